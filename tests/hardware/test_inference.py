"""Serving a model: counts worked by hand."""

from dataclasses import replace

import pytest

from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware import inference
from fgmp.hardware.inference import Machine, Work

MACHINE = Machine(
    name="m",
    fj_per_op={
        "fp4xfp4": 1.0,
        "fp4xfp8": 2.0,
        "fp8xfp4": 3.0,
        "fp8xfp8": 4.0,
        "totals": 0.5,
        "control": 0.25,
    },
    quantizer_fj=100.0,
    bits=(5.0, 8.0),
    lanes=4,
    rows=1,
    reuse=2,
)
LINEAR = Work("w", "s", n=8, k=32, mix=inference.independent(0.5, 1.0))


def test_a_mix_of_independent_shares() -> None:
    mix = inference.independent(0.7, 0.9)
    assert inference.unit_shares(mix) == pytest.approx(
        {"fp4xfp4": 0.63, "fp4xfp8": 0.07, "fp8xfp4": 0.27, "fp8xfp8": 0.03}
    )


def test_energy_of_one_linear() -> None:
    """4 tokens, 8 outputs, 2 blocks: 64 pairs of 32 operations; half of the activations FP8."""
    joules = inference.serve([LINEAR], MACHINE, tokens=4, passes=3)
    table = inference.energies()
    assert joules["lanes"] == pytest.approx(3e-15 * 64 * 32 * (0.5 * 1 + 0.5 * 3))
    assert joules["totals"] == pytest.approx(3e-15 * 64 * 32 * 0.75)
    assert joules["quantizer"] == pytest.approx(3e-15 * 4 * 2 * 100)
    weights = 64 / 2 * 16 * 5
    activations = 64 / 4 * 16 * 6.5
    outputs = 2 * 16 * 4 * 8
    bits = weights + activations + outputs
    assert joules["buffers"] == pytest.approx(3e-15 * bits * table["sram"].value)
    assert joules["dram"] == pytest.approx(3e-15 * 8 * 32 * 5 * table["dram"].value)


def test_an_expert_sees_its_share_of_the_tokens() -> None:
    expert = replace(LINEAR, routed=0.25)
    assert inference.serve([expert], MACHINE, 16) == inference.serve([LINEAR], MACHINE, 4)
    assert inference.cycles([expert], MACHINE, 16) == inference.cycles([LINEAR], MACHINE, 4)
    one, whole = (inference.serve([w], MACHINE, 1, 8) for w in (expert, LINEAR))
    assert one == pytest.approx({name: value / 4 for name, value in whole.items()})
    busy, waiting = inference.cycles([LINEAR], MACHINE, 1, 8)
    assert inference.cycles([expert], MACHINE, 1, 8) == (busy / 4, waiting / 4)


def test_a_site_is_quantized_once_for_all_its_linears() -> None:
    both = [LINEAR, Work("v", "s", n=8, k=32, mix=LINEAR.mix)]
    one, two = (inference.serve(work, MACHINE, 4)["quantizer"] for work in (both[:1], both))
    assert one == two


def test_cycles_and_stalls() -> None:
    """Two tiles of 2 tokens; 2 rounds of 4 outputs, 2 blocks, 2 cycles each; the lanes wait for
    the first token, and for the first block of the second through the quantizer."""
    assert inference.cycles([LINEAR], MACHINE, tokens=4) == (2 * 2 * 2 * 2, 2 + 9)
    narrow = Work("n", "s", n=2, k=32, mix=LINEAR.mix)
    assert inference.cycles([narrow], MACHINE, tokens=4) == (2 * 2 * 2, 2 + 9)


def test_the_quantizers_latency() -> None:
    pytest.importorskip("amaranth")
    from fgmp.hardware.rtl import ppu

    assert ppu.latency(QuantizerConfig()) == inference.QUANTIZER_LATENCY


def test_llama_2_7b_has_its_weights() -> None:
    work = inference.llama_2_7b(LINEAR.mix)
    assert sum(w.n * w.k for w in work) == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert len({w.site for w in work}) == 4 * 32


def test_overhead_dilutes() -> None:
    assert inference.diluted(28.0, 1.0) == 14.0
    assert inference.diluted(28.0, 0.0) == 28.0


def test_every_table_entry_has_a_source() -> None:
    for entry in inference.energies().values():
        assert entry.value > 0 and entry.unit == "fJ/bit"
        assert all((entry.what, entry.node, entry.source))
