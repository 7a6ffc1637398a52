"""The packed linear (docs/numerics.md, section 6): y = fl32(acc * fl32(t_w t_x)) + bias.

For up to 16 rows of activations, one kernel reads the planes once and multiplies in the tensor
core. Its time is that of reading them only if decoding takes few instructions per weight, so
weights are decoded and scaled in pairs. A program computes some rows of the weight over all of K.
Each of its warps takes a part of every tile; their sums are added in a fixed order. K is not split
between programs, and there are no atomics and no autotuner, so the order of additions is fixed.

For larger batches arithmetic is the limit. Rows are unpacked to a bf16 scratch and multiplied by
cuBLAS, in slices of the weight whose scratch and product fit in a cache of 50 MB.

fp32 activations are split into three bf16 terms with the same sum, three rows instead of one. Every
product is then exact too, and TF32 is never used.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.kernels.triton import bits, planes
from fgmp.kernels.triton.launch import launch
from fgmp.kernels.triton.unpack import unpack_rows

DECODE_ROWS = 16
"""Largest batch, in rows of bf16 terms, for the kernel that reads planes."""

SLICE = 4096
"""Rows of a weight that larger batches unpack at a time: 32 MB of bf16 at K = 4096."""

_FINISH = 1024
_INTERPRETED = triton.knobs.runtime.interpret


def _tile(n: int, batch: int) -> dict[str, int]:
    """Tile of the decode kernel: ROWS by GROUPS blocks, BATCH columns, K split over PARTS warps.

    Wide tiles take fewer instructions per weight; narrow ones give more programs: 256 for a weight
    of 4096 rows, for the 132 multiprocessors of an H200. ``benchmarks/gpu_compiled.py`` counts
    both.
    """
    rows, groups = (16, 32) if n < 8192 else (32, 16)
    columns = 8 if batch <= 8 else 16
    return {"ROWS": rows, "GROUPS": groups, "BATCH": columns, "PARTS": 4, "num_warps": 4}


@triton.jit
def _operand(
    patterns,
    scale,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    VALUES: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Weights over UNIT_LIFT, (PARTS, ROWS, VALUES), values of a block in the order of lanes.

    Both factors and the product are exact in bf16. One instruction multiplies both halves of a
    word: a fused multiply-add with -0, since sm_80 has no packed product. Triton's own bf16 product
    unpacks and packs the halves, one instruction more per weight. The interpreter supports neither
    inline assembly nor a bf16 dot (it multiplies the raw bits), so it gets the same values in fp32.
    """
    multipliers = bits.multipliers(scale)[:, :, None, None, None]
    if INTERPRETED:
        low, high = bits.halves(patterns)
        low *= multipliers
        high *= multipliers
    else:
        pairs = multipliers.to(tl.int32, bitcast=True)
        products = tl.inline_asm_elementwise(
            "fma.rn.bf16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            [patterns, pairs | (pairs >> 16), -0x7FFF8000],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        low = products.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (products >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    weights = tl.reshape(tl.join(low, high), (ROWS, PARTS, VALUES))
    return tl.permute(weights, (1, 0, 2))


@triton.jit
def _finish(total, t_x_ptr, t_w_ptr, bias_ptr, column, valid, HAS_BIAS: tl.constexpr):
    """Scale sums and add the bias: fl32(total * fl32(t_w t_x)) + bias."""
    y = total * (tl.load(t_w_ptr) * tl.load(t_x_ptr))
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=valid, other=0).to(tl.float32)
    return y


@triton.jit
def _decode_kernel(
    y_ptr,
    x_ptr,
    t_x_ptr,
    t_w_ptr,
    bias_ptr,
    words_ptr,
    scale_ptr,
    overflow_ptr,
    row_ptr,
    batch,
    n,
    k,
    groups,
    fp8_blocks,
    MODE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FINISH: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    BATCH: tl.constexpr,
    PARTS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, BATCH)
    before = planes.first_positions(row_ptr, row, n, MODE)
    total = tl.zeros((PARTS, ROWS, BATCH), tl.float32)
    # Loads run ahead: planes by one tile, scales by two, since they give positions in overflow.
    scale = planes.load_scale(scale_ptr, row, n, 0, groups, MODE, ROWS, GROUPS)
    words = planes.load_words(words_ptr, row, n, 0, groups, MODE, ROWS, GROUPS)
    over, before = planes.load_overflow(overflow_ptr, scale, before, fp8_blocks, MODE, ROWS, GROUPS)
    next_scale = planes.load_scale(scale_ptr, row, n, GROUPS, groups, MODE, ROWS, GROUPS)
    for first in range(0, groups, GROUPS):
        ahead = first + GROUPS
        next_words = planes.load_words(words_ptr, row, n, ahead, groups, MODE, ROWS, GROUPS)
        next_over, before = planes.load_overflow(
            overflow_ptr, next_scale, before, fp8_blocks, MODE, ROWS, GROUPS
        )
        last_scale = planes.load_scale(
            scale_ptr, row, n, ahead + GROUPS, groups, MODE, ROWS, GROUPS
        )
        column = first * bits.VALUES + tl.arange(0, GROUPS * bits.VALUES)
        x_valid = (item < batch)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + item[:, None] * k + column[None, :], x_valid, other=0)
        patterns = planes.patterns(words, over, scale, MODE, ROWS, GROUPS)
        weights = _operand(patterns, scale, PARTS, ROWS, GROUPS * bits.VALUES // PARTS, INTERPRETED)
        words, over, scale, next_scale = next_words, next_over, next_scale, last_scale
        x = bits.from_bf16_bits(x.to(tl.int32)) if INTERPRETED else x.to(tl.bfloat16, bitcast=True)
        x = planes.swap_lanes(tl.reshape(x, (BATCH, GROUPS, 2, 2, 2, 2)), MODE)
        x = tl.permute(tl.reshape(x, (BATCH, PARTS, GROUPS * bits.VALUES // PARTS)), (1, 2, 0))
        total = tl.dot(weights, x, total)
    y = tl.permute(tl.sum(total, axis=0), (1, 0)) * bits.UNIT_LIFT
    valid = (item < batch)[:, None] & (row < n)[None, :]
    if FINISH:
        y = _finish(y, t_x_ptr, t_w_ptr, bias_ptr, row[None, :], (row < n)[None, :], HAS_BIAS)
    bits.store_float(y_ptr + item[:, None] * n + row[None, :], y, valid)


@triton.jit
def _finish_kernel(
    y_ptr,
    sums_ptr,
    t_x_ptr,
    t_w_ptr,
    bias_ptr,
    n,
    start,
    width,
    terms,
    HAS_BIAS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write columns ``start`` to ``start + width`` of y from sums, fp32 (terms, batch, width)."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    valid = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for term in range(terms):
        offsets = (term * tl.num_programs(0) + item) * width + column
        total += tl.load(sums_ptr + offsets, mask=valid, other=0)
    y = _finish(total, t_x_ptr, t_w_ptr, bias_ptr, start + column, valid, HAS_BIAS)
    bits.store_float(y_ptr + item * n + start + column, y, valid)


def packed_linear(
    units: Tensor,
    low: Tensor | None,
    scale: Tensor | None,
    overflow: Tensor | None,
    row_ptr: Tensor | None,
    fp8: Tensor | None,
    t_x: Tensor,
    t_w: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Output of the packed linear, ``dtype`` (..., N); see ``kernels.ops``.

    ``units`` are activations in units of t_x, bf16 or fp32 (..., K). Products with fp32 activations
    are exact if their magnitudes are 0 or between 2**-60 and 2**112.
    """
    weight = (low, scale, overflow, row_ptr, fp8)
    dense = fp8 if low is None else low
    assert dense is not None
    n, k = dense.shape[0], units.shape[-1]
    terms = _terms(units.reshape(-1, k))
    batch = terms.shape[1]
    y = torch.empty(*units.shape[:-1], n, dtype=dtype, device=units.device)
    if y.numel() == 0:
        return y
    scales = {"t_x_ptr": t_x, "t_w_ptr": t_w}
    if terms.shape[0] * batch > DECODE_ROWS:
        for start, stop in pairwise([*range(0, n, SLICE), n]):
            sums = _multiply(terms.flatten(0, 1), weight, start, stop)
            _launch_finish(y, sums, terms.shape[0], start, scales, bias)
    elif len(terms) == 1:
        _launch_decode(y, terms, weight, scales, bias, finish=True)
    else:
        sums = torch.empty(len(terms) * batch, n, dtype=torch.float32, device=units.device)
        _launch_decode(sums, terms, weight, scales, None, finish=False)
        _launch_finish(y, sums, len(terms), 0, scales, bias)
    return y


def _terms(units: Tensor) -> Tensor:
    """Split ``units`` (M, K) into bf16 terms (1 or 3, M, K) with exactly this sum.

    Each term holds 8 bits of an fp32 value.
    """
    if units.dtype == torch.bfloat16:
        return units.contiguous().unsqueeze(0)
    terms = []
    for _ in range(3):
        terms.append(units.to(torch.bfloat16))
        units = torch.where(units.isfinite(), units - terms[-1], 0)
    return torch.stack(terms)


def _multiply(x: Tensor, weight: planes.Planes, start: int, stop: int) -> Tensor:
    """Compute x @ W[start:stop].T in fp32, through a bf16 scratch."""
    scratch = torch.empty(stop - start, x.shape[1], dtype=torch.bfloat16, device=x.device)
    unpack_rows(weight, start, scratch)
    if _INTERPRETED:
        return x.float() @ scratch.float().T
    return torch.mm(x, scratch.T, out_dtype=torch.float32)


def _launch_decode(
    y: Tensor,
    terms: Tensor,
    weight: planes.Planes,
    scales: dict[str, Tensor],
    bias: Tensor | None,
    *,
    finish: bool,
) -> None:
    x = terms.flatten(0, 1)
    n = y.shape[-1]
    tile = _tile(n, len(x))
    launch(
        _decode_kernel,
        (triton.cdiv(n, tile["ROWS"]),),
        on=x,
        y_ptr=bits.as_stored(y),
        x_ptr=bits.as_loaded(x),
        bias_ptr=x if bias is None else bias,
        batch=len(x),
        n=n,
        k=x.shape[1],
        HAS_BIAS=bias is not None,
        FINISH=finish,
        INTERPRETED=_INTERPRETED,
        **scales,
        **planes.arguments(weight),
        **tile,
    )


def _launch_finish(
    y: Tensor,
    sums: Tensor,
    terms: int,
    start: int,
    scales: dict[str, Tensor],
    bias: Tensor | None,
) -> None:
    width, n = sums.shape[1], y.shape[-1]
    launch(
        _finish_kernel,
        (len(sums) // terms, triton.cdiv(width, _FINISH)),
        on=y,
        y_ptr=bits.as_stored(y),
        sums_ptr=sums,
        bias_ptr=sums if bias is None else bias,
        n=n,
        start=start,
        width=width,
        terms=terms,
        HAS_BIAS=bias is not None,
        COLUMNS=_FINISH,
        **scales,
    )
