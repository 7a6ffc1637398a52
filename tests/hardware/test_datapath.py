"""The integer model of a lane is the arithmetic of docs/numerics.md, and its widths suffice."""

import re
from fractions import Fraction

import pytest
import torch
from benches import random_blocks

from fgmp.errors import InputError
from fgmp.formats.spec import E2M1, E4M3, FP8_FACTOR, UNIT_BITS, UNIT_MAX
from fgmp.hardware.datapath import CUTS, Datapath, integer, signed_bits
from fgmp.pack.planes import BlockCodes

SHARES = {"mixed": 0.5, "fp8": 1.0, "fp4": 0.0}
FP4_VALUES = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def values(blocks: BlockCodes) -> list[list[Fraction]]:
    """Decoded values over t, exactly: E4M3 by PyTorch's own conversion, E2M1 from a list."""
    e4m3 = blocks.codes.view(torch.float8_e4m3fn).double()
    scale = (blocks.scale & 0x7F).view(torch.float8_e4m3fn).double()
    rows = []
    for i, is_fp8 in enumerate(blocks.is_fp8.tolist()):
        if is_fp8:
            rows.append([6 * Fraction(v) for v in e4m3[i].tolist()])
        else:
            s = Fraction(scale[i].item())
            codes = blocks.codes[i].tolist()
            rows.append([FP4_VALUES[c & 7] * (-1 if c & 8 else 1) * s for c in codes])
    return rows


@pytest.mark.parametrize("kind", SHARES)
def test_contributions_are_dot_products(kind: str) -> None:
    datapath = Datapath(kind=kind)
    a, w = (random_blocks(300, SHARES[kind], seed) for seed in (1, 2))
    contributions = datapath.contributions(a, w).tolist()
    exact = [
        sum(x * y for x, y in zip(left, right, strict=True))
        for left, right in zip(values(a), values(w), strict=True)
    ]
    assert [c * datapath.total_unit for c in contributions] == exact


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("k_max", [16, 4096, 16384])
def test_totals_fit_and_no_bit_is_wasted(kind: str, k_max: int) -> None:
    """The bound is attained: k_max products of the largest operands."""
    datapath = Datapath(kind=kind, k_max=k_max)
    limit = 2 ** (datapath.total_bits - 1)
    assert limit / 2 <= datapath.total_max < limit
    largest = FP8_FACTOR * Fraction(E4M3.max)
    assert largest == UNIT_MAX
    assert datapath.total_max * datapath.total_unit == k_max * largest**2


def test_bounds_of_a_unit_are_attained() -> None:
    for unit in Datapath().units:
        a, w = (2 ** (side.bits - 1) - 1 for side in (unit.activation, unit.weight))
        a, w = integer(unit.activation, a), integer(unit.weight, w)
        assert unit.sum_max == 16 * a * w
        scales = integer(E4M3, 0x7F) ** unit.scales * 12 ** (2 - unit.scales)
        assert unit.contribution_max == unit.sum_max * scales
        assert signed_bits(unit.contribution_max) <= Datapath().contribution_bits


def test_units_are_all_pairs_of_formats() -> None:
    assert [unit.name for unit in Datapath().units] == ["fp4xfp4", "fp4xfp8", "fp8xfp4", "fp8xfp8"]
    assert [unit.name for unit in Datapath(kind="fp8").units] == ["fp8xfp8"]
    assert Datapath(kind="fp8").units[0].fp8_gain == 1, "a lane for FP8 alone has no factor 6"


def test_integers_count_the_smallest_value() -> None:
    for fmt in (E2M1, E4M3):
        for code, value in enumerate(fmt.magnitudes):
            assert integer(fmt, code) * fmt.smallest == value
    assert Fraction(E2M1.smallest) * Fraction(E4M3.smallest) == Fraction(1, 2**UNIT_BITS)


@pytest.mark.parametrize(
    ("parameters", "rule"),
    [
        ({"kind": "int8"}, "kind must be one of ['fp4', 'fp8', 'mixed'], got 'int8'"),
        ({"k_max": 8}, "k_max must be 16 or more, got 8"),
        ({"reuse": 12}, "reuse must be a power of two, got 12"),
        ({"cuts": ("scaled", "sums")}, f"cuts must be some of {CUTS}, in order"),
        ({"fp8_cuts": ("sums", "products")}, f"fp8_cuts must be some of {CUTS}, in order"),
        ({"fp8_cuts": ("sums",)}, "fp8_cuts must be 2, as cuts, got ('sums',)"),
        ({"kind": "fp8", "fp8_cuts": ("products", "sums")}, "only a mixed lane has fp8_cuts"),
        ({"accumulator": "fp16"}, "accumulator must be one of"),
    ],
)
def test_refusals(parameters: dict[str, object], rule: str) -> None:
    with pytest.raises(InputError, match=re.escape(rule)):
        Datapath(**parameters)
