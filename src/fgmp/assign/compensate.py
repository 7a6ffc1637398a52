"""Error compensation: GPTQ on quantized inputs, with the block formats fixed.

After every block has its format, the packed weight V need not be the original W rounded to nearest.
Any V whose codes fit the formats is allowed. The best V has an output on quantized activations q
that is closest to W's output on the original activations x. With the moments H = sum q q^T (GPTQ's
Hessian up to a factor of 2) and C = sum x q^T,

    sum |W x - V q|^2 + m |V - W|^2 = (V - W*) (H + m I) (V - W*)^T + terms without V
    W* = (W C + m W) (H + m I)^-1

There are two steps. The first is W*, a Wiener filter: it reduces the weight of directions in which
the noise of quantized activations exceeds their signal. The second is GPTQ (arXiv 2210.17323)
starting from W*: columns are rounded one after the other. Each column's error is spread over the
columns not yet rounded, along the rows of the Cholesky factor U of (H + m I)^-1. The scale of an
FP4 block is chosen when its first column is reached, for the values that the block has by then.

Some rows are exempt. If a row's squared distance from W*, the quadratic form above, exceeds 8
(``LIMIT``) times that of round to nearest, it gets the codes of round to nearest. This happens if
the two models of the loss disagree. F may see no sensitivity of the loss to a large weight; the
scale search then fits the other weights of its block and clips it. H counts all outputs alike, so
the rest of the row moves far to compensate. In one such row of an encoder of 22.7M parameters,
whose normalization cancels an outlier channel, the ratio was two thousand, which ruined the model.
Elsewhere it is about a half, in a few rows up to four.

The damping m, a fraction of the mean of H's diagonal, keeps V close to W where the calibration set
has little signal. The loss model here is the layer's output error, with equal weight per output.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.scale_search import search_scale_codes
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
"""Damping m over the mean of H's diagonal (percdamp); chosen with ``runs/constants.py damping``."""

ScaleSearch = Callable[[Tensor, Tensor, float], Tensor]
"""Scale search: maps (weight (N, K), sensitivities (N, K), tensor scale) to E4M3 scale codes, uint8
(N, G)."""

LIMIT = 8.0
"""Largest squared distance of a compensated row from W*, over that of round to nearest. Chosen
between two ratios that were observed without a script: up to four in rows that do no harm, two
thousand in one that ruins a model. ``runs/compensation.py`` prints such ratios."""


@dataclass(frozen=True)
class Factors:
    """Matrices computed from the moments of one input, for every weight that reads it.

    Both are float64 (K, K).

    Attributes:
        transfer: (C + m I) (H + m I)^-1, so that W* = W transfer.
        spread: U, upper triangular with U^T U = (H + m I)^-1.
    """

    transfer: Tensor
    spread: Tensor


def factorize(moments: Moments, damping: float = DAMPING) -> Factors | None:
    """Compute the factors of an input's moments.

    Args:
        moments: H and C.
        damping: m over the mean of H's diagonal.

    Returns:
        The factors; None for moments of no tokens, as of an expert that was never chosen.
    """
    h, c = moments.h.double(), moments.c.double()
    m = damping * h.diagonal().mean()
    if m == 0:
        return None
    h.diagonal().add_(m)
    c.diagonal().add_(m)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return Factors(c @ inverse, torch.linalg.cholesky(inverse, upper=True))


def compensated(
    weight: Tensor,
    factors: Factors,
    is_fp8: Tensor,
    t: float,
    sensitivity: Tensor | None,
    search: ScaleSearch = search_scale_codes,
    limit: float = LIMIT,
) -> WeightCodes:
    """Round a weight with error compensation.

    Args:
        weight: finite, (N, K).
        factors: factors of the layer's input moments.
        is_fp8: format of every block, bool (N, G).
        t: tensor scale.
        sensitivity: sensitivities (N, K) for the scale search of FP4 blocks; None: no search.
        search: the scale search.
        limit: see :data:`LIMIT`.

    Returns:
        Codes in both formats; in each block only those of its assigned format are meaningful.
    """
    n, k = weight.shape
    v = weight.double() @ factors.transfer
    distance = torch.zeros(n, dtype=torch.float64, device=weight.device)
    fp4 = torch.zeros(*is_fp8.shape, BLOCK, dtype=torch.uint8, device=weight.device)
    fp8, scale = torch.zeros_like(fp4), torch.zeros_like(fp4[..., 0])
    for block in range(is_fp8.shape[1]):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, k)
        columns, spread = v[:, start:stop], factors.spread[start:stop]
        if sensitivity is None:
            scale_codes = nearest_scale_codes(columns.float(), t).squeeze(1)
        else:
            scale_codes = search(columns.float(), sensitivity[:, start:stop], t).squeeze(1)
        scale[:, block] = scale_codes
        errors = torch.zeros(n, stop - start, dtype=torch.float64, device=weight.device)
        for j in range(stop - start):
            fp4[:, block, j], fp8[:, block, j], value = rounded(
                columns[:, j].float(), scale_codes, is_fp8[:, block], t
            )
            errors[:, j] = (columns[:, j] - value) / spread[j, start + j]
            columns[:, j + 1 :] -= errors[:, j, None] * spread[j, start + j + 1 : stop]
        v[:, stop:] -= errors @ spread[:, stop:]
        distance += errors.square().sum(1)
    scale[(fp4 & (E2M1.sign_bit - 1) == 0).all(-1)] = SCALE_MIN_CODE
    del v, columns  # frees memory for another matrix of this size
    nearest = quantize_weight(weight, t, nearest_scale_codes(weight, t))
    too_far = distance > limit * distances(nearest.units(is_fp8).double() * t, weight, factors)
    for codes, nearest_codes in ((fp4, nearest.fp4), (scale, nearest.scale), (fp8, nearest.fp8)):
        codes[too_far] = nearest_codes[too_far]
    return WeightCodes(fp4, scale, fp8, t, k)


def distances(v: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """Squared distance (V - W*) (H + m I) (V - W*)^T of each row, float64 (N,); V is (N, K)."""
    difference = v - weight.double() @ factors.transfer
    # H + m I is U^-1 U^-T.
    roots: Tensor = torch.linalg.solve_triangular(
        factors.spread, difference, upper=True, left=False
    )
    return roots.square().sum(1)


def rounded(
    column: Tensor, scale: Tensor, is_fp8: Tensor, t: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Round one column (N,) of blocks to its assigned formats.

    Args:
        column: fp32 (N,).
        scale: E4M3 codes of the blocks' FP4 scales, uint8 (N,).
        is_fp8: format of each block, bool (N,).
        t: tensor scale.

    Returns:
        FP4 codes, FP8 codes, and decoded values in the assigned format, float64 (N,).
    """
    fp4 = fp4_codes(column.unsqueeze(-1), scale, t).squeeze(-1)
    fp8 = fp8_codes(column, t)
    units = torch.where(
        is_fp8, decode_e4m3(fp8) * FP8_FACTOR, decode_e2m1(fp4) * decode_e4m3(scale)
    )
    return fp4, fp8, units.double() * t
