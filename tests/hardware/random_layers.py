"""Layers of random blocks for the lanes' tests."""

import torch

from fgmp.formats.spec import BLOCK, E4M3
from fgmp.hardware.stimulus import Layer
from fgmp.pack.planes import BlockCodes


def blocks(rows: int, groups: int, fp8_share: float, seed: int) -> BlockCodes:
    """Random codes, none of them NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator, dtype=torch.uint8)

    is_fp8 = torch.rand(rows, groups, generator=generator) < fp8_share
    sign = draw(2, rows, groups, BLOCK) * E4M3.sign_bit
    fp8 = draw(E4M3.max_code + 1, rows, groups, BLOCK) + sign
    codes = torch.where(is_fp8.unsqueeze(-1), fp8, draw(16, rows, groups, BLOCK))
    scale = 1 + draw(E4M3.max_code, rows, groups)
    return BlockCodes(is_fp8, codes, torch.where(is_fp8, torch.full_like(scale, 0x80), scale))


def layer(fp8_share: float) -> Layer:
    activation, weight = blocks(32, 3, fp8_share, 0), blocks(5, 3, fp8_share, 1)
    return Layer("linear", activation, weight, activation.codes, weight.codes)


def row_of(weight: BlockCodes, row: int) -> BlockCodes:
    return BlockCodes(weight.is_fp8[row], weight.codes[row], weight.scale[row])
