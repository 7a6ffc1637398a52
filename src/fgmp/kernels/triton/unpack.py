"""Decode a packed weight to a matrix in units of t (docs/format.md, section 2).

A program reads its rows from left to right, since the position of an FP8 block in the overflow
plane is found by counting. Rows are independent, and there are enough of them to fill a GPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.kernels.triton import bits, planes
from fgmp.kernels.triton.launch import launch

_ROWS = 8
_GROUPS = 32
_WARPS = 4


@triton.jit
def _unpack_kernel(
    out_ptr,
    words_ptr,
    scale_ptr,
    overflow_ptr,
    row_ptr,
    start,
    stop,
    k,
    groups,
    fp8_blocks,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = start + tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    before = planes.first_positions(row_ptr, row, stop, MODE)
    for first in range(0, groups, GROUPS):
        scale = planes.load_scale(scale_ptr, row, stop, first, groups, MODE, ROWS, GROUPS)
        words = planes.load_words(words_ptr, row, stop, first, groups, MODE, ROWS, GROUPS)
        over, before = planes.load_overflow(
            overflow_ptr, scale, before, fp8_blocks, MODE, ROWS, GROUPS
        )
        low, high = bits.halves(planes.patterns(words, over, scale, MODE, ROWS, GROUPS))
        factor = bits.multipliers(scale)[:, :, None, None, None]
        units = tl.join(low * factor * bits.UNIT_LIFT, high * factor * bits.UNIT_LIFT)
        units = tl.reshape(planes.swap_lanes(units, MODE), (ROWS, GROUPS * bits.VALUES))
        column = first * bits.VALUES + tl.arange(0, GROUPS * bits.VALUES)
        valid = (row < stop)[:, None] & (column < k)[None, :]
        offsets = (row - start).to(tl.int64)[:, None] * k + column[None, :]
        bits.store_exact(out_ptr + offsets, units, valid)


def unpack_weight(
    low: Tensor | None,
    scale: Tensor | None,
    overflow: Tensor | None,
    row_ptr: Tensor | None,
    fp8: Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a weight to units of t, (N, K), exact in any float dtype; see ``kernels.ops``."""
    dense = fp8 if low is None else low
    assert dense is not None
    out = torch.empty(dense.shape[0], k, dtype=dtype, device=dense.device)
    unpack_rows((low, scale, overflow, row_ptr, fp8), 0, out)
    return out


def unpack_rows(weight: planes.Planes, start: int, out: Tensor) -> None:
    """Decode rows from ``start`` on into ``out``, (rows, K), as many as ``out`` has."""
    rows, k = out.shape
    launch(
        _unpack_kernel,
        (triton.cdiv(rows, _ROWS),),
        on=out,
        out_ptr=bits.as_stored(out),
        **planes.arguments(weight),
        start=start,
        stop=start + rows,
        k=k,
        ROWS=_ROWS,
        GROUPS=_GROUPS,
        num_warps=_WARPS,
    )
