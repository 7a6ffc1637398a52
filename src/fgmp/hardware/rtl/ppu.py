"""The online quantizer: a block of 16 bf16 activations to codes, scale and flag, a block a cycle.

It computes what ``formats.activation.quantize`` defines (docs/numerics.md, sections 3 and 5),
exactly and in eight steps with a register after each; by the paper's rule:

    product     u = x * r
    fp8         E4M3(u)
    scale       s = the largest of the 16 codes without their signs, at least 0x01
    fp4         E2M1(6 u / s)
    difference  q4 - q8
    weighted    its square times the sensitivity
    score       S = their sum
    flag        S > T

By the rule ``benefit``, or with searched scales, errors against u itself take the place of q4 - q8
(``rtl.search``):

    target      v, weighted             beside ``scale``
    fp4         under each scale        beside the multiples of g v
    sums        sum g e**2, sum e g v   under each scale; 2 v - q8 by its significand
    inner       s * the first - 2 * the second; sum g q8 (2 v - q8)
    outer       that times s
    choice      of the least
    flag        S > T

A value that is not finite makes its block FP8 and its own code NaN, is zero to its neighbours, and
raises a flag that stays until it is cleared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.activation import MULTIPLIER_BITS, SCALES, TRUNCATED
from fgmp.formats.spec import BLOCK, E4M3, SCALE_MIN_CODE
from fgmp.hardware.datapath import FP8_GAIN, Datapath
from fgmp.hardware.rtl import search
from fgmp.hardware.rtl.decode import decode_magnitude, named, shifted, tree
from fgmp.hardware.rtl.encode import (
    BF16_BITS,
    CODE_BITS,
    EXPONENT_BITS,
    encode_e2m1,
    encode_e4m3,
    fixed_point,
    in_quarters,
    midpoints,
    multiply,
)
from fgmp.hardware.rtl.lane import block_layout
from fgmp.hardware.rtl.pipeline import Carried, Pipeline
from fgmp.hardware.rtl.score import difference, placed, weighted

LATENCY = 8
"""Cycles from a block to its codes, where nothing stalls; see :func:`latency`."""

_SQUARES = 3
"""More of them, where a searched scale is settled before the paper's rule can begin."""

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
    paper = (rule, scales) == ("difference", "max")
    return LATENCY + (0 if paper else 1 + (rule == TRUNCATED) + _SQUARES * (rule == "difference"))


class Quantizer(wiring.Component):
    """The PPU; a block a cycle, ``latency`` cycles.

    Args:
        rule: what decides, ``difference``, ``benefit`` or ``truncated``.
        scales: what FP4 block scales are chosen from, a key of ``formats.activation.SCALES``.
        sensitivities: ``e4m3``, or ``powers`` where all are powers of two from 2**-6 on.

    Ports:
        input: stream of 16 bf16 values and the 7-bit codes of their channels' sensitivities, zero
            in padding.
        output: stream of blocks as a lane takes them, and whether all values were finite. An FP8
            block has scale 0.
        site: constants of the tensor: r = significand * 2**(exponent - 11) with the significand's
            first bit set and the exponent in two's complement; the threshold likewise.
        nonfinite: a value was not finite since the last ``clear``.
    """

    def __init__(
        self, rule: str = "difference", scales: str = "max", sensitivities: str = "e4m3"
    ) -> None:
        self.rule, self.scales, self.sensitivities = rule, scales, sensitivities
        self.latency = latency(rule, scales)
        self._paper = (rule, scales) == ("difference", "max")
        self._short, self._powers = rule == TRUNCATED, sensitivities == "powers"
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
        x = [named(m, "x", payload.x[i]) for i in range(BLOCK)]
        r = [self.site.significand] * BLOCK, [self.site.exponent] * BLOCK
        product = _columns(_each(m, "product", multiply, x, *r))
        significand, exponent = carry(product[0], "significand"), carry(product[1], "exponent")
        low = E4M3.mantissa_bits if self._powers else 0
        sensitivity = carry([payload.sensitivity[i][low:] for i in range(BLOCK)], "sensitivity")
        negative, finite = carry(product[2], "negative"), carry(product[3], "finite")
        pipeline.next()
        u = significand.now, exponent.now
        fp8 = carry(_each(m, "fp8", encode_e4m3, *u), "fp8")
        fixed = carry(_each(m, "fixed", fixed_point, *u), "fixed")
        pipeline.next()
        nearest = carry([_largest(_unit(m, "maximum"), fp8.now)], "nearest")
        judge = self._difference if self._paper else self._errors
        score, fp4, scale = judge(m, pipeline, _Front(fixed, fp8, nearest, sensitivity))
        whole = carry([named(m, "whole", Cat(finite.now).all())], "whole")
        # Powers of two are taken over 8, and so is S: 8 S > T says the same as S > floor(T / 8).
        threshold = self.site.threshold[low:].as_signed()
        # A score is not negative: where it was left so, a threshold of -1 is for all FP8 still.
        exceeds = (score > threshold) | (threshold < 0) | ~whole.now[0]
        is_fp8 = carry([named(m, "exceeds", exceeds)], "is_fp8")
        pipeline.next()
        assert pipeline.step == self.latency

        wide = is_fp8.now[0]
        block = self.output.payload.block
        parts = zip(fp4.now, fp8.now, negative.now, finite.now, strict=True)
        for i, (a, b, n, f) in enumerate(parts):
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
        self, m: Module, pipeline: Pipeline, front: "_Front"
    ) -> tuple[Value, Carried, Carried]:
        """Score, FP4 codes and scale by the paper's rule and scale."""
        pipeline.next()
        scale = front.nearest.now[0]
        _, codes, _ = _fp4_codes(m, front, [scale])
        fp4 = pipeline.carry(codes[0], "fp4")
        pipeline.next()
        return self._squares(m, pipeline, front, fp4, front.nearest), fp4, front.nearest

    def _squares(
        self, m: Module, pipeline: Pipeline, front: "_Front", fp4: Carried, scale: Carried
    ) -> Value:
        """S by the rule ``difference``, of codes under a scale that is settled."""
        judge = partial(difference, offsets=SCALES[self.scales])
        away = _each(m, "difference", judge, fp4.now, front.fp8.now, scale.now * BLOCK)
        d, unit = (pipeline.carry(v, n) for v, n in zip(_columns(away), ("d", "unit"), strict=True))
        pipeline.next()
        weigh = _each(m, "weighted", weighted, d.now, unit.now, front.sensitivity.now)
        value, place = (
            pipeline.carry(v, n) for v, n in zip(_columns(weigh), ("value", "place"), strict=True)
        )
        pipeline.next()
        terms = _each(m, "placed", placed, value.now, place.now)
        score = pipeline.carry([tree(_unit(m, "sum"), terms)[:SCORE_BITS]], "score")
        pipeline.next()
        return score.now[0]

    def _errors(
        self, m: Module, pipeline: Pipeline, front: "_Front"
    ) -> tuple[Value, Carried, Carried]:
        """The same by the errors of the scales that are tried; the score may be negative."""
        carry, benefit = pipeline.carry, self.rule != "difference"
        sensitivity, fp8 = front.sensitivity, front.fp8
        if not self._short:
            each = _each(m, "target", search.weighted_target, front.fixed.now, sensitivity.now)
            target = carry(each, "target")
        pipeline.next()
        unit = _unit(m, "candidates")
        tried = [search.candidate(unit, front.nearest.now[0], o) for o in SCALES[self.scales]]
        scales = [carry([scale], "scale") for scale in tried]
        quarters, found, shift = _fp4_codes(m, front, tried)
        codes = [carry(code, "fp4") for code in found]
        lowest = carry([shift], "lowest")
        if self._short:
            target = carry(_each(m, "target", search.short_target, quarters), "target")
            q8 = carry(_each(m, "q8", search.short_fp8, fp8.now, [shift] * BLOCK), "q8")
            pipeline.next()
            each = _each(m, "beyond", search.short_beyond, target.now, q8.now, sensitivity.now)
            beyond = carry(each, "beyond")
        elif benefit:
            each = _each(m, "beyond", search.fp8_target, target.now, sensitivity.now, fp8.now)
            beyond = carry(each, "beyond")
        of = search.short_multiples if self._short else search.multiples
        each = _columns(_each(m, "multiples", of, target.now, sensitivity.now))
        multiples = [carry(v, n) for v, n in zip(each, ("g", "once", "thrice"), strict=True)]
        pipeline.next()
        sums = []
        for i, code in enumerate(codes):
            each = _each(m, f"chosen_{i}", search.chosen, code.now, *(v.now for v in multiples))
            added = [
                named(m, n, tree(_unit(m, f"{n}_{i}"), v))
                for v, n in zip(_columns(each), ("squares", "linear"), strict=True)
            ]
            sums.append([carry([v], n) for v, n in zip(added, ("squares", "linear"), strict=True)])
        if self._short:
            terms = _each(m, "fp8_term", search.short_term, beyond.now, q8.now, sensitivity.now)
            total = carry([tree(_unit(m, "fp8_sum"), terms)], "total")
        elif benefit:
            each = _each(m, "fp8_product", search.fp8_product, beyond.now, fp8.now)
            narrow = carry(each, "narrow")
        pipeline.next()
        inner = []
        for i, ((a, b), scale) in enumerate(zip(sums, scales, strict=True)):
            unit = _unit(m, f"inner_{i}")
            s = decode_magnitude(unit, E4M3, scale.now[0])
            if self._short:
                above = named(unit, "above", s.shift != lowest.now[0])
                s = replace(s, shift=above, shift_max=1)
            inner.append(carry([search.inner(unit, a.now[0], b.now[0], s)], "inner"))
        if benefit and not self._short:
            terms = _each(m, "fp8_term", search.fp8_term, narrow.now, fp8.now, sensitivity.now)
            total = carry([tree(_unit(m, "fp8_sum"), terms)[: search.PRODUCT_BITS]], "total")
        pipeline.next()
        errors = []
        for i, (product_of, tried_scale) in enumerate(zip(inner, scales, strict=True)):
            unit = _unit(m, f"outer_{i}")
            s = decode_magnitude(unit, E4M3, tried_scale.now[0])
            above = named(unit, "above", s.shift != lowest.now[0])
            errors.append(carry([search.outer(unit, product_of.now[0], s, above)], "error"))
        pipeline.next()
        unit = _unit(m, "choice")
        rivals = [
            [error.now[0], *code.now, scale.now[0]]
            for error, code, scale in zip(errors, codes, scales, strict=True)
        ]
        while len(rivals) > 1:  # of equals the first, which is the larger scale
            rivals = [_better(unit, *pair) for pair in zip(rivals[::2], rivals[1::2], strict=True)]
        least, *best = rivals[0]
        nothing = named(unit, "nothing", ~Cat(best[:BLOCK]).any())
        fp4 = carry(best[:BLOCK], "fp4")
        scale = carry([named(unit, "scale", Mux(nothing, SCALE_MIN_CODE, best[-1]))], "scale")
        error = carry([least], "least")
        pipeline.next()
        if not benefit:
            return self._squares(m, pipeline, front, fp4, scale), fp4, scale
        unit = _unit(m, "benefit")
        if self._short:
            taken = named(unit, "taken", error.now[0] + total.now[0])
            raised = shifted(unit, taken, Cat(Const(0, 1), lowest.now[0]), 2 * search.SHIFT_MAX)
            return raised[: search.SCORE_BITS].as_signed(), fp4, scale
        raised = shifted(unit, error.now[0], lowest.now[0], search.SHIFT_MAX)
        twos = search.SCORE_BITS - search.PRODUCT_BITS
        taken = named(unit, "taken", total.now[0] * (FP8_GAIN >> twos))
        score = named(unit, "score", (raised + (taken << twos))[: search.SCORE_BITS])
        return score.as_signed(), fp4, scale


@dataclass(frozen=True)
class _Front:
    """What every rule reads: 6 |u|, the FP8 codes and the largest of them, the sensitivities."""

    fixed: Carried
    fp8: Carried
    nearest: Carried
    sensitivity: Carried


def _fp4_codes(
    m: Module, front: _Front, scales: list[Value]
) -> tuple[list[Value], list[list[Value]], Value]:
    """6 |u| in quarters, its 16 codes under each scale, the shift of the last scale, the lowest."""
    unit = _unit(m, "bounds")
    decoded = [decode_magnitude(unit, E4M3, scale) for scale in scales]
    lowest = decoded[-1].shift
    bounds = [
        midpoints(unit, s, s.shift != lowest if s is not decoded[-1] else None) for s in decoded
    ]
    quarters = _each(m, "quarters", in_quarters, front.fixed.now, [lowest] * BLOCK)
    codes = [
        _each(m, f"fp4_{i}", encode_e2m1, quarters, *([bound] * BLOCK for bound in each))
        for i, each in enumerate(bounds)
    ]
    return quarters, codes, lowest


def _better(m: Module, one: list[Value], other: list[Value]) -> list[Value]:
    """The one of two tries, error first, that has the smaller error."""
    better = named(m, "better", other[0] < one[0])
    return [named(m, "best", Mux(better, b, a)) for a, b in zip(one, other, strict=True)]


def _unit(m: Module, name: str) -> Module:
    """A module for a part of the calculation: synthesis maps each by itself."""
    m.submodules[name] = unit = Module()
    return unit


def _each(m: Module, name: str, step: Callable[..., Any], *values: Sequence[Value]) -> list[Any]:
    """A step of the calculation for each of the 16 elements, in modules of one content."""
    unit, found, label = _unit(m, name), [], name.rstrip("_0123456789") + "_of"
    for i, operands in enumerate(zip(*values, strict=True)):
        element = Module()
        unit.submodules[f"element_{i}"] = element
        result = step(element, *operands)
        whole = isinstance(result, Value)
        held = [named(element, label, v) for v in ([result] if whole else result)]
        found.append(held[0] if whole else tuple(held))
    return found


def _columns(rows: list[tuple[Value, ...]]) -> list[list[Value]]:
    """Results of a step that has several, by result."""
    return [list(column) for column in zip(*rows, strict=True)]


def _largest(m: Module, codes: Sequence[Value]) -> Value:
    """The largest code, at least 0x01: codes without a sign are in the order of their values."""
    while len(codes) > 1:
        larger = [Mux(a > b, a, b) for a, b in zip(codes[::2], codes[1::2], strict=True)]
        codes = [named(m, "larger", v) for v in larger]
    return named(m, "largest", Mux(codes[0].any(), codes[0], SCALE_MIN_CODE)[:CODE_BITS])
