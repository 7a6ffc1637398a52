"""The linear layer (docs/numerics.md, section 6).

    y = fl32(fl32(A * 2**-20) * fl32(t_w * t_x)) + bias, rounded once to the output dtype

A = sum a_int * w_int is an exact integer, since decoded values are integer multiples of 2**-10 * t.
:func:`exact_linear` computes A exactly; hardware reproduces it bit for bit. :func:`linear` replaces
A by an fp32 GEMM over the same operands. Every product is exact there too, so the two differ only
by the accumulation, by at most :func:`error_bound`.
"""

import torch
from torch import Tensor

from fgmp.formats.activation import fl32
from fgmp.formats.spec import UNIT_BITS, UNIT_MAX

# Products are below (2688 * 2**10)**2 and float64 holds integers up to 2**53.
_EXACT_TERMS = int(2**53 // (UNIT_MAX * 2**UNIT_BITS) ** 2)


def exact_linear(
    activation: Tensor, weight: Tensor, t_x: float, t_w: float, bias: Tensor | None = None
) -> Tensor:
    """Output of the linear layer with an exact accumulator.

    Args:
        activation: in units of t_x, (..., K), from ``formats.activation``.
        weight: in units of t_w, (N, K), from ``formats.weight`` or ``pack``.
        t_x: activation tensor scale, an fp32 value.
        t_w: weight tensor scale, an fp32 value.
        bias: (N,), added in fp32.

    Returns:
        fp32 (..., N), not yet rounded to the layer's output dtype. A row with a NaN operand is NaN.
    """
    a = activation.double() * 2**UNIT_BITS
    w = weight.double() * 2**UNIT_BITS
    broken = a.isnan().any(-1, keepdim=True)
    a = a.nan_to_num(nan=0.0)
    total = torch.zeros(*a.shape[:-1], w.shape[0], dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[-1], _EXACT_TERMS):
        stop = start + _EXACT_TERMS
        total += (a[..., start:stop] @ w[:, start:stop].T).long()
    y = _int64_to_fp32(total) * 2.0 ** (-2 * UNIT_BITS)
    return torch.where(broken, torch.nan, _epilogue(y, t_x, t_w, bias))


def linear(
    activation: Tensor, weight: Tensor, t_x: float, t_w: float, bias: Tensor | None = None
) -> Tensor:
    """Output of the linear layer with an fp32 accumulator; otherwise as :func:`exact_linear`."""
    return _epilogue(activation.float() @ weight.float().T, t_x, t_w, bias)


def error_bound(
    activation: Tensor, weight: Tensor, t_x: float, t_w: float, bias: Tensor | None = None
) -> Tensor:
    """Largest difference between fp32 accumulation and :func:`exact_linear`, float64 (..., N).

    Products are exact, so only additions round, and at most one multiplication by a block's scale.
    Adding K products in fp32, in any order, has an error of at most

        (K + 8) u sum |a w| / (1 - (K + 8) u),    u = 2**-24

    (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1). The 8 covers the
    additions that join partial sums. The tensor scales, the bias and the last rounding add one ulp
    each, on both sides.

    Args:
        activation, weight, t_x, t_w, bias: as for :func:`exact_linear`.
    """
    u = 2.0**-24
    terms = (activation.shape[-1] + 8) * u
    sums = activation.double().abs() @ weight.double().abs().T * (t_x * t_w)
    rest = sums if bias is None else sums + bias.double().abs()
    return sums * terms / (1 - terms) + 8 * u * rest


def _epilogue(y: Tensor, t_x: float, t_w: float, bias: Tensor | None) -> Tensor:
    y = y * fl32(t_x * t_w)
    return y if bias is None else y + bias.float()


def _int64_to_fp32(x: Tensor) -> Tensor:
    """Round int64 to fp32 once, to nearest even; a cast through float64 rounds twice from 2**53."""
    # Sticky rounding: shift the magnitude below 2**53 and or the lost bits into the last one, far
    # below fp32's rounding position. Then the one rounding from float64 to fp32 is correct.
    magnitude = x.abs()
    shift = 11
    sticky = (magnitude & (2**shift - 1) != 0).long()
    large = magnitude >= 2**53
    shifted = torch.where(large, (magnitude >> shift) | sticky, magnitude)
    rounded = shifted.double().float() * torch.where(large, 2.0**shift, 1.0)
    return rounded.copysign(x.float())
