"""Device functions that load and decode tiles of a packed weight.

A tile is ROWS rows by GROUPS blocks. Its patterns are int32 (ROWS, GROUPS, 2, 2, 2), two weights
each (see ``bits``), in the order that takes the fewest instructions: see :func:`swap_lanes`.

The position of an FP8 block in the overflow plane is found by counting. ``before`` is, for each
row, the number of FP8 blocks in all rows above and in this row before the tile. It starts as
row_ptr, and every tile returns it for the next. An index beyond the overflow plane is not read: a
plane that is too short gives wrong numbers rather than a memory fault.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.formats.spec import BLOCK
from fgmp.kernels.triton import bits

Planes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Planes low, scale, overflow, row_ptr and fp8, as in :class:`fgmp.pack.planes.PackedWeight`."""


def mode(planes: Planes) -> str:
    """Mode of the planes: ``mixed``, ``fp4`` or ``fp8``."""
    _, _, overflow, _, fp8 = planes
    if fp8 is not None:
        return "fp8"
    return "fp4" if overflow is None else "mixed"


def arguments(planes: Planes) -> dict[str, object]:
    """Kernel arguments for the planes, by parameter name.

    For a plane that the mode lacks, the argument is an arbitrary pointer, which is never read.
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
    """A plane of bytes as int32; copied where it begins at an address that is not aligned."""
    assert plane is not None
    return (plane if plane.data_ptr() % 16 == 0 else plane.clone()).view(torch.int32)


@triton.jit
def first_positions(row_ptr, row, stop, MODE: tl.constexpr):
    """``before`` at the first block of each row, int32 (ROWS,); rows from ``stop`` are masked."""
    if MODE == "mixed":
        return tl.load(row_ptr + row, mask=row < stop, other=0)
    else:
        return row


@triton.jit
def load_words(
    words_ptr,
    row,
    stop,
    first,
    groups,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Load words of the low or the fp8 plane, int32 (ROWS, 2 or 4 GROUPS); zero outside it."""
    WORDS: tl.constexpr = bits.BYTE_WORDS if MODE == "fp8" else bits.NIBBLE_WORDS
    word = first * WORDS + tl.arange(0, GROUPS * WORDS)
    valid = (row < stop)[:, None] & (word < groups * WORDS)[None, :]
    offsets = row.to(tl.int64)[:, None] * (groups * WORDS) + word[None, :]
    return tl.load(words_ptr + offsets, mask=valid, other=0)


@triton.jit
def load_scale(
    scale_ptr,
    row,
    stop,
    first,
    groups,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Load scale bytes, int32 (ROWS, GROUPS); zero outside the plane."""
    if MODE == "fp8":
        return tl.full((ROWS, GROUPS), bits.FP8_SCALE, tl.int32)
    else:
        group = first + tl.arange(0, GROUPS)
        valid = (row < stop)[:, None] & (group < groups)[None, :]
        offsets = row.to(tl.int64)[:, None] * groups + group[None, :]
        return tl.load(scale_ptr + offsets, mask=valid, other=0).to(tl.int32)


@triton.jit
def load_overflow(
    overflow_ptr,
    scale,
    before,
    fp8_blocks,
    MODE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Load words of the overflow plane, int32 (ROWS, 2 GROUPS), zero for FP4 blocks.

    Returns:
        The words, and ``before`` of the next tile. In modes without this plane the words are a
        zero that is never read.
    """
    if MODE == "mixed":
        flags = bits.is_fp8_block(scale).to(tl.int32)
        position = before[:, None] + tl.cumsum(flags, axis=1) - flags
        inside = (flags > 0) & (position >= 0) & (position < fp8_blocks)
        offsets = tl.where(inside, position, -1)[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        offsets = tl.reshape(offsets, (ROWS, GROUPS * 2))
        over = tl.load(overflow_ptr + offsets.to(tl.int64), mask=offsets >= 0, other=0)
        return over, before + tl.sum(flags, axis=1)
    else:
        return 0, before


@triton.jit
def patterns(words, overflow, scale, MODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr):
    """Patterns of a loaded tile, int32 (ROWS, GROUPS, 2, 2, 2)."""
    if MODE == "mixed":
        # The two planes were loaded by different threads. Joining them moves 2 words per block
        # between threads; otherwise the compiler would move the 8 lanes of each.
        words, overflow = tl.split(tl.join(words, overflow))
        place = bits.places(scale)[:, :, None, None, None]
        low = tl.reshape(bits.nibble_lanes(words), (ROWS, GROUPS, 2, 2, 2))
        over = tl.reshape(bits.nibble_lanes(overflow), (ROWS, GROUPS, 2, 2, 2))
        return bits.mixed_patterns(low, over, place)
    elif MODE == "fp4":
        return bits.e2m1_patterns(tl.reshape(bits.nibble_lanes(words), (ROWS, GROUPS, 2, 2, 2)))
    else:
        return bits.e4m3_patterns(tl.reshape(bits.byte_lanes(words), (ROWS, GROUPS, 2, 2, 2)))


@triton.jit
def swap_lanes(values, MODE: tl.constexpr):
    """Permute a block's values (..., 2, 2, 2, 2) from the order of K to that of a tile, or back.

    A tile's last axis is the lane. In the order of K the lane is an earlier axis: the axis over
    four nibbles in a word of eight, or over two bytes in a word of four.
    """
    if MODE == "fp8":
        return tl.permute(values, (0, 1, 2, 3, 5, 4))
    else:
        return tl.permute(values, (0, 1, 2, 5, 4, 3))
