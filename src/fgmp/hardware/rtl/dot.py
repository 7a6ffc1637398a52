"""One dot-product unit: a pair of blocks in two fixed formats to its contribution to the total.

    products    16 significand products, shifted             unsigned, exact
    sum         of the signed products                       Unit.sum_max bounds it
    gain        times the block scales and the constant      Unit.contribution_max bounds it

The gain multiplies the sum by the product of the significands of the block scales and of the odd
part of the constant, then shifts: two small multipliers for a whole block. A pipeline register
may stand after each step. It loads only when a pair of blocks passes, so that no gate of a unit
toggles while the unit is not selected.
"""

from typing import Any

from amaranth.hdl import Const, Module, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.spec import BLOCK, E2M1, E4M3, Minifloat
from fgmp.hardware.datapath import Unit, signed_bits
from fgmp.hardware.rtl.decode import (
    Decoded,
    decode,
    decode_magnitude,
    multiplied,
    named,
    shifted,
    signed_sum,
)
from fgmp.hardware.rtl.pipeline import Pipeline

SCALE_BITS = E4M3.bits - 1
"""A block scale is positive: its code has no sign bit."""

_SCALE_SHIFT_MAX = (1 << E4M3.exponent_bits) - 2


def operand_layout(fmt: Minifloat) -> data.StructLayout:
    """A block at a unit's port: codes, and a scale where the format has one."""
    codes = data.ArrayLayout(fmt.bits, BLOCK)
    return data.StructLayout(
        {"codes": codes, "scale": SCALE_BITS} if fmt is E2M1 else {"codes": codes}
    )


class DotUnit(wiring.Component):
    """A dot-product unit; one pair of blocks per cycle, ``len(cuts)`` cycles of latency.

    Ports:
        activation, weight: blocks, held by the caller while ``valid``.
        valid: a pair of blocks is at the ports.
        contribution: two's complement, ``signed_bits(unit.contribution_max)`` bits.
        done: ``contribution`` is that of a pair.

    Args:
        unit: formats of both sides.
        cuts: steps that end with a register, some of ``datapath.CUTS``.
        addition: one of ``datapath.ADDITIONS``.
    """

    def __init__(self, unit: Unit, cuts: tuple[str, ...], addition: str) -> None:
        self.unit = unit
        self.addition = addition
        self.cuts = cuts
        super().__init__(
            {
                "activation": In(operand_layout(unit.activation)),
                "weight": In(operand_layout(unit.weight)),
                "valid": In(1),
                "contribution": Out(signed_bits(unit.contribution_max)),
                "done": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        pipeline = Pipeline(m, self.valid)

        def cut(name: str) -> None:
            if name in self.cuts:
                pipeline.next()

        products = self._products(m)
        significands = pipeline.carry([p.significand for p in products], "significand")
        shifts = pipeline.carry([p.shift for p in products], "shift")
        signs = pipeline.carry([p.sign for p in products], "sign")
        gains = pipeline.carry(self._gain(m), "gain")
        cut("significands")
        most = products[0].shift_max
        placed = [shifted(m, v, s, most) for v, s in zip(significands.now, shifts.now, strict=True)]
        magnitudes = pipeline.carry(placed, "magnitude")
        cut("products")
        total = signed_sum(m, magnitudes.now, signs.now, self.addition)
        exact = pipeline.carry([total[: signed_bits(self.unit.sum_max)].as_signed()], "sum")
        cut("sums")
        gain, shift = gains.now
        scaled = named(m, "scaled", multiplied(m, exact.now[0], gain))
        most = _twos(self.unit.constant_gain) + self.unit.scales * _SCALE_SHIFT_MAX
        whole = shifted(m, scaled, shift, most)[: len(self.contribution)]
        contribution = pipeline.carry([whole], "contribution")
        cut("scaled")
        m.d.comb += [self.contribution.eq(contribution.now[0]), self.done.eq(pipeline.valid)]
        return m

    def _products(self, m: Module) -> list[Decoded]:
        """Products of the 16 pairs of elements, before their shifts."""
        products = []
        for i in range(BLOCK):
            a = decode(m, self.unit.activation, self.activation.codes[i])
            w = decode(m, self.unit.weight, self.weight.codes[i])
            products.append(
                Decoded(
                    sign=named(m, "sign", a.sign ^ w.sign),
                    significand=named(m, "product", a.significand * w.significand),
                    shift=named(m, "shifts", a.shift + w.shift),
                    shift_max=a.shift_max + w.shift_max,
                )
            )
        return products

    def _gain(self, m: Module) -> list[Value]:
        """Odd factor and shift of the gain."""
        gain: Value = Const(self.unit.constant_gain >> _twos(self.unit.constant_gain))
        shift: Value = Const(_twos(self.unit.constant_gain))
        for fmt, block in (
            (self.unit.activation, self.activation),
            (self.unit.weight, self.weight),
        ):
            if fmt is E2M1:
                scale = decode_magnitude(m, E4M3, block.scale)
                gain = gain * scale.significand
                shift = shift + scale.shift
        return [named(m, "gain", gain), named(m, "gain_shift", shift)]


def _twos(value: int) -> int:
    """Number of times that 2 divides ``value``."""
    return (value & -value).bit_length() - 1
