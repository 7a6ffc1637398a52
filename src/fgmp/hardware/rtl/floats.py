"""Exact values to floats, rounded once: to nearest, ties to even, subnormals included.

A value before rounding has a significand, which is zero or has its first bit set, and the exponent
of that bit. :func:`rounded` encodes it in any format: E4M3 in the quantizer, fp32 in the epilogue
and the fp32 accumulator. The other functions are for fp32: the leading bit of an integer, a sum.
"""

from dataclasses import dataclass

from amaranth.hdl import Cat, Const, Module, Mux, Value

from fgmp.hardware.rtl.decode import named


@dataclass(frozen=True)
class Code:
    """A float format, without the sign.

    Attributes:
        exponent_bits, mantissa_bits, bias: as in IEEE 754.
        limit: the code that larger values become: the largest finite value, or infinity.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int
    limit: int

    @property
    def bits(self) -> int:
        """Width without the sign."""
        return self.exponent_bits + self.mantissa_bits


FP32 = Code(exponent_bits=8, mantissa_bits=23, bias=127, limit=0xFF << 23)
QUIET_NAN = 0x7FC0_0000


def rounded(m: Module, code: Code, significand: Value, exponent: Value) -> Value:
    """The code of ``significand * 2**(exponent - len(significand) + 1)``."""
    significand_bits = 1 + code.mantissa_bits
    missing = named(m, "missing", 1 - code.bias - exponent)
    subnormal = missing > 0
    # Everything shifted further than one more than the kept bits rounds to zero.
    most = significand_bits + 1
    far = missing > most
    amount = named(m, "amount", Mux(subnormal, Mux(far, most, missing), 0)[: most.bit_length()])
    moved = named(m, "moved", Cat(Const(0, most), significand) >> amount)
    place = len(moved) - significand_bits
    whole, half, rest = moved[place:], moved[place - 1], moved[: place - 1].any()
    field = named(m, "field", Mux(subnormal, 0, exponent + code.bias)[: code.exponent_bits])
    up = half & (rest | whole[0])
    near = named(m, "near", Cat(whole[:-1], field) + up)
    largest = (code.limit >> code.mantissa_bits) - code.bias
    limited = Mux((exponent > largest) | (near > code.limit), code.limit, near)
    return named(m, "code", Mux(significand.any(), limited, 0)[: code.bits])


def leading(m: Module, value: Value) -> tuple[Value, Value]:
    """``value`` shifted left until its first bit is set, and the amount."""
    amount: list[Value] = []
    for bit in reversed(range((len(value) - 1).bit_length())):
        empty = named(m, "empty", ~value[-(1 << bit) :].any())
        value = named(m, "leading", Mux(empty, value << (1 << bit), value)[: len(value)])
        amount.insert(0, empty)
    return value, Cat(*amount)


def integer_to_fp32(m: Module, value: Value) -> Value:
    """A signed integer as fp32, 32 bits."""
    negative = value[-1]
    magnitude = named(m, "magnitude", abs(value.as_signed())[: len(value)])
    significand, lost = leading(m, magnitude)
    exponent = named(m, "exponent", len(value) - 1 - lost)
    return Cat(rounded(m, FP32, significand, exponent), negative)


def parts(m: Module, value: Value) -> tuple[Value, Value]:
    """Significand, 24 bits, and biased exponent of fp32; a subnormal's first bit is not set."""
    field = value[FP32.mantissa_bits : FP32.bits]
    normal = named(m, "normal", field.any())
    return Cat(value[: FP32.mantissa_bits], normal), named(m, "biased", Mux(normal, field, 1))


def fp32_sum(m: Module, a: Value, b: Value) -> Value:
    """fp32(a + b) of two fp32 values, of which only ``a`` may be infinite."""
    swapped = named(m, "swapped", b[: FP32.bits] > a[: FP32.bits])
    large, small = named(m, "large", Mux(swapped, b, a)), named(m, "small", Mux(swapped, a, b))
    (wide, exponent), (narrow, below) = parts(m, large), parts(m, small)
    # Rounding needs three more bits: half, the next, and whether any lower bit is set.
    distance = named(m, "distance", exponent - below)
    most = len(narrow) + 3
    amount = named(m, "amount", Mux(distance > most, most, distance)[: most.bit_length()])
    moved = named(m, "moved", Cat(Const(0, most), narrow) >> amount)
    aligned = Cat(moved[: most - 2].any(), moved[most - 2 :])
    minus = named(m, "minus", a[-1] ^ b[-1])
    scaled = Cat(Const(0, 3), wide)
    total = named(m, "total", Mux(minus, scaled - aligned, scaled + aligned)[: len(scaled) + 1])
    significand, lost = leading(m, total)
    top = named(m, "top", exponent + 1 - FP32.bias - lost)
    magnitude = rounded(m, FP32, significand, top)
    # a - a is +0; the sum of two negative zeros stays negative.
    sign = Mux(total.any(), large[-1], a[-1] & b[-1])
    infinite = large[: FP32.bits] == FP32.limit
    return named(m, "sum", Mux(infinite, large, Cat(magnitude, sign)))
