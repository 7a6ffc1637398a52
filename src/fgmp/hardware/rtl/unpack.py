"""The streamed image (docs/format.md, section 5) to blocks for the lanes, one block per cycle.

The image arrives in two streams: flags, one byte at a time, and blocks of 9 or 16 bytes, in words
of 16 bytes. In one cycle, a buffer of two words can output the bytes of a block and accept a word.
"""

from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.spec import BLOCK, E2M1, E4M3
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.lane import block_layout
from fgmp.pack.stream import FP4_BLOCK_BYTES, FP8_BLOCK_BYTES

WORD_BYTES = 16
FLAGS = data.StructLayout({"data": 8, "last": 1})
WORDS = data.StructLayout({"data": 8 * WORD_BYTES, "last": 1})


class Unpacker(wiring.Component):
    """Image to blocks; one block per cycle, one cycle after its last byte.

    Ports:
        flags: stream of bytes; bit i of a byte belongs to its block i.
        words: stream of 16 bytes, the first in the low bits.
        output: stream of blocks.
        restart: the last block was taken; a new image begins.

    Both inputs mark their ``last`` item and are not read beyond it until ``restart``.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "flags": In(stream.Signature(FLAGS)),
                "words": In(stream.Signature(WORDS)),
                "output": Out(stream.Signature(block_layout(Datapath()))),
                "restart": In(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        flags, flags_left, flags_end = Signal(8), Signal(range(9)), Signal()
        held, bytes_held, words_end = Signal(16 * WORD_BYTES), Signal(range(33)), Signal()
        is_fp8 = flags[0]
        size = named(m, "size", Mux(is_fp8, FP8_BLOCK_BYTES, FP4_BLOCK_BYTES))
        m.d.comb += self.output.valid.eq((flags_left != 0) & (bytes_held >= size))
        gone = named(m, "gone", self.output.valid & self.output.ready)

        empty = (flags_left == 0) | (gone & (flags_left == 1))
        m.d.comb += self.flags.ready.eq(empty & ~flags_end)
        with m.If(self.flags.ready & self.flags.valid):
            m.d.sync += [
                flags.eq(self.flags.payload.data),
                flags_left.eq(8),
                flags_end.eq(self.flags.payload.last),
            ]
        with m.Elif(gone):
            m.d.sync += [flags.eq(flags >> 1), flags_left.eq(flags_left - 1)]

        left = named(m, "left", bytes_held - Mux(gone, size, 0))[: len(bytes_held)]
        moved = Mux(is_fp8, held >> 8 * FP8_BLOCK_BYTES, held >> 8 * FP4_BLOCK_BYTES)
        rest = named(m, "rest", Mux(gone, moved, held))
        m.d.comb += self.words.ready.eq((left <= WORD_BYTES) & ~words_end)
        taken = named(m, "taken", self.words.ready & self.words.valid)
        appended = named(m, "appended", self.words.payload.data << Cat(Const(0, 3), left[:5]))
        m.d.sync += [
            held.eq(Mux(taken, rest | appended, rest)),
            bytes_held.eq(left + Mux(taken, WORD_BYTES, 0)),
        ]
        with m.If(taken):
            m.d.sync += words_end.eq(self.words.payload.last)
        with m.If(self.restart):
            m.d.sync += [flags_left.eq(0), flags_end.eq(0)]
            m.d.sync += [bytes_held.eq(0), held.eq(0), words_end.eq(0)]

        block = self.output.payload
        m.d.comb += [block.is_fp8.eq(is_fp8), block.scale.eq(Mux(is_fp8, 0, held[:8]))]
        for i in range(BLOCK):
            narrow = held[E4M3.bits + i * E2M1.bits :][: E2M1.bits]
            m.d.comb += block.codes[i].eq(Mux(is_fp8, held[i * E4M3.bits :][: E4M3.bits], narrow))
        return m
