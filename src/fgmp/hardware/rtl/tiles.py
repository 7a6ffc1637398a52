"""Buffers of blocks in front of the lanes: banks of two tiles, filled in the order of arrival.

A bank feeds the lanes of one weight row or of one activation row. Each of its two tiles holds
``slots`` rows of blocks. While one tile is read the other is filled; while both are full, no
further block is accepted.
"""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from fgmp.hardware.array import Array
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.lane import block_layout

SIZE_BITS = 20
"""Width of token, output and block counts."""

SHAPE = data.StructLayout(dict.fromkeys(("outputs", "groups", "tokens"), SIZE_BITS))
BLOCK = block_layout(Datapath())


def place_layout(banks: int, slots: int, groups: int) -> data.StructLayout:
    """Place of a block within a tile."""
    return data.StructLayout(
        {"group": ceil_log2(groups), "slot": ceil_log2(slots), "bank": ceil_log2(banks)}
    )


class Banks(wiring.Component):
    """Memories of blocks, two tiles each.

    Ports:
        write: write ``block`` to ``place`` of the tile that is being filled.
        filled: this write completes the tile.
        full: both tiles are complete; nothing may be written.
        ready: a complete tile can be read.
        read: the blocks of ``group`` and ``slot`` appear in the next cycle and stay. Without a
            complete tile they are those of the tile that is being filled.
        release: this cycle's read is the tile's last.
        clear: discard both tiles.
    """

    def __init__(self, banks: int, slots: int, groups: int) -> None:
        place = place_layout(banks, slots, groups)
        self._banks, self._words = banks, 1 << (ceil_log2(slots) + ceil_log2(groups) + 1)
        super().__init__(
            {
                "write": In(1),
                "place": In(place),
                "block": In(BLOCK),
                "filled": In(1),
                "full": Out(1),
                "ready": Out(1),
                "read": In(1),
                "group": In(place["group"].shape),
                "slot": In(place["slot"].shape),
                "blocks": Out(data.ArrayLayout(BLOCK, banks)),
                "release": In(1),
                "clear": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        tiles, filling, reading = Signal(2), Signal(), Signal()
        m.d.comb += [self.full.eq(tiles == 2), self.ready.eq(tiles != 0)]
        for bank in range(self._banks):
            memory = Memory(shape=BLOCK, depth=self._words, init=[])
            m.submodules[f"bank_{bank}"] = memory
            write, read = memory.write_port(), memory.read_port()
            m.d.comb += [
                write.addr.eq(Cat(self.place.group, self.place.slot, filling)),
                write.data.eq(self.block),
                write.en.eq(self.write & (self.place.bank == bank)),
                read.addr.eq(Cat(self.group, self.slot, reading)),
                read.en.eq(self.read),
                self.blocks[bank].eq(read.data),
            ]
        with m.If(self.clear):
            m.d.sync += tiles.eq(0)
        with m.Else():
            m.d.sync += tiles.eq(tiles + self.filled - self.release)
        m.d.sync += [filling.eq(filling ^ self.filled), reading.eq(reading ^ self.release)]
        return m


class WeightTiles(wiring.Component):
    """Counter of an image's blocks, row by row: the place of each.

    A tile has one row per bank; the last tile of a weight may have fewer. The image is sent once
    per tile of activation rows.

    Ports:
        taken: a block arrives in this cycle.
        place: its place.
        filled: it completes a tile.
        restart: it is the image's last.
        done: the image was sent as often as needed; no more blocks.
        shape: shape of the linear.
        start: a linear begins.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        super().__init__(
            {
                "taken": In(1),
                "place": Out(place_layout(array.lanes, 1, array.groups_max)),
                "filled": Out(1),
                "restart": Out(1),
                "done": Out(1),
                "shape": In(SHAPE),
                "start": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        group, row, bank = Signal(SIZE_BITS), Signal(SIZE_BITS), Signal(SIZE_BITS)
        tokens = Signal(SIZE_BITS + 1)
        row_ends = named(m, "row_ends", self.taken & (group == self.shape.groups - 1))
        weight_ends = named(m, "weight_ends", row_ends & (row == self.shape.outputs - 1))
        tile_ends = named(m, "tile_ends", weight_ends | (row_ends & (bank == self.array.lanes - 1)))
        m.d.comb += [
            self.place.group.eq(group),
            self.place.bank.eq(bank),
            self.filled.eq(tile_ends),
            self.restart.eq(weight_ends),
            self.done.eq(tokens >= self.shape.tokens),
        ]
        with m.If(self.taken):
            m.d.sync += group.eq(group + 1)
        with m.If(row_ends):
            m.d.sync += [group.eq(0), row.eq(row + 1), bank.eq(bank + 1)]
        with m.If(tile_ends):
            m.d.sync += bank.eq(0)
        with m.If(weight_ends):
            m.d.sync += [row.eq(0), tokens.eq(tokens + self.array.tile_rows)]
        with m.If(self.start):
            m.d.sync += [group.eq(0), row.eq(0), bank.eq(0), tokens.eq(0)]
        return m


class ActivationTiles(wiring.Component):
    """Counter of quantized blocks, row by row: the place of each.

    Row i of a tile is in bank ``i % rows`` and slot ``i // rows``; the last tile may have fewer
    rows.

    Ports:
        taken: a block arrives in this cycle.
        finite: all its values are finite.
        place: its place.
        filled: it completes a tile.
        open_groups: number of blocks present in every row of the tile that is being filled.
        row_finite: whether the rows of ``slot`` of the tile that is read are finite.
        slot, release: the inputs of the banks.
        shape: shape of the linear.
        start: a linear begins.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        slots = array.datapath.reuse
        place = place_layout(array.rows, slots, array.groups_max)
        super().__init__(
            {
                "taken": In(1),
                "finite": In(1),
                "place": Out(place),
                "filled": Out(1),
                "open_groups": Out(SIZE_BITS),
                "row_finite": Out(array.rows),
                "slot": In(place["slot"].shape),
                "release": In(1),
                "shape": In(SHAPE),
                "start": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        group, row = Signal(SIZE_BITS), Signal(SIZE_BITS)
        bank, slot = Signal(SIZE_BITS), Signal(SIZE_BITS)
        filling, reading = Signal(), Signal()
        first = named(m, "first", group == 0)
        row_ends = named(m, "row_ends", self.taken & (group == self.shape.groups - 1))
        slot_ends = named(m, "slot_ends", row_ends & (bank == self.array.rows - 1))
        last_slot = (bank == self.array.rows - 1) & (slot == self.array.datapath.reuse - 1)
        last_row = named(m, "last_row", last_slot | (row == self.shape.tokens - 1))
        tile_ends = named(m, "tile_ends", row_ends & last_row)
        m.d.comb += [
            self.place.group.eq(group),
            self.place.bank.eq(bank),
            self.place.slot.eq(slot),
            self.filled.eq(tile_ends),
            self.open_groups.eq(Mux(last_row, group, 0)),
        ]
        with m.If(self.taken):
            m.d.sync += group.eq(group + 1)
        with m.If(row_ends):
            m.d.sync += [group.eq(0), row.eq(row + 1), bank.eq(bank + 1)]
        with m.If(slot_ends):
            m.d.sync += [bank.eq(0), slot.eq(slot + 1)]
        with m.If(tile_ends):
            m.d.sync += [bank.eq(0), slot.eq(0)]
        with m.If(self.start):
            m.d.sync += [group.eq(0), row.eq(0), bank.eq(0), slot.eq(0)]

        flags = Signal(data.ArrayLayout(self.array.rows, 2 * self.array.datapath.reuse))
        written = flags[Cat(slot[: len(self.slot)], filling)]
        for i in range(self.array.rows):
            with m.If(self.taken & (bank == i)):
                m.d.sync += written[i].eq(self.finite & (written[i] | first))
        m.d.comb += self.row_finite.eq(flags[Cat(self.slot, reading)])
        m.d.sync += [filling.eq(filling ^ self.filled), reading.eq(reading ^ self.release)]
        return m
