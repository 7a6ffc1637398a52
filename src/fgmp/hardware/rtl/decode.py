"""Element codes to sign, significand and shift for exact products; sums of many signed terms.

A code of either format is ``(-1)**sign * significand * 2**shift`` in units of the format's smallest
value, with the significand one bit wider than the mantissa:

    significand = exponent != 0 ? 2**m + mantissa : mantissa        shift = max(exponent, 1) - 1

This holds for subnormals too. The product of two codes multiplies the significands, 2 by 2 to 4 by
4 bits, and adds the shifts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import add

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value

from fgmp.formats.spec import Minifloat


@dataclass(frozen=True)
class Decoded:
    """Parts of a code as signals; ``shift_max`` bounds the shift."""

    sign: Value
    significand: Value
    shift: Value
    shift_max: int


def named(m: Module, name: str, value: Value) -> Signal:
    """A wire that holds ``value``; Amaranth would copy the expression wherever it is used."""
    wire = Signal(value.shape(), name=name)
    m.d.comb += wire.eq(value)
    return wire


def decode(m: Module, fmt: Minifloat, code: Value) -> Decoded:
    """Parts of a code of ``fmt.bits`` bits."""
    bits = fmt.mantissa_bits
    exponent = code[bits : bits + fmt.exponent_bits]
    normal = named(m, "normal", exponent.any())
    return Decoded(
        sign=code[fmt.bits - 1],
        significand=Cat(code[:bits], normal),
        shift=named(m, "shift", (exponent - normal)[: fmt.exponent_bits]),
        shift_max=(1 << fmt.exponent_bits) - 2,
    )


def decode_magnitude(m: Module, fmt: Minifloat, code: Value) -> Decoded:
    """Parts of a code without a sign bit, such as that of a block scale."""
    return decode(m, fmt, Cat(code, Const(0, 1)))


def shifted(m: Module, value: Value, amount: Value, most: int) -> Value:
    """``value << amount`` without overflow, for an amount of at most ``most``."""
    width = len(value) + most
    for bit in range(most.bit_length()):
        wider = named(m, f"shift_{1 << bit}", Mux(amount[bit], value << (1 << bit), value))
        value = wider[:width].as_signed() if value.shape().signed else wider[:width]
    return value


def multiplied(m: Module, value: Value, factor: Value) -> Value:
    """``value * factor`` for an unsigned factor, as a tree of adders over its bits.

    Yosys would map a product to a carry-save array, which glitches more (docs/energy.md,
    section 3).
    """
    width = len(value) + len(factor)
    rows = [named(m, "row", Mux(bit, value, 0)) << i for i, bit in enumerate(factor)]
    whole = tree(m, rows)[:width]
    return whole.as_signed() if value.shape().signed else whole


def signed_sum(
    m: Module, magnitudes: Sequence[Value], signs: Sequence[Value], addition: str
) -> Value:
    """Sum of ``(-1)**sign * magnitude``, signed; ``addition`` as in ``datapath.ADDITIONS``.

    In two's complement a negative term enters as its complement plus one. The ones are summed as
    one more term, which costs less than an incrementer per term.
    """
    pairs = list(zip(magnitudes, signs, strict=True))
    if addition == "apart":
        positive = [named(m, "positive", v & (~sign).replicate(len(v))) for v, sign in pairs]
        negative = [named(m, "negative", v & sign.replicate(len(v))) for v, sign in pairs]
        return tree(m, positive) - tree(m, negative)
    terms = [Cat(v ^ sign.replicate(len(v)), sign).as_signed() for v, sign in pairs]
    return tree(m, terms) + tree(m, signs)


def tree(m: Module, terms: Sequence[Value], join: Callable[[Value, Value], Value] = add) -> Value:
    """Sum of all terms by a balanced tree; ``join`` replaces addition."""
    while len(terms) > 1:
        sums = [join(a, b) for a, b in zip(terms[::2], terms[1::2], strict=False)]
        terms = [named(m, "partial", s) for s in sums] + list(terms[len(sums) * 2 :])
    return terms[0]
