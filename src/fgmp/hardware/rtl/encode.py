"""Values to codes: u = x * r, E4M3(u), and E2M1(6 u / s) without a divider.

    |u| = significand * 2**(exponent - 19)       significand: 20 bits, its first bit set, or zero

E4M3 takes the first four bits, fewer below 2**-6, and rounds by the rest. For E2M1, 6 |u| becomes
a fixed-point number whose last bit says whether any bit was lost. It is compared with ``midpoint
* s`` for the seven midpoints. In units of a quarter of the last bit of s, these products are
integers of at most nine bits, so nine bits of 6 |u| and its last bit decide.
"""

from typing import NamedTuple

from amaranth.hdl import Cat, Const, Module, Mux, Value

from fgmp.formats.activation import MULTIPLIER_BITS
from fgmp.formats.codec import E2M1_MIDPOINTS
from fgmp.formats.spec import E4M3, FP8_FACTOR, UNIT_BITS, UNIT_MAX
from fgmp.hardware.rtl.decode import Decoded, named
from fgmp.hardware.rtl.floats import Code, rounded

BF16_BITS, BF16_MANTISSA, BF16_BIAS = 16, 7, 127
CODE_BITS = E4M3.bits - 1
EXPONENT_BITS = 9
"""Width of exponents in two's complement. Those of x are -127 to 128 and those of r -100 to 100;
that of their product is their sum or one more."""

_SIGNIFICAND_BITS = 1 + BF16_MANTISSA + MULTIPLIER_BITS
_TOP = _SIGNIFICAND_BITS - 1
_E4M3 = Code(
    exponent_bits=E4M3.exponent_bits,
    mantissa_bits=E4M3.mantissa_bits,
    bias=E4M3.bias,
    limit=E4M3.max_code,
)
_QUARTERS = [int(4 * mid) for mid in E2M1_MIDPOINTS]

FIXED_BITS = UNIT_BITS + 1
"""Bits after the point of 6 |u|: down to half a unit, a quarter of the smallest scale."""

QUARTERS_BITS = 9
"""Width of 6 |u| in quarters of the last bit of the lowest scale tried. The lowest scale is the
code of the largest |u| or one code below, so |u| is at most 17 of its last bits; 4 * 6 * 17 < 2**9.
"""

_FIXED_MAX = int(UNIT_MAX) << FIXED_BITS


class Product(NamedTuple):
    """|u| in the form above, the sign of x, and whether x is finite."""

    significand: Value
    exponent: Value
    negative: Value
    finite: Value


def multiply(m: Module, x: Value, r_significand: Value, r_exponent: Value) -> Product:
    """x * r, exact.

    A subnormal x counts as zero but for its sign. It could reach an FP8 code only with a multiplier
    beyond the largest, 2**100.
    """
    magnitude, mantissa = x[: BF16_BITS - 1], x[:BF16_MANTISSA]
    exponent = x[BF16_MANTISSA : BF16_BITS - 1]
    finite = named(m, "finite", ~exponent.all())
    live = named(m, "live", finite & exponent.any())
    significand = named(m, "significand", Mux(live, Cat(mantissa, 1), 0))
    product = named(m, "product", significand * r_significand)
    above = product[_TOP]
    sum_of_exponents = exponent - BF16_BIAS + r_exponent.as_signed() + above
    return Product(
        significand=named(m, "normalised", Mux(above, product, product << 1)[: _TOP + 1]),
        exponent=named(m, "exponent", sum_of_exponents[:EXPONENT_BITS].as_signed()),
        negative=named(m, "negative", x[BF16_BITS - 1] & magnitude.any() & finite),
        finite=finite,
    )


def encode_e4m3(m: Module, significand: Value, exponent: Value) -> Value:
    """The 7-bit code of |u|, rounded to nearest even and saturated."""
    return rounded(m, _E4M3, significand, exponent)


def fixed_point(m: Module, significand: Value, exponent: Value) -> Value:
    """6 |u| in units of half of 2**-10, and below it a bit that says whether any bit was lost.

    Saturates at the largest value that has codes, 2688.
    """
    wide = named(m, "six_u", significand * FP8_FACTOR)
    down = named(m, "down", len(significand) - 1 - FIXED_BITS - exponent)
    most = len(wide)
    too_large = (down < 0) & significand.any()
    far = named(m, "far", Mux(down < 0, 0, Mux(down > most, most, down))[: most.bit_length()])
    moved = lowered(m, Cat(Const(0, 1), wide), far)
    largest = Const(_FIXED_MAX << 1)
    return named(m, "fixed", Mux(too_large | (moved > largest), largest, moved)[: len(largest)])


def lowered(m: Module, value: Value, amount: Value) -> Value:
    """``value >> amount``, with the last bit set if any bit was lost."""
    for bit in range(len(amount)):
        step = 1 << bit
        lost = value[: step + 1].any() if step < len(value) else value.any()
        moved = named(m, f"lowered_{step}", Mux(amount[bit], Cat(lost, value[step + 1 :]), value))
        value = moved[: len(value)]
    return value


def midpoints(m: Module, scale: Decoded, below: Value | None = None) -> list[Value]:
    """``midpoint * s`` for the seven midpoints, in quarters of the last bit of the scale.

    Where ``below`` is set, the unit is one bit lower than the scale's last bit.
    """
    bounds = [named(m, "midpoint", scale.significand * quarters) for quarters in _QUARTERS]
    if below is None:
        return bounds
    return [named(m, "bound", Mux(below, bound << 1, bound)) for bound in bounds]


def in_quarters(m: Module, fixed: Value, shift: Value) -> Value:
    """:func:`fixed_point` in quarters of the last bit of a scale with this shift."""
    return named(m, "quarters", lowered(m, fixed, shift)[: 1 + QUARTERS_BITS])


def encode_e2m1(m: Module, quarters: Value, *bounds: Value) -> Value:
    """The 3-bit code of 6 |u| / s, by seven compares.

    Args:
        m: module.
        quarters: from :func:`in_quarters`.
        bounds: from :func:`midpoints`.
    """
    # Ties go to the even code: up from an odd code, down to an even one.
    passed = [
        named(m, "passed", quarters >= Cat(Const(below % 2 == 0, 1), bound))
        for below, bound in enumerate(bounds)
    ]
    one, two, three, four, five, six, seven = passed
    upper, lower = Cat(Mux(six, seven, five), six), Cat(Mux(two, three, one), two)
    return named(m, "fp4", Mux(four, Cat(upper, 1), lower))
