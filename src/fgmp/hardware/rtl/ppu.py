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

By the rule ``benefit``, or with searched scales, errors against u itself take the place of q4 - q8
(``rtl.search``), and one more step chooses the scale of least error.

A value that is not finite makes its block FP8 and its own code NaN, is zero to its neighbours, and
raises a flag that stays until it is cleared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.activation import MULTIPLIER_BITS, SCALES
from fgmp.formats.spec import BLOCK, E4M3, SCALE_MIN_CODE
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl import search
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
"""Cycles from a block to its codes by the paper's rule and scale, where nothing stalls; other rules
and scales take one more."""

SCORE_BITS = 60
THRESHOLD_BITS = 64

INPUT = data.StructLayout(
    {"x": data.ArrayLayout(BF16_BITS, BLOCK), "sensitivity": data.ArrayLayout(CODE_BITS, BLOCK)}
)
OUTPUT = data.StructLayout({"block": block_layout(Datapath()), "finite": 1})
SITE = data.StructLayout(
    {"significand": MULTIPLIER_BITS, "exponent": EXPONENT_BITS, "threshold": THRESHOLD_BITS}
)


def latency(rule: str, scales: str) -> int:
    """Cycles from a block to its codes, where nothing stalls."""
    return LATENCY + ((rule, scales) != ("difference", "max"))


class Quantizer(wiring.Component):
    """The PPU; a block a cycle, ``latency`` cycles.

    Args:
        rule: what decides, ``difference`` or ``benefit``.
        scales: what FP4 block scales are chosen from, a key of ``formats.activation.SCALES``.

    Ports:
        input: stream of 16 bf16 values and the 7-bit codes of their channels' sensitivities, zero
            in padding.
        output: stream of blocks as a lane takes them, and whether all values were finite. An FP8
            block has scale 0.
        site: constants of the tensor: r = significand * 2**(exponent - 11) with the significand's
            first bit set and the exponent in two's complement; the threshold likewise.
        nonfinite: a value was not finite since the last ``clear``.
    """

    def __init__(self, rule: str = "difference", scales: str = "max") -> None:
        self.rule, self.scales = rule, scales
        self.latency = latency(rule, scales)
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
        front = _Front(
            significand=carry([u.significand for u in products], "significand"),
            exponent=carry([u.exponent for u in products], "exponent"),
            sensitivity=carry([payload.sensitivity[i] for i in range(BLOCK)], "sensitivity"),
        )
        negative = carry([u.negative for u in products], "negative")
        finite = carry([u.finite for u in products], "finite")
        pipeline.next()
        fp8 = carry(_each(encode_e4m3, m, front.significand, front.exponent), "fp8")
        pipeline.next()
        nearest = carry([_largest(m, [Const(SCALE_MIN_CODE), *fp8.now])], "nearest")
        pipeline.next()
        paper = (self.rule, self.scales) == ("difference", "max")
        judge = self._difference if paper else self._errors
        score, fp4, scale = judge(m, pipeline, front, fp8, nearest)
        whole = carry([named(m, "whole", Cat(finite.now).all())], "whole")
        threshold = self.site.threshold.as_signed()
        # A score is not negative: where it was left so, a threshold of -1 is for all FP8 still.
        exceeds = (score.now[0] > threshold) | (threshold < 0) | ~whole.now[0]
        is_fp8 = carry([named(m, "exceeds", exceeds)], "is_fp8")
        pipeline.next()
        assert pipeline.step == self.latency

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

    def _difference(
        self, m: Module, pipeline: Pipeline, front: "_Front", fp8: Carried, nearest: Carried
    ) -> tuple[Carried, Carried, Carried]:
        """Score, FP4 codes and scale by the paper's rule."""
        carry = pipeline.carry
        fp4 = carry(_fp4_codes(m, front, nearest.now[0]), "fp4")
        pipeline.next()
        judge = partial(difference, scale=nearest.now[0])
        d, unit = _carry_pairs(pipeline, _each(judge, m, fp4, fp8))
        pipeline.next()
        weigh = _each(weighted, m, d, unit, front.sensitivity)
        value, shift = _carry_pairs(pipeline, weigh)
        pipeline.next()
        score = carry([tree(m, _each(placed, m, value, shift))[:SCORE_BITS]], "score")
        pipeline.next()
        return score, fp4, nearest

    def _errors(
        self, m: Module, pipeline: Pipeline, front: "_Front", fp8: Carried, nearest: Carried
    ) -> tuple[Carried, Carried, Carried]:
        """The same by the errors of several scales; the score may be negative."""
        carry = pipeline.carry
        tried = [search.candidate(m, nearest.now[0], o) for o in SCALES[self.scales]]
        scales = [carry([scale], "scale") for scale in tried]
        codes = [carry(_fp4_codes(m, front, scale), "fp4") for scale in tried]
        v = carry(_each(search.target, m, front.significand, front.exponent), "v")
        pipeline.next()
        q4 = []
        for scale, fp4 in zip(scales, codes, strict=True):
            decoded = decode_magnitude(m, E4M3, scale.now[0])
            q4.append([search.fp4_value(m, code, decoded) for code in fp4.now])
        q8 = _each(search.fp8_value, m, fp8)
        pairs = [(q, v.now) for q in q4]
        pairs += [(q8, v.now)] if self.rule == "benefit" else [(q, q8) for q in q4]
        away = [
            carry([search.distance(m, a, b) for a, b in zip(*pair, strict=True)], "d")
            for pair in pairs
        ]
        pipeline.next()
        squares = [carry(_each(search.weighed, m, d, front.sensitivity), "square") for d in away]
        pipeline.next()
        sums = [tree(m, _each(search.put, m, s, front.sensitivity))[:SCORE_BITS] for s in squares]
        totals = carry([named(m, "sum", total) for total in sums], "sum")
        pipeline.next()
        return self._least(m, pipeline, totals, codes, scales)

    def _least(
        self,
        m: Module,
        pipeline: Pipeline,
        totals: Carried,
        codes: list[Carried],
        scales: list[Carried],
    ) -> tuple[Carried, Carried, Carried]:
        """The try of least error, the first of equals, and its score."""
        errors, rest = totals.now[: len(codes)], totals.now[len(codes) :]
        benefit = self.rule == "benefit"
        scores = [e - rest[0] for e in errors] if benefit else list(rest)
        least, score = errors[0], scores[0]
        fp4, scale = list(codes[0].now), scales[0].now[0]
        for error, other, code, s in zip(
            errors[1:], scores[1:], codes[1:], scales[1:], strict=True
        ):
            better = named(m, "better", error < least)
            least = named(m, "least", Mux(better, error, least))
            score = named(m, "score", Mux(better, other, score))
            fp4 = [named(m, "code", Mux(better, c, f)) for c, f in zip(code.now, fp4, strict=True)]
            scale = named(m, "scale", Mux(better, s.now[0], scale))
        nothing = named(m, "nothing", ~Cat(fp4).any())
        chosen = [named(m, "chosen", Mux(nothing, SCALE_MIN_CODE, scale)[:CODE_BITS])]
        carried = [
            pipeline.carry([named(m, "score", score)], "score"),
            pipeline.carry(fp4, "fp4"),
            pipeline.carry(chosen, "scale"),
        ]
        pipeline.next()
        return carried[0], carried[1], carried[2]


@dataclass(frozen=True)
class _Front:
    """What every rule reads: |u|, as ``encode.multiply`` gives it, and the sensitivities."""

    significand: Carried
    exponent: Carried
    sensitivity: Carried


def _fp4_codes(m: Module, front: _Front, scale: Value) -> list[Value]:
    """The 16 codes under a scale."""
    decoded = decode_magnitude(m, E4M3, scale)
    encode = partial(encode_e2m1, bounds=midpoints(m, decoded), scale_shift=decoded.shift)
    return _each(encode, m, front.significand, front.exponent)


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
