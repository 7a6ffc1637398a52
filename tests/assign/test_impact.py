"""The impact of a block is the sum of the paper's equation 3, computed exactly."""

from fractions import Fraction

import pytest
import torch

from fgmp.assign.impact import weight_benefit, weight_impact
from fgmp.formats.spec import E2M1, E4M3
from fgmp.formats.weight import quantize_weight, tensor_scale

N, K = 3, 44  # ragged: four elements of padding, which must count nothing


def signed(code: int, magnitudes: tuple[float, ...], sign_bit: int) -> Fraction:
    """Exact value of a sign-magnitude code, read off the record's table."""
    value = Fraction(magnitudes[code % sign_bit])
    return -value if code >= sign_bit else value


def test_impact_is_the_exact_sum() -> None:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=g) * 0.02
    fisher = torch.randn(N, K, generator=g).mul(4).exp() * 1e-9
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    impact = weight_impact(codes, fisher)
    assert impact.dtype == torch.float64 and impact.shape == (N, 3)
    t = Fraction(codes.t)
    for row in range(N):
        for block in range(3):
            scale = signed(int(codes.scale[row, block]), E4M3.magnitudes, E4M3.sign_bit)
            exact = Fraction(0)
            for i in range(min(16, K - 16 * block)):
                q4 = signed(int(codes.fp4[row, block, i]), E2M1.magnitudes, E2M1.sign_bit) * scale
                q8 = signed(int(codes.fp8[row, block, i]), E4M3.magnitudes, E4M3.sign_bit) * 6
                exact += Fraction(fisher[row, 16 * block + i].item()) * ((q4 - q8) * t) ** 2
            # 16 non-negative terms, three roundings each and 15 additions in float64.
            result = impact[row, block].item()
            assert result == pytest.approx(float(exact), rel=20 * 2.0**-53)


def test_impact_is_zero_where_both_formats_agree() -> None:
    # 448 times 1.5, 3 and 6 is 6 times 112, 224 and 448, which E4M3 holds.
    weight = torch.tensor([[0.0, 672.0, -1344.0, 2688.0] * 4])
    codes = quantize_weight(weight, 1.0)
    assert weight_impact(codes, torch.ones_like(weight)).item() == 0
    weight[0, 5] = 896.0  # 448 times 2 is 6 times 149.3, and E4M3 rounds that to 144
    codes = quantize_weight(weight, 1.0)
    assert weight_impact(codes, torch.ones_like(weight)).item() == (896 - 864) ** 2


def test_fisher_weighs_each_element_by_itself() -> None:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(1, 16, generator=g)
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    difference = (codes.fp4_units() - codes.fp8_units()).flatten().double() * codes.t
    parts = [weight_impact(codes, torch.eye(16)[i : i + 1]).item() for i in range(16)]
    assert parts == difference.square().tolist()
    whole = weight_impact(codes, torch.ones(1, 16)).item()
    assert weight_impact(codes, torch.full((1, 16), 4.0)).item() == 4 * whole


def test_benefit_is_the_error_that_fp8_takes_away() -> None:
    g = torch.Generator().manual_seed(2)
    weight = torch.randn(N, K, generator=g) * 0.02
    fisher = torch.randn(N, K, generator=g).mul(4).exp() * 1e-9
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    benefit = weight_benefit(codes, weight, fisher)
    none, every = torch.zeros(N, 3, dtype=torch.bool), torch.ones(N, 3, dtype=torch.bool)
    for row in range(N):
        for block in range(3):
            exact = Fraction(0)
            for i in range(16 * block, min(K, 16 * block + 16)):
                v = Fraction(weight[row, i].item())
                q4 = Fraction(codes.units(none)[row, i].item()) * Fraction(codes.t)
                q8 = Fraction(codes.units(every)[row, i].item()) * Fraction(codes.t)
                exact += Fraction(fisher[row, i].item()) * ((q4 - v) ** 2 - (q8 - v) ** 2)
            # float64 throughout; the two errors may cancel, by no more than a factor of 2**10 here.
            assert benefit[row, block].item() == pytest.approx(float(max(exact, 0)), rel=2.0**-40)


def test_benefit_is_zero_where_fp8_would_be_worse() -> None:
    # 4 times the scale 448 is 6 times 298.67, which E4M3 rounds to 288.
    weight = torch.tensor([[2688.0] + [1792.0] * 15])
    codes = quantize_weight(weight, 1.0)
    assert weight_benefit(codes, weight, torch.ones_like(weight)).item() == 0
    assert weight_impact(codes, torch.ones_like(weight)).item() == 15 * (1792 - 6 * 288) ** 2
