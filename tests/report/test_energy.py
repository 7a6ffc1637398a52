"""Energy by layer: the sums of ``hardware.relative_energy``, and what cannot be said."""

import pytest

from fgmp.errors import InputError
from fgmp.evaluation.inspect import LinearFacts
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.hardware.inference import Work, independent
from fgmp.hardware.relative_energy import percent_of_fp8
from fgmp.report.energy import energy_of
from fgmp.report.records import BlockMap, Matrix, SiteShare, Window

QUANTIZER = QuantizerConfig()


def matrix(name: str, layer: str, fp8_blocks: int) -> Matrix:
    facts = LinearFacts(name, 64, 128, 512, fp8_blocks, 0, 0)
    return Matrix(facts, layer, name, 1.0, BlockMap(1, b""), Window(0, 0, b""))


def site(owner: str, layer: str, share: float, *linears: str) -> SiteShare:
    return SiteShare(owner, layer, owner, 128, share, list(linears))


MATRICES = [matrix("a", "0", 256), matrix("b", "0", 0), matrix("c", "1", 512)]
SITES = [site("a", "0", 0.25, "a", "b"), site("c", "1", 1.0, "c")]


def test_it_is_the_relative_energy_of_independent_formats() -> None:
    energy = energy_of(MATRICES, SITES, {}, {QUANTIZER})
    work = [
        Work("a", "a", 64, 128, independent(0.75, 0.5)),
        Work("b", "a", 64, 128, independent(0.75, 1.0)),
        Work("c", "c", 64, 128, independent(0.0, 0.0)),
    ]
    assert energy.percent == percent_of_fp8(work, QUANTIZER)
    assert energy.by_layer == {
        "0": percent_of_fp8(work[:2], QUANTIZER),
        "1": percent_of_fp8(work[2:], QUANTIZER),
    }
    assert energy.all_fp4_percent < energy.by_layer["0"] < energy.percent < energy.by_layer["1"]


def test_a_shared_weight_counts_at_every_use() -> None:
    sites = [SITES[0], site("d", "1", 0.25, "d")]
    energy = energy_of(MATRICES[:2], sites, {"d": "a"}, {QUANTIZER})
    again = Work("d", "d", 64, 128, independent(0.75, 0.5))
    assert energy.by_layer["1"] == percent_of_fp8([again], QUANTIZER)


def test_what_cannot_be_said() -> None:
    with pytest.raises(InputError, match=r"must share one quantizer, got benefit.*; difference"):
        energy_of(MATRICES, SITES, {}, {QUANTIZER, PAPER_QUANTIZER})
    with pytest.raises(InputError, match="energies are known of quantizers"):
        energy_of(MATRICES, SITES, {}, {QuantizerConfig("random", "max", "e4m3")})
    expert = "layers.0.experts.3.up"
    with pytest.raises(InputError, match="routed to experts"):
        energy_of([matrix(expert, "0", 1)], [site(expert, "0", 0.1, expert)], {}, {QUANTIZER})
