"""The packed linear (docs/numerics.md, section 6): y = fl32(acc * fl32(t_w t_x)) + bias.

Up to 16 rows of activations, one kernel reads the planes once. It is bound by their bytes, so it
saves instructions per weight: a pattern goes into the tensor core as it is, two weights to a
register, and the block's scale is applied to the block's dot product instead of to its 16
weights. A program owns some rows of the weight over all of K; its warps share the blocks and add
up what they have in a fixed order. No split of K between programs, no atomics, no autotuner: all
three would let the sum's order, hence its last bit, depend on the machine's mood.

Beyond, arithmetic is the limit: rows are unpacked to a bf16 scratch and multiplied by cuBLAS, in
slices of the weight that leave scratch and product in a cache of 50 MB.

fp32 activations are split into three bf16 terms whose sum they are, three rows instead of one:
every product is exact then too, and TF32 cannot happen.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.kernels.triton import bits, planes
from fgmp.kernels.triton.unpack import unpack_rows

DECODE_ROWS = 16
"""Largest batch, in bf16 terms, of the kernel that reads planes."""

SLICE = 4096
"""Rows of a weight that the other path unpacks at a time: 32 MB of bf16 at K = 4096."""

_FINISH = 1024
_INTERPRETED = triton.knobs.runtime.interpret


def _tile(batch: int) -> dict[str, int]:
    """Rows, blocks, columns of the decode kernel's tile, and warps, for a batch.

    The accumulator has a value for each row, block and column: 64 registers a thread.
    """
    if batch <= 8:
        return {"ROWS": 16, "GROUPS": 32, "BATCH": 8, "num_warps": 4}
    return {"ROWS": 16, "GROUPS": 32, "BATCH": 16, "num_warps": 8}


@triton.jit
def _operand(patterns, ROWS: tl.constexpr, GROUPS: tl.constexpr, INTERPRETED: tl.constexpr):
    """Patterns to a dot operand (GROUPS, ROWS, 16), blocks in the order of lanes.

    The interpreter multiplies the raw bits of bf16, so it gets the same values as fp32.
    """
    if INTERPRETED:
        low, high = bits.halves(patterns)
    else:
        low = patterns.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (patterns >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return tl.reshape(tl.join(low, high), (GROUPS, ROWS, bits.VALUES))


@triton.jit
def _finish(total, t_x_ptr, t_w_ptr, bias_ptr, column, here, HAS_BIAS: tl.constexpr):
    """fl32(total * fl32(t_w t_x)) + bias."""
    y = total * (tl.load(t_w_ptr) * tl.load(t_x_ptr))
    if HAS_BIAS:
        y += tl.load(bias_ptr + column, mask=here, other=0).to(tl.float32)
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
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    item = tl.arange(0, BATCH)
    before = planes.first_positions(row_ptr, row, n, MODE)
    total = tl.zeros((GROUPS, ROWS, BATCH), tl.float32)
    # Loads run ahead: scales by two tiles, since they say where overflow is, the rest by one.
    scale = planes.load_scale(scale_ptr, row, n, 0, groups, MODE, ROWS, GROUPS)
    words = planes.load_words(words_ptr, row, n, 0, groups, MODE, ROWS, GROUPS)
    over, before = planes.load_overflow(overflow_ptr, scale, before, fp8_blocks, MODE)
    next_scale = planes.load_scale(scale_ptr, row, n, GROUPS, groups, MODE, ROWS, GROUPS)
    for first in range(0, groups, GROUPS):
        ahead = first + GROUPS
        next_words = planes.load_words(words_ptr, row, n, ahead, groups, MODE, ROWS, GROUPS)
        next_over, before = planes.load_overflow(overflow_ptr, next_scale, before, fp8_blocks, MODE)
        last_scale = planes.load_scale(
            scale_ptr, row, n, ahead + GROUPS, groups, MODE, ROWS, GROUPS
        )
        weights = _operand(planes.patterns(words, over, scale, MODE), ROWS, GROUPS, INTERPRETED)
        multipliers = tl.permute(bits.multipliers(scale), (1, 0))
        words, over, scale, next_scale = next_words, next_over, next_scale, last_scale
        column = first * bits.VALUES + tl.arange(0, GROUPS * bits.VALUES)
        x_here = (item < batch)[:, None] & (column < k)[None, :]
        x = tl.load(x_ptr + item[:, None] * k + column[None, :], x_here, other=0)
        if INTERPRETED:
            x = bits.from_bf16_bits(x.to(tl.int32)) * bits.HALF
        else:
            x = x.to(tl.bfloat16, bitcast=True) * tl.full([], bits.HALF, tl.bfloat16)
        x = planes.swap_lanes(tl.reshape(x, (BATCH, GROUPS, 2, 2, 2, 2)), MODE)
        x = tl.permute(tl.reshape(x, (BATCH, GROUPS, bits.VALUES)), (1, 2, 0))
        total = tl.fma(tl.dot(weights, x), multipliers[:, :, None], total)
    y = tl.permute(tl.sum(total, axis=0), (1, 0))
    here = (item < batch)[:, None] & (row < n)[None, :]
    if FINISH:
        y = _finish(y, t_x_ptr, t_w_ptr, bias_ptr, row[None, :], (row < n)[None, :], HAS_BIAS)
    bits.store_float(y_ptr + item[:, None] * n + row[None, :], y, here)


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
    """Columns ``start`` to ``start + width`` of y from sums, fp32 (terms, batch, width)."""
    item = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    total = tl.zeros((COLUMNS,), tl.float32)
    for term in range(terms):
        at = (term * tl.num_programs(0) + item) * width + column
        total += tl.load(sums_ptr + at, mask=here, other=0)
    y = _finish(total, t_x_ptr, t_w_ptr, bias_ptr, start + column, here, HAS_BIAS)
    bits.store_float(y_ptr + item * n + start + column, y, here)


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
    """The linear of activations in units of t_x, (..., K), to ``dtype`` (..., N).

    See ``kernels.ops``. Activations are bf16 or fp32; fp32 ones keep all their bits below 2**63.
    """
    weight = (low, scale, overflow, row_ptr, fp8)
    some = fp8 if low is None else low
    assert some is not None
    n, k = some.shape[0], units.shape[-1]
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
    """bf16 (1 or 3, M, K) whose sum is ``units`` exactly: 8 bits of an fp32 value each."""
    if units.dtype == torch.bfloat16:
        return units.contiguous().unsqueeze(0)
    terms = []
    for _ in range(3):
        terms.append(units.to(torch.bfloat16))
        units = torch.where(units.isfinite(), units - terms[-1], 0)
    return torch.stack(terms)


def _multiply(x: Tensor, weight: planes.Planes, start: int, stop: int) -> Tensor:
    """x @ W[start:stop].T in fp32, through a bf16 scratch."""
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
    tile = _tile(len(x))
    _decode_kernel[(triton.cdiv(n, tile["ROWS"]),)](
        bits.as_stored(y),
        bits.as_loaded(x),
        bias_ptr=x if bias is None else bias,
        batch=len(x),
        n=n,
        k=x.shape[1],
        HAS_BIAS=bias is not None,
        FINISH=finish,
        INTERPRETED=_INTERPRETED,
        enable_fp_fusion=False,
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
    _finish_kernel[(len(sums) // terms, triton.cdiv(width, _FINISH))](
        bits.as_stored(y),
        sums,
        bias_ptr=sums if bias is None else bias,
        n=n,
        start=start,
        width=width,
        terms=terms,
        HAS_BIAS=bias is not None,
        COLUMNS=_FINISH,
        enable_fp_fusion=False,
        **scales,
    )
