"""Error compensation: GPTQ on quantized inputs, with the block formats fixed.

After every block has its format, the packed weight V need not be the original W rounded to nearest.
Any V whose codes fit the formats is allowed. The best V has an output on quantized activations q
that is closest to W's output on the original activations x. With the moments H = sum q q^T and
D = sum (x - q) q^T,

    sum |W x - V q|^2 + m |V - W|^2 = (V - W*) (H + m I) (V - W*)^T + terms without V
    W* = W + W D (H + m I)^-1

W* is a Wiener filter: it reduces the weight of directions in which the noise of quantized
activations exceeds their signal. V is W*, rounded by GPTQ (arXiv 2210.17323): columns are rounded
one after the other, and the columns not yet rounded compensate each error.

GPTQ spreads errors along the rows of U, the upper Cholesky factor of (H + m I)^-1. Its inverse
R = U^-1 serves as well and is computed without inverting H + m I: R is upper triangular, and

    H + m I = R R^T        (V - W*) (H + m I) (V - W*)^T = |(W* - V) R|^2

Column j of (W* - V) R depends on columns 0 to j of V alone. Column j of V can bring it to zero,
up to rounding, whatever the earlier columns are. With S = (W* - W) R = W D R^-T, the value
before rounding is

    w_j + (S_j + sum over i < j of (w_i - v_i) R_ij) / R_jj

This is GPTQ with lazy batch updates: one matrix product applies the errors of all earlier columns
to the next 128 (``BATCH``). Within a block of 16, errors spread along rows of U, whose diagonal
blocks are inverses of R's. The scale of an FP4 block is chosen when its first column is reached,
for the best values of the block at that point.

Some rows are exempt. If a row's squared distance from W*, the quadratic form above, exceeds 8
(``LIMIT``) times that of round to nearest, it gets the codes of round to nearest. This happens if
F and H, two approximations of the loss, disagree.
F may see no sensitivity of the loss to a large weight; the
scale search then fits the other weights of its block and clips it. H counts all outputs alike, so
the rest of the row moves far to compensate. In one such row of an encoder of 22.7M parameters,
whose normalization cancels an outlier channel, the ratio was two thousand, which ruined the model.
Elsewhere it is about a half, in a few rows up to four.

The damping m, a fraction of the mean of H's diagonal, keeps V close to W where the calibration set
has little signal. The loss model here is the layer's output error, with equal weight per output.

Everything is fp32, as the moments are. LAPACK factors panels of 128 columns, because its results up
to that size do not depend on the number of threads; everything else is matrix products.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

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
from fgmp.kernels.cpu.library import kernels
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

BATCH = 128
"""Columns that a matrix product or a small factorization treats at once."""

ACCURACY = 2.0**-7
"""Largest error of R R^T, relative to the damping m, with which an fp32 R is used. Above it, R is
computed again in float64. An error below it matters less than a change of m by a hundredth."""


@dataclass(frozen=True)
class Factors:
    """Factors for compensating one weight (N, K), from its input's moments, fp32.

    Attributes:
        root: R (K, K), upper triangular with R R^T = H + m I.
        shift: S = (W* - W) R (N, K).
    """

    root: Tensor
    shift: Tensor


def factorize(h: Tensor, damping: float = DAMPING) -> Tensor | None:
    """The upper Cholesky factor ("root") R of H + m I, fp32 (K, K).

    It is computed in fp32, and in float64 where that fails or is too inaccurate: where R R^T, on a
    vector of random signs, is further from H + m I than :data:`ACCURACY`.

    Args:
        h: fp32 (K, K).
        damping: m over the mean of H's diagonal.

    Returns:
        R; None for moments of no tokens, as of an expert that was never chosen.
    """
    m = damping * h.diagonal().double().mean().item()
    if m == 0:
        return None
    signs = torch.randint(2, (len(h), 1), generator=torch.Generator().manual_seed(0))
    probe = (2 * signs - 1).to(h)
    product = h @ probe + m * probe
    root = _root(h, m)
    if root is not None:
        error = torch.linalg.vector_norm(root @ (root.T @ probe) - product)
        if error <= ACCURACY * m * len(h) ** 0.5:
            return root
    root = _root(h.double(), m)
    assert root is not None, "H + m I is positive definite"
    return root.float()


def root_of(moments: Moments, damping: float = DAMPING) -> Tensor | None:
    """:func:`factorize` of the moments' H, computed once for all variants that share it."""
    if damping not in moments.roots:
        moments.roots[damping] = factorize(moments.h, damping)
    return moments.roots[damping]


def _root(h: Tensor, m: float) -> Tensor | None:
    """Upper triangular R with R R^T = H + m I, panel by panel from the last; None if it fails."""
    root = torch.zeros_like(h)
    for here in reversed(_slices(0, len(h), BATCH)):
        start = here.start
        panel = h[: here.stop, here] - root[: here.stop, here.stop :] @ root[here, here.stop :].T
        panel[start:].diagonal().add_(m)
        # An upper factor is a lower one of the reversed matrix, reversed.
        lower, failed = torch.linalg.cholesky_ex(panel[start:].double().flip(0, 1))
        if failed:
            return None
        corner = lower.flip(0, 1)
        root[here, here] = corner.to(h)
        root[:start, here] = panel[:start] @ _inverse(corner).T.to(h)
    return root


def factors_of(root: Tensor, drift: Tensor) -> Factors:
    """Factors of one weight (N, K).

    Args:
        root: R, from :func:`factorize`.
        drift: W D, from :meth:`Moments.drift`; overwritten.
    """
    for here in reversed(_slices(0, len(root), BATCH)):
        drift[:, here] -= drift[:, here.stop :] @ root[here, here.stop :].T
        drift[:, here] = drift[:, here] @ _inverse(root[here, here].double()).T.float()
    return Factors(root, drift)


def _inverse(upper: Tensor) -> Tensor:
    """Inverse of a small upper triangular matrix."""
    identity = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


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
        factors: from :func:`factors_of`.
        is_fp8: format of every block, bool (N, G).
        t: tensor scale.
        sensitivity: sensitivities (N, K) for the scale search of FP4 blocks; None: no search.
        search: the scale search.
        limit: see :data:`LIMIT`.

    Returns:
        Codes in both formats; in each block only those of its assigned format are meaningful.
    """

    def round_block(block: int, columns: Tensor, spread: Tensor) -> RoundedBlock:
        here = slice(block * BLOCK, block * BLOCK + columns.shape[1])
        if sensitivity is None:
            scale = nearest_scale_codes(columns, t).squeeze(1)
        else:
            scale = search(columns, sensitivity[:, here], t).squeeze(1)
        return RoundedBlock(scale, *round_columns(columns, spread, scale, is_fp8[:, block], t))

    weight = weight.float()
    codes, distance = column_by_column(weight, factors, t, round_block)
    too_far = _further_than_nearest(distance / limit, weight, factors, is_fp8, t)
    if too_far.any():
        nearest = quantize_weight(weight, t)
        for ours, theirs in (
            (codes.fp4, nearest.fp4),
            (codes.scale, nearest.scale),
            (codes.fp8, nearest.fp8),
        ):
            ours[too_far] = theirs[too_far]
    return codes


class RoundedBlock(NamedTuple):
    """One block of columns: scale codes (N,), and what :func:`round_columns` returns."""

    scale: Tensor
    fp4: Tensor
    fp8: Tensor
    values: Tensor
    errors: Tensor


RoundBlock = Callable[[int, Tensor, Tensor], RoundedBlock]
"""Rounds a block of columns: its index, columns fp32 (N, B), which it may overwrite, and the
diagonal block of U, fp32 (B, B)."""


def column_by_column(
    weight: Tensor, factors: Factors, t: float, round_block: RoundBlock
) -> tuple[WeightCodes, Tensor]:
    """Round the columns of a weight in turn; later columns compensate the errors of earlier ones.

    Args:
        weight: fp32 (N, K).
        factors: from :func:`factors_of`.
        t: tensor scale.
        round_block: chooses scales and rounds one block.

    Returns:
        Codes, and the distance of each row, float64 (N,), as :func:`distances` has it.
    """
    root, (n, k) = factors.root, weight.shape
    fp4 = torch.zeros(n, -(-k // BLOCK), BLOCK, dtype=torch.uint8, device=weight.device)
    fp8, scale = torch.zeros_like(fp4), torch.zeros_like(fp4[..., 0])
    errors = torch.zeros_like(weight)  # W - V
    distance = torch.zeros(n, dtype=torch.float64, device=weight.device)
    for batch in _slices(0, k, BATCH):
        # (W* - V) R, as far as columns before the batch decide it.
        ahead = factors.shift[:, batch] + errors[:, : batch.start] @ root[: batch.start, batch]
        for here in _slices(batch.start, batch.stop, BLOCK):
            block, done = here.start // BLOCK, here.stop - batch.start
            spread = _inverse(root[here, here].double()).float()
            columns = weight[:, here] + ahead[:, here.start - batch.start : done] @ spread
            rounded = round_block(block, columns, spread)
            scale[:, block], fp4[:, block], fp8[:, block] = rounded[:3]
            errors[:, here] = weight[:, here] - rounded.values
            ahead[:, done:] += errors[:, here] @ root[here, here.stop : batch.stop]
            distance += rounded.errors.double().square().sum(1)
    scale[(fp4 & (E2M1.sign_bit - 1) == 0).all(-1)] = SCALE_MIN_CODE
    return WeightCodes(fp4, scale, fp8, t, k), distance


def _slices(start: int, stop: int, width: int) -> list[slice]:
    return [slice(at, min(at + width, stop)) for at in range(start, stop, width)]


def _further_than_nearest(
    distance: Tensor, weight: Tensor, factors: Factors, is_fp8: Tensor, t: float
) -> Tensor:
    """Rows, bool (N,), whose ``distance`` exceeds that of round to nearest.

    The latter is a sum of squares over columns. It is computed batch by batch until it has reached
    ``distance`` in every row, which usually takes few columns.
    """
    errors, total = torch.zeros_like(weight), torch.zeros_like(distance)
    for batch in _slices(0, weight.shape[1], BATCH):
        columns = weight[:, batch]
        formats = is_fp8[:, batch.start // BLOCK : -(-batch.stop // BLOCK)]
        errors[:, batch] = columns - quantize_weight(columns, t).units(formats) * t
        total += _distances_in(batch, errors, factors)
        further = distance > total
        if not further.any():
            break
    return further


def distances(v: Tensor, weight: Tensor, factors: Factors) -> Tensor:
    """Distance |(W* - V) R|^2 of each row, float64 (N,), for V fp32 (N, K)."""
    errors, total = weight.float() - v, torch.zeros(len(v), dtype=torch.float64, device=v.device)
    for batch in _slices(0, v.shape[1], BATCH):
        total += _distances_in(batch, errors, factors)
    return total


def _distances_in(batch: slice, errors: Tensor, factors: Factors) -> Tensor:
    """Contribution of a batch of columns to each row's distance; ``errors`` is W - V."""
    columns = errors[:, : batch.stop] @ factors.root[: batch.stop, batch]
    return (columns + factors.shift[:, batch]).double().square().sum(1)


def round_columns(
    columns: Tensor, spread: Tensor, scale: Tensor, is_fp8: Tensor, t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round one block of columns to its assigned formats; later columns compensate earlier ones.

    Args:
        columns: fp32 (N, B), B at most 16; overwritten.
        spread: diagonal block of U, fp32 (B, B).
        scale: E4M3 codes of the blocks' FP4 scales, uint8 (N,).
        is_fp8: format of each row's block, bool (N,).
        t: tensor scale.

    Returns:
        FP4 and FP8 codes, uint8 (N, 16), decoded values in the assigned format, fp32 (N, B), and
        errors divided by the diagonal of U, fp32 (N, B).
    """
    compiled = kernels()
    if compiled and columns.device.type == "cpu":
        return compiled.round_columns(
            columns.contiguous(), spread.contiguous(), scale.contiguous(), is_fp8.contiguous(), t
        )
    return round_columns_definition(columns, spread, scale, is_fp8, t)


def round_columns_definition(
    columns: Tensor, spread: Tensor, scale: Tensor, is_fp8: Tensor, t: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`round_columns` in PyTorch."""
    fp4 = torch.zeros(len(columns), BLOCK, dtype=torch.uint8, device=columns.device)
    fp8, values, errors = torch.zeros_like(fp4), columns.clone(), torch.zeros_like(columns)
    for j in range(columns.shape[1]):
        column = columns[:, j]
        fp4[:, j], fp8[:, j] = fp4_codes(column[:, None], scale, t)[:, 0], fp8_codes(column, t)
        units = torch.where(
            is_fp8, decode_e4m3(fp8[:, j]) * FP8_FACTOR, decode_e2m1(fp4[:, j]) * decode_e4m3(scale)
        )
        values[:, j] = units * t
        errors[:, j] = (column - values[:, j]) / spread[j, j]
        columns[:, j + 1 :] -= errors[:, j, None] * spread[j, j + 1 :]
    return fp4, fp8, values, errors
