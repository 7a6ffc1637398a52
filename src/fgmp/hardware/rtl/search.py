"""Searched scales and the rule ``benefit``: errors against the value itself, in full width.

In units of 2**-10, with v = 6 u rounded to an integer (docs/numerics.md, section 5),

    E4(s) = sum g_int (q4 - v)**2        for each scale that is tried
    E8    = sum g_int (q8 - v)**2

q4, q8 and v have 22 bits and their differences 19; unlike q4 - q8 they use all of them, for v has
as many as x and r together. Each try costs sixteen squares of 20 bits, which is why the paper's
rule has a quantizer of its own (``rtl.score``).
"""

from amaranth.hdl import Cat, Const, Module, Mux, Value

from fgmp.formats.spec import E2M1, E4M3, FP8_FACTOR, SCALE_MIN_CODE, UNIT_BITS, UNIT_MAX
from fgmp.hardware.datapath import FP8_GAIN
from fgmp.hardware.rtl.decode import Decoded, decode_magnitude, named, shifted
from fgmp.hardware.rtl.score import TERM_BITS

VALUE_BITS = (int(UNIT_MAX) << UNIT_BITS).bit_length()
DIFFERENCE_BITS = 20
"""|q4 - q8| reaches 2**19, the others stay below."""

_LARGEST = int(UNIT_MAX) << UNIT_BITS


def candidate(m: Module, nearest: Value, offset: int) -> Value:
    """The scale code ``nearest + offset``, clamped to those of scales."""
    if offset < 0:
        low = SCALE_MIN_CODE - offset
        return named(m, "tried", Mux(nearest < low, SCALE_MIN_CODE, nearest + offset)[:7])
    high = E4M3.max_code - offset
    return named(m, "tried", Mux(nearest > high, E4M3.max_code, nearest + offset)[:7])


def target(m: Module, significand: Value, exponent: Value) -> Value:
    """|v|: 6 |u| to nearest even in units of 2**-10, at most what FP8 can hold."""
    wide = named(m, "six_u", significand * FP8_FACTOR)
    down = named(m, "down", len(significand) - 1 - UNIT_BITS - exponent)
    most = len(wide) + 1
    too_large = (down <= 0) & significand.any()
    far = named(m, "far", Mux(down < 0, 0, Mux(down > most, most, down))[: most.bit_length()])
    moved = named(m, "moved", Cat(Const(0, most), wide) >> far)
    half, rest = moved[most - 1], moved[: most - 1].any()
    near = named(m, "near", moved[most:] + (half & (rest | moved[most])))
    return named(m, "v", Mux(too_large | (near > _LARGEST), _LARGEST, near)[:VALUE_BITS])


def fp4_value(m: Module, code: Value, scale: Decoded) -> Value:
    """|q4| of a code without its sign."""
    e = decode_magnitude(m, E2M1, code)
    element = shifted(m, e.significand, e.shift, e.shift_max)
    product = named(m, "q4", element * scale.significand)
    return shifted(m, product, scale.shift, scale.shift_max)[:VALUE_BITS]


def fp8_value(m: Module, code: Value) -> Value:
    """|q8| of a code without its sign."""
    e = decode_magnitude(m, E4M3, code)
    product = named(m, "q8", e.significand * FP8_GAIN)
    return shifted(m, product, e.shift, e.shift_max)[:VALUE_BITS]


def distance(m: Module, a: Value, b: Value) -> Value:
    """|a - b|."""
    difference = named(m, "difference", a - b)
    return named(m, "distance", abs(difference)[:DIFFERENCE_BITS])


def weighed(m: Module, d: Value, sensitivity: Value) -> Value:
    """The square times the significand of the sensitivity."""
    g = decode_magnitude(m, E4M3, sensitivity)
    return named(m, "weighed", d * d * g.significand)


def put(m: Module, value: Value, sensitivity: Value) -> Value:
    """:func:`weighed`, shifted to its place."""
    g = decode_magnitude(m, E4M3, sensitivity)
    return shifted(m, value, g.shift, g.shift_max)[:TERM_BITS]
