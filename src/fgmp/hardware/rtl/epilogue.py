"""Exact totals to the layer's outputs (docs/numerics.md, section 6).

    y = fl32(fl32(A * 2**-20) * scale)      scale = fl32(t_w * t_x)
    y = fl32(y + bias)                      if there is one
    output = bf16(y)

Each ``fl32`` rounds once, subnormals included, as the software's fp32 does. A layer without bias
has biases of -0, which change no sum; +0 would turn -0 into 0. A row with a value that is not
finite has outputs NaN, 0x7FC00000.
"""

from typing import Any

from amaranth.hdl import Cat, Module, Mux
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.spec import UNIT_BITS
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.floats import (
    FP32,
    QUIET_NAN,
    fp32_sum,
    integer_to_fp32,
    parts,
    rounded,
)
from fgmp.hardware.rtl.pipeline import Pipeline

LATENCY = 5
"""Cycles from a total to its output, without stalls."""

SCALE = data.StructLayout({"significand": 1 + FP32.mantissa_bits, "exponent": 10})

NO_BIAS = 1 << 31
"""-0 as fp32."""


def input_layout(datapath: Datapath, tag_bits: int) -> data.StructLayout:
    """A total, the bias of its column, whether its row is finite, and a tag for the output."""
    return data.StructLayout(
        {"total": datapath.total_bits, "bias": 32, "finite": 1, "tag": tag_bits}
    )


def output_layout(tag_bits: int) -> data.StructLayout:
    """An output in both widths, with its tag."""
    return data.StructLayout({"fp32": 32, "bf16": 16, "tag": tag_bits})


class Epilogue(wiring.Component):
    """The epilogue; one total per cycle, :data:`LATENCY` cycles.

    Ports:
        input: stream of totals with their bias, a finite fp32, and whether the row is finite.
        output: stream of y as fp32 and as bf16.
        scale: significand * 2**(exponent - 23), the significand's first bit set unless it is zero;
            the exponent in two's complement.
    """

    def __init__(self, datapath: Datapath, tag_bits: int = 0) -> None:
        super().__init__(
            {
                "input": In(stream.Signature(input_layout(datapath, tag_bits))),
                "output": Out(stream.Signature(output_layout(tag_bits))),
                "scale": In(SCALE),
            }
        )
        self.datapath = datapath

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        advance = named(m, "advance", ~self.output.valid | self.output.ready)
        m.d.comb += self.input.ready.eq(advance)
        pipeline = Pipeline(m, self.input.valid, advance)
        payload = self.input.payload
        bias = pipeline.carry([payload.bias], "bias")
        finite = pipeline.carry([payload.finite], "finite")
        tag = pipeline.carry([payload.tag], "tag")
        exact = self.datapath.accumulator == "exact"
        total = integer_to_fp32(m, payload.total) if exact else payload.total
        a = pipeline.carry([total], "a")
        pipeline.next()
        significand, biased = parts(m, a.now[0])
        product = pipeline.carry([named(m, "product", significand * self.scale.significand)], "ay")
        shift = biased + self.scale.exponent.as_signed() - (FP32.bias + 2 * UNIT_BITS)
        exponent = pipeline.carry([named(m, "exponent", shift)], "exponent")
        sign = pipeline.carry([a.now[0][-1]], "sign")
        pipeline.next()
        above = product.now[0][-1]
        normalised = named(m, "normalised", Mux(above, product.now[0], product.now[0] << 1)[:48])
        magnitude = rounded(m, FP32, normalised, named(m, "top", exponent.now[0] + above))
        y = pipeline.carry([Cat(magnitude, sign.now[0])], "y")
        pipeline.next()
        with_bias = pipeline.carry([fp32_sum(m, y.now[0], bias.now[0])], "with_bias")
        pipeline.next()
        fp32 = named(m, "fp32", Mux(finite.now[0], with_bias.now[0], QUIET_NAN))
        narrow = named(m, "narrow", fp32 + 0x7FFF + fp32[16])
        outputs = pipeline.carry([fp32, narrow[16:32]], "out")
        pipeline.next()
        assert pipeline.step == LATENCY
        m.d.comb += [
            self.output.valid.eq(pipeline.valid),
            self.output.payload.fp32.eq(outputs.now[0]),
            self.output.payload.bf16.eq(outputs.now[1]),
            self.output.payload.tag.eq(tag.now[0]),
        ]
        return m
