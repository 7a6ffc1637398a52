"""A table of constants: a stream fills it, an address reads it."""

from typing import Any

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out


class Table(wiring.Component):
    """A memory of ``depth`` words; a read takes one cycle.

    Ports:
        input: stream of the first ``count`` words, in order.
        count: number of words.
        clear: discard the words; a new table follows.
        address: the word to read in the next cycle.
        data: the word addressed in the last cycle.
        loaded: ``data`` is valid: all words were there in this cycle and the last.
    """

    def __init__(self, bits: int, depth: int) -> None:
        self._depth = depth
        self._bits = bits
        size = range(depth + 1)
        super().__init__(
            {
                "input": In(stream.Signature(bits)),
                "count": In(size),
                "clear": In(1),
                "address": In(range(depth)),
                "data": Out(bits),
                "loaded": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.memory = memory = Memory(shape=self._bits, depth=self._depth, init=[])
        write, read = memory.write_port(), memory.read_port()
        filled = Signal.like(self.count)
        m.d.comb += [
            self.input.ready.eq((filled != self.count) & ~self.clear),
            write.addr.eq(filled),
            write.data.eq(self.input.payload),
            write.en.eq(self.input.valid & self.input.ready),
            read.addr.eq(self.address),
            read.en.eq(1),
            self.data.eq(read.data),
        ]
        m.d.sync += self.loaded.eq((filled == self.count) & ~self.clear)
        with m.If(self.clear):
            m.d.sync += filled.eq(0)
        with m.Elif(write.en):
            m.d.sync += filled.eq(filled + 1)
        return m
