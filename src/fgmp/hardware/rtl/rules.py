"""From encoded elements to the score, the FP4 codes and the block scale, by each rule.

Every function adds pipeline steps and begins in the step in which the largest FP8 code becomes
known. The paper's rule with the paper's scale:

==========  ==========================
fp4         E2M1(6 u / s)
difference  q4 - q8
weighted    its square times the sensitivity
score       S = their sum
==========  ==========================

With the rule ``benefit``, or with searched scales, errors are measured against u itself
(``rtl.search``):

==========  =====================================================================
target      v, weighted; beside the largest FP8 code
fp4         under each scale that is tried; multiples of g v
sums        sum g e**2 and sum e g v under each scale; 2 v - q8 by its significand
inner       s * the first - 2 * the second; sum g q8 (2 v - q8)
outer       that times s
choice      the scale of least error
==========  =====================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from amaranth.hdl import Cat, Const, Module, Mux, Value

from fgmp.formats.rules import PAPER_QUANTIZER, SCALES
from fgmp.formats.spec import BLOCK, E4M3, SCALE_MIN_CODE
from fgmp.hardware.datapath import FP8_GAIN
from fgmp.hardware.rtl import search
from fgmp.hardware.rtl.decode import decode_magnitude, named, shifted, tree
from fgmp.hardware.rtl.elements import columns, each, part
from fgmp.hardware.rtl.encode import encode_e2m1, in_quarters, midpoints
from fgmp.hardware.rtl.pipeline import Carried, Pipeline
from fgmp.hardware.rtl.score import difference, placed, weighted

SCORE_BITS = 60


@dataclass(frozen=True)
class Encoded:
    """A block after encoding, as every rule reads it.

    Attributes:
        fixed: 6 |u|, from ``encode.fixed_point``.
        fp8: FP8 codes without signs.
        largest: the largest of them, at least 0x01.
        sensitivity: codes, or exponents of powers of two.
        negative, finite: flags of each element.
    """

    fixed: Carried
    fp8: Carried
    largest: Carried
    sensitivity: Carried
    negative: Carried
    finite: Carried


@dataclass(frozen=True)
class Scored:
    """A block with its score; the score may be negative where errors are measured against u."""

    score: Value
    fp4: Carried
    scale: Carried


@dataclass(frozen=True)
class _Candidates:
    """FP4 codes of a block under each scale that is tried.

    Attributes:
        scales: E4M3 codes, the largest first.
        codes: 16 E2M1 codes for each scale.
        lowest: the shift of the last scale, which is the lowest.
        quarters: 6 |u| in quarters of the last bit of the lowest scale, in this step only.
    """

    scales: list[Carried]
    codes: list[Carried]
    lowest: Carried
    quarters: list[Value]


def by_difference(m: Module, pipeline: Pipeline, block: Encoded) -> Scored:
    """The paper's rule and scale."""
    pipeline.next()
    scale = block.largest.now[0]
    _, codes, _ = _fp4_codes(m, block, [scale])
    fp4 = pipeline.carry(codes[0], "fp4")
    pipeline.next()
    offsets = SCALES[PAPER_QUANTIZER.scales]
    score = _squares(m, pipeline, block, fp4, block.largest, offsets)
    return Scored(score, fp4, block.largest)


def by_difference_searched(
    m: Module, pipeline: Pipeline, block: Encoded, offsets: tuple[int, ...]
) -> Scored:
    """The paper's rule under the scale of least error."""
    target = _weighted_target(m, pipeline, block)
    pipeline.next()
    tried = _candidates(m, pipeline, block, offsets)
    multiples = _multiples(m, pipeline, search.multiples, target, block.sensitivity)
    pipeline.next()
    sums = _fp4_sums(m, pipeline, tried, multiples)
    pipeline.next()
    inner = _inner(m, pipeline, tried, sums)
    pipeline.next()
    errors = _outer(m, pipeline, tried, inner)
    pipeline.next()
    _, fp4, scale = _choice(m, pipeline, tried, errors)
    pipeline.next()
    return Scored(_squares(m, pipeline, block, fp4, scale, offsets), fp4, scale)


def by_benefit(m: Module, pipeline: Pipeline, block: Encoded, offsets: tuple[int, ...]) -> Scored:
    """The rule ``benefit``: the error of FP4 beyond that of FP8, both against u."""
    carry, fp8, sensitivity = pipeline.carry, block.fp8, block.sensitivity
    target = _weighted_target(m, pipeline, block)
    pipeline.next()
    tried = _candidates(m, pipeline, block, offsets)
    terms = each(m, "beyond", search.fp8_target, target.now, sensitivity.now, fp8.now)
    beyond = carry(terms, "beyond")
    multiples = _multiples(m, pipeline, search.multiples, target, sensitivity)
    pipeline.next()
    sums = _fp4_sums(m, pipeline, tried, multiples)
    narrow = carry(each(m, "fp8_product", search.fp8_product, beyond.now, fp8.now), "narrow")
    pipeline.next()
    inner = _inner(m, pipeline, tried, sums)
    terms = each(m, "fp8_term", search.fp8_term, narrow.now, fp8.now, sensitivity.now)
    total = carry([tree(part(m, "fp8_sum"), terms)[: search.PRODUCT_BITS]], "total")
    pipeline.next()
    errors = _outer(m, pipeline, tried, inner)
    pipeline.next()
    error, fp4, scale = _choice(m, pipeline, tried, errors)
    pipeline.next()
    module = part(m, "benefit")
    raised = shifted(module, error.now[0], tried.lowest.now[0], search.SHIFT_MAX)
    twos = search.SCORE_BITS - search.PRODUCT_BITS
    taken = named(module, "taken", total.now[0] * (FP8_GAIN >> twos))
    score = named(module, "score", (raised + (taken << twos))[: search.SCORE_BITS])
    return Scored(score.as_signed(), fp4, scale)


def by_truncated_benefit(
    m: Module, pipeline: Pipeline, block: Encoded, offsets: tuple[int, ...]
) -> Scored:
    """The rule ``truncated``: ``benefit`` on values of 8 bits, one step longer."""
    carry, sensitivity = pipeline.carry, block.sensitivity
    pipeline.next()
    tried = _candidates(m, pipeline, block, offsets)
    target = carry(each(m, "target", search.short_target, tried.quarters), "target")
    lowest = tried.lowest.now * BLOCK
    q8 = carry(each(m, "q8", search.short_fp8, block.fp8.now, lowest), "q8")
    pipeline.next()
    terms = each(m, "beyond", search.short_beyond, target.now, q8.now, sensitivity.now)
    beyond = carry(terms, "beyond")
    multiples = _multiples(m, pipeline, search.short_multiples, target, sensitivity)
    pipeline.next()
    sums = _fp4_sums(m, pipeline, tried, multiples)
    terms = each(m, "fp8_term", search.short_term, beyond.now, q8.now, sensitivity.now)
    total = carry([tree(part(m, "fp8_sum"), terms)], "total")
    pipeline.next()
    inner = _inner(m, pipeline, tried, sums, relative=True)
    pipeline.next()
    errors = _outer(m, pipeline, tried, inner)
    pipeline.next()
    error, fp4, scale = _choice(m, pipeline, tried, errors)
    pipeline.next()
    module = part(m, "benefit")
    taken = named(module, "taken", error.now[0] + total.now[0])
    twice = Cat(Const(0, 1), tried.lowest.now[0])
    raised = shifted(module, taken, twice, 2 * search.SHIFT_MAX)
    return Scored(raised[: search.SCORE_BITS].as_signed(), fp4, scale)


def _weighted_target(m: Module, pipeline: Pipeline, block: Encoded) -> Carried:
    """v times the significand of g, of each element."""
    targets = each(m, "target", search.weighted_target, block.fixed.now, block.sensitivity.now)
    return pipeline.carry(targets, "target")


def _candidates(
    m: Module, pipeline: Pipeline, block: Encoded, offsets: tuple[int, ...]
) -> _Candidates:
    """FP4 codes under each scale, at these offsets from the largest FP8 code."""
    carry, module = pipeline.carry, part(m, "candidates")
    scales = [search.candidate(module, block.largest.now[0], offset) for offset in offsets]
    quarters, codes, lowest = _fp4_codes(m, block, scales)
    return _Candidates(
        scales=[carry([scale], "scale") for scale in scales],
        codes=[carry(code, "fp4") for code in codes],
        lowest=carry([lowest], "lowest"),
        quarters=quarters,
    )


def _fp4_codes(
    m: Module, block: Encoded, scales: list[Value]
) -> tuple[list[Value], list[list[Value]], Value]:
    """6 |u| in quarters, its 16 codes under each scale, and the shift of the last scale."""
    module = part(m, "bounds")
    decoded = [decode_magnitude(module, E4M3, scale) for scale in scales]
    lowest = decoded[-1].shift
    bounds = [
        midpoints(module, s, s.shift != lowest if s is not decoded[-1] else None) for s in decoded
    ]
    quarters = each(m, "quarters", in_quarters, block.fixed.now, [lowest] * BLOCK)
    codes = [
        each(m, f"fp4_{i}", encode_e2m1, quarters, *([value] * BLOCK for value in bound))
        for i, bound in enumerate(bounds)
    ]
    return quarters, codes, lowest


def _multiples(
    m: Module,
    pipeline: Pipeline,
    step: Callable[..., Any],
    target: Carried,
    sensitivity: Carried,
) -> list[Carried]:
    """g, g v and 3 g v of each element."""
    rows = each(m, "multiples", step, target.now, sensitivity.now)
    names = ("g", "once", "thrice")
    return [pipeline.carry(v, n) for v, n in zip(columns(rows), names, strict=True)]


def _fp4_sums(
    m: Module, pipeline: Pipeline, tried: _Candidates, multiples: list[Carried]
) -> list[list[Carried]]:
    """``sum g e**2`` and ``sum e g v`` under each scale."""
    names, sums = ("squares", "linear"), []
    for i, code in enumerate(tried.codes):
        rows = each(m, f"chosen_{i}", search.chosen, code.now, *(v.now for v in multiples))
        totals = [
            named(m, n, tree(part(m, f"{n}_{i}"), v))
            for v, n in zip(columns(rows), names, strict=True)
        ]
        sums.append([pipeline.carry([v], n) for v, n in zip(totals, names, strict=True)])
    return sums


def _inner(
    m: Module,
    pipeline: Pipeline,
    tried: _Candidates,
    sums: list[list[Carried]],
    relative: bool = False,
) -> list[Carried]:
    """``s * sum g e**2 - 2 * sum e g v`` under each scale; ``relative`` counts s in units of the
    lowest scale's last bit."""
    results = []
    for i, ((squares, linear), scale) in enumerate(zip(sums, tried.scales, strict=True)):
        module = part(m, f"inner_{i}")
        s = decode_magnitude(module, E4M3, scale.now[0])
        if relative:
            above = named(module, "above", s.shift != tried.lowest.now[0])
            s = replace(s, shift=above, shift_max=1)
        error = search.inner(module, squares.now[0], linear.now[0], s)
        results.append(pipeline.carry([error], "inner"))
    return results


def _outer(
    m: Module, pipeline: Pipeline, tried: _Candidates, inner: list[Carried]
) -> list[Carried]:
    """The error of each scale, less ``sum g v**2``, which is common to all."""
    errors = []
    for i, (factor, scale) in enumerate(zip(inner, tried.scales, strict=True)):
        module = part(m, f"outer_{i}")
        s = decode_magnitude(module, E4M3, scale.now[0])
        above = named(module, "above", s.shift != tried.lowest.now[0])
        errors.append(pipeline.carry([search.outer(module, factor.now[0], s, above)], "error"))
    return errors


def _choice(
    m: Module, pipeline: Pipeline, tried: _Candidates, errors: list[Carried]
) -> tuple[Carried, Carried, Carried]:
    """The least error with its FP4 codes and scale; among equals, the larger scale."""
    module = part(m, "choice")
    rivals = [
        [error.now[0], *code.now, scale.now[0]]
        for error, code, scale in zip(errors, tried.codes, tried.scales, strict=True)
    ]
    while len(rivals) > 1:
        rivals = [_better(module, *pair) for pair in zip(rivals[::2], rivals[1::2], strict=True)]
    least, *best = rivals[0]
    nothing = named(module, "nothing", ~Cat(best[:BLOCK]).any())
    scale = named(module, "scale", Mux(nothing, SCALE_MIN_CODE, best[-1]))
    carry = pipeline.carry
    return carry([least], "least"), carry(best[:BLOCK], "fp4"), carry([scale], "scale")


def _better(m: Module, one: list[Value], other: list[Value]) -> list[Value]:
    """The candidate of smaller error, error first; ``one`` if both are equal."""
    better = named(m, "better", other[0] < one[0])
    return [named(m, "best", Mux(better, b, a)) for a, b in zip(one, other, strict=True)]


def _squares(
    m: Module,
    pipeline: Pipeline,
    block: Encoded,
    fp4: Carried,
    scale: Carried,
    offsets: tuple[int, ...],
) -> Value:
    """S by the rule ``difference``, of codes under a known scale."""
    step = partial(difference, offsets=offsets)
    rows = each(m, "difference", step, fp4.now, block.fp8.now, scale.now * BLOCK)
    names = ("d", "unit")
    d, unit = (pipeline.carry(v, n) for v, n in zip(columns(rows), names, strict=True))
    pipeline.next()
    rows = each(m, "weighted", weighted, d.now, unit.now, block.sensitivity.now)
    names = ("value", "place")
    value, place = (pipeline.carry(v, n) for v, n in zip(columns(rows), names, strict=True))
    pipeline.next()
    terms = each(m, "placed", placed, value.now, place.now)
    score = pipeline.carry([tree(part(m, "sum"), terms)[:SCORE_BITS]], "score")
    pipeline.next()
    return score.now[0]
