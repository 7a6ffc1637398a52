"""The exact linear against Python's integers, and the fp32 one within its derived bound."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.formats.linear import _int64_to_fp32, exact_linear, linear

from . import model

MAGNITUDES = sorted({e * s for e in model.E2M1 for s in model.E4M3} | {6 * e for e in model.E4M3})
"""Every decoded magnitude of both formats in units of t."""


def operand(rows, k, seed):
    """Decoded values, all magnitudes equally likely, of either sign; fp32 (rows, k)."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.tensor([float(m) for m in MAGNITUDES])
    signs = torch.randint(0, 2, (rows, k), generator=generator) * 2 - 1
    return values[torch.randint(0, len(values), (rows, k), generator=generator)] * signs


def accumulator(a, w):
    """A in integers of Python, (rows of a) lists of (rows of w)."""
    a, w = ((v.double() * 2**10).long().tolist() for v in (a, w))
    return [[sum(x * y for x, y in zip(r, c, strict=True)) for c in w] for r in a]


def fl32_product(t_x, t_w):
    return model.fl32(Fraction(t_x) * Fraction(t_w))


def test_decoded_values_are_exact_in_bf16():
    """At most 6 significant bits, which bf16's 8 hold."""
    values = torch.tensor([float(m) for m in MAGNITUDES], dtype=torch.float64)
    assert torch.equal(values.bfloat16().double(), values)
    odd = [int(m * 2**10) for m in MAGNITUDES if m]
    assert max((n // (n & -n)).bit_length() for n in odd) == 6


def test_products_are_exact_in_fp32():
    """All pairs of decoded values; only the accumulation rounds."""
    values = torch.tensor([float(m) for m in MAGNITUDES])
    products = values.view(-1, 1) * values
    assert torch.equal(products.double(), values.double().view(-1, 1) * values.double())


@pytest.mark.parametrize("k", [1, 16, 172, 1188, 1189, 4096])
def test_exact_linear_is_the_integer_sum(k):
    """A bit for bit: 1,188 is one float64 chunk, 1,189 two."""
    a, w = operand(3, k, seed=k), operand(4, k, seed=k + 1)
    t_x, t_w = 0.0123, 3.7e-5
    t_x, t_w = float(model.fl32(Fraction(t_x))), float(model.fl32(Fraction(t_w)))
    y = exact_linear(a, w, t_x, t_w)
    for row, totals in zip(y.tolist(), accumulator(a, w), strict=True):
        for found, total in zip(row, totals, strict=True):
            scaled = model.fl32(Fraction(total, 2**20))
            assert found == model.fl32(scaled * fl32_product(t_x, t_w))


@pytest.mark.parametrize("sign", [1, -1])
def test_exact_linear_at_its_largest(sign):
    """Nearly all values 2688, so that A has 55 bits, and the last of them decides.

    4,094 products of 2688^2 are a multiple of 2**34 units; 2**30 more is an fp32 midpoint, and a
    single unit more rounds away from zero. No float64 holds the sum.
    """
    a, w = torch.full((1, 4096), 2688.0), torch.full((1, 4096), sign * 2688.0)
    a[0, 7], w[0, 7] = 32.0, sign * 32.0
    a[0, 9], w[0, 9] = 2.0**-10, sign * 2.0**-10
    ((total,),) = accumulator(a, w)
    assert 2**54 < abs(total) < 2**55
    assert float(total) != total
    expected = model.fl32(Fraction(total, 2**20))
    assert expected != model.fl32(Fraction(total - sign, 2**20))
    assert exact_linear(a, w, 1.0, 1.0).item() == expected


def test_cancellation_leaves_the_small_term():
    """Large terms cancel and one unit of A remains."""
    a = torch.full((1, 4097), 2688.0)
    w = torch.full((1, 4097), 2688.0)
    w[0, 2049:] *= -1
    a[0, 1000] = w[0, 1000] = 2.0**-10
    assert accumulator(a, w) == [[1]]
    assert exact_linear(a, w, 1.0, 1.0).item() == 2.0**-20


@given(st.integers(-(2**62), 2**62))
@settings(deadline=None)
def test_integers_round_once(n):
    assert _int64_to_fp32(torch.tensor([n])).item() == model.fl32(Fraction(n))


@pytest.mark.parametrize("exponent", [24, 30, 52, 53, 54, 57, 61])
def test_integers_beside_midpoints_round_once(exponent):
    """2**e + half an ulp, one off it, and odd multiples: a cast through float64 fails these."""
    wrong = 0
    for significand in (2**23, 2**23 + 1, 2**24 - 1):
        ulp = 2 ** (exponent - 23)
        for off in (-1, 0, 1):
            n = significand * ulp + ulp // 2 + off
            for signed in (n, -n):
                x = torch.tensor([signed])
                expected = model.fl32(Fraction(signed))
                assert _int64_to_fp32(x).item() == expected
                wrong += x.double().float().item() != expected
    assert (wrong > 0) == (exponent >= 53)  # where float64 stops holding integers


@pytest.mark.parametrize("k", [16, 172, 4096])
def test_fp32_linear_meets_its_bound(k):
    """|y - y_exact| <= ((1 + u)**(K + 3) - 1) t sum |a w| with u = 2**-24.

    A term of the fp32 sum carries at most K - 1 roundings, whatever the order, and that of the
    scaling; the exact result carries two; the product of the tensor scales is one more.
    """
    a, w = operand(8, k, seed=1), operand(16, k, seed=2)
    t_x, t_w = 0.5, float(model.fl32(Fraction(1, 3)))
    y, exact = (f(a, w, t_x, t_w).double() for f in (linear, exact_linear))
    magnitude = a.double().abs() @ w.double().abs().T * t_x * t_w
    bound = ((1 + 2.0**-24) ** (k + 3) - 1) * magnitude
    assert ((y - exact).abs() <= bound).all()
    assert (y != exact).any()
    # The bound is narrow enough to see the largest term of a sum go missing.
    largest = (a[:1].abs() * w[0].abs()).argmax()
    a[0, largest] = 0
    assert (linear(a, w, t_x, t_w).double() - exact).abs()[0, 0] > bound[0, 0]


@pytest.mark.parametrize("function", [linear, exact_linear])
def test_bias_is_added_in_fp32_after_scaling(function):
    """y = fl32(fl32(A 2**-20) fl32(t t)) + b, rounded once more. A has one term, so it is exact."""
    a, w = torch.tensor([[45.0], [2688.0]]), torch.tensor([[3.0], [2688.0]])
    t = float(model.fl32(Fraction(1, 3)))
    bias = torch.tensor([0.1, -7.3], dtype=torch.bfloat16)
    y = function(a, w, t, t, bias)
    assert y.dtype == torch.float32
    for i in range(2):
        for j in range(2):
            product = Fraction(a[i, 0].item()) * Fraction(w[j, 0].item())
            scaled = model.fl32(model.fl32(product) * fl32_product(t, t))
            assert y[i, j].item() == model.fl32(scaled + Fraction(bias[j].item()))


@pytest.mark.parametrize("function", [linear, exact_linear])
def test_the_two_tensor_scales_are_multiplied_first(function):
    """(y t_x) t_w rounds elsewhere than y fl32(t_x t_w): 1 * fl32(t_x t_w) shows which it is."""
    t_x, t_w = (float(model.fl32(Fraction(n, 10**9))) for n in (123456789, 987654321))
    values = torch.tensor([[7.0]]), torch.tensor([[13.0]])
    right = model.fl32(91 * fl32_product(t_x, t_w))
    assert function(*values, t_x, t_w).item() == right
    assert model.fl32(model.fl32(91 * Fraction(t_x)) * Fraction(t_w)) != right


@pytest.mark.parametrize("function", [linear, exact_linear])
def test_nan_reaches_exactly_its_row(function):
    a, w = operand(4, 172, seed=3), operand(5, 172, seed=4)
    clean = function(a, w, 1.0, 1.0)
    a[1, 100] = torch.nan
    w[0, 100] = 0.0  # NaN times zero is NaN all the same
    clean[:, 0] = function(a.nan_to_num(nan=0.0), w, 1.0, 1.0)[:, 0]
    y = function(a, w, 1.0, 1.0)
    assert y[1].isnan().all()
    keep = [0, 2, 3]
    assert torch.equal(y[keep], clean[keep])


@pytest.mark.parametrize("function", [linear, exact_linear])
def test_leading_dimensions(function):
    a, w = operand(6, 32, seed=5), operand(3, 32, seed=6)
    y = function(a.view(2, 3, 32), w, 0.5, 0.25)
    assert torch.equal(y, function(a, w, 0.5, 0.25).view(2, 3, 3))
    assert function(a[0], w, 0.5, 0.25).shape == (3,)
    assert function(a[:0], w, 0.5, 0.25).shape == (0, 3)
