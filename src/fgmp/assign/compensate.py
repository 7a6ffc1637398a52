"""Error compensation: weights make up for what rounding did to their neighbours and their inputs.

Once every block has its format, the weight V that is packed need not be W rounded: any V whose
codes fit the formats will do, and the best is the one whose output on quantized activations q is
nearest to the original's on x. With the moments H = sum q q^T and C = sum x q^T,

    sum |W x - V q|^2 + m |V - W|^2 = (V - W*) (H + m I) (V - W*)^T + terms without V
    W* = (W C + m W) (H + m I)^-1

Two steps follow. W* itself, a Wiener filter: it leans away from directions in which the noise of
quantized activations outweighs what they carry. Then GPTQ (arXiv 2210.17323) from W* on: columns
are rounded one after the other, and each column's error is spread over those still to come,
along the rows of the Cholesky factor U of (H + m I)^-1. A block keeps the format that it was
assigned; the scale of an FP4 block is chosen when its first column is reached, for the values that
it holds by then.

A row that ends up many times as far from W* by that measure as rounding each of its blocks by
itself is left rounded so. It happens where two measures clash: F may find a large weight of no use
to the loss, and its block's scale is then chosen for the others and clips it, while H, which weighs
all outputs alike, has the rest of the row move far to make up for it. One such row of an encoder of
22.7M parameters, whose normalization cancels an outlier channel, was two thousand times as far and
lost the model. Elsewhere rows end at half the distance, a few at up to four times.

m, a share of the mean of H's diagonal, keeps V near W where calibration says little. The model of
the loss is the layer's own output error, each output counting alike.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.clip import search_scale_codes
from fgmp.formats.codec import decode_e2m1, decode_e4m3
from fgmp.formats.spec import BLOCK, E2M1, FP8_FACTOR, SCALE_MIN_CODE
from fgmp.formats.weight import (
    WeightCodes,
    fp4_codes,
    fp8_codes,
    nearest_scale_codes,
    quantize_weight,
)
from fgmp.sensitivity.moments import Moments

DAMPING = 0.3
"""m over the mean of H's diagonal."""

_LIMIT = 8.0
"""Of a row's distance from W* over that of rounding alone."""


@dataclass(frozen=True)
class Factors:
    """What the moments of one input say, for every weight that reads it; float64 (K, K) each.

    Attributes:
        transfer: (C + m I) (H + m I)^-1, so that W* = W transfer.
        spread: U, upper triangular with U^T U = (H + m I)^-1.
    """

    transfer: Tensor
    spread: Tensor


def factorize(moments: Moments, damping: float = DAMPING) -> Factors | None:
    """The factors of an input's moments; None where no token came, as for an idle expert."""
    h, c = moments.h.double(), moments.c.double()
    m = damping * h.diagonal().mean()
    if m == 0:
        return None
    h.diagonal().add_(m)
    c.diagonal().add_(m)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return Factors(c @ inverse, torch.linalg.cholesky(inverse, upper=True))


def compensated(
    weight: Tensor, factors: Factors, is_fp8: Tensor, t: float, fisher: Tensor | None
) -> WeightCodes:
    """Codes of the weight that makes the layer's output on quantized inputs nearest to its own.

    Args:
        weight: finite, (N, K).
        factors: of the layer's input.
        is_fp8: the format of every block, bool (N, G); only codes of that format count.
        t: tensor scale.
        fisher: what squares count in the search of FP4 scales, (N, K); None: nearest scales.
    """
    n, k = weight.shape
    v = weight.double() @ factors.transfer
    harm = torch.zeros(n, dtype=torch.float64, device=weight.device)
    fp4 = torch.zeros(*is_fp8.shape, BLOCK, dtype=torch.uint8, device=weight.device)
    fp8, scale = torch.zeros_like(fp4), torch.zeros_like(fp4[..., 0])
    for block in range(is_fp8.shape[1]):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, k)
        columns, spread = v[:, start:stop], factors.spread[start:stop]
        counts = None if fisher is None else fisher[:, start:stop]
        scale[:, block] = best = _scales(columns.float(), counts, t)
        errors = torch.zeros(n, stop - start, dtype=torch.float64, device=weight.device)
        for j in range(stop - start):
            fp4[:, block, j], fp8[:, block, j], value = rounded(
                columns[:, j].float(), best, is_fp8[:, block], t
            )
            errors[:, j] = (columns[:, j] - value) / spread[j, start + j]
            columns[:, j + 1 :] -= errors[:, j, None] * spread[j, start + j + 1 : stop]
        v[:, stop:] -= errors @ spread[:, stop:]
        harm += errors.square().sum(1)
    scale[(fp4 & (E2M1.sign_bit - 1) == 0).all(-1)] = SCALE_MIN_CODE
    del v, columns  # another of its size follows
    alone = quantize_weight(weight, t, nearest_scale_codes(weight, t))
    astray = harm > _LIMIT * _harm(alone.units(is_fp8).double() * t, weight, factors)
    for plane, rounded_alone in ((fp4, alone.fp4), (scale, alone.scale), (fp8, alone.fp8)):
        plane[astray] = rounded_alone[astray]
    return WeightCodes(fp4, scale, fp8, t, k)


def _harm(v: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """(V - W*) (H + m I) (V - W*)^T of every row, float64 (N,); of V float64 (N, K)."""
    distance = v - weight.double() @ factors.transfer
    # H + m I is U^-1 U^-T.
    roots: Tensor = torch.linalg.solve_triangular(factors.spread, distance, upper=True, left=False)
    return roots.square().sum(1)


def _scales(block: Tensor, fisher: Tensor | None, t: float) -> Tensor:
    """Scale codes, uint8 (N,), of one block a row, fp32 (N, up to 16)."""
    if fisher is None:
        return nearest_scale_codes(block, t).squeeze(1)
    return search_scale_codes(block, fisher, t).squeeze(1)


def rounded(
    column: Tensor, scale: Tensor, is_fp8: Tensor, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 codes, FP8 codes and the decoded value, float64, of a column (N,) of blocks."""
    fp4 = fp4_codes(column.unsqueeze(-1), scale, t).squeeze(-1)
    fp8 = fp8_codes(column, t)
    units = torch.where(
        is_fp8, decode_e4m3(fp8) * FP8_FACTOR, decode_e2m1(fp4) * decode_e4m3(scale)
    )
    return fp4, fp8, units.double() * t
