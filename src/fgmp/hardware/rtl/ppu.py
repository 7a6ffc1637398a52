"""The online quantizer: 16 bf16 activations to codes, scale and flag, one block per cycle.

The paper calls it the post-processing unit (PPU). It computes what ``formats.activation.quantize``
defines (docs/numerics.md, sections 3 and 5), bit for bit. There is a register after each step:

=======  ==================================================================
product  u = x * r
fp8      E4M3(u)
scale    the largest of the 16 codes without their signs, at least 0x01
...      FP4 codes, block scale and score S by the rule (``rtl.rules``)
flag     S > T
=======  ==================================================================

A value that is not finite makes its block FP8 and its own code NaN, counts as zero for its
neighbours, and raises a flag that stays until it is cleared.
"""

from collections.abc import Sequence
from typing import Any

from amaranth.hdl import Cat, Module, Mux, Value
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.formats.activation import MULTIPLIER_BITS
from fgmp.formats.rules import PAPER_QUANTIZER, RULES, SCALES, QuantizerConfig
from fgmp.formats.spec import BLOCK, E4M3, SCALE_MIN_CODE
from fgmp.hardware.array import require_rtl
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl import rules
from fgmp.hardware.rtl.decode import named
from fgmp.hardware.rtl.elements import columns, each, part
from fgmp.hardware.rtl.encode import (
    BF16_BITS,
    CODE_BITS,
    EXPONENT_BITS,
    encode_e4m3,
    fixed_point,
    multiply,
)
from fgmp.hardware.rtl.lane import block_layout
from fgmp.hardware.rtl.pipeline import Carried, Pipeline
from fgmp.hardware.rtl.rules import Encoded, Scored

LATENCY = 8
"""Cycles from a block to its codes for the paper's quantizer; :func:`latency` has the others."""

_SQUARES = 3
"""Further cycles of the rule ``difference`` after a searched scale is settled."""

THRESHOLD_BITS = 64

_DEFAULT = QuantizerConfig()
_NAN = E4M3.nan_code

INPUT = data.StructLayout(
    {"x": data.ArrayLayout(BF16_BITS, BLOCK), "sensitivity": data.ArrayLayout(CODE_BITS, BLOCK)}
)
OUTPUT = data.StructLayout({"block": block_layout(Datapath()), "finite": 1})
SITE = data.StructLayout(
    {"significand": MULTIPLIER_BITS, "exponent": EXPONENT_BITS, "threshold": THRESHOLD_BITS}
)


def latency(config: QuantizerConfig) -> int:
    """Cycles from a block to its codes, without stalls.

    Raises:
        InputError: there is no hardware for the rule.
    """
    require_rtl(config)
    if _is_paper(config):
        return LATENCY
    squares = _SQUARES if config.rule == "difference" else 0
    return LATENCY + 1 + RULES[config.rule].truncated + squares


def _is_paper(config: QuantizerConfig) -> bool:
    """Whether rule and scales are the paper's; sensitivities may be of either kind."""
    return (config.rule, config.scales) == (PAPER_QUANTIZER.rule, PAPER_QUANTIZER.scales)


class Quantizer(wiring.Component):
    """The quantizer; one block per cycle, :func:`latency` cycles.

    Args:
        config: rule, scales and sensitivities. Of ``powers``, powers of two from 2**-6 on, only
            the exponents are read.

    Ports:
        input: stream of 16 bf16 values and the 7-bit codes of their channels' sensitivities, zero
            in padding.
        output: stream of blocks as a lane takes them, and whether all values were finite. An FP8
            block has scale 0.
        site: constants of the tensor: r = significand * 2**(exponent - 11) with the significand's
            first bit set and the exponent in two's complement; the threshold likewise.
        nonfinite: a value was not finite since the last ``clear``.

    Raises:
        InputError: there is no hardware for the rule.
    """

    def __init__(self, config: QuantizerConfig = _DEFAULT) -> None:
        self.config = config
        self.latency = latency(config)
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
        block = self._encode(m, pipeline)
        scored = self._score(m, pipeline, block)
        whole, is_fp8 = self._decide(m, pipeline, block, scored)
        pipeline.next()
        assert pipeline.step == self.latency
        self._select(m, block, scored, whole, is_fp8)
        m.d.comb += self.output.valid.eq(pipeline.valid)
        with m.If(self.clear):
            m.d.sync += self.nonfinite.eq(0)
        with m.If(self.output.valid & ~whole.now[0]):
            m.d.sync += self.nonfinite.eq(1)
        return m

    @property
    def _ignored_bits(self) -> int:
        """Low bits of sensitivities and of the threshold that are not read."""
        return E4M3.mantissa_bits if self.config.sensitivities == "powers" else 0

    def _encode(self, m: Module, pipeline: Pipeline) -> Encoded:
        """Products, FP8 codes and the largest of them."""
        carry, payload = pipeline.carry, self.input.payload
        x = [named(m, "x", payload.x[i]) for i in range(BLOCK)]
        r = [self.site.significand] * BLOCK, [self.site.exponent] * BLOCK
        product = columns(each(m, "product", multiply, x, *r))
        significand, exponent = carry(product[0], "significand"), carry(product[1], "exponent")
        codes = [payload.sensitivity[i][self._ignored_bits :] for i in range(BLOCK)]
        sensitivity = carry(codes, "sensitivity")
        negative, finite = carry(product[2], "negative"), carry(product[3], "finite")
        pipeline.next()
        u = significand.now, exponent.now
        fp8 = carry(each(m, "fp8", encode_e4m3, *u), "fp8")
        fixed = carry(each(m, "fixed", fixed_point, *u), "fixed")
        pipeline.next()
        largest = carry([_largest(part(m, "maximum"), fp8.now)], "nearest")
        return Encoded(fixed, fp8, largest, sensitivity, negative, finite)

    def _score(self, m: Module, pipeline: Pipeline, block: Encoded) -> Scored:
        """Score, FP4 codes and scale by the configured rule and scales."""
        offsets = SCALES[self.config.scales]
        if _is_paper(self.config):
            return rules.by_difference(m, pipeline, block)
        if RULES[self.config.rule].truncated:
            return rules.by_truncated_benefit(m, pipeline, block, offsets)
        if self.config.rule == "difference":
            return rules.by_difference_searched(m, pipeline, block, offsets)
        return rules.by_benefit(m, pipeline, block, offsets)

    def _decide(
        self, m: Module, pipeline: Pipeline, block: Encoded, scored: Scored
    ) -> tuple[Carried, Carried]:
        """Whether all values are finite, and whether the block is FP8."""
        whole = pipeline.carry([named(m, "whole", Cat(block.finite.now).all())], "whole")
        # Powers of two are taken over 8, and so is S: 8 S > T is the same as S > floor(T / 8).
        threshold = self.site.threshold[self._ignored_bits :].as_signed()
        # A defined score is at least 0, this one may be negative: a threshold of -1 means all FP8.
        exceeds = (scored.score > threshold) | (threshold < 0) | ~whole.now[0]
        is_fp8 = pipeline.carry([named(m, "exceeds", exceeds)], "is_fp8")
        return whole, is_fp8

    def _select(
        self, m: Module, block: Encoded, scored: Scored, whole: Carried, is_fp8: Carried
    ) -> None:
        """Drive the output with the codes of the chosen format."""
        wide = is_fp8.now[0]
        output = self.output.payload.block
        parts = zip(
            scored.fp4.now, block.fp8.now, block.negative.now, block.finite.now, strict=True
        )
        for i, (fp4, fp8, negative, finite) in enumerate(parts):
            narrow_code, wide_code = Cat(fp4, negative), Mux(finite, Cat(fp8, negative), _NAN)
            m.d.comb += output.codes[i].eq(Mux(wide, wide_code, narrow_code))
        m.d.comb += [
            output.scale.eq(Mux(wide, 0, scored.scale.now[0])),
            output.is_fp8.eq(wide),
            self.output.payload.finite.eq(whole.now[0]),
        ]


def _largest(m: Module, codes: Sequence[Value]) -> Value:
    """The largest code, at least 0x01: codes without signs are in the order of their values."""
    while len(codes) > 1:
        larger = [Mux(a > b, a, b) for a, b in zip(codes[::2], codes[1::2], strict=True)]
        codes = [named(m, "larger", v) for v in larger]
    return named(m, "largest", Mux(codes[0].any(), codes[0], SCALE_MIN_CODE)[:CODE_BITS])
