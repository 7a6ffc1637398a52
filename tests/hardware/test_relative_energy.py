"""Energies of choices of formats, held against those of docs/energy.md."""

from dataclasses import replace

import pytest

from fgmp.errors import InputError
from fgmp.formats.rules import PAPER_QUANTIZER, SENSITIVITIES, QuantizerConfig
from fgmp.hardware import inference, relative_energy
from fgmp.hardware.array import rtl_rules
from fgmp.hardware.inference import Machine


@pytest.mark.parametrize(
    ("fp4", "saving"),
    # docs/energy.md, section 5: a prefill of Llama-2-7B's shapes with DRAM, on ASAP7. The lanes of
    # the table were measured at 70%; at 90% they meet other operands.
    [(0.7, 30.5), (0.9, 40.9)],
)
def test_the_table_gives_the_documented_savings(fp4: float, saving: float) -> None:
    work = inference.llama_2_7b(inference.independent(fp4, fp4))
    assert 100 - relative_energy.percent_of_fp8(work, PAPER_QUANTIZER) == pytest.approx(
        saving, abs=1.0
    )


def test_less_fp8_takes_less() -> None:
    def percent(activations: float, weights: float) -> float:
        work = inference.llama_2_7b(inference.independent(activations, weights))
        return relative_energy.percent_of_fp8(work, PAPER_QUANTIZER)

    for fixed in (0.0, 0.5, 1.0):
        for more, less in ((0.0, 0.4), (0.4, 1.0)):
            assert percent(less, fixed) < percent(more, fixed)
            assert percent(fixed, less) < percent(fixed, more)
    assert percent(0, 0) > 100  # flags, and units that are as wide as FP8 and serve both


def test_machines_know_every_unit() -> None:
    mixed, fp8 = relative_energy.machine("mixed", PAPER_QUANTIZER), relative_energy.machine("fp8")
    assert isinstance(mixed, Machine) and mixed.bits == (4.5625, 8.0625) and fp8.bits == (4.5, 8)
    for fp4 in (0.0, 0.3, 1.0):
        work = inference.llama_2_7b(inference.independent(fp4, fp4))[:1]
        assert all(v > 0 for v in inference.serve(work, mixed, 8).values())
    wide = [replace(work[0], mix={(True, True): 1.0})]
    assert inference.serve(wide, fp8, 8)["quantizer"] == 0


MEASURED = [
    ("benefit", "search"),
    ("benefit", "max"),
    ("difference", "max"),
    ("truncated", "search"),
]


def test_the_energy_of_quantizers_is_known() -> None:
    """Every rule with hardware; ``difference`` with searched scales was not measured."""
    assert {rule for rule, _ in MEASURED} == set(rtl_rules())
    for rule, scales in MEASURED:
        for sensitivities in SENSITIVITIES:
            if (rule, scales, sensitivities) != ("benefit", "max", "powers"):
                config = QuantizerConfig(rule, scales, sensitivities)
                assert relative_energy.machine("mixed", config).quantizer_fj > 10_000
    with pytest.raises(InputError, match=r"difference, max, powers; .* got random, max, e4m3"):
        relative_energy.machine("mixed", QuantizerConfig("random", "max"))
