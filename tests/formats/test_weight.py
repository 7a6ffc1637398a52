"""Weights against the exact model: every rounding of section 2, at ties and beside them."""

from fractions import Fraction

import pytest
import torch

from fgmp.errors import InputError
from fgmp.formats.codec import decode_e4m3, encode_e2m1
from fgmp.formats.weight import check_finite, quantize_weight, tensor_scale

from . import model

SMALLEST_NORMAL = 2.0**-126


def check_against_model(weight, t, scale_codes=None):
    """Codes of fp32 (N, 16 G) equal the model's, block by block."""
    codes = quantize_weight(weight, t, scale_codes)
    for n, row in enumerate(weight.unflatten(-1, (-1, 16)).tolist()):
        for g, block in enumerate(row):
            given = None if scale_codes is None else scale_codes[n, g].item()
            x = [Fraction(v) for v in block]
            s, fp4, fp8 = model.weight_block(x, Fraction(t), given)
            assert codes.scale[n, g].item() == s
            assert codes.fp4[n, g].tolist() == fp4
            assert codes.fp8[n, g].tolist() == fp8
    return codes


def test_tensor_scale_is_one_division():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-60, 60, (500,), generator=generator)
    for amax in (torch.rand(500, generator=generator) * 2.0**exponents).tolist():
        assert tensor_scale(amax) == model.fl32(Fraction(amax) / 2688)


def test_tensor_scale_of_nothing_and_of_almost_nothing():
    assert tensor_scale(0.0) == 1.0
    for amax in (2.0**-149, 2.0**-130, 2688 * SMALLEST_NORMAL / 2):
        assert tensor_scale(amax) == SMALLEST_NORMAL
    assert tensor_scale(2688 * SMALLEST_NORMAL * 1.5) == SMALLEST_NORMAL * 1.5


def test_largest_weight_is_the_largest_code():
    """u = amax / fl32(6 t) is within three roundings of 448, far from the tie at 432."""
    generator = torch.Generator().manual_seed(1)
    for amax in (1 + torch.rand(300, generator=generator)).tolist():
        block = torch.zeros(1, 16)
        block[0, 5] = -amax
        codes = quantize_weight(block, tensor_scale(amax))
        assert (codes.scale.item(), codes.fp4[0, 0, 5].item()) == (0x7E, 0xF)
        assert codes.fp8[0, 0, 5].item() == 0xFE
        assert codes.fp4_units()[0, 0, 5] == codes.fp8_units()[0, 0, 5] == -2688


@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_gaussian_weights(spread):
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(8, 64, generator=generator)
    weight *= torch.exp2(spread * torch.randn(8, 64, generator=generator))
    check_against_model(weight, tensor_scale(weight.abs().max().item()))


def near_ties(t):
    """Blocks with s = 16 .. 30: the midpoints of fl32(s t) and the fp32 values on both sides."""
    midpoints = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    rows = []
    for s in range(16, 32, 2):
        step = torch.tensor(float(s)) * t
        for towards in (0.0, torch.inf, None):
            ties = midpoints * step
            ties = ties if towards is None else ties.nextafter(torch.tensor(towards))
            rows.append(torch.cat([6 * step.view(1), ties, -ties, torch.zeros(1)]))
    return torch.stack(rows)


@pytest.mark.parametrize("t", [0.25, 1 / 3, 0.7071, 1.9e-5, 3.3e7])
def test_ties_and_their_neighbours(t):
    t = torch.tensor(t)
    check_against_model(near_ties(t), t.item())


def test_a_reciprocal_would_be_another_format():
    """Multiplying by 1 / (s t) instead of dividing changes codes near ties and only there."""
    differences = 0
    for t in (1 / 3, 0.7071, 1.9e-5, 3.3e7):
        t = torch.tensor(t)
        weight = near_ties(t)
        codes = quantize_weight(weight, t.item())
        reciprocal = 1 / (decode_e4m3(codes.scale) * t).unsqueeze(-1)
        blocks = weight.unflatten(-1, (-1, 16))
        differences += (encode_e2m1(blocks * reciprocal, blocks) != codes.fp4).sum().item()
    assert differences > 0


def test_fp8_ties():
    """u on every E4M3 midpoint: 6 t is a power of two times 3, so x = 6 t u is exact."""
    midpoints = [(a + b) / 2 for a, b in zip(model.E4M3[:-1], model.E4M3[1:], strict=True)]
    ties = torch.tensor([float(6 * m) for m in [*midpoints, 448, 448]]).view(8, 16)
    for towards in (-torch.inf, None, torch.inf):
        weight = ties if towards is None else ties.nextafter(torch.tensor(towards))
        check_against_model(weight, 1.0)


@pytest.mark.parametrize("t", [1.0, 0.3])
def test_every_searched_scale(t):
    """A given scale replaces the nearest, even where it clips or flushes the whole block."""
    t = torch.tensor(t).item()
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(126, 16, generator=generator) * 200 * t
    scale_codes = torch.arange(1, 127, dtype=torch.uint8).view(126, 1)
    codes = check_against_model(weight, t, scale_codes)
    assert torch.equal(codes.fp8, quantize_weight(weight, t).fp8)


def test_zero_and_underflowing_blocks_take_the_smallest_scale():
    weight = torch.zeros(1, 64)
    weight[0, 16] = 6 * 2.0**-10  # u = 2**-10, a tie between 0 and the smallest scale
    weight[0, 32] = 6 * 2.0**-30
    weight[0, 48] = -6 * 2.0**-30
    codes = check_against_model(weight, 1.0)
    assert codes.scale.tolist() == [[1, 1, 1, 1]]
    assert codes.fp4[0, :, 0].tolist() == [0, 5, 0, 8]  # 3 * 2**-9 is 6u; flushed; flushed
    assert codes.fp8[0, :, 0].tolist() == [0, 0, 0, 0x80]


def test_a_subnormal_weight_keeps_a_normal_tensor_scale():
    weight = torch.tensor([[2.0**-149, -(2.0**-127), *[0.0] * 14]])
    codes = check_against_model(weight, tensor_scale(2.0**-127))
    assert codes.fp4_units().isfinite().all()


def test_underflowing_quotients_keep_the_sign_of_the_weight():
    """-2**-149 over 6 t or s t is minus zero in fp32; the codes are those of a negative value."""
    weight = torch.tensor([[2688.0, -(2.0**-149), 2.0**-149, -0.0, *[0.0] * 12]])
    codes = check_against_model(weight, 1.0)
    assert codes.fp4[0, 0, :4].tolist() == [7, 8, 0, 0]
    assert codes.fp8[0, 0, :4].tolist() == [0x7E, 0x80, 0, 0]


def test_ragged_rows_are_padded_with_zero():
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(3, 172, generator=generator)
    t = tensor_scale(weight.abs().max().item())
    codes = quantize_weight(weight, t)
    padded = check_against_model(torch.nn.functional.pad(weight, (0, 4)), t)
    assert codes.k == 172
    for field in ("fp4", "scale", "fp8"):
        assert torch.equal(getattr(codes, field), getattr(padded, field))


def test_units_mix_the_two_formats():
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(4, 172, generator=generator)
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    is_fp8 = torch.arange(4 * 11).view(4, 11) % 3 == 0
    units = codes.units(is_fp8)
    assert units.shape == (4, 172)
    for n, k in ((0, 0), (0, 20), (3, 171), (2, 95)):
        block, element = divmod(k, 16)
        fp4, fp8, s = (field[n, block] for field in (codes.fp4, codes.fp8, codes.scale))
        low, high = fp4[element].item(), fp8[element].item()
        value = (
            6 * model.E4M3[high & 127] * (-1 if high & 128 else 1)
            if is_fp8[n, block]
            else model.E2M1[low & 7] * model.E4M3[s.item()] * (-1 if low & 8 else 1)
        )
        assert units[n, k].item() == value


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_taken_as_they_are(dtype):
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(6)).to(dtype)
    t = tensor_scale(weight.float().abs().max().item())
    half, full = quantize_weight(weight, t), check_against_model(weight.float(), t)
    assert torch.equal(half.fp4, full.fp4)
    assert torch.equal(half.fp8, full.fp8)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused_by_name(bad):
    weight = torch.zeros(2, 16)
    check_finite("model.0.up", weight)
    weight[1, 3] = bad
    with pytest.raises(InputError, match=rf"model\.0\.up holds {bad} at \[1, 3\] \(1 such values"):
        check_finite("model.0.up", weight)
