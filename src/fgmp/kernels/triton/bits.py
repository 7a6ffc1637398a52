"""Device functions that encode and decode E2M1, E4M3 and bf16.

They use integers, and fp32 operations whose result is exact or rounded once by IEEE. There is no
cast to or from an 8- or 16-bit float: Triton's interpreter truncates fp32 to bf16, rounds fp32 to
fp8 wrongly and loses subnormals, so a kernel with such casts could not be tested without a GPU.
There is no division either, since ``/`` on a GPU is not IEEE's.

A code is decoded to one of two forms. Its *integer* is its value as a multiple of the format's
smallest magnitude, 2**-9 for E4M3 and 2**-1 for E2M1. Its *pattern* is a bf16 number. Codes and
patterns are stored in *lanes*, the two halves of an int32, so that one operation decodes two:

    codes       lane = ... s ee m, ... s mmm or ... s eeee mmm, with other bits above
    patterns    lane = bf16 with the code's exponent and mantissa in place, bias uncorrected

An exponent field of zero means subnormal in bf16 as in E2M1 and E4M3. An uncorrected pattern is
therefore the value times a power of two for every code: 2**-126 for E2M1, 2**-120 for E4M3. The
multiplication by the block's scale corrects it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.formats.codec import E2M1_MIDPOINTS
from fgmp.formats.spec import BLOCK, E2M1, E4M3, FP8_BLOCK, FP8_FACTOR

# fp32 and bf16: 8 exponent bits and a bias of 127, 23 and 7 mantissa bits.
_BIAS = 127
_FP32_MANTISSA = 23
_BF16_MANTISSA = 7

_E4M3_MAX = tl.constexpr(E4M3.max)
_E4M3_BIAS = tl.constexpr(2.0 ** (_BIAS - E4M3.bias))
_TO_FP32 = tl.constexpr(_FP32_MANTISSA - E4M3.mantissa_bits)
_LOWEST_EXPONENT = 1 - E4M3.bias + _BIAS
_LOWEST_OCTAVE = tl.constexpr(_LOWEST_EXPONENT << _FP32_MANTISSA)
_LOWEST = tl.constexpr(_LOWEST_EXPONENT)
_TO_LAST_BIT = tl.constexpr(_FP32_MANTISSA - E4M3.mantissa_bits << _FP32_MANTISSA)
_EXPONENT_FIELD = tl.constexpr(0xFF << _FP32_MANTISSA)
_MANTISSA_BITS = tl.constexpr(E4M3.mantissa_bits)
_MANTISSA = tl.constexpr((1 << E4M3.mantissa_bits) - 1)
_IMPLICIT = tl.constexpr(1 << E4M3.mantissa_bits)

_ONE_IS_LAST_BIT = tl.constexpr(2.0**_FP32_MANTISSA)
_BITS_OF_ONE_IS_LAST_BIT = tl.constexpr(_FP32_MANTISSA + _BIAS << _FP32_MANTISSA)

_M0, _M1, _M2, _M3, _M4, _M5, _M6 = (tl.constexpr(m) for m in E2M1_MIDPOINTS)
# Twice the magnitudes of E2M1, eight nibbles: 0xC8643210, which is negative as an int32.
_HALVES = tl.constexpr(
    sum(int(2 * m) << 4 * code for code, m in enumerate(E2M1.magnitudes)) - (1 << 32)
)

FP8_SCALE = tl.constexpr(FP8_BLOCK)
_HIGH_LANE = tl.constexpr(-(1 << 16))
_E4M3_CODE = tl.constexpr(E4M3.sign_bit - 1)
_FP8_BLOCK = tl.constexpr(FP8_BLOCK)
_TWO = 0x0001_0001
_NIBBLES = tl.constexpr(0xF * _TWO)
_NIBBLE_SIGNS = tl.constexpr(E2M1.sign_bit * _TWO)
_NIBBLE_MAGNITUDES = tl.constexpr((E2M1.sign_bit - 1) * _TWO)
_BYTE_SIGNS = tl.constexpr(E4M3.sign_bit * _TWO)
_BYTE_MAGNITUDES = tl.constexpr((E4M3.sign_bit - 1) * _TWO)
_SIGN_OF_NIBBLE = tl.constexpr(0x8000 // E2M1.sign_bit)
_SIGN_OF_BYTE = tl.constexpr(0x8000 // E4M3.sign_bit)
_PLACE_E2M1 = tl.constexpr(1 << _BF16_MANTISSA - E2M1.mantissa_bits)
_PLACE_E4M3 = tl.constexpr(1 << _BF16_MANTISSA - E4M3.mantissa_bits)
_PLACE_EXPONENT = tl.constexpr(1 << _BF16_MANTISSA)

UNIT_LIFT = tl.constexpr(2.0**16)
_E2M1_MULTIPLIER = tl.constexpr(2.0 ** (_BIAS - E2M1.bias - 16))
_E4M3_MULTIPLIER = tl.constexpr(FP8_FACTOR * 2.0 ** (_BIAS - E4M3.bias - 16))
"""A pattern times its block's multiplier is the decoded value over UNIT_LIFT. A multiplier with the
whole of 2**126 would overflow bf16 for large scales."""

VALUES = tl.constexpr(BLOCK)
NIBBLE_WORDS = tl.constexpr(BLOCK // 8)
BYTE_WORDS = tl.constexpr(BLOCK // 4)
"""Per block: values, 32-bit words of nibbles, and 32-bit words of bytes."""


@triton.jit
def bf16_bits(x):
    """Round fp32 to bf16, to nearest even, NaN to 0x7FC0; the bits in an int32."""
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x != x, 0x7FC0, rounded & 0xFFFF)


@triton.jit
def from_bf16_bits(bits):
    """Convert bf16 bits in the low half of an int32 to fp32; the high half is ignored."""
    return (bits << 16).to(tl.float32, bitcast=True)


def as_loaded(x: Tensor) -> Tensor:
    """View of ``x`` for :func:`load_rounded`: bf16 as its bits, float64 rounded to bf16 first."""
    if x.dtype == torch.float64:
        x = x.to(torch.bfloat16)
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def load_rounded(pointers, mask):
    """Load floats of any dtype, rounded to bf16, as fp32; zeros where masked."""
    x = tl.load(pointers, mask=mask, other=0)
    if x.dtype == tl.int16:
        return from_bf16_bits(x.to(tl.int32))
    else:
        return from_bf16_bits(bf16_bits(x.to(tl.float32)))


def as_stored(x: Tensor) -> Tensor:
    """View of ``x`` for :func:`store_float`: bf16 as its bits."""
    return x.view(torch.int16) if x.dtype == torch.bfloat16 else x


@triton.jit
def store_exact(pointers, x, mask):
    """Store fp32 values that the pointers' dtype represents exactly."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def store_float(pointers, x, mask):
    """Store fp32 values in the pointers' dtype, rounded once to nearest even."""
    if pointers.dtype.element_ty == tl.int16:
        tl.store(pointers, bf16_bits(x).to(tl.int16), mask=mask)
    else:
        tl.store(pointers, x.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def round_to_integer(x):
    """Round fp32 from 0 to 2**22 to the nearest int32, ties to even, by an fp32 addition."""
    return (x + _ONE_IS_LAST_BIT).to(tl.int32, bitcast=True) - _BITS_OF_ONE_IS_LAST_BIT


@triton.jit
def encode_e4m3(magnitude):
    """Encode non-negative fp32 as (E4M3 code, its integer), int32: to nearest even, saturating.

    The addition of a power of two whose last bit is the code's last bit rounds to the code's grid.
    The bits of the sum, less those of that power, count the steps of the grid: 0 to 8 in the
    subnormal octave, 8 to 16 above.
    """
    clamped = tl.minimum(magnitude, _E4M3_MAX)
    octave = tl.maximum(clamped.to(tl.int32, bitcast=True) & _EXPONENT_FIELD, _LOWEST_OCTAVE)
    anchor = octave + _TO_LAST_BIT
    rounded = clamped + anchor.to(tl.float32, bitcast=True)
    steps = rounded.to(tl.int32, bitcast=True) - anchor
    exponent = (octave >> 23) - _LOWEST
    return steps + (exponent << _MANTISSA_BITS), steps << exponent


@triton.jit
def e4m3_integer(code):
    """Integer of an E4M3 code without its sign bit, int32."""
    exponent = code >> _MANTISSA_BITS
    mantissa = code & _MANTISSA
    return tl.where(exponent > 0, mantissa | _IMPLICIT, mantissa) << tl.maximum(exponent - 1, 0)


@triton.jit
def e4m3_value(code):
    """Value of an E4M3 code without its sign bit, int32, in fp32."""
    return (code << _TO_FP32).to(tl.float32, bitcast=True) * _E4M3_BIAS


@triton.jit
def encode_e2m1(magnitude, scale):
    """Encode the exact quotient of two non-negative fp32 values as an E2M1 code, int32.

    Three comparisons with midpoint * scale, which is exact, find the code by bisection. Ties go to
    the even code: at each level of the bisection, either all midpoints lie above an odd code or
    all above an even one.
    """
    high = magnitude >= scale * _M3
    middle = magnitude >= tl.where(high, scale * _M5, scale * _M1)
    above = tl.where(middle, scale * _M6, scale * _M4)
    below = tl.where(middle, scale * _M2, scale * _M0)
    low = magnitude > tl.where(high, above, below)
    return (high.to(tl.int32) << 2) | (middle.to(tl.int32) << 1) | low.to(tl.int32)


@triton.jit
def e2m1_integer(code):
    """Integer of an E2M1 code without its sign bit, int32, from a table of eight nibbles."""
    return (tl.full([], _HALVES, tl.int32) >> (code << 2)) & 0xF


@triton.jit
def multipliers(scale):
    """Multipliers of a block's patterns for its scale byte, int32; fp32, exact in bf16."""
    fp4 = e4m3_value(scale & _E4M3_CODE) * _E2M1_MULTIPLIER
    return tl.where(scale == _FP8_BLOCK, _E4M3_MULTIPLIER, fp4)


@triton.jit
def is_fp8_block(scale):
    """Mask of the scale bytes, int32, that mark FP8 blocks."""
    return scale == _FP8_BLOCK


@triton.jit
def nibble_lanes(words):
    """Spread words of 8 nibbles (...) over lanes (..., 2, 2).

    The word at [j0, j1] has nibble 2 j1 + j0 at the bottom of its low lane, and the fourth nibble
    after it at the bottom of its high lane. The bits above a nibble must be masked.
    """
    shifted = tl.join(words, words >> 4)
    return tl.join(shifted, shifted >> 8)


@triton.jit
def byte_lanes(words):
    """Spread words of 4 bytes (...) over lanes (..., 2), byte j and byte j + 2; to be masked."""
    return tl.join(words, words >> 8)


@triton.jit
def e2m1_patterns(low):
    """Patterns of lanes of E2M1 codes."""
    return (low & _NIBBLE_SIGNS) * _SIGN_OF_NIBBLE + (low & _NIBBLE_MAGNITUDES) * _PLACE_E2M1


@triton.jit
def e4m3_patterns(codes):
    """Patterns of lanes of E4M3 codes."""
    return (codes & _BYTE_SIGNS) * _SIGN_OF_BYTE + (codes & _BYTE_MAGNITUDES) * _PLACE_E4M3


@triton.jit
def mixed_patterns(low, overflow, place):
    """Patterns of lanes of the planes low and overflow, in FP4 and FP8 blocks.

    Args:
        low: lanes of the low plane.
        overflow: lanes of the overflow plane, 0 in FP4 blocks.
        place: position of the block's format, from :func:`places`.
    """
    signs = (low & _NIBBLE_SIGNS) * _SIGN_OF_NIBBLE
    magnitudes = (low & _NIBBLE_MAGNITUDES) * place
    return signs + magnitudes + (overflow & _NIBBLES) * _PLACE_EXPONENT


@triton.jit
def places(scale):
    """Factors that shift a nibble's magnitude bits to their place in a pattern, by scale byte."""
    return tl.where(scale == _FP8_BLOCK, _PLACE_E4M3, _PLACE_E2M1)


@triton.jit
def halves(pairs):
    """Low and high value, fp32, of two lanes of bf16 bits."""
    low = (pairs << 16).to(tl.float32, bitcast=True)
    return low, (pairs & _HIGH_LANE).to(tl.float32, bitcast=True)
