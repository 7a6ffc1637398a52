"""Terms of the score: the difference of a value's FP4 and FP8 versions, squared and weighted.

In units of 2**-10, with ``sig`` and ``shift`` the parts of a code (``rtl.decode``),

    q4 = e2m1_int * sig_s << shift_s            q8 = 12 * e4m3_int = 3 * sig_8 << (2 + shift_8)

Either version lies anywhere in 22 bits, but their difference does not. Where the FP4 code is not
zero, the value is near its scale: no bit of either version lies more than three below the last bit
of sig_s. Where it is zero, the difference is q8, which has few bits. So ``|q4 - q8| = d << unit``,
where d has 9 bits: :func:`difference_bounds` enumerates all scales and codes. The square has a
9-bit operand, and one shift places the product with the sensitivity.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cache

from amaranth.hdl import Module, Mux, Value

from fgmp.formats.codec import E2M1_MIDPOINTS
from fgmp.formats.rules import SCALES
from fgmp.formats.spec import E2M1, E4M3, FP8_FACTOR, SCALE_MIN_CODE
from fgmp.hardware.datapath import FP8_GAIN, integer, integer_max
from fgmp.hardware.rtl.decode import decode_magnitude, named, shifted
from fgmp.hardware.rtl.search import weight

_ALIGNED = 3
"""Bits of a difference below the last bit of the scale's significand, at most."""

_FP8_TWOS = (FP8_GAIN & -FP8_GAIN).bit_length() - 1
_FP8_ODD = FP8_GAIN >> _FP8_TWOS

TERM_BITS = (integer_max(E4M3) << 2 * 19).bit_length()
"""No difference exceeds 2**19 (docs/numerics.md, section 5)."""


@dataclass(frozen=True)
class DifferenceBounds:
    """Bounds of the difference of a value's two versions, over all scales and codes.

    Attributes:
        magnitude: largest ``d``.
        unit: largest ``unit``.
        alignment: largest shift of an FP8 significand against a scale's.
    """

    magnitude: int
    unit: int
    alignment: int


@cache
def difference_bounds(offsets: tuple[int, ...] = SCALES["max"]) -> DifferenceBounds:
    """Bounds by enumeration of every scale, FP8 code and FP4 code that can meet in a block.

    Args:
        offsets: offsets of the scale's code from that of the block's largest magnitude.
    """
    magnitude = largest = alignment = 0
    for scale in range(SCALE_MIN_CODE, E4M3.max_code + 1):
        base = max(_shift(scale) - _ALIGNED, 0)
        for code in range(min(scale - min(offsets), E4M3.max_code) + 1):
            fp8 = integer(E4M3, code) * FP8_GAIN
            for fp4 in _fp4_codes(code, scale):
                if fp4:
                    unit, aligned = base, _FP8_TWOS + _shift(code) - base
                    alignment = max(alignment, aligned)
                else:
                    unit, aligned = _FP8_TWOS + _shift(code), 0
                difference = abs(integer(E2M1, fp4) * integer(E4M3, scale) - fp8)
                assert aligned >= 0 and difference % (1 << unit) == 0
                magnitude = max(magnitude, difference >> unit)
                largest = max(largest, unit)
    return DifferenceBounds(magnitude, largest, alignment)


def _shift(code: int) -> int:
    """The shift of ``rtl.decode`` for a constant code."""
    return max(code >> E4M3.mantissa_bits, 1) - 1


def _fp4_codes(code: int, scale: int) -> range:
    """FP4 codes, under this scale, of the values that round to the FP8 code ``code``."""
    ends = [E4M3.magnitude(max(code - 1, 0)), E4M3.magnitude(code + 1)]
    low, high = (
        (E4M3.magnitude(code) + end) / 2 * FP8_FACTOR / E4M3.magnitude(scale) for end in ends
    )
    if code == E4M3.max_code:  # values that saturate, too
        high = Fraction(FP8_FACTOR)
    passed = [sum(q > mid for mid in E2M1_MIDPOINTS) for q in (low, high)]
    return range(passed[0], sum(high >= mid for mid in E2M1_MIDPOINTS) + 1)


def difference(
    m: Module, fp4: Value, fp8: Value, scale: Value, offsets: tuple[int, ...]
) -> tuple[Value, Value]:
    """``d`` and ``unit`` from the codes without their signs, which are equal."""
    bounds = difference_bounds(offsets)
    s = decode_magnitude(m, E4M3, scale)
    near, high = decode_magnitude(m, E2M1, fp4), decode_magnitude(m, E4M3, fp8)
    below = named(m, "below", Mux(s.shift < _ALIGNED, s.shift, _ALIGNED))
    base = named(m, "base", s.shift - below)[: len(s.shift)]
    zero = ~near.significand.any()
    place = named(m, "place", high.shift + _FP8_TWOS)
    aligned = named(m, "aligned", Mux(zero, 0, place - base)[: bounds.alignment.bit_length()])
    element = shifted(m, near.significand, near.shift, near.shift_max)
    q4 = shifted(m, named(m, "q4", element * s.significand), below, _ALIGNED)
    q8 = named(m, "q8", high.significand * _FP8_ODD)
    q8 = shifted(m, q8, aligned, bounds.alignment)
    signed_difference = named(m, "difference", q4 - q8)
    magnitude = named(m, "magnitude", abs(signed_difference))
    unit = named(m, "unit", Mux(zero, place, base)[: bounds.unit.bit_length()])
    return magnitude[: bounds.magnitude.bit_length()], unit


def weighted(m: Module, d: Value, unit: Value, sensitivity: Value) -> tuple[Value, Value]:
    """``g_int * difference**2`` as a value and its shift."""
    g = weight(m, sensitivity)
    square = named(m, "square", d * d)
    value = named(m, "weighted", square * g.significand)
    return value, named(m, "place", (unit << 1) + g.shift)


def placed(m: Module, value: Value, shift: Value) -> Value:
    """The term: ``value`` at its place."""
    most = 2 * difference_bounds().unit + (1 << E4M3.exponent_bits) - 2
    return shifted(m, value, shift, most)[:TERM_BITS]
