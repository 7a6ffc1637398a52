"""Block maps and windows of codes: what a page stores of each weight.

A page holds one bit per block while all maps together stay below a limit; larger models get one
byte per square of blocks. Of the first rows and blocks of every weight it holds the codes, too, so
that a reader can look into a block.
"""

import zlib
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from fgmp.formats.spec import BLOCK
from fgmp.pack.planes import PackedWeight, rows, unpack
from fgmp.report.records import BlockMap, Window

MAP_BYTES = 14_000_000
"""Limit on the uncompressed maps of a page: it stays below 25 MB."""

WINDOW = (64, 16)
"""Rows and blocks per row of which the codes are stored; ``fgmp_scores.json`` has their scores."""

_WINDOWS_BYTES = 6_000_000
"""Limit on the uncompressed windows of a page; with very many weights they have fewer rows."""


def tile_for(block_count: int) -> int:
    """Side of the squares of blocks that a map stores; 1 if every block fits.

    Args:
        block_count: blocks of all weights on the page.
    """
    if block_count <= 8 * MAP_BYTES:
        return 1
    return int(np.ceil(np.sqrt(block_count / MAP_BYTES)))


def window_for(weight_count: int) -> tuple[int, int]:
    """Rows and blocks of the windows of a page with so many weights."""
    per_row = WINDOW[1] * (BLOCK + 1)
    return max(1, min(WINDOW[0], _WINDOWS_BYTES // (per_row * max(1, weight_count)))), WINDOW[1]


def block_map(is_fp8: Tensor, tile: int) -> BlockMap:
    """Map of FP8 blocks, bool (N, G)."""
    if tile == 1:
        raw = np.packbits(is_fp8.numpy().reshape(-1)).tobytes()
    else:
        counts = _tiled(torch.ones_like(is_fp8), tile)
        raw = (255 * _tiled(is_fp8, tile) / counts).round().byte().numpy().tobytes()
    return BlockMap(tile, zlib.compress(raw, 6))


def _tiled(flags: Tensor, tile: int) -> Tensor:
    """Number of flags set in each square of ``tile`` x ``tile``, the last possibly smaller."""
    n, g = flags.shape
    rows, columns = -(-n // tile), -(-g // tile)
    padded = torch.zeros(rows * tile, columns * tile)
    padded[:n, :g] = flags
    return padded.reshape(rows, tile, columns, tile).sum((1, 3))


def window(packed: PackedWeight, size: tuple[int, int]) -> Window:
    """Codes of the first ``size`` rows and blocks of a weight."""
    content = unpack(rows(packed, 0, min(packed.n, size[0])))
    scale, codes = content.scale[:, : size[1]], content.codes[:, : size[1]]
    raw = torch.cat([scale.reshape(-1), codes.reshape(-1)]).numpy().tobytes()
    return Window(scale.shape[0], scale.shape[1], zlib.compress(raw, 6))


def total_blocks(shapes: Collection[tuple[int, int]]) -> int:
    """Blocks of weights of these shapes (N, K)."""
    return sum(n * -(-k // BLOCK) for n, k in shapes)
