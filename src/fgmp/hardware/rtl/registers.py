"""A lane's registers: operands, which keep an idle unit from toggling, and running totals.

Valid flags are reset; data registers are not.
"""

from operator import or_
from typing import Any

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from fgmp.hardware.datapath import Datapath, Unit
from fgmp.hardware.rtl.decode import named, tree
from fgmp.hardware.rtl.dot import operand_layout
from fgmp.hardware.rtl.floats import fp32_sum, integer_to_fp32


class Operands(wiring.Component):
    """Operand registers of one unit; one cycle of latency.

    Ports:
        activation, weight: blocks in the unit's formats.
        load: load the blocks; the operands change in no other cycle.
        selected: the blocks are for this unit.
        exchanged: ``weight`` comes from the activation's side and ``activation`` from the weight's.
        new_weight: the weight's side has another block from this cycle on.
        activation_held, weight_held: the registers.
        held: the registers loaded a pair for this unit in the last cycle.
    """

    def __init__(self, unit: Unit) -> None:
        activation, weight = operand_layout(unit.activation), operand_layout(unit.weight)
        super().__init__(
            {
                "activation": In(activation),
                "weight": In(weight),
                "load": In(1),
                "selected": In(1),
                "exchanged": In(1),
                "new_weight": In(1),
                "activation_held": Out(activation),
                "weight_held": Out(weight),
                "held": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        activation = Signal.like(self.activation, reset_less=True)
        weight = Signal.like(self.weight, reset_less=True)
        current = Signal()
        stale = self.new_weight | ~current
        with m.If(self.load & (stale | ~self.exchanged)):
            m.d.sync += activation.eq(self.activation)
        with m.If(self.load & (stale | self.exchanged)):
            m.d.sync += weight.eq(self.weight)
        with m.If(self.load | self.new_weight):
            m.d.sync += current.eq(self.load)
        m.d.sync += self.held.eq(self.selected)
        m.d.comb += [self.activation_held.eq(activation), self.weight_held.eq(weight)]
        return m


class Totals(wiring.Component):
    """Running totals of a lane, exact integers or fp32; one cycle of latency.

    Ports:
        contribution: the summand, two's complement.
        valid: add it in this cycle.
        first: add it to zero instead of the slot's total.
        select: slot, one-hot.
        last: put the sum out.
        total: the last sum that was put out.
        done: it was put out in the last cycle.
    """

    def __init__(self, datapath: Datapath) -> None:
        self.slots = datapath.reuse
        self.exact = datapath.accumulator == "exact"
        super().__init__(
            {
                "contribution": In(datapath.contribution_bits),
                "valid": In(1),
                "first": In(1),
                "select": In(datapath.reuse),
                "last": In(1),
                "total": Out(datapath.total_bits),
                "done": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        total, *slots = (
            Signal.like(self.total, name=name, reset_less=True)
            for name in ("last_total", *(f"slot_{i}" for i in range(self.slots)))
        )
        masked = [
            named(m, "masked", Mux(bit, slot, 0))
            for bit, slot in zip(self.select, slots, strict=True)
        ]
        old = Mux(self.first, 0, tree(m, masked, or_))
        if self.exact:
            new = old + self.contribution.as_signed()
        else:
            new = fp32_sum(m, named(m, "old", old), integer_to_fp32(m, self.contribution))
        with m.If(self.valid):
            for bit, slot in zip(self.select, slots, strict=True):
                with m.If(bit):
                    m.d.sync += slot.eq(new)
            with m.If(self.last):
                m.d.sync += total.eq(new)
        m.d.sync += self.done.eq(self.valid & self.last)
        m.d.comb += self.total.eq(total)
        return m
