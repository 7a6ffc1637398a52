"""The arithmetic of docs/numerics.md a second time, in exact rationals and nothing else.

Written from the document and not from the code: it imports neither fgmp nor torch, its tables
are typed out, its rounding compares distances, and a float enters as the rational that its bits
mean. Slow, a block at a time; the tests hold the fast code to it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

E2M1 = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]

# E4M3 in units of 2**-9: two rows of one step each, then steps that double.
E4M3 = [
    Fraction(n, 512)
    for n in (
        *(0, 1, 2, 3, 4, 5, 6, 7),
        *(8, 9, 10, 11, 12, 13, 14, 15),
        *(16, 18, 20, 22, 24, 26, 28, 30),
        *(32, 36, 40, 44, 48, 52, 56, 60),
        *(64, 72, 80, 88, 96, 104, 112, 120),
        *(128, 144, 160, 176, 192, 208, 224, 240),
        *(256, 288, 320, 352, 384, 416, 448, 480),
        *(512, 576, 640, 704, 768, 832, 896, 960),
        *(1024, 1152, 1280, 1408, 1536, 1664, 1792, 1920),
        *(2048, 2304, 2560, 2816, 3072, 3328, 3584, 3840),
        *(4096, 4608, 5120, 5632, 6144, 6656, 7168, 7680),
        *(8192, 9216, 10240, 11264, 12288, 13312, 14336, 15360),
        *(16384, 18432, 20480, 22528, 24576, 26624, 28672, 30720),
        *(32768, 36864, 40960, 45056, 49152, 53248, 57344, 61440),
        *(65536, 73728, 81920, 90112, 98304, 106496, 114688, 122880),
        *(131072, 147456, 163840, 180224, 196608, 212992, 229376),
    )
]

ALL_FP8 = -1
ALL_FP4 = 2**63 - 1


def nearest(table: Sequence[Fraction], value: Fraction) -> int:
    """Index of the entry nearest to ``value`` >= 0; a tie goes to the even index."""
    above = bisect_right(table, value)
    if above == len(table):
        return above - 1
    low, high = value - table[above - 1], table[above] - value
    if low == high:
        return above - above % 2
    return above - 1 if low < high else above


def fl32(value: Fraction) -> Fraction:
    """``value`` rounded to fp32, to nearest even, with subnormals and without overflow."""
    if value == 0:
        return Fraction(0)
    magnitude = abs(value)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (max(exponent, -126) - 23)
    rounded = round(magnitude / ulp) * ulp  # round() of a Fraction takes ties to even
    return rounded if value > 0 else -rounded


def float_of_bits(bits: int, width: int) -> Fraction | None:
    """The value of bf16 (width 16) or fp32 (width 32) bits; None for infinities and NaN."""
    mantissa_bits = width - 9
    sign = -1 if bits >> (width - 1) else 1
    exponent = bits >> mantissa_bits & 0xFF
    mantissa = bits & ((1 << mantissa_bits) - 1)
    if exponent == 0xFF:
        return None
    if exponent:
        mantissa |= 1 << mantissa_bits
    return sign * mantissa * Fraction(2) ** (max(exponent, 1) - 127 - mantissa_bits)


def bits_of_float(value: Fraction) -> int:
    """fp32 bits of ``value`` rounded to fp32; infinity from 2**128 - 2**103 on."""
    sign = 0x8000_0000 if value < 0 else 0
    magnitude = abs(fl32(value))
    if magnitude >= Fraction(2) ** 128:
        return sign | 0x7F80_0000
    if magnitude < Fraction(2) ** -126:
        return sign | int(magnitude * 2**149)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    if magnitude < Fraction(2) ** exponent:
        exponent -= 1
    return sign | (exponent + 126 << 23) + int(magnitude / Fraction(2) ** (exponent - 23))


def signed(code: int, value: Fraction, sign_bit: int) -> int:
    """``code`` with its sign bit set where ``value`` is negative."""
    return code | sign_bit if value < 0 else code


def weight_block(
    x: list[Fraction], t: Fraction, scale: int | None = None
) -> tuple[int, list[int], list[int]]:
    """(scale code, E2M1 codes, E4M3 codes) of 16 weights under the tensor scale ``t``."""
    u = [fl32(v / fl32(6 * t)) for v in x]
    if scale is None:
        scale = max(1, nearest(E4M3, max(abs(v) for v in u)))
    step = fl32(E4M3[scale] * t)
    fp4 = [signed(nearest(E2M1, abs(fl32(v / step))), v, 8) for v in x]
    fp8 = [signed(nearest(E4M3, abs(w)), v, 128) for w, v in zip(u, x, strict=True)]
    return scale, fp4, fp8


def activation_block(
    x: list[Fraction], r: Fraction, sensitivity: list[int] | None = None
) -> tuple[int, list[int], list[int]]:
    """(scale code, E2M1 codes, E4M3 codes) of 16 finite bf16 values under the multiplier r.

    With ``sensitivity`` the scale is searched: of the codes one below, equal to, four and five
    above that of the largest value, the one of least error, the larger of equals.
    """
    u = [v * r for v in x]
    fp8 = [signed(nearest(E4M3, abs(v)), v, 128) for v in u]
    largest = max(1, *(code & 127 for code in fp8))
    if sensitivity is None:
        return largest, fp4_under(largest, u), fp8
    tried = {min(max(largest + offset, 1), 126) for offset in (-1, 0, 4, 5)}
    scale = min(tried, key=lambda s: (error(s, fp4_under(s, u), u, sensitivity), -s))
    fp4 = fp4_under(scale, u)
    return scale if any(code & 7 for code in fp4) else 1, fp4, fp8


def fp4_under(scale: int, u: list[Fraction]) -> list[int]:
    """E2M1 codes under a scale code."""
    return [signed(nearest(E2M1, 6 * abs(v) / E4M3[scale]), v, 8) for v in u]


def target(u: Fraction) -> int:
    """v: 6u in steps of 2**-10, ties to even, at most 2688."""
    return max(-2688 * 2**10, min(2688 * 2**10, round(6 * u * 2**10)))


def error(scale: int | None, codes: list[int], u: list[Fraction], sensitivity: list[int]) -> int:
    """sum g_int (q - v)**2 of E2M1 codes under a scale, or of E4M3 codes where that is None."""
    total = 0
    for code, value, weight in zip(codes, u, sensitivity, strict=True):
        if scale is None:
            q = 6 * E4M3[code & 127] * (-1 if code & 128 else 1)
        else:
            q = E2M1[code & 7] * E4M3[scale] * (-1 if code & 8 else 1)
        total += int(E4M3[weight] * 2**9) * (int(q * 2**10) - target(value)) ** 2
    return total


def benefit(
    scale: int, fp4: list[int], fp8: list[int], u: list[Fraction], sensitivity: list[int]
) -> int:
    """S of the rule ``benefit``: how much less FP8 errs than FP4, at least 0."""
    return max(0, error(scale, fp4, u, sensitivity) - error(None, fp8, u, sensitivity))


def score(scale: int, fp4: list[int], fp8: list[int], sensitivity: list[int]) -> int:
    """S, from the codes of a block."""
    total = Fraction(0)
    for low, high, weight in zip(fp4, fp8, sensitivity, strict=True):
        q4 = E2M1[low & 7] * E4M3[scale] * (-1 if low & 8 else 1)
        q8 = 6 * E4M3[high & 127] * (-1 if high & 128 else 1)
        total += E4M3[weight] * 2**9 * ((q4 - q8) * 2**10) ** 2
    assert total.denominator == 1
    return int(total)
