"""A lane: dot-product units, flags that select one, operand registers and running totals.

Each unit has its own operand registers, which load only for pairs of blocks in its two formats.
Otherwise the unit's inputs hold and nothing in it toggles: this is the operand gating. A weight
block stays for ``reuse`` activation blocks; a unit's weight register loads with the first of
them that selects the unit.

    cycle 0     ports; the selected unit's operand registers load
    1 ..        products, sum and gain, with the pipeline registers of ``Datapath.cuts``
    last        the total of the slot is read, added to and written

Totals live in ``reuse`` slots. The first pair of a dot product replaces what its slot held.
"""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from fgmp.formats.spec import BLOCK, E2M1, E4M3, Minifloat
from fgmp.hardware.datapath import Datapath, Unit
from fgmp.hardware.rtl.dot import SCALE_BITS, DotUnit
from fgmp.hardware.rtl.registers import Operands, Totals


def block_layout(datapath: Datapath) -> data.StructLayout:
    """A block at a lane's port: codes in the low bits of elements, scale and flag where needed."""
    bits = max(fmt.bits for fmt in datapath.formats)
    members: dict[str, Any] = {"codes": data.ArrayLayout(bits, BLOCK)}
    if E2M1 in datapath.formats:
        members["scale"] = SCALE_BITS
    if len(datapath.formats) > 1:
        members["is_fp8"] = 1
    return data.StructLayout(members)


class Lane(wiring.Component):
    """A dot-product lane; one pair of blocks per cycle, whatever their flags.

    Ports:
        activation: a block: 16 codes of 8 bits (an E2M1 code in the low four), the 7-bit code
            of the scale, the flag. A baseline has only the fields of its format.
        weight: likewise; stays while the block is in use.
        valid: a pair of blocks is at the ports.
        new_weight: with ``valid``, the weight block differs from that of the last valid cycle.
        slot: index of the total that the pair adds to.
        first: the pair begins a dot product.
        last: the pair ends one.
        total: the slot's new total, two's complement, :attr:`Datapath.latency` cycles later.
        done: ``total`` belongs to a pair marked ``last``.

    After elaboration, ``operands`` holds the operand registers by the name of their unit.
    """

    def __init__(self, datapath: Datapath) -> None:
        self.datapath = datapath
        block = block_layout(datapath)
        super().__init__(
            {
                "activation": In(block),
                "weight": In(block),
                "valid": In(1),
                "new_weight": In(1),
                "slot": In(exact_log2(datapath.reuse)),
                "first": In(1),
                "last": In(1),
                "total": Out(datapath.total_bits),
                "done": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        self.operands = {unit.name: Operands(unit) for unit in self.datapath.units}
        m.submodules.totals = totals = Totals(self.datapath)
        contribution: Value = Const(0, signed(1))
        done: Value = Const(0, 1)
        for unit in self.datapath.units:
            m.submodules[unit.name] = dot = DotUnit(
                unit, self.datapath.cuts_of(unit), self.datapath.addition
            )
            m.submodules[f"{unit.name}_operands"] = operands = self.operands[unit.name]
            selected = self.valid & self._selects(unit)
            exchanged: Value = Const(0, 1)
            if self.datapath.exchanges(unit):
                exchanged = self.weight.is_fp8 == (unit.activation is E4M3)
            a, w = self.activation, self.weight
            m.d.comb += [
                operands.activation.eq(_either(unit.activation, a, w, exchanged)),
                operands.weight.eq(_either(unit.weight, w, a, exchanged)),
                operands.exchanged.eq(exchanged),
                operands.selected.eq(selected),
                operands.load.eq(selected if self.datapath.gated else self.valid),
                operands.new_weight.eq(self.valid & self.new_weight),
                dot.activation.eq(operands.activation_held),
                dot.weight.eq(operands.weight_held),
                dot.valid.eq(operands.held),
            ]
            # At most one unit is done; the contributions of the others are masked to zero.
            contribution |= Mux(dot.done, dot.contribution.as_signed(), 0)
            done |= dot.done
        m.d.comb += [totals.contribution.eq(contribution), totals.valid.eq(done)]
        ends: Value = Cat(self.first, self.last)
        slot: Value = self.slot
        for step in reversed(range(self.datapath.latency - 1)):
            # One-hot before the last register, so that the select settles before it is used.
            slot = slot if step else Cat(slot == i for i in range(self.datapath.reuse))
            control = Signal(len(ends) + len(slot), name="control", reset_less=True)
            m.d.sync += control.eq(Cat(ends, slot))
            ends, slot = control[: len(ends)], control[len(ends) :]
        m.d.comb += [
            Cat(totals.first, totals.last, totals.select).eq(control),
            self.total.eq(totals.total),
            self.done.eq(totals.done),
        ]
        return m

    def _selects(self, unit: Unit) -> Value:
        """Whether the flags at the ports select ``unit``."""
        if len(self.datapath.formats) == 1:
            return Const(1)
        if self.datapath.exchanges(unit):
            return self.activation.is_fp8 ^ self.weight.is_fp8
        return (self.activation.is_fp8 == (unit.activation is E4M3)) & (
            self.weight.is_fp8 == (unit.weight is E4M3)
        )


def _either(fmt: Minifloat, block: Any, other: Any, exchanged: Value) -> Value:
    """Input of one side of a unit: ``block``, or ``other`` where the sides are exchanged."""
    usual = _narrowed(fmt, block)
    constant = isinstance(exchanged, Const)
    return usual if constant else Mux(exchanged, _narrowed(fmt, other), usual)


def _narrowed(fmt: Minifloat, block: Any) -> Value:
    """Fields of a block that a unit reads, in the order of :func:`operand_layout`."""
    codes = Cat(block.codes[i][: fmt.bits] for i in range(BLOCK))
    return Cat(codes, block.scale) if fmt is E2M1 else codes
