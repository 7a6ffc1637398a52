"""The streamed image that hardware reads (docs/format.md, section 5).

An image has two parts, both in row-major order of the weight's blocks:

    flags   one bit per block, 1 for FP8, bit i % 8 of byte i // 8, zero-filled to a whole byte
    blocks  FP4: its scale byte, then 8 bytes of E2M1 codes, element 2i in the low nibble: 9 bytes
            FP8: 16 bytes of E4M3 codes

Its size is the paper's: 4.5 bits per FP4 value, 8 per FP8 value, 1/16 per value for flags. The
tensor scale and the shape are stored elsewhere. Blocks differ in length, so an image can only be
read from front to back, as a datapath does; CPUs and GPUs read planes.
"""

import numpy as np
import torch

from fgmp.errors import CheckpointError
from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.pack.planes import BlockCodes, PackedWeight, check_codes, check_scale, unpack

FP4_BLOCK_BYTES = 1 + BLOCK // 2
FP8_BLOCK_BYTES = BLOCK


def image_bytes(blocks: int, fp8_blocks: int) -> int:
    """Bytes of an image with ``blocks`` blocks, ``fp8_blocks`` of them FP8."""
    fp4_blocks = blocks - fp8_blocks
    return -(-blocks // 8) + FP4_BLOCK_BYTES * fp4_blocks + FP8_BLOCK_BYTES * fp8_blocks


def to_image(packed: PackedWeight) -> bytes:
    """Write a packed weight as an image."""
    content = unpack(packed)
    flags = content.is_fp8.flatten().cpu().numpy()
    codes = content.codes.flatten(0, 1).cpu().numpy()
    scale = content.scale.flatten().cpu().numpy()
    wide = np.zeros((len(flags), FP8_BLOCK_BYTES), dtype=np.uint8)
    wide[flags] = codes[flags]
    nibbles = codes[~flags]
    wide[~flags, 0] = scale[~flags]
    wide[~flags, 1:FP4_BLOCK_BYTES] = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    used = np.arange(FP8_BLOCK_BYTES) < np.where(flags, FP8_BLOCK_BYTES, FP4_BLOCK_BYTES)[:, None]
    return np.packbits(flags, bitorder="little").tobytes() + wide[used].tobytes()


def from_image(image: bytes, n: int, k: int) -> BlockCodes:
    """Read the codes of an image of a weight (n, k); the inverse of :func:`to_image`.

    This defines how a reader interprets an image and which images it must refuse. The package
    itself only writes images; tests hold writer and hardware against this function.

    Raises:
        CheckpointError: names the rule of docs/format.md that the image breaks.
    """
    groups = -(-k // BLOCK)
    blocks = n * groups
    data = np.frombuffer(image, dtype=np.uint8)
    flag_bytes = -(-blocks // 8)
    if len(data) < flag_bytes:
        raise CheckpointError(
            f"image: {blocks} blocks need {flag_bytes} flag bytes, got {len(data)}"
        )
    flags, beyond = np.split(np.unpackbits(data[:flag_bytes], bitorder="little"), [blocks])
    flags = flags.astype(bool)
    if beyond.any():
        last = data[flag_bytes - 1]
        raise CheckpointError(f"image: bits after the last flag must be zero, got 0x{last:02X}")
    expected = image_bytes(blocks, int(flags.sum()))
    if len(data) != expected:
        raise CheckpointError(f"image: its flags call for {expected} bytes, got {len(data)}")
    used = np.arange(FP8_BLOCK_BYTES) < np.where(flags, FP8_BLOCK_BYTES, FP4_BLOCK_BYTES)[:, None]
    wide = np.zeros((blocks, FP8_BLOCK_BYTES), dtype=np.uint8)
    wide[used] = data[flag_bytes:]
    codes = wide.copy()
    packed = wide[~flags, 1:FP4_BLOCK_BYTES]
    codes[~flags] = np.stack([packed & 0xF, packed >> 4], -1).reshape(-1, BLOCK)
    scale = np.where(flags, FP8_BLOCK, wide[:, 0]).astype(np.uint8)
    content = BlockCodes(
        is_fp8=torch.from_numpy(flags).view(n, groups),
        codes=torch.from_numpy(codes).view(n, groups, BLOCK),
        scale=torch.from_numpy(scale).view(n, groups),
    )
    check_scale("image", content.scale, content.is_fp8)
    check_codes("image", content, k)
    return content
