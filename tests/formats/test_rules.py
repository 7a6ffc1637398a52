"""The registry of decision rules: every score by its formula, and rules that others add."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from fgmp.assign.impact import WEIGHT_SCORES
from fgmp.errors import InputError
from fgmp.formats import rules
from fgmp.formats.activation import Site, fake_quantize, quantize, scores
from fgmp.formats.rules import (
    PAPER_QUANTIZER,
    RULES,
    SCALES,
    SENSITIVITIES,
    Integers,
    QuantizerConfig,
    Rule,
    recipe_rules,
    register,
    weighted_squares,
)
from fgmp.kernels import ops

LIMIT = 2**60
"""Scores are below this."""


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    exponents = 2 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * torch.exp2(exponents)


def a_site(rule: str, scales: str = "search", k: int = 16) -> Site:
    generator = torch.Generator().manual_seed(0)
    sensitivity = torch.randint(1, 127, (k,), dtype=torch.uint8, generator=generator)
    return Site(3.5, sensitivity, 1.0, 0, rule, scales)


def some_integers(seed: int = 0, blocks: int = 50) -> Integers:
    """Blocks as the definition of a site makes them: bounded as docs/numerics.md derives."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape or (blocks, 16), generator=generator)

    v = draw(-2688 * 2**10, 2688 * 2**10)
    return Integers(
        q4=v + draw(-(2**18), 2**18),
        q8=v + draw(-(2**16), 2**16),
        v=v,
        g=draw(1, 448 * 2**9, 16),
        fp8=draw(0, 256).byte(),
    )


def by_hand(rule: str, x: Integers) -> list[int]:
    """The formulas of the module's docstring in Python's integers."""
    totals = []
    for q4, q8, v in zip(x.q4.tolist(), x.q8.tolist(), x.v.tolist(), strict=True):
        g = x.g.tolist()
        if rule == "difference":
            total = sum(w * (a - b) ** 2 for w, a, b in zip(g, q4, q8, strict=True))
        else:
            errors = zip(g, q4, q8, v, strict=True)
            total = max(0, sum(w * ((a - c) ** 2 - (b - c) ** 2) for w, a, b, c in errors))
        totals.append(total)
    return totals


@pytest.mark.parametrize("rule", ["difference", "benefit", "truncated"])
def test_scores_in_integers(rule: str) -> None:
    x = some_integers()
    assert RULES[rule].score(x).tolist() == by_hand(rule, x)


def test_benefit_is_zero_where_fp8_errs_more() -> None:
    x = some_integers()
    worse = replace(x, q4=x.q8, q8=x.q4)
    assert RULES["benefit"].score(worse).tolist() == [0] * 50
    assert min(RULES["benefit"].score(x).tolist()) > 0


def test_sensitivities_weigh_every_position() -> None:
    difference = torch.arange(16).unsqueeze(0)
    for position in range(16):
        g = torch.zeros(16, dtype=torch.int64)
        g[position] = 3
        assert weighted_squares(difference, g).tolist() == [3 * position**2]


@pytest.mark.parametrize("rule", RULES)
def test_scores_fit_in_60_bits(rule: str) -> None:
    """At the largest differences that both formats allow."""
    x = some_integers()
    worst = replace(
        x,
        q4=torch.full_like(x.q4, 2**19),
        q8=torch.zeros_like(x.q8),
        v=torch.zeros_like(x.v),
        g=torch.full_like(x.g, 448 * 2**9),
    )
    assert 0 <= int(RULES[rule].score(worst).min()) <= int(RULES[rule].score(worst).max()) < LIMIT


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_complete(rule: str) -> None:
    """Scores of weights exist, and only the definition estimates rules that it can."""
    entry = RULES[rule]
    assert entry.weight_score in WEIGHT_SCORES
    assert not (entry.estimated and entry.truncated)
    assert rule in rules.__doc__


def test_codes_of_the_cpu_kernels_differ() -> None:
    codes = [rule.cpu for rule in RULES.values() if rule.cpu is not None]
    assert len(set(codes)) == len(codes)


def test_a_recipe_may_choose_these() -> None:
    assert recipe_rules() == ("difference", "benefit", "truncated")


def test_candidate_scales_descend() -> None:
    """Ties go to the first candidate, which must be the larger scale."""
    for offsets in SCALES.values():
        assert list(offsets) == sorted(offsets, reverse=True) and 0 in offsets


# Configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("best", "max", "e4m3"), "rule must be one of difference, benefit, truncated, random"),
        (("benefit", "all", "e4m3"), "scales must be one of max, search, got 'all'"),
        (("benefit", "max", "e5m2"), "sensitivities must be one of e4m3, powers, got 'e5m2'"),
    ],
)
def test_unknown_names_are_refused(values: tuple[str, str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizerConfig(*values)


def test_the_default_is_ours_and_the_papers_is_named() -> None:
    assert str(QuantizerConfig()) == "benefit, search, e4m3"
    assert str(PAPER_QUANTIZER) == "difference, max, e4m3"
    assert Site(1.0, torch.empty(0), 1.0, 0).rule == QuantizerConfig.rule
    assert Site(1.0, torch.empty(0), 1.0, 0).scales == QuantizerConfig.scales


def test_configurations_are_ordered_and_hashable() -> None:
    """Synthesis caches by them, and lists are sorted by them."""
    all_of_them = [QuantizerConfig(r, s, c) for r in RULES for s in SCALES for c in SENSITIVITIES]
    assert len(set(all_of_them)) == 16
    assert sorted(all_of_them) == sorted(all_of_them, key=str)


# Rules that others add


@pytest.fixture
def largest_gap() -> Iterator[str]:
    """A rule of an experiment: the largest weighted difference, not the sum."""

    def score(x: Integers) -> torch.Tensor:
        return ((x.q4 - x.q8).square() * x.g).amax(-1)

    register("largest-gap", Rule(score=score))
    yield "largest-gap"
    del RULES["largest-gap"]


def test_a_registered_rule_decides(largest_gap: str) -> None:
    """In the definition, its fast twin, calibration's scores and the operators alike."""
    x = heavy_tailed(20, 40)
    site = a_site(largest_gap, k=40)
    exact = quantize(x, site)
    median = replace(site, threshold=int(exact.score.median()))
    expected = quantize(x, median)
    assert torch.equal(expected.is_fp8, expected.score > median.threshold)
    assert 0 < expected.is_fp8.sum() < expected.is_fp8.numel()
    assert not torch.equal(expected.is_fp8, quantize(x, replace(median, rule="difference")).is_fp8)
    units, flags = fake_quantize(x, median)
    assert torch.equal(flags, expected.is_fp8) and torch.equal(units, expected.units(40))
    assert torch.equal(scores(x, site), expected.score)
    arguments = torch.tensor(median.r), median.sensitivity, torch.tensor(median.threshold)
    units, flags = ops.fake_quantize_activation(x, *arguments, largest_gap, "search")
    assert torch.equal(flags, expected.is_fp8) and torch.equal(units.float(), expected.units(40))
    scored = ops.score_activation(x, *arguments, largest_gap, "search")
    assert torch.equal(scored, expected.score)


def test_a_registered_rule_is_one_of_all(largest_gap: str) -> None:
    assert QuantizerConfig(largest_gap).rule == largest_gap
    assert recipe_rules()[-1] == largest_gap
    with pytest.raises(InputError, match="largest-gap"):
        QuantizerConfig("another")


def test_a_taken_name_is_refused() -> None:
    before = dict(RULES)
    with pytest.raises(InputError, match="rule 'benefit' exists already; choose another name"):
        register("benefit", Rule(score=RULES["difference"].score))
    assert before == RULES


# The arbitrary rule


def hash_in_integers(fp8: list[int]) -> int:
    """docs/numerics.md, section 5, with 64-bit wrap-around spelt out."""
    wrap = 2**64 - 1
    golden = 0x9E3779B97F4A7C15
    odd = [(i * golden | 1) & (2**63 - 1) for i in range(1, 17)]
    mixed = sum(code * m for code, m in zip(fp8, odd, strict=True)) & wrap
    arithmetic_shift = (mixed - (mixed >> 63 << 64)) >> 31
    mixed = (mixed ^ arithmetic_shift) * odd[0] & wrap
    return (mixed ^ (mixed - (mixed >> 63 << 64)) >> 29) & (2**60 - 1)


def test_random_rule_is_its_hash() -> None:
    codes = quantize(heavy_tailed(200, 16, seed=8), a_site("random", "max"))
    for fp8, score in zip(codes.fp8[:, 0].tolist(), codes.score[:, 0].tolist(), strict=True):
        assert score == hash_in_integers(fp8)


def test_random_rule_is_uniform() -> None:
    """10,000 blocks in ten equal bins: each holds 1,000 within 5 standard deviations of 30."""
    score = quantize(heavy_tailed(10_000, 16, seed=9), a_site("random", "max")).score
    counts = torch.bincount(score.flatten() // (2**60 // 10 + 1), minlength=10)
    assert (counts - 1000).abs().max() < 150
