"""Block maps hold every flag, or the share of a square; windows hold the codes."""

import zlib

import numpy as np
import pytest
import torch

from fgmp.formats.spec import BLOCK
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.planes import pack, unpack
from fgmp.report.blocks import (
    MAP_BYTES,
    WINDOW,
    block_map,
    tile_for,
    total_blocks,
    window,
    window_for,
)


def flags_of(n: int, g: int) -> torch.Tensor:
    return torch.rand(n, g, generator=torch.Generator().manual_seed(n)) < 0.3


@pytest.mark.parametrize(("n", "g"), [(1, 1), (3, 5), (64, 16), (33, 130)])
def test_one_bit_per_block(n: int, g: int) -> None:
    flags = flags_of(n, g)
    stored = block_map(flags, 1)
    bits = np.unpackbits(np.frombuffer(zlib.decompress(stored.data), np.uint8))[: n * g]
    assert stored.tile == 1 and np.array_equal(bits.reshape(n, g), flags.numpy())


@pytest.mark.parametrize(("n", "g", "tile"), [(8, 8, 4), (9, 5, 4), (3, 2, 7)])
def test_squares_hold_their_share(n: int, g: int, tile: int) -> None:
    flags = flags_of(n, g)
    stored = np.frombuffer(zlib.decompress(block_map(flags, tile).data), np.uint8)
    expected = [
        round(255 * flags[i : i + tile, j : j + tile].double().mean().item())
        for i in range(0, n, tile)
        for j in range(0, g, tile)
    ]
    assert np.abs(stored.astype(int) - expected).max() <= 1  # ties of the rounding


def test_maps_stay_below_the_limit() -> None:
    assert tile_for(8 * MAP_BYTES) == 1
    for blocks in (8 * MAP_BYTES + 1, 432_000_000, 4_400_000_000):
        tile = tile_for(blocks)
        assert tile > 1 and blocks / tile**2 <= MAP_BYTES < blocks / (tile - 1) ** 2
    assert total_blocks([(4096, 11008), (3, 17)]) == 4096 * 688 + 6


def test_windows_stay_below_a_limit() -> None:
    assert window_for(0) == window_for(112) == WINDOW
    for count in (1000, 10_000):
        rows, blocks = window_for(count)
        assert rows * blocks * (BLOCK + 1) * count <= 6_000_000
    assert window_for(10**9) == (1, WINDOW[1])


@pytest.mark.parametrize("fp8", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("n", "k"), [(70, 300), (5, 20)])
def test_windows_hold_scales_and_codes(n: int, k: int, fp8: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n, k, generator=generator)
    codes = quantize_weight(weight, tensor_scale(4.0))
    packed = pack(codes, torch.rand(codes.scale.shape, generator=generator) < fp8)
    stored = window(packed, WINDOW)
    raw = np.frombuffer(zlib.decompress(stored.data), np.uint8)
    content = unpack(packed)
    rows, blocks = min(n, WINDOW[0]), min(-(-k // BLOCK), WINDOW[1])
    assert (stored.rows, stored.blocks) == (rows, blocks)
    scale, values = raw[: rows * blocks], raw[rows * blocks :]
    assert np.array_equal(scale.reshape(rows, blocks), content.scale[:rows, :blocks])
    assert np.array_equal(values.reshape(rows, blocks, BLOCK), content.codes[:rows, :blocks])
