"""Encode and decode single E2M1 and E4M3 values, and cut rows into blocks.

Rounding is to nearest, ties to the even code, saturating at the largest magnitude. Encoders take
finite fp32. A code has the sign of the value that it represents: a small negative value becomes
negative zero, while a zero of either sign becomes code 0. A quotient that underflowed no longer
shows that sign, so encoders can take it from a second argument.
"""

import torch
from torch import Tensor

from fgmp.formats.spec import BLOCK, E2M1, E4M3, Minifloat


def _table(fmt: Minifloat) -> Tensor:
    positive = torch.tensor(fmt.magnitudes)
    if fmt.has_nan:
        positive = torch.cat([positive, torch.tensor([torch.nan])])
    return torch.cat([positive, -positive])


_E2M1_VALUES = _table(E2M1)
_E4M3_VALUES = _table(E4M3)

# Midpoints between neighbours, in code order. A quotient on a midpoint goes to the even code: up
# from an odd code, down to an even one.
E2M1_MIDPOINTS = tuple(
    (low + high) / 2 for low, high in zip(E2M1.magnitudes, E2M1.magnitudes[1:], strict=False)
)


def decode_e2m1(codes: Tensor) -> Tensor:
    """Decode E2M1 codes, uint8 0..15, to fp32 of the same shape."""
    return _look_up(_E2M1_VALUES, codes)


def decode_e4m3(codes: Tensor) -> Tensor:
    """Decode E4M3 codes, uint8, to fp32 of the same shape; 0x7F and 0xFF give NaN."""
    return _look_up(_E4M3_VALUES, codes)


def _look_up(table: Tensor, codes: Tensor) -> Tensor:
    # index_select with a flat index takes a third of the time of table[codes].
    return table.to(codes.device).index_select(0, codes.flatten().int()).view(codes.shape)


def encode_e4m3(x: Tensor, sign_of: Tensor | None = None) -> Tensor:
    """Encode fp32 as E4M3 codes, uint8: to nearest even, saturating at 448, NaN as 0x7F.

    Args:
        x: fp32.
        sign_of: fp32 of the same shape; a code gets the sign bit where this is negative, even
            if ``x`` underflowed to zero. Default: ``x``.
    """
    # The cast alone would saturate on some devices only, hence the clamp.
    codes = x.abs().clamp(max=E4M3.max).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = codes | ((x if sign_of is None else sign_of) < 0).to(torch.uint8) << (E4M3.bits - 1)
    return torch.where(x.isnan(), torch.full_like(codes, E4M3.nan_code), codes)


def encode_e2m1(quotient: Tensor, sign_of: Tensor) -> Tensor:
    """Encode fp32 quotients as E2M1 codes, uint8 0..15, by seven comparisons.

    Args:
        quotient: fp32, the value over its scale; its sign is ignored.
        sign_of: broadcastable fp32; a code gets the sign bit where this is negative.
    """
    magnitude = quotient.abs()
    codes = torch.zeros(quotient.shape, dtype=torch.uint8, device=quotient.device)
    for below, midpoint in enumerate(E2M1_MIDPOINTS):
        passed = magnitude >= midpoint if below % 2 else magnitude > midpoint
        codes += passed
    return codes | (sign_of < 0).to(torch.uint8) << (E2M1.bits - 1)


def round_e2m1(quotient: Tensor) -> Tensor:
    """Round fp32 quotients to the nearest E2M1 value, ties to even, saturating; fp32, same shape.

    Equals ``decode_e2m1(encode_e2m1(q, q))`` and is faster: the exponent of a quotient gives the
    step of the grid there, and division by a power of two is exact.
    """
    clamped = quotient.clamp(-E2M1.max, E2M1.max)
    exponent = clamped.view(torch.int32).bitwise_and(0x7F80_0000).clamp_(min=0x3F80_0000)
    step = (exponent - 0x0080_0000).view(torch.float32)
    return clamped.div_(step).round_().mul_(step)


def to_blocks(x: Tensor) -> Tensor:
    """Cut (..., K) into blocks (..., G, 16), G = ceil(K / 16), padded with zeros."""
    ragged = -x.shape[-1] % BLOCK
    if ragged:
        x = torch.nn.functional.pad(x, (0, ragged))
    blocks: Tensor = x.unflatten(-1, (-1, BLOCK))
    return blocks


def block_sums(terms: Tensor) -> Tensor:
    """Sums over blocks (..., 16) to (...), adding halves to halves: one order on every machine."""
    width = BLOCK
    while width > 1:
        width //= 2
        terms = terms[..., :width] + terms[..., width:]
    return terms.squeeze(-1)


def from_blocks(blocks: Tensor, k: int) -> Tensor:
    """Join blocks (..., G, 16) and drop the padding: (..., k)."""
    return blocks.flatten(-2)[..., :k]
