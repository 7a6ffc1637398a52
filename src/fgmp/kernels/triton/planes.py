"""Tiles of a packed weight: loads from its planes, and the decoding of what was loaded.

A tile is ROWS rows by GROUPS blocks, its patterns int32 (ROWS, GROUPS, 2, 2, 2), two weights each
(see ``bits``) in an order that costs the fewest instructions: :func:`swap_lanes`. Where an FP8 block's other nibbles are is counted: ``before`` holds the FP8
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
    words = _words(low if fp8 is None else fp8)
    return {
        "words_ptr": words,
        "scale_ptr": words if scale is None else scale,
        "overflow_ptr": words if overflow is None else _words(overflow),
        "row_ptr": words if row_ptr is None else row_ptr,
        "groups": words.shape[1] // (BLOCK // 8 if fp8 is None else BLOCK // 4),
        "fp8_blocks": 0 if overflow is None else overflow.shape[0],
        "MODE": mode(planes),
    }


def _words(plane: Tensor | None) -> Tensor:
    """A plane of bytes as int32; a copy where a view of a larger tensor begins between words."""
    assert plane is not None
    return (plane if plane.data_ptr() % 16 == 0 else plane.clone()).view(torch.int32)


@triton.jit
def first_positions(row_ptr, row, stop, MODE: tl.constexpr):
    """``before`` at the first block of rows below ``stop``, int32 (ROWS,)."""
    if MODE == "mixed":
        return tl.load(row_ptr + row, mask=row < stop, other=0)
    else:
        return row


@triton.jit
def load(
    words_ptr,
    scale_ptr,
    overflow_ptr,
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
        patterns, int32 (ROWS, GROUPS, 2, 2, 2); multipliers, fp32 (ROWS, GROUPS), zero beyond the
        row's end in a mode with scales; ``before`` of the next tile.
    """
    group = first + tl.arange(0, GROUPS)
    WORDS: tl.constexpr = bits.BYTE_WORDS if MODE == "fp8" else bits.NIBBLE_WORDS
    word = first * WORDS + tl.arange(0, GROUPS * WORDS)
    rows_here = (row < stop)[:, None]
    words_here = rows_here & (word < groups * WORDS)[None, :]
    blocks_above = row.to(tl.int64)[:, None] * groups
    words = tl.load(words_ptr + blocks_above * WORDS + word[None, :], words_here, other=0)
    if MODE == "fp8":
        codes = bits.byte_lanes(tl.reshape(words, (ROWS, GROUPS, 2, 2)))
        patterns = bits.e4m3_patterns(codes)
        scale = tl.full((ROWS, GROUPS), bits.FP8_SCALE, tl.int32)
    else:
        low = bits.nibble_lanes(tl.reshape(words, (ROWS, GROUPS, 2)))
        here = rows_here & (group < groups)[None, :]
        scale = tl.load(scale_ptr + blocks_above + group[None, :], here, other=0).to(tl.int32)
        if MODE == "mixed":
            flags = bits.is_fp8_block(scale).to(tl.int32)
            position = before[:, None] + tl.cumsum(flags, axis=1) - flags
            before += tl.sum(flags, axis=1)
            inside = (flags > 0) & (position >= 0) & (position < fp8_blocks)
            at = position.to(tl.int64)[:, :, None] * WORDS + tl.arange(0, WORDS)
            over = tl.load(overflow_ptr + at, mask=inside[:, :, None], other=0)
            place = bits.places(scale)[:, :, None, None, None]
            patterns = bits.mixed_patterns(low, bits.nibble_lanes(over), place)
        else:
            patterns = bits.e2m1_patterns(low)
    return patterns, bits.multipliers(scale), before


@triton.jit
def swap_lanes(values, MODE: tl.constexpr):
    """(..., 2, 2, 2, 2) of a block's values in the order of K to that of a tile, and back.

    A tile's last axis is the lane. In the order of K the lane is an earlier axis: that of four
    nibbles in a word of eight, or of two bytes in a word of four.
    """
    if MODE == "fp8":
        return tl.permute(values, (0, 1, 2, 3, 5, 4))
    else:
        return tl.permute(values, (0, 1, 2, 5, 4, 3))
