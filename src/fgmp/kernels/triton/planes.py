"""Tiles of a packed weight: loads from its planes, and the decoding of what was loaded.

A tile is ROWS rows by GROUPS blocks, its patterns int32 (ROWS, GROUPS, 8), a pair of weights
each (see ``bits``). Where an FP8 block's other nibbles are is counted: ``before`` holds the FP8
blocks of each row, and of all rows above it, that lie before the tile. It starts as row_ptr and
every tile hands it on. An index beyond the overflow plane is not read, so that a plane that is
too short gives wrong numbers and not a fault of the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.formats.spec import BLOCK
from fgmp.kernels.triton import bits

Planes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""low, scale, overflow, row_ptr, fp8, as in :class:`fgmp.pack.planes.PackedWeight`."""


def mode(planes: Planes) -> str:
    """``mixed``, ``fp4`` or ``fp8``."""
    _, _, overflow, _, fp8 = planes
    if fp8 is not None:
        return "fp8"
    return "fp4" if overflow is None else "mixed"


def arguments(planes: Planes) -> dict[str, object]:
    """The arguments of a kernel that say where the planes are, under their names there.

    A plane that the mode lacks is any pointer, for it is never read.
    """
    low, scale, overflow, row_ptr, fp8 = planes
    some = low if fp8 is None else fp8.view(torch.uint16)
    assert some is not None
    return {
        "low_ptr": some,
        "scale_ptr": some if scale is None else scale,
        "overflow_ptr": some if overflow is None else overflow,
        "row_ptr": some if row_ptr is None else row_ptr,
        "fp8_ptr": some,
        "groups": some.shape[1] // (BLOCK // 2),
        "fp8_blocks": 0 if overflow is None else overflow.shape[0],
        "MODE": mode(planes),
    }


@triton.jit
def first_positions(row_ptr, row, stop, MODE: tl.constexpr):
    """``before`` at the first block of rows below ``stop``, int32 (ROWS,)."""
    if MODE == "mixed":
        return tl.load(row_ptr + row, mask=row < stop, other=0)
    else:
        return row


@triton.jit
def load(
    low_ptr,
    scale_ptr,
    overflow_ptr,
    fp8_ptr,
    row,
    stop,
    first,
    groups,
    before,
    fp8_blocks,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """One tile: rows ``row`` below ``stop``, GROUPS blocks from ``first``.

    Returns:
        patterns, int32 (ROWS, GROUPS, 8); multipliers, fp32 (ROWS, GROUPS), zero beyond the
        row's end in a mode with scales; ``before`` of the next tile.
    """
    group = first + tl.arange(0, GROUPS)
    pair = first * bits.PAIRS + tl.arange(0, GROUPS * bits.PAIRS)
    here = (row < stop)[:, None] & (group < groups)[None, :]
    pairs_here = (row < stop)[:, None] & (pair < groups * bits.PAIRS)[None, :]
    blocks_above = row.to(tl.int64)[:, None] * groups
    pairs_at = blocks_above * bits.PAIRS + pair[None, :]
    if MODE == "fp8":
        words = tl.load(fp8_ptr + pairs_at, pairs_here, other=0)
        patterns = bits.e4m3_patterns(bits.spread_bytes(words.to(tl.int32)))
        patterns = tl.reshape(patterns, (ROWS, GROUPS, bits.PAIRS))
        scale = tl.full((ROWS, GROUPS), bits.FP8_SCALE, tl.int32)
    else:
        scale = tl.load(scale_ptr + blocks_above + group[None, :], here, other=0).to(tl.int32)
        bytes_low = tl.load(low_ptr + pairs_at, pairs_here, other=0)
        low = tl.reshape(bits.spread_nibbles(bytes_low.to(tl.int32)), (ROWS, GROUPS, bits.PAIRS))
        is_fp8 = bits.is_fp8_block(scale)
        if MODE == "mixed":
            flags = is_fp8.to(tl.int32)
            position = before[:, None] + tl.cumsum(flags, axis=1) - flags
            before += tl.sum(flags, axis=1)
            inside = is_fp8 & (position >= 0) & (position < fp8_blocks)
            at = position.to(tl.int64)[:, :, None] * bits.PAIRS + tl.arange(0, bits.PAIRS)
            bytes_over = tl.load(overflow_ptr + at, mask=inside[:, :, None], other=0)
            over = bits.spread_nibbles(bytes_over.to(tl.int32))
            patterns = bits.mixed_patterns(low, over, is_fp8[:, :, None])
        else:
            patterns = bits.e2m1_patterns(low)
    return patterns, bits.multipliers(scale), before
