"""Rounding to one format changes the blocks of the other format, and nothing else."""

import pytest
import torch

from fgmp.export.rounding import ROUND, relative_error
from fgmp.formats.spec import FP8_BLOCK
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack, unpack, unpack_units, validate


def packed(fraction: float, k: int = 96) -> PackedWeight:
    """A random weight of which about ``fraction`` of the blocks is FP8."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, k, generator=generator)
    weight[3, 16:32] = 0.0
    weight[4, 16:32] *= 1e-9
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    is_fp8 = torch.rand(codes.scale.shape, generator=generator) < fraction
    is_fp8[3:5, 1] = fraction > 0
    return pack(codes, is_fp8)


@pytest.mark.parametrize("k", [96, 90])
@pytest.mark.parametrize("mode", ROUND)
def test_only_blocks_of_the_other_format_change(mode: str, k: int) -> None:
    before = packed(0.4, k)
    after = ROUND[mode](before)
    validate("x", after)
    assert (before.mode, after.mode) == ("mixed", mode)
    old, new = unpack(before), unpack(after)
    same = old.is_fp8 == (mode == "fp8")
    assert torch.equal(old.codes[same], new.codes[same])
    if mode == "fp4":
        assert torch.equal(old.scale[same], new.scale[same])
        assert not (new.scale == FP8_BLOCK).any()
    assert after.t == before.t
    # The new codes are those of round to nearest from the decoded values.
    direct = quantize_weight(unpack_units(before) * before.t, before.t.item())
    assert torch.equal(new.codes[~same], getattr(direct, mode)[~same])


@pytest.mark.parametrize(("fraction", "mode"), [(0.0, "fp4"), (1.0, "fp8")])
def test_a_weight_of_the_mode_stays(fraction: float, mode: str) -> None:
    weight = packed(fraction)
    assert ROUND[mode](weight) is weight
    assert relative_error(weight, weight) == 0


def test_error_is_relative_to_the_weight() -> None:
    weight = packed(0.4)
    values = unpack_units(weight).double()
    for rounder in ROUND.values():
        rounded = rounder(weight)
        expected = (unpack_units(rounded).double() - values).norm() / values.norm()
        assert relative_error(rounded, weight) == pytest.approx(expected.item(), rel=1e-12)
        assert 0 < expected < 0.2
    zeros = pack(quantize_weight(torch.zeros(2, 32), 1.0), torch.eye(2).bool())
    assert relative_error(ROUND["fp4"](zeros), zeros) == 0
