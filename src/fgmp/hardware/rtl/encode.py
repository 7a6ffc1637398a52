"""Values to codes: u = x * r, E4M3(u), and E2M1(6 u / s) without a divider.

    |u| = significand * 2**(exponent - 19)       significand: 20 bits, its first bit set, or zero

E4M3 takes the first four bits, fewer below 2**-6, and rounds on the rest. E2M1 compares
``6 |u|`` with ``midpoint * s`` for the seven midpoints: in units of a quarter of the last bit of s,
the right sides are integers of at most nine bits, so that the left side needs nine bits and one
that says whether anything lies below.
"""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Value

from fgmp.formats.activation import MULTIPLIER_BITS
from fgmp.formats.codec import E2M1_MIDPOINTS
from fgmp.formats.spec import E2M1, E4M3, FP8_FACTOR
from fgmp.hardware.rtl.decode import Decoded, named, tree
from fgmp.hardware.rtl.floats import Code, rounded

BF16_BITS, BF16_MANTISSA, BF16_BIAS = 16, 7, 127
CODE_BITS = E4M3.bits - 1
EXPONENT_BITS = 9
"""Of exponents in two's complement: x gives -127 to 128, r -100 to 100, their product one more."""

_SIGNIFICAND_BITS = 1 + BF16_MANTISSA + MULTIPLIER_BITS
_TOP = _SIGNIFICAND_BITS - 1
_EXPONENT_MIN = 1 - E4M3.bias
_E4M3 = Code(
    exponent_bits=E4M3.exponent_bits,
    mantissa_bits=E4M3.mantissa_bits,
    bias=E4M3.bias,
    limit=E4M3.max_code,
)
_QUARTERS = [int(4 * mid) for mid in E2M1_MIDPOINTS]
_BELOW = _TOP - E4M3.mantissa_bits - 2
"""Bits of 6 |u| below a quarter of the last bit of s, where u and s have the same exponent."""


@dataclass(frozen=True)
class Product:
    """|u| as in the module's text, the sign of x, and whether x was finite."""

    significand: Value
    exponent: Value
    negative: Value
    finite: Value


def multiply(m: Module, x: Value, r_significand: Value, r_exponent: Value) -> Product:
    """x * r, exact.

    A subnormal x counts as zero but for its sign: with r up to 2**127 it could reach an FP8 code
    only beyond the largest multiplier, 2**100.
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
    """The code of |u|, seven bits, to nearest even and saturated."""
    return rounded(m, _E4M3, significand, exponent)


def midpoints(m: Module, scale: Decoded) -> list[Value]:
    """The seven right sides of a block, in quarters of the last bit of its scale."""
    return [named(m, "midpoint", scale.significand * quarters) for quarters in _QUARTERS]


def encode_e2m1(
    m: Module, significand: Value, exponent: Value, bounds: list[Value], scale_shift: Value
) -> Value:
    """The code of 6 |u| / s, three bits, by seven compares."""
    wide = named(m, "wide", significand * FP8_FACTOR)
    # How far u's exponent lies below that of s; above it only where u saturates.
    down = named(m, "down", scale_shift + _EXPONENT_MIN - exponent)
    over = named(m, "over", (down < 0) & significand.any())
    most = len(wide) - _BELOW
    amount = named(m, "amount", Mux(down < most, down, most)[: most.bit_length()])
    moved = named(m, "moved", Cat(Const(0, most), wide[_BELOW:]) >> amount)
    whole = moved[most:]
    rest = named(m, "rest", moved[:most].any() | wide[:_BELOW].any())
    # Ties go to the even code: from an odd one upwards, from an even one not.
    reached = [
        over | (whole >= bound if below % 2 else (whole > bound) | ((whole == bound) & rest))
        for below, bound in enumerate(bounds)
    ]
    return named(m, "fp4", tree(m, reached)[: E2M1.bits - 1])
