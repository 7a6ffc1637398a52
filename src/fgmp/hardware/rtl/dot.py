"""One dot-product unit: a pair of blocks in two given formats to what they add to the total.

    products    16 significand products, shifted             unsigned, exact
    sum         of the signed products                       Unit.sum_max bounds it
    gain        times the block scales and the constant      Unit.contribution_max bounds it

The gain multiplies the sum by the product of the significands of the block scales and of the odd
part of the constant, then shifts: two small multipliers for a whole block. A pipeline register
may stand after each step. It loads only when a pair of blocks passes, so that a unit that is not
selected is still to the last gate.
"""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Signal, Value
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.spec import BLOCK, E2M1, E4M3, Minifloat
from fgmp.hardware.datapath import Unit, signed_bits
from fgmp.hardware.rtl.decode import decode, named, shifted, signed_sum

SCALE_BITS = E4M3.bits - 1
"""A block scale is positive: its code has no sign bit."""

_SCALE_SHIFT_MAX = (1 << E4M3.exponent_bits) - 2


def operand_layout(fmt: Minifloat) -> data.StructLayout:
    """A block as a unit takes it: codes, and a scale where the format has one."""
    codes = data.ArrayLayout(fmt.bits, BLOCK)
    return data.StructLayout(
        {"codes": codes, "scale": SCALE_BITS} if fmt is E2M1 else {"codes": codes}
    )


class DotUnit(wiring.Component):
    """A dot-product unit; a pair of blocks a cycle, ``len(cuts)`` cycles of latency.

    Ports:
        activation, weight: blocks, held by the caller while ``valid``.
        valid: a pair of blocks is at the ports.
        contribution: two's complement, ``signed_bits(unit.contribution_max)`` bits.
        done: ``contribution`` is that of a pair.
    """

    def __init__(self, unit: Unit, cuts: tuple[str, ...]) -> None:
        self.unit = unit
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
        stage = _Stage(m, self.cuts, self.valid)
        magnitudes, signs = self._products(m)
        gain, shift = self._gain(m)
        *products, gain, shift = stage.cut("products", [*magnitudes, *signs, gain, shift])
        total = signed_sum(m, products[:BLOCK], products[BLOCK:])
        exact = total[: signed_bits(self.unit.sum_max)].as_signed()
        exact, gain, shift = stage.cut("sums", [exact, gain, shift])
        scaled = named(m, "scaled", exact * gain)
        most = _twos(self.unit.constant_gain) + self.unit.scales * _SCALE_SHIFT_MAX
        whole = shifted(m, scaled, shift, most)[: len(self.contribution)]
        (whole,) = stage.cut("scaled", [whole])
        m.d.comb += [self.contribution.eq(whole), self.done.eq(stage.valid)]
        return m

    def _products(self, m: Module) -> tuple[list[Value], list[Value]]:
        """Magnitudes and signs of the 16 products."""
        magnitudes, signs = [], []
        for i in range(BLOCK):
            a = decode(m, self.unit.activation, self.activation.codes[i])
            w = decode(m, self.unit.weight, self.weight.codes[i])
            product = named(m, "product", a.significand * w.significand)
            shift = named(m, "shifts", a.shift + w.shift)
            magnitudes.append(shifted(m, product, shift, a.shift_max + w.shift_max))
            signs.append(named(m, "sign", a.sign ^ w.sign))
        return magnitudes, signs

    def _gain(self, m: Module) -> tuple[Value, Value]:
        """Odd factor and shift of the gain."""
        gain: Value = Const(self.unit.constant_gain >> _twos(self.unit.constant_gain))
        shift: Value = Const(_twos(self.unit.constant_gain))
        for fmt, block in (
            (self.unit.activation, self.activation),
            (self.unit.weight, self.weight),
        ):
            if fmt is E2M1:
                scale = decode(m, E4M3, Cat(block.scale, Const(0, 1)))
                gain = gain * scale.significand
                shift = shift + scale.shift
        return named(m, "gain", gain), named(m, "gain_shift", shift)


class _Stage:
    """The pipeline: cuts that exist load while the pair of blocks before them is valid."""

    def __init__(self, m: Module, cuts: tuple[str, ...], valid: Value) -> None:
        self._m, self._cuts, self.valid = m, cuts, valid

    def cut(self, name: str, values: list[Value]) -> list[Value]:
        """The values, or registers that hold them a cycle later."""
        if name not in self._cuts:
            return values
        held = [
            Signal(v.shape(), name=f"{name}_{i}", reset_less=True) for i, v in enumerate(values)
        ]
        passed = Signal(name=f"{name}_valid")
        with self._m.If(self.valid):
            self._m.d.sync += [h.eq(v) for h, v in zip(held, values, strict=True)]
        self._m.d.sync += passed.eq(self.valid)
        self.valid = passed
        return held


def _twos(value: int) -> int:
    """How often two divides ``value``."""
    return (value & -value).bit_length() - 1
