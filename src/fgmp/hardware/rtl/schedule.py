"""The order of work: which blocks meet in a cycle, and in which order totals leave.

    for each activation tile, for each weight tile:
        Issue    for each block of K, for each slot         one cycle
        Drain    for each slot, for each lane               one cycle

A tile of activation rows has ``reuse`` slots of ``rows`` rows; the last tile may have fewer. A
weight tile has ``lanes`` rows; the last tile of a weight may have fewer.
"""

from typing import Any

from amaranth.hdl import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from fgmp.hardware.array import Array
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.tiles import SHAPE, SIZE_BITS


class Issue(wiring.Component):
    """Counter of pairs of blocks that enter the lanes.

    Ports:
        step: a pair enters in this cycle.
        group, slot: index of the pair.
        first, last: it begins, or ends, its dot products.
        weight_release, activation_release: with ``step``, it is the tile's last pair.
        done: all pairs have entered.
        shape: shape of the linear.
        start: a linear begins.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        super().__init__(
            {
                "step": In(1),
                "group": Out(SIZE_BITS),
                "slot": Out(SIZE_BITS),
                "first": Out(1),
                "last": Out(1),
                "weight_release": Out(1),
                "activation_release": Out(1),
                "done": Out(1),
                "shape": In(SHAPE),
                "start": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        tile, token = Signal(SIZE_BITS + 1), Signal(SIZE_BITS + 1)
        output = Signal(SIZE_BITS + 1)
        lanes, rows = self.array.lanes, self.array.rows
        slots_end = named(
            m,
            "slots_end",
            (self.slot == self.array.datapath.reuse - 1) | (token + rows >= self.shape.tokens),
        )
        groups_end = named(m, "groups_end", slots_end & self.last)
        outputs_end = named(m, "outputs_end", groups_end & (output + lanes >= self.shape.outputs))
        next_tile = named(m, "next_tile", tile + self.array.tile_rows)
        m.d.comb += [
            self.first.eq(self.group == 0),
            self.last.eq(self.group == self.shape.groups - 1),
            self.weight_release.eq(self.step & groups_end),
            self.activation_release.eq(self.step & outputs_end),
            self.done.eq(tile >= self.shape.tokens),
        ]
        with m.If(self.step):
            m.d.sync += [self.slot.eq(self.slot + 1), token.eq(token + rows)]
            with m.If(slots_end):
                m.d.sync += [self.slot.eq(0), token.eq(tile), self.group.eq(self.group + 1)]
            with m.If(groups_end):
                m.d.sync += [self.group.eq(0), output.eq(output + lanes)]
            with m.If(outputs_end):
                m.d.sync += [output.eq(0), tile.eq(next_tile), token.eq(next_tile)]
        with m.If(self.start):
            m.d.sync += [s.eq(0) for s in (self.slot, self.group, output, tile, token)]
        return m


class Drain(wiring.Component):
    """Counter of totals that leave for the epilogue.

    Ports:
        step: the totals of one lane and of all rows of a slot leave in this cycle.
        lane: index of the lane.
        row: the first of the totals' rows.
        column: the totals' output feature.
        next_column: ``column`` of the next cycle.
        last: these are the last totals of the slot.
        shape: shape of the linear.
        start: a linear begins.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        super().__init__(
            {
                "step": In(1),
                "lane": Out(SIZE_BITS),
                "row": Out(SIZE_BITS),
                "column": Out(SIZE_BITS),
                "next_column": Out(SIZE_BITS),
                "last": Out(1),
                "shape": In(SHAPE),
                "start": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        tile, output, slot = (Signal(SIZE_BITS + 1, name=n) for n in ("tile", "output", "slot"))
        lanes, rows = self.array.lanes, self.array.rows
        ends = (self.lane == lanes - 1) | (self.column == self.shape.outputs - 1)
        m.d.comb += self.last.eq(ends)
        last_row = self.row + rows >= self.shape.tokens
        slots_end = named(
            m, "slots_end", self.last & ((slot == self.array.datapath.reuse - 1) | last_row)
        )
        outputs_end = named(m, "outputs_end", slots_end & (output + lanes >= self.shape.outputs))
        next_tile = named(m, "next_tile", tile + self.array.tile_rows)
        m.d.comb += self.next_column.eq(self.column)
        with m.If(self.step):
            m.d.sync += [self.lane.eq(self.lane + 1), self.column.eq(self.next_column)]
            m.d.comb += self.next_column.eq(self.column + 1)
            with m.If(self.last):
                m.d.sync += [self.lane.eq(0), slot.eq(slot + 1), self.row.eq(self.row + rows)]
                m.d.comb += self.next_column.eq(output)
            with m.If(slots_end):
                m.d.sync += [slot.eq(0), self.row.eq(tile), output.eq(output + lanes)]
                m.d.comb += self.next_column.eq(output + lanes)
            with m.If(outputs_end):
                m.d.sync += [output.eq(0), tile.eq(next_tile), self.row.eq(next_tile)]
                m.d.comb += self.next_column.eq(0)
        with m.If(self.start):
            m.d.sync += [s.eq(0) for s in (self.lane, self.row, self.column, tile, output, slot)]
            m.d.comb += self.next_column.eq(0)
        return m
