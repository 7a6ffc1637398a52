"""Round a packed weight to one format, and measure what that loses.

Blocks that have the format keep their bytes. Other blocks are rounded to nearest from their decoded
values, with the tensor scale of the checkpoint, in the order of operations of docs/numerics.md,
section 2; an FP4 scale is that of the largest magnitude. The original weights are not known here,
so the error is relative to the checkpoint's weights.
"""

import torch

from fgmp.formats.weight import quantize_weight
from fgmp.pack.planes import BlockCodes, PackedWeight, pack_blocks, unpack, unpack_units


def to_fp4(packed: PackedWeight) -> PackedWeight:
    """Round FP8 blocks to FP4; the result has mode ``fp4``."""
    if packed.mode == "fp4":
        return packed
    content, t = unpack(packed), packed.t.item()
    new = quantize_weight(unpack_units(packed) * packed.t, t)
    blocks = BlockCodes(
        torch.zeros_like(content.is_fp8),
        torch.where(content.is_fp8.unsqueeze(-1), new.fp4, content.codes),
        torch.where(content.is_fp8, new.scale, content.scale),
    )
    return pack_blocks(blocks, packed.k, t, "fp4")


def to_fp8(packed: PackedWeight) -> PackedWeight:
    """Round FP4 blocks to FP8; the result has mode ``fp8``."""
    if packed.mode == "fp8":
        return packed
    content, t = unpack(packed), packed.t.item()
    new = quantize_weight(unpack_units(packed) * packed.t, t)
    codes = torch.where(content.is_fp8.unsqueeze(-1), content.codes, new.fp8)
    blocks = BlockCodes(torch.ones_like(content.is_fp8), codes, content.scale)
    return pack_blocks(blocks, packed.k, t, "fp8")


ROUND = {"fp4": to_fp4, "fp8": to_fp8}
"""Function that rounds to a mode, by mode."""


def relative_error(rounded: PackedWeight, packed: PackedWeight) -> float:
    """Frobenius norm of the rounding error over that of the weight; both have one tensor scale."""
    if rounded is packed:
        return 0.0
    values = unpack_units(packed)
    norm = values.double().norm().item()
    error = (unpack_units(rounded) - values).double().norm().item()
    return error / norm if norm else 0.0
