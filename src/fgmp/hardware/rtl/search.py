"""Searched scales and the rule ``benefit``: errors against the value itself, without a square.

In units of 2**-10, with v = 6 u rounded to an integer (docs/numerics.md, section 5), the errors are
``E4(s) = sum g (q4 - v)**2`` under each scale that is tried, and ``E8 = sum g (q8 - v)**2``. All of
them contain ``sum g v**2``. Without it, q4 being an integer e of four bits times the scale,

    E4(s) - sum g v**2 = sum g q4 (q4 - 2 v) = s * (s * sum g e**2 - 2 * sum e g v)
    sum g v**2 - E8    = sum g q8 (2 v - q8)

The first orders the scales, and both together are S. The product ``g v`` is computed once for all
scales; ``e g v`` is one of few multiples of it; s is common to a block. Further products are ``g
q8``, of two significands, and ``g q8 (2 v - q8)``. The sum of squares would need 65 bits, but only
differences of such sums are needed.

By the rule ``truncated`` v and q8 are integers of 8 bits, in units of the last bit of the lowest
scale tried. The sums are the same, in the square of that unit.
"""

from amaranth.hdl import Const, Module, Mux, Value

from fgmp.formats.spec import E2M1, E4M3, SCALE_MIN_CODE
from fgmp.hardware.datapath import FP8_GAIN
from fgmp.hardware.rtl.decode import Decoded, decode_magnitude, named, shifted
from fgmp.hardware.rtl.encode import QUARTERS_BITS

SHIFT_MAX = (1 << E4M3.exponent_bits) - 2
"""Largest shift of an E4M3 code (``rtl.decode``)."""

_UNSIGNED_SCORE = 60
"""S is below 2**60 in magnitude."""

SCORE_BITS = _UNSIGNED_SCORE + 1
"""Width of S in two's complement; partial sums may wrap around."""

PRODUCT_BITS = SCORE_BITS - (FP8_GAIN & -FP8_GAIN).bit_length() + 1
"""Width of the terms of ``sum g q8 (2 v - q8)`` over :data:`~fgmp.hardware.datapath.FP8_GAIN`,
whose powers of two are applied after the sum."""


def candidate(m: Module, nearest: Value, offset: int) -> Value:
    """The scale code ``nearest + offset``, clamped to valid codes of scales."""
    if offset < 0:
        low = SCALE_MIN_CODE - offset
        return named(m, "tried", Mux(nearest < low, SCALE_MIN_CODE, nearest + offset)[:7])
    high = E4M3.max_code - offset
    return named(m, "tried", Mux(nearest > high, E4M3.max_code, nearest + offset)[:7])


def weight(m: Module, sensitivity: Value) -> Decoded:
    """Parts of g from a 7-bit code; or of g / 8 from the exponent bits of a power of two."""
    if len(sensitivity) == E4M3.bits - 1:
        return decode_magnitude(m, E4M3, sensitivity)
    one = named(m, "one", sensitivity.any())
    shift = named(m, "shift", (sensitivity - one)[: E4M3.exponent_bits])
    return Decoded(sign=Const(0, 1), significand=one, shift=shift, shift_max=SHIFT_MAX)


def weighted_target(m: Module, fixed: Value, sensitivity: Value) -> Value:
    """v times the significand of g; v is ``encode.fixed_point`` rounded to nearest even."""
    lost, half, whole = fixed[0], fixed[1], fixed[2:]
    v = named(m, "v", (whole + (half & (lost | whole[0])))[: len(whole)])
    g = weight(m, sensitivity)
    return named(m, "target", g.significand * v)


def multiples(m: Module, target: Value, sensitivity: Value) -> tuple[Value, Value, Value]:
    """g, g v and 3 g v."""
    g = weight(m, sensitivity)
    once = shifted(m, target, g.shift, g.shift_max)
    return shifted(m, g.significand, g.shift, g.shift_max), once, once + (once << 1)


def chosen(m: Module, fp4: Value, g: Value, once: Value, thrice: Value) -> tuple[Value, Value]:
    """``g e**2`` and ``e g v`` for e = 0, 1, 2, 3, 4, 6, 8 or 12."""
    e = decode_magnitude(m, E2M1, fp4)
    one, two = e.significand[0], e.significand[1]
    nine = named(m, "nine", g + (g << 3))
    square = named(m, "square", Mux(two, Mux(one, nine, g << 2), Mux(one, g, 0)))
    linear = named(m, "linear", Mux(two, Mux(one, thrice, once << 1), Mux(one, once, 0)))
    twice = Value.cast(e.shift << 1)
    return shifted(m, square, twice, 2 * e.shift_max), shifted(m, linear, e.shift, e.shift_max)


def inner(m: Module, squares: Value, linear: Value, scale: Decoded) -> Value:
    """``s * sum g e**2 - 2 * sum e g v``."""
    product = named(m, "product", scale.significand * squares)
    return named(m, "inner", shifted(m, product, scale.shift, scale.shift_max) - (linear << 1))


def outer(m: Module, inner: Value, scale: Decoded, above: Value) -> Value:
    """``s * inner`` in units of the lowest scale's last bit, from which s is shifted by ``above``,
    0 or 1."""
    product = named(m, "product", inner * scale.significand)
    return named(m, "outer", Mux(above, product << 1, product))


def fp8_target(m: Module, target: Value, sensitivity: Value, fp8: Value) -> Value:
    """``2 v - q8`` times the significand of g; not negative, because q8 is v to nearest."""
    g, e = weight(m, sensitivity), decode_magnitude(m, E4M3, fp8)
    product = named(m, "product", g.significand * e.significand)
    q8 = shifted(m, named(m, "q8", product * FP8_GAIN), e.shift, e.shift_max)
    return named(m, "beyond", ((target << 1) - q8)[: len(target) + 1])


def fp8_product(m: Module, beyond: Value, fp8: Value) -> Value:
    """:func:`fp8_target` times the significand of q8."""
    return named(m, "product", decode_magnitude(m, E4M3, fp8).significand * beyond)


def fp8_term(m: Module, product: Value, fp8: Value, sensitivity: Value) -> Value:
    """``g q8 (2 v - q8)`` over FP8_GAIN."""
    e, g = decode_magnitude(m, E4M3, fp8), weight(m, sensitivity)
    place = named(m, "place", e.shift + g.shift)
    return shifted(m, product, place, e.shift_max + g.shift_max)[:PRODUCT_BITS]


def short_target(m: Module, quarters: Value) -> Value:
    """v by the rule ``truncated``: ``encode.in_quarters`` rounded to nearest."""
    halves = quarters[1:]
    return named(m, "v", (halves + 1)[1:])


def short_fp8(m: Module, fp8: Value, lowest: Value) -> Value:
    """q8 rounded to nearest in units of ``2**lowest``, halves away from zero."""
    e = decode_magnitude(m, E4M3, fp8)
    down = named(m, "down", (lowest + 1 - e.shift)[: E4M3.exponent_bits])
    # In halves of half the unit: only the block's largest has a shift above the lowest.
    halves = named(m, "halves", (e.significand * (4 * FP8_GAIN)) >> down)
    return named(m, "q8", (halves + 1)[1 : 1 + QUARTERS_BITS])


def short_multiples(m: Module, v: Value, sensitivity: Value) -> tuple[Value, Value, Value]:
    """:func:`multiples` from an unweighted v."""
    target = named(m, "target", weight(m, sensitivity).significand * v)
    return multiples(m, target, sensitivity)


def short_beyond(m: Module, v: Value, q8: Value, sensitivity: Value) -> Value:
    """``2 v - q8`` times the significand of g; negative where v rounds to 0 and q8 to 1."""
    beyond = named(m, "beyond", (v << 1) - q8)
    return named(m, "weighted", beyond * weight(m, sensitivity).significand)


def short_term(m: Module, beyond: Value, q8: Value, sensitivity: Value) -> Value:
    """``g q8 (2 v - q8)``."""
    g = weight(m, sensitivity)
    return shifted(m, named(m, "product", beyond * q8), g.shift, g.shift_max)
