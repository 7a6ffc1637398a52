"""A packed weight as *planes*: arrays that are addressed directly (docs/format.md, section 2).

    low        uint8 (N, Kp / 2)    one nibble per element, element 2i in the low half of byte i
    scale      uint8 (N, Kp / 16)   one byte per block: the E4M3 scale if FP4, 0x80 if FP8
    overflow   uint8 (n_fp8, 8)     the other nibble of FP8 elements, FP8 blocks in row-major order
    row_ptr    int32 (N + 1)        FP8 blocks before each row
    t          float32 ()           one tensor scale for both formats

Kp is K rounded up to whole blocks; the padding is zero. An FP4 element's nibble is its E2M1 code.
An FP8 element ``s eeee mmm`` has ``s mmm`` in the low plane and ``eeee`` in the overflow plane.
Both formats thus have the sign in the same bit, and the exponent is one nibble.

All-FP4 weights have neither overflow nor row_ptr, all-FP8 weights only ``fp8`` uint8 (N, Kp).

An NVFP4 checkpoint stores the same under other names. ``r`` is the multiplier of the activation
site (``pack.checkpoint``):

    here       compressed-tensors, vLLM         ModelOpt
    low        weight_packed                    weight
    scale      weight_scale                     weight_scale
    t          weight_global_scale = 1 / t      weight_scale_2 = t
    r          input_global_scale, about 6 r    input_scale, about 1 / (6 r)

``low`` and ``scale`` of an all-FP4 weight have the same bytes there. NVFP4 has no counterpart of
``overflow`` and ``row_ptr``, which hold the FP8 blocks.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from fgmp.errors import CheckpointError
from fgmp.formats.codec import decode_e2m1, decode_e4m3, from_blocks
from fgmp.formats.spec import (
    BLOCK,
    E2M1,
    E4M3,
    FP8_BLOCK,
    FP8_FACTOR,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
)
from fgmp.formats.weight import WeightCodes

MODES = {
    "mixed": ("low", "scale", "overflow", "row_ptr"),
    "fp4": ("low", "scale"),
    "fp8": ("fp8",),
}
"""Planes of each mode, beside ``shape`` and ``t``."""

_CHECKED_ELEMENTS = 1 << 20
"""Elements that :func:`validate` decodes at a time."""

_MANTISSA = (1 << E4M3.mantissa_bits) - 1
_EXPONENT = (1 << E4M3.exponent_bits) - 1


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """Planes of one weight, as in the module's table; ``shape`` is int64 (2,), N and K."""

    shape: Tensor
    t: Tensor
    low: Tensor | None = None
    scale: Tensor | None = None
    overflow: Tensor | None = None
    row_ptr: Tensor | None = None
    fp8: Tensor | None = None

    @property
    def mode(self) -> str:
        """Mode of the planes, a key of :data:`MODES`."""
        if self.fp8 is not None:
            return "fp8"
        return "mixed" if self.overflow is not None else "fp4"

    @property
    def n(self) -> int:
        """Rows, which are output features."""
        return int(self.shape[0])

    @property
    def k(self) -> int:
        """Columns before padding, which are input features."""
        return int(self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Tensors that are present, by field name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, ``shape`` and ``t`` included."""
        return sum(t.nbytes for t in self.tensors().values())

    def is_fp8(self) -> Tensor:
        """Mask of FP8 blocks, bool (N, G)."""
        if self.scale is not None:
            return self.scale == FP8_BLOCK
        assert self.fp8 is not None
        groups = -(-self.k // BLOCK)
        return torch.ones(self.n, groups, dtype=torch.bool, device=self.fp8.device)


def packed_bytes(n: int, k: int, fp8_blocks: int | None = None) -> int:
    """Bytes of all tensors of a packed weight (n, k).

    Args:
        n, k: rows and columns before padding.
        fp8_blocks: number of FP8 blocks; None: all.
    """
    groups = -(-k // BLOCK)
    blocks = n * groups
    fixed = torch.int64.itemsize * 2 + torch.float32.itemsize
    if fp8_blocks is None or fp8_blocks == blocks:
        return fixed + blocks * BLOCK
    nibbles = BLOCK // 2
    fp4_planes = fixed + blocks * (nibbles + 1)
    if fp8_blocks == 0:
        return fp4_planes
    return fp4_planes + fp8_blocks * nibbles + (n + 1) * torch.int32.itemsize


@dataclass(frozen=True)
class BlockCodes:
    """Codes of a mixed matrix, block by block, whatever the layout.

    Attributes:
        is_fp8: which blocks are FP8, bool (N, G).
        codes: E4M3 codes in FP8 blocks, E2M1 codes in FP4 blocks, uint8 (N, G, 16).
        scale: E4M3 codes of FP4 block scales, 0x80 in FP8 blocks, uint8 (N, G).
    """

    is_fp8: Tensor
    codes: Tensor
    scale: Tensor


def pack(codes: WeightCodes, is_fp8: Tensor) -> PackedWeight:
    """Pack a weight whose blocks are FP8 where ``is_fp8``, bool (N, G), in the mode that fits."""
    content = BlockCodes(
        is_fp8,
        torch.where(is_fp8.unsqueeze(-1), codes.fp8, codes.fp4),
        torch.where(is_fp8, torch.full_like(codes.scale, FP8_BLOCK), codes.scale),
    )
    mode = "fp8" if is_fp8.all() else "mixed" if is_fp8.any() else "fp4"
    return pack_blocks(content, codes.k, codes.t, mode)


def pack_blocks(content: BlockCodes, k: int, t: float, mode: str) -> PackedWeight:
    """Pack blocks in a given mode; the inverse of :func:`unpack`.

    Args:
        content: codes of all blocks.
        k: columns before padding.
        t: tensor scale.
        mode: a key of :data:`MODES`. ``mixed`` accepts any content, even blocks that are all of one
            format; ``fp4`` and ``fp8`` accept only blocks of that format.
    """
    common = {
        "shape": torch.tensor([len(content.scale), k], dtype=torch.int64),
        "t": torch.tensor(t, dtype=torch.float32),
    }
    is_fp8, codes = content.is_fp8, content.codes
    if mode == "fp8":
        return PackedWeight(fp8=codes.flatten(-2).contiguous(), **common)
    if mode == "fp4":
        return PackedWeight(low=_join(codes.flatten(-2)), scale=content.scale, **common)
    low_half = (codes >> 4 & ~_MANTISSA & 0xF) | (codes & _MANTISSA)
    high_half = codes >> E4M3.mantissa_bits & _EXPONENT
    return PackedWeight(
        low=_join(torch.where(is_fp8.unsqueeze(-1), low_half, codes).flatten(-2)),
        scale=content.scale,
        overflow=_join(high_half[is_fp8]),
        row_ptr=_row_ptr(is_fp8),
        **common,
    )


def unpack(packed: PackedWeight) -> BlockCodes:
    """Read the codes of a packed weight; the inverse of :func:`pack_blocks`."""
    is_fp8 = packed.is_fp8()
    if packed.fp8 is not None:
        scale = torch.full(is_fp8.shape, FP8_BLOCK, dtype=torch.uint8, device=packed.fp8.device)
        return BlockCodes(is_fp8, packed.fp8.reshape(packed.n, -1, BLOCK), scale)
    assert packed.low is not None and packed.scale is not None
    codes = _split(packed.low).reshape(packed.n, -1, BLOCK)
    if packed.overflow is not None:
        positions = _positions(is_fp8)
        low = codes.flatten(0, 1).index_select(0, positions)
        high = _split(packed.overflow) << E4M3.mantissa_bits
        joined = (low & ~_MANTISSA & 0xF) << 4 | high | (low & _MANTISSA)
        codes.flatten(0, 1).index_copy_(0, positions, joined)
    return BlockCodes(is_fp8, codes, packed.scale)


def rows(packed: PackedWeight, start: int, stop: int) -> PackedWeight:
    """Rows ``start`` to ``stop`` of a packed weight; planes are views where possible."""
    shape = torch.tensor([stop - start, packed.k])
    if packed.fp8 is not None:
        return PackedWeight(shape=shape, t=packed.t, fp8=packed.fp8[start:stop])
    assert packed.low is not None and packed.scale is not None
    low, scale = packed.low[start:stop], packed.scale[start:stop]
    if packed.overflow is None or packed.row_ptr is None:
        return PackedWeight(shape=shape, t=packed.t, low=low, scale=scale)
    row_ptr = packed.row_ptr[start : stop + 1]
    overflow = packed.overflow[row_ptr[0] : row_ptr[-1]]
    row_ptr = row_ptr - row_ptr[0]
    return PackedWeight(
        shape=shape, t=packed.t, low=low, scale=scale, overflow=overflow, row_ptr=row_ptr
    )


def append_rows(above: PackedWeight, below: PackedWeight) -> PackedWeight:
    """Concatenate the rows of two packed matrices with the same K, tensor scale and mode."""
    planes = {
        name: torch.cat([tensor, below.tensors()[name]])
        for name, tensor in above.tensors().items()
        if name not in ("shape", "t", "row_ptr")
    }
    if above.row_ptr is not None and below.row_ptr is not None:
        planes["row_ptr"] = torch.cat([above.row_ptr, above.row_ptr[-1] + below.row_ptr[1:]])
    return PackedWeight(shape=torch.tensor([above.n + below.n, above.k]), t=above.t, **planes)


def select_rows(packed: PackedWeight, index: Tensor) -> PackedWeight:
    """Select rows of a packed matrix by index, int64 (M,), in any order, with repetition."""
    content = unpack(packed)
    chosen = BlockCodes(content.is_fp8[index], content.codes[index], content.scale[index])
    return pack_blocks(chosen, packed.k, packed.t.item(), packed.mode)


def unpack_units(packed: PackedWeight) -> Tensor:
    """Decoded weight in units of t, fp32 (N, K), exact in bf16."""
    blocks = unpack(packed)
    if packed.fp8 is not None:
        return from_blocks(decode_e4m3(blocks.codes) * FP8_FACTOR, packed.k)
    # 0x80 decodes to zero, so FP8 blocks are zero here until they are filled in.
    units = decode_e2m1(blocks.codes & 0xF) * decode_e4m3(blocks.scale).unsqueeze(-1)
    if packed.overflow is not None:
        positions = _positions(blocks.is_fp8)
        codes = blocks.codes.flatten(0, 1).index_select(0, positions)
        units.flatten(0, 1).index_copy_(0, positions, decode_e4m3(codes) * FP8_FACTOR)
    return from_blocks(units, packed.k)


def validate(name: str, packed: PackedWeight) -> None:
    """Check every rule of docs/format.md, section 2.

    Args:
        name: full name of the weight, for messages.
        packed: its planes.

    Raises:
        CheckpointError: names the plane, the rule and the value that breaks it.
    """

    def require(holds: bool, plane: str, rule: str, value: object) -> None:
        if not holds:
            raise CheckpointError(f"{name}_{plane}: {rule}, got {value}")

    def require_tensor(plane: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = packed.tensors()[plane]
        require(tensor.dtype == dtype, plane, f"must be {dtype}", tensor.dtype)
        actual = tuple(tensor.shape)
        require(actual == shape, plane, f"must have shape {list(shape)}", list(actual))
        require(tensor.is_contiguous(), plane, "must be contiguous", f"strides {tensor.stride()}")
        return tensor

    present = [plane for plane in packed.tensors() if plane not in ("shape", "t")]
    if set(present) != set(MODES[packed.mode]):
        choices = " or ".join("+".join(planes) for planes in MODES.values())
        raise CheckpointError(f"{name}: planes must be {choices}, got {'+'.join(present)}")
    shape = require_tensor("shape", (2,), torch.int64)
    require(bool((shape > 0).all()), "shape", "must be positive", shape.tolist())
    t = require_tensor("t", (), torch.float32).item()
    is_normal = torch.finfo(torch.float32).tiny <= t < float("inf")
    require(is_normal, "t", "must be a positive normal number", t)
    n, groups = packed.n, -(-packed.k // BLOCK)
    if packed.mode == "fp8":
        require_tensor("fp8", (n, groups * BLOCK), torch.uint8)
    else:
        require_tensor("low", (n, groups * BLOCK // 2), torch.uint8)
        scale = require_tensor("scale", (n, groups), torch.uint8)
        fp8 = scale == FP8_BLOCK
        check_scale(f"{name}_scale", scale, fp8)
        if packed.mode == "fp4":
            _forbid(fp8, scale, f"{name}_scale: an all-FP4 weight has no byte 0x80")
        else:
            count = int(fp8.sum())
            rule = f"a mixed weight has 1 to {fp8.numel() - 1} bytes 0x80"
            require(0 < count < fp8.numel(), "scale", rule, count)
            row_ptr = require_tensor("row_ptr", (n + 1,), torch.int32)
            _forbid(
                row_ptr != _row_ptr(fp8),
                row_ptr,
                f"{name}_row_ptr: must count the bytes 0x80 of scale before each row",
            )
            require_tensor("overflow", (count, BLOCK // 2), torch.uint8)
    # Slice by slice: decoding takes many times the memory of the planes.
    step = max(1, _CHECKED_ELEMENTS // (groups * BLOCK))
    for start in range(0, n, step):
        part = rows(packed, start, min(start + step, n))
        check_codes(name, unpack(part), packed.k, first_row=start)


def check_scale(name: str, scale: Tensor, is_fp8: Tensor) -> None:
    """Check that every FP4 block's scale byte, uint8 (N, G), is a valid block scale.

    Raises:
        CheckpointError: names the first invalid byte.
    """
    valid = (scale >= SCALE_MIN_CODE) & (scale <= SCALE_MAX_CODE) | is_fp8
    _forbid(~valid, scale, f"{name}: bytes must be 0x01 to 0x7E, or 0x80 for an FP8 block")


def check_codes(name: str, content: BlockCodes, k: int, first_row: int = 0) -> None:
    """Check the rules for codes, whatever the layout they came from.

    Args:
        name: full name of the weight, for messages.
        content: codes of some rows.
        k: columns before padding.
        first_row: index of the first of these rows in the weight, for messages.

    Raises:
        CheckpointError: names the first invalid code by [row, block, element], or by
            [row, element] of the last block.
    """
    fp8, codes = content.is_fp8, content.codes
    nan = (codes & E4M3.nan_code == E4M3.nan_code) & fp8.unsqueeze(-1)
    _forbid(nan, codes, f"{name}: FP8 codes must not be NaN", first_row)
    zero = (codes & (E2M1.sign_bit - 1) == 0).all(-1) & ~fp8
    _forbid(
        zero & (content.scale != SCALE_MIN_CODE),
        content.scale,
        f"{name}: an FP4 block of zeros must have the scale 0x01",
        first_row,
    )
    last = codes[:, -1]
    beyond = torch.arange(BLOCK, device=last.device) > (k - 1) % BLOCK
    _forbid(
        (last != 0) & beyond, last, f"{name}: padding of the last block must be zero", first_row
    )


def _forbid(wrong: Tensor, values: Tensor, rule: str, first_row: int = 0) -> None:
    """Raise CheckpointError with the first of ``values`` that is ``wrong``, bytes in hex."""
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        value = int(values[tuple(index)])
        shown = f"0x{value:02X}" if values.dtype == torch.uint8 else str(value)
        index[0] += first_row
        raise CheckpointError(f"{rule}, got {shown} at {index}")


def _row_ptr(is_fp8: Tensor) -> Tensor:
    """FP8 blocks before each row, int32 (N + 1,)."""
    row_ptr = torch.zeros(len(is_fp8) + 1, dtype=torch.int32, device=is_fp8.device)
    row_ptr[1:] = is_fp8.sum(-1).cumsum(0)
    return row_ptr


def _positions(is_fp8: Tensor) -> Tensor:
    """Indices of the FP8 blocks, int64: copying by index is faster than by mask."""
    return is_fp8.flatten().nonzero().squeeze(-1)


def _join(nibbles: Tensor) -> Tensor:
    """Join nibbles (..., 2m) into bytes (..., m), the even element low."""
    return (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).contiguous()


def _split(packed: Tensor) -> Tensor:
    """Split bytes (..., m) into nibbles (..., 2m), the low one first."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)
