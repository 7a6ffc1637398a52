"""The accelerator: computes a whole linear from streams to a stream.

    activations -> quantizer -> activation banks --+
                                                   +--> lanes -> totals -> epilogues -> results
    image -> unpacker --------> weight banks ------+

A bank holds two tiles, one that is computed and one that is loaded. A weight bank feeds the lanes
of one weight row, an activation bank those of one activation row. The order of work is that of
``hardware.array``. A part without room stalls its source through ``ready``. Counters say how many
cycles the lanes waited, and for what.
"""

from typing import Any

from amaranth.hdl import Cat, Module, Mux, Signal, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.fifo import SyncFIFOBuffered
from amaranth.lib.wiring import In, Out

from fgmp.formats.spec import BLOCK
from fgmp.hardware.array import Array
from fgmp.hardware.rtl import epilogue, ppu
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.encode import BF16_BITS, CODE_BITS
from fgmp.hardware.rtl.schedule import Drain, Issue
from fgmp.hardware.rtl.table import Table
from fgmp.hardware.rtl.tiles import SHAPE, SIZE_BITS, ActivationTiles, Banks, WeightTiles
from fgmp.hardware.rtl.unpack import FLAGS, WORDS, Unpacker

COUNTERS = data.StructLayout(
    dict.fromkeys(("cycles", "working", "first", "activations", "weights", "epilogue"), 32)
)
"""Cycles from start to end, cycles in which the lanes worked, and cycles in which they waited: for
the first pair of tiles, for quantized activations, for weights, for the epilogue."""

TAG = data.StructLayout({"row": SIZE_BITS, "column": SIZE_BITS})


def results_layout(array: Array) -> data.StructLayout:
    """Outputs of ``rows`` activation rows from ``row`` on, in one column.

    The user ignores rows beyond the last token.
    """
    value = data.StructLayout({"fp32": 32, "bf16": 16})
    return data.StructLayout({"tag": TAG, "values": data.ArrayLayout(value, array.rows)})


class Accelerator(wiring.Component):
    """The accelerator; one linear at a time.

    Ports:
        start: begin; shape, site and scale must hold until ``busy`` falls.
        busy: a linear is in progress.
        shape: N, ceil(K / 16) and the number of activation rows.
        site, scale: constants in the layouts of the quantizer and the epilogue.
        sensitivities: stream of 16 codes per block of K, each block once.
        biases: stream of N fp32 values, each once; ``epilogue.NO_BIAS`` where there is none.
        activations: stream of 16 bf16 values, row by row.
        flags, words: the weight's image, once per tile of activation rows.
        results: stream of :func:`results_layout`.
        counters: counters of the current or last linear.
        nonfinite: an activation was not finite; falls with ``start``.
    """

    def __init__(self, array: Array) -> None:
        self.array = array
        super().__init__(
            {
                "start": In(1),
                "busy": Out(1),
                "shape": In(SHAPE),
                "site": In(ppu.SITE),
                "scale": In(epilogue.SCALE),
                "sensitivities": In(stream.Signature(CODE_BITS * BLOCK)),
                "biases": In(stream.Signature(32)),
                "activations": In(stream.Signature(BF16_BITS * BLOCK)),
                "flags": In(stream.Signature(FLAGS)),
                "words": In(stream.Signature(WORDS)),
                "results": Out(stream.Signature(results_layout(array))),
                "counters": Out(COUNTERS),
                "nonfinite": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        begin = named(m, "begin", self.start & ~self.busy)
        self._quantize(m, begin)
        self._load_weights(m, begin)
        totals = self._multiply(m, begin)
        self._finish(m, begin, totals)
        self._count(m, begin)
        return m

    def _quantize(self, m: Module, begin: Value) -> None:
        """Pass activations through the quantizer into their banks."""
        array = self.array
        m.submodules.quantizer = quantizer = ppu.Quantizer(array.quantizer)
        m.submodules.sensitivities = table = Table(CODE_BITS * BLOCK, array.groups_max)
        m.submodules.activation_tiles = tiles = ActivationTiles(array)
        m.submodules.activation_banks = self._activations = Banks(
            array.rows, array.datapath.reuse, array.groups_max
        )
        self._activation_tiles = tiles
        self._gate(m, self.sensitivities, table.input, self.busy)
        group, next_group, rows = Signal(SIZE_BITS), Signal(SIZE_BITS), Signal(SIZE_BITS)
        expected = named(m, "expected", self.busy & table.loaded & (rows != self.shape.tokens))
        entered = named(m, "entered", quantizer.input.valid & quantizer.input.ready)
        last = named(m, "last_group", group == self.shape.groups - 1)
        with m.If(begin):
            m.d.comb += next_group.eq(0)
        with m.Elif(entered):
            m.d.comb += next_group.eq(Mux(last, 0, group + 1))
        with m.Else():
            m.d.comb += next_group.eq(group)
        m.d.sync += group.eq(next_group)
        m.d.sync += rows.eq(Mux(begin, 0, rows + (entered & last)))
        taken = named(m, "quantized", quantizer.output.valid & quantizer.output.ready)
        m.d.comb += [
            table.count.eq(self.shape.groups),
            table.clear.eq(begin),
            table.address.eq(next_group),
            quantizer.site.eq(self.site),
            quantizer.clear.eq(begin),
            self.nonfinite.eq(quantizer.nonfinite),
            quantizer.input.valid.eq(self.activations.valid & expected),
            quantizer.input.payload.x.eq(self.activations.payload),
            quantizer.input.payload.sensitivity.eq(table.data),
            self.activations.ready.eq(quantizer.input.ready & expected),
            quantizer.output.ready.eq(~self._activations.full),
            tiles.taken.eq(taken),
            tiles.finite.eq(quantizer.output.payload.finite),
            tiles.shape.eq(self.shape),
            tiles.start.eq(begin),
            self._activations.write.eq(taken),
            self._activations.place.eq(tiles.place),
            self._activations.block.eq(quantizer.output.payload.block),
            self._activations.filled.eq(tiles.filled),
            self._activations.clear.eq(begin),
        ]

    def _gate(self, m: Module, outer: Any, inner: Any, expected: Value) -> None:
        """Connect a stream that flows only while items are expected.

        Items of the next linear wait until it begins.
        """
        m.d.comb += [
            inner.payload.eq(outer.payload),
            inner.valid.eq(outer.valid & expected),
            outer.ready.eq(inner.ready & expected),
        ]

    def _load_weights(self, m: Module, begin: Value) -> None:
        """Pass the image through the unpacker into the weight banks."""
        m.submodules.unpacker = unpacker = Unpacker()
        m.submodules.weight_tiles = tiles = WeightTiles(self.array)
        m.submodules.weight_banks = self._weights = Banks(
            self.array.lanes, 1, self.array.groups_max
        )
        expected = named(m, "image_expected", self.busy & ~tiles.done)
        self._gate(m, self.flags, unpacker.flags, expected)
        self._gate(m, self.words, unpacker.words, expected)
        taken = named(m, "unpacked", unpacker.output.valid & unpacker.output.ready)
        m.d.comb += [
            unpacker.output.ready.eq(self.busy & ~self._weights.full & ~tiles.done),
            unpacker.restart.eq(tiles.restart | begin),
            tiles.taken.eq(taken),
            tiles.shape.eq(self.shape),
            tiles.start.eq(begin),
            self._weights.write.eq(taken),
            self._weights.place.eq(tiles.place),
            self._weights.block.eq(unpacker.output.payload),
            self._weights.filled.eq(tiles.filled),
            self._weights.clear.eq(begin),
        ]

    def _multiply(self, m: Module, begin: Value) -> SyncFIFOBuffered:
        """Pass pairs of blocks through the lanes; totals go to a queue, with one flag per row."""
        array, width = self.array, self.array.datapath.total_bits
        m.submodules.issue = self._issue = Issue(array)
        depth = 2 * array.datapath.reuse
        # A total whose computation has begun never waits: its place in the queue is reserved. The
        # queue has two more, because it refuses while an item moves from its memory to its output.
        m.submodules.totals = totals = SyncFIFOBuffered(
            width=(array.lanes * width + 1) * array.rows, depth=depth + 2
        )
        step = self._step(m, begin, depth, totals.r_en & totals.r_rdy)
        pair, finite = self._pair(m, step)
        lanes = self._lanes(m, pair)
        m.d.comb += [
            totals.w_data.eq(Cat(*(lane.total for lane in lanes), finite)),
            totals.w_en.eq(lanes[0].done),
        ]
        return totals

    def _step(self, m: Module, begin: Value, depth: int, taken: Value) -> Signal:
        """Whether a pair of blocks is issued: both blocks are there, and room for its total.

        Args:
            m, begin: the module, and whether a linear begins.
            depth: places of the queue that may be reserved.
            taken: an item leaves the queue.
        """
        issue = self._issue
        room = Signal(range(depth + 1), init=depth)
        # Lanes follow the quantizer through the last row of a tile: a single token need not wait.
        self._quantized = named(
            m,
            "activations_there",
            self._activations.ready | (issue.group < self._activation_tiles.open_groups),
        )
        step = named(
            m,
            "step",
            self.busy
            & self._quantized
            & self._weights.ready
            & ~issue.done
            & (~issue.last | (room != 0)),
        )
        m.d.sync += room.eq(room - (step & issue.last) + taken)
        m.d.comb += [
            issue.step.eq(step),
            issue.shape.eq(self.shape),
            issue.start.eq(begin),
            self._activations.read.eq(step),
            self._activations.group.eq(issue.group),
            self._activations.slot.eq(issue.slot),
            self._activations.release.eq(issue.activation_release),
            self._activation_tiles.slot.eq(issue.slot),
            self._activation_tiles.release.eq(issue.activation_release),
            self._weights.read.eq(step & (issue.slot == 0)),
            self._weights.group.eq(issue.group),
            self._weights.release.eq(issue.weight_release),
        ]
        return step

    def _pair(self, m: Module, step: Value) -> tuple[Any, Value]:
        """Control of the pair that the banks read, and finite flags beside its totals."""
        array, issue = self.array, self._issue
        pair = Signal(data.StructLayout(_PAIR | {"slot": SIZE_BITS, "finite": array.rows}))
        m.d.sync += [
            pair.valid.eq(step),
            pair.new_weight.eq(issue.slot == 0),
            pair.first.eq(issue.first),
            pair.last.eq(issue.last),
            pair.slot.eq(issue.slot),
            pair.finite.eq(self._activation_tiles.row_finite),
        ]
        finite: Value = pair.finite
        for _ in range(array.datapath.latency):
            later = Signal(array.rows, name="finite")
            m.d.sync += later.eq(finite)
            finite = later
        return pair, finite

    def _lanes(self, m: Module, pair: Any) -> list[Any]:
        """The lanes, row by row, at the banks' outputs."""
        array, lanes = self.array, []
        for row in range(array.rows):
            for column in range(array.lanes):
                lane = array.datapath.create()
                m.submodules[f"lane_{row}_{column}"] = lane
                m.d.comb += [
                    lane.activation.eq(self._activations.blocks[row]),
                    lane.weight.eq(self._weights.blocks[column]),
                    *(getattr(lane, name).eq(pair[name]) for name in (*_PAIR, "slot")),
                ]
                lanes.append(lane)
        return lanes

    def _finish(self, m: Module, begin: Value, totals: SyncFIFOBuffered) -> None:
        """Pass totals from the queue through the epilogues, one output feature at a time."""
        array, width = self.array, self.array.datapath.total_bits
        m.submodules.biases = table = Table(32, array.outputs_max)
        m.submodules.drain = drain = Drain(array)
        self._gate(m, self.biases, table.input, self.busy)
        queue = data.StructLayout(
            {
                "totals": data.ArrayLayout(data.ArrayLayout(width, array.lanes), array.rows),
                "finite": array.rows,
            }
        )
        head = data.View(queue, totals.r_data)
        epilogues = [epilogue.Epilogue(array.datapath, TAG.size) for _ in range(array.rows)]
        leader = epilogues[0]
        valid = named(m, "draining", totals.r_rdy & table.loaded)
        tag = Signal(TAG)
        m.d.comb += [
            table.count.eq(self.shape.outputs),
            table.clear.eq(begin),
            table.address.eq(drain.next_column),
            drain.shape.eq(self.shape),
            drain.start.eq(begin),
            drain.step.eq(valid & leader.input.ready),
            totals.r_en.eq(drain.step & drain.last),
            tag.row.eq(drain.row),
            tag.column.eq(drain.column),
            self.results.valid.eq(leader.output.valid),
            self.results.payload.tag.eq(leader.output.payload.tag),
        ]
        for row, each in enumerate(epilogues):
            m.submodules[f"epilogue_{row}"] = each
            chosen = Signal(width, name=f"total_{row}")
            with m.Switch(drain.lane):
                for lane in range(array.lanes):
                    with m.Case(lane):
                        m.d.comb += chosen.eq(head.totals[row][lane])
            m.d.comb += [
                each.input.valid.eq(valid),
                each.input.payload.total.eq(chosen),
                each.input.payload.bias.eq(table.data),
                each.input.payload.finite.eq(head.finite[row]),
                each.input.payload.tag.eq(tag),
                each.scale.eq(self.scale),
                each.output.ready.eq(self.results.ready),
                self.results.payload.values[row].fp32.eq(each.output.payload.fp32),
                self.results.payload.values[row].bf16.eq(each.output.payload.bf16),
            ]
        left = self.results.payload.tag
        is_last = (left.column == self.shape.outputs - 1) & (
            left.row + array.rows >= self.shape.tokens
        )
        with m.If(begin):
            m.d.sync += self.busy.eq(1)
        with m.Elif(self.results.valid & self.results.ready & is_last):
            m.d.sync += self.busy.eq(0)

    def _count(self, m: Module, begin: Value) -> None:
        """Count cycles by what the lanes did or waited for."""
        counters, issue = self.counters, self._issue
        begun = Signal()
        with m.If(begin):
            m.d.sync += [counters.eq(0), begun.eq(0)]
        with m.Elif(self.busy):
            m.d.sync += counters.cycles.eq(counters.cycles + 1)
            with m.If(issue.step):
                m.d.sync += [counters.working.eq(counters.working + 1), begun.eq(1)]
            with m.Elif(~begun):
                m.d.sync += counters.first.eq(counters.first + 1)
            with m.Elif(~issue.done):
                with m.If(~self._quantized):
                    m.d.sync += counters.activations.eq(counters.activations + 1)
                with m.Elif(~self._weights.ready):
                    m.d.sync += counters.weights.eq(counters.weights + 1)
                with m.Else():
                    m.d.sync += counters.epilogue.eq(counters.epilogue + 1)


_PAIR = dict.fromkeys(("valid", "new_weight", "first", "last"), 1)
