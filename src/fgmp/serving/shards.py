"""Parts of packed weights, as a server divides and joins them; codes are copied, never decoded.

vLLM multiplies q, k and v in one product and divides every product among the ranks of tensor
parallelism. Column parallelism takes rows of the weight, row parallelism columns. Rows may come
from several weights, in any order and repeatedly; columns are cut between blocks.

Weights that read one activation site have one tensor scale, so joining them rounds nothing. Their
modes may differ: the joined weight has the mode that they share, or else ``mixed``.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK, FP8_BLOCK, SCALE_MIN_CODE
from fgmp.pack.planes import BlockCodes, PackedWeight, pack_blocks, rows, unpack

ZERO_ROW = -1
"""Row number of a row of zeros, with which a server pads its vocabulary."""


def columns(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Columns ``start`` to ``stop`` of a packed weight, whole blocks or up to its last column.

    Raises:
        InputError: the cut would go through a block.
    """
    if (start, stop) == (0, packed.k):
        return packed
    if start % BLOCK or (stop % BLOCK and stop != packed.k):
        raise InputError(
            f"columns of a packed weight are divided in multiples of {BLOCK}, got {start} to {stop}"
            f" of {packed.k}"
        )
    first, last = start // BLOCK, -(-stop // BLOCK)
    shape = torch.tensor([packed.n, stop - start])
    if packed.fp8 is not None:
        fp8 = packed.fp8[:, first * BLOCK : last * BLOCK].contiguous()
        return PackedWeight(shape=shape, t=packed.t, fp8=fp8)
    assert packed.low is not None and packed.scale is not None
    half = BLOCK // 2
    low = packed.low[:, first * half : last * half].contiguous()
    scale = packed.scale[:, first:last].contiguous()
    if packed.overflow is None:
        return PackedWeight(shape=shape, t=packed.t, low=low, scale=scale)
    is_fp8 = packed.is_fp8()
    inside = torch.zeros_like(is_fp8)
    inside[:, first:last] = True
    return PackedWeight(
        shape=shape,
        t=packed.t,
        low=low,
        scale=scale,
        overflow=packed.overflow[inside[is_fp8]],
        row_ptr=_row_ptr(scale == FP8_BLOCK),
    )


def take(weights: Sequence[PackedWeight], numbers: Tensor) -> PackedWeight:
    """Weight whose rows are those of ``weights``, counted through all of them.

    Args:
        weights: packed weights with the same K and tensor scale.
        numbers: row numbers, int64 (M,); :data:`ZERO_ROW` is a row of zeros.
    """
    modes = {weight.mode for weight in weights}
    mode = modes.pop() if len(modes) == 1 else "mixed"
    parts = [
        _zero_rows(weights[0], stop - start, mode)
        if index is None
        else _in_mode(rows(weights[index], start, stop), mode)
        for index, start, stop in _runs([weight.n for weight in weights], numbers)
    ]
    return _join(parts)


def _runs(sizes: list[int], numbers: Tensor) -> Iterator[tuple[int | None, int, int]]:
    """Runs of consecutive rows: index of the weight, or None for zeros, first row and end."""
    ends = torch.tensor(sizes).cumsum(0)
    weight = torch.bucketize(numbers, ends, right=True)
    zero = numbers < 0
    follows = (numbers[1:] == numbers[:-1] + 1) & (weight[1:] == weight[:-1]) & ~zero[:-1]
    breaks = (~(follows | (zero[1:] & zero[:-1]))).nonzero().flatten() + 1
    edges = [0, *breaks.tolist(), len(numbers)]
    for begin, end in pairwise(edges):
        index = int(weight[begin])
        first = int(numbers[begin]) - (int(ends[index]) - sizes[index]) if not zero[begin] else 0
        yield None if zero[begin] else index, first, first + end - begin


def _zero_rows(like: PackedWeight, count: int, mode: str) -> PackedWeight:
    groups = -(-like.k // BLOCK)
    is_fp8 = torch.full((count, groups), mode == "fp8")
    codes = torch.zeros(count, groups, BLOCK, dtype=torch.uint8)
    scale = torch.full((count, groups), SCALE_MIN_CODE, dtype=torch.uint8)
    return pack_blocks(BlockCodes(is_fp8, codes, scale), like.k, like.t.item(), mode)


def _in_mode(packed: PackedWeight, mode: str) -> PackedWeight:
    if packed.mode == mode:
        return packed
    return pack_blocks(unpack(packed), packed.k, packed.t.item(), mode)


def _join(parts: Sequence[PackedWeight]) -> PackedWeight:
    """Rows of packed weights of one mode, one below the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    planes = {
        name: torch.cat([part.tensors()[name] for part in parts])
        for name in first.tensors()
        if name not in ("shape", "t", "row_ptr")
    }
    if first.row_ptr is not None:
        counts = [part.row_ptr.diff() for part in parts if part.row_ptr is not None]
        planes["row_ptr"] = _pointers(torch.cat(counts))
    shape = torch.tensor([sum(part.n for part in parts), first.k])
    return PackedWeight(shape=shape, t=first.t, **planes)


def stack(weights: Sequence[PackedWeight]) -> PackedWeight:
    """Weights of one shape below each other, whose tensor scales may differ.

    The caller keeps their tensor scales; that of the result means nothing.
    """
    modes = {weight.mode for weight in weights}
    mode = modes.pop() if len(modes) == 1 else "mixed"
    return _join([_in_mode(weight, mode) for weight in weights])


def _row_ptr(is_fp8: Tensor) -> Tensor:
    return _pointers(is_fp8.sum(-1))


def _pointers(counts: Tensor) -> Tensor:
    """Sums of the counts before each row, int32 (N + 1,)."""
    pointers = torch.zeros(len(counts) + 1, dtype=torch.int32)
    pointers[1:] = counts.cumsum(0)
    return pointers
