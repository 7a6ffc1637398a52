"""The online quantizer: a block of 16 bf16 activations to codes, scale and flag, a block a cycle.

It computes what ``formats.activation.quantize`` defines (docs/numerics.md, sections 3 and 5),
exactly and in eight steps with a register after each:

    product     u = x * r
    fp8         E4M3(u)
    scale       s = the largest of the 16 codes without their signs, at least 0x01
    fp4         E2M1(6 u / s)
    difference  q4 - q8
    weighted    its square times the sensitivity
    score       S = their sum
    flag        S > T

A value that is not finite makes its block FP8 and its own code NaN, is zero to its neighbours, and
raises a flag that stays until it is cleared.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.activation import MULTIPLIER_BITS
from fgmp.formats.spec import BLOCK, E4M3, SCALE_MIN_CODE
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl.decode import decode_magnitude, named, tree
from fgmp.hardware.rtl.encode import (
    BF16_BITS,
    CODE_BITS,
    EXPONENT_BITS,
    encode_e2m1,
    encode_e4m3,
    midpoints,
    multiply,
)
from fgmp.hardware.rtl.lane import block_layout
from fgmp.hardware.rtl.pipeline import Carried, Pipeline
from fgmp.hardware.rtl.score import difference, placed, weighted

LATENCY = 8
"""Cycles from a block at the input to its codes at the output, where nothing stalls."""

SCORE_BITS = 60
THRESHOLD_BITS = 64

INPUT = data.StructLayout(
    {"x": data.ArrayLayout(BF16_BITS, BLOCK), "sensitivity": data.ArrayLayout(CODE_BITS, BLOCK)}
)
OUTPUT = data.StructLayout({"block": block_layout(Datapath()), "finite": 1})
SITE = data.StructLayout(
    {"significand": MULTIPLIER_BITS, "exponent": EXPONENT_BITS, "threshold": THRESHOLD_BITS}
)


class Quantizer(wiring.Component):
    """The PPU; a block a cycle, :data:`LATENCY` cycles.

    Ports:
        input: stream of 16 bf16 values and the 7-bit codes of their channels' sensitivities, zero
            in padding.
        output: stream of blocks as a lane takes them, and whether all values were finite. An FP8
            block has scale 0.
        site: constants of the tensor: r = significand * 2**(exponent - 11) with the significand's
            first bit set and the exponent in two's complement; the threshold likewise.
        nonfinite: a value was not finite since the last ``clear``.
    """

    def __init__(self) -> None:
        super().__init__(
            {
                "input": In(stream.Signature(INPUT)),
                "output": Out(stream.Signature(OUTPUT)),
                "site": In(SITE),
                "clear": In(1),
                "nonfinite": Out(1),
            }
        )

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        advance = named(m, "advance", ~self.output.valid | self.output.ready)
        m.d.comb += self.input.ready.eq(advance)
        pipeline = Pipeline(m, self.input.valid, advance)
        carry = pipeline.carry

        payload = self.input.payload
        products = [
            multiply(m, payload.x[i], self.site.significand, self.site.exponent)
            for i in range(BLOCK)
        ]
        significand = carry([u.significand for u in products], "significand")
        exponent = carry([u.exponent for u in products], "exponent")
        negative = carry([u.negative for u in products], "negative")
        finite = carry([u.finite for u in products], "finite")
        sensitivity = carry([payload.sensitivity[i] for i in range(BLOCK)], "sensitivity")
        pipeline.next()
        fp8 = carry(_each(encode_e4m3, m, significand, exponent), "fp8")
        pipeline.next()
        scale = carry([_largest(m, [Const(SCALE_MIN_CODE), *fp8.now])], "scale")
        pipeline.next()
        decoded = decode_magnitude(m, E4M3, scale.now[0])
        encode = partial(encode_e2m1, bounds=midpoints(m, decoded), scale_shift=decoded.shift)
        fp4 = carry(_each(encode, m, significand, exponent), "fp4")
        pipeline.next()
        d, unit = _carry_pairs(
            pipeline, _each(partial(difference, scale=scale.now[0]), m, fp4, fp8)
        )
        pipeline.next()
        value, shift = _carry_pairs(pipeline, _each(weighted, m, d, unit, sensitivity))
        pipeline.next()
        score = carry([tree(m, _each(placed, m, value, shift))[:SCORE_BITS]], "score")
        pipeline.next()
        whole = carry([named(m, "whole", Cat(finite.now).all())], "whole")
        exceeds = score.now[0] > self.site.threshold.as_signed()
        is_fp8 = carry([named(m, "exceeds", exceeds | ~whole.now[0])], "is_fp8")
        pipeline.next()
        assert pipeline.step == LATENCY

        wide = is_fp8.now[0]
        block = self.output.payload.block
        for i, (a, b, n, f) in enumerate(_each(_parts, m, fp4, fp8, negative, finite)):
            narrow_code, wide_code = Cat(a, n), Mux(f, Cat(b, n), E4M3.nan_code)
            m.d.comb += block.codes[i].eq(Mux(wide, wide_code, narrow_code))
        m.d.comb += [
            block.scale.eq(Mux(wide, 0, scale.now[0])),
            block.is_fp8.eq(wide),
            self.output.payload.finite.eq(whole.now[0]),
            self.output.valid.eq(pipeline.valid),
        ]
        with m.If(self.clear):
            m.d.sync += self.nonfinite.eq(0)
        with m.If(self.output.valid & ~whole.now[0]):
            m.d.sync += self.nonfinite.eq(1)
        return m


def _each(step: Callable[..., Any], m: Module, *carried: Carried) -> list[Any]:
    """A step of the calculation for each of the 16 elements."""
    return [step(m, *values) for values in zip(*(c.now for c in carried), strict=True)]


def _parts(m: Module, *values: Value) -> tuple[Value, ...]:
    return values


def _carry_pairs(pipeline: Pipeline, pairs: list[tuple[Value, Value]]) -> tuple[Carried, Carried]:
    """Values and shifts, carried."""
    values, shifts = zip(*pairs, strict=True)
    return pipeline.carry(values, "value"), pipeline.carry(shifts, "shift")


def _largest(m: Module, codes: Sequence[Value]) -> Value:
    """The largest code: codes without a sign are in the order of their values."""
    while len(codes) > 1:
        larger = [Mux(a > b, a, b) for a, b in zip(codes[::2], codes[1::2], strict=False)]
        codes = [named(m, "larger", v) for v in larger] + list(codes[len(larger) * 2 :])
    return codes[0]
