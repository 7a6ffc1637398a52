"""A budget is spent where a bit saved harms least, judged against sorting every single block."""

import pytest
import torch
from torch import Tensor

from fgmp.assign.frontier import Fractions, Frontier, furthest
from fgmp.sensitivity.histogram import ScoreHistogram

TOKENS = 50


def material(seed: int = 0) -> tuple[list[Tensor], list[ScoreHistogram], Tensor]:
    """Scores of two weights, histograms of two sites, and the activation scores in nats."""
    g = torch.Generator().manual_seed(seed)
    weights = [torch.randn(n, 8, generator=g).mul(2).exp().double() * 1e-6 for n in (30, 70)]
    histograms, nats = [], []
    for unit, blocks in ((1e-12, 4), (1e-15, 9)):
        s = torch.randn(TOKENS, blocks, generator=g).mul(2).exp().mul(2e-6 / unit).round().double()
        histogram = ScoreHistogram(unit)
        histogram.add(s)
        histograms.append(histogram)
        nats.append(s.flatten() * unit)
    return weights, histograms, torch.cat(nats)


@pytest.mark.parametrize("bits", [4.6, 5.05, 5.4, 6.0, 7.5])
@pytest.mark.parametrize("relief", [1.0, 0.4])
def test_least_harm_first(bits: float, relief: float) -> None:
    weights, histograms, activations = material()
    w = torch.cat([s.flatten() for s in weights])
    result = Frontier(weights, histograms, TOKENS, relief=relief).fractions(bits)
    # Harm per bit of every block; a weight block is 1 / 2W of the budget, an activation's 1 / 2A.
    harm = torch.cat([relief * w * len(w), activations / TOKENS * len(activations)])
    cost = torch.cat([torch.full_like(w, 0.5 / len(w)), torch.full_like(activations, 0.5)])
    cost[len(w) :] /= len(activations)
    order = harm.argsort()
    is_fp4 = torch.zeros(len(harm), dtype=torch.bool)
    is_fp4[order[cost[order].cumsum(0) <= (8 - bits) / 3.5]] = True
    expected = (
        is_fp4[: len(w)].double().mean().item(),
        is_fp4[len(w) :].double().mean().item(),
    )
    # Histogram bins hold a few of the 650 activation blocks each.
    assert result == pytest.approx(expected, abs=0.01)
    assert sum(result) / 2 == pytest.approx((8 - bits) / 3.5, abs=0.005)


def test_the_ends_are_uniform() -> None:
    weights, histograms, _ = material()
    frontier = Frontier(weights, histograms, TOKENS, relief=1.0)
    assert frontier.fractions(8.0) == Fractions(weights=0.0, activations=0.0)
    assert frontier.fractions(4.5) == Fractions(weights=1.0, activations=1.0)


def test_harmless_weights_take_more_of_the_fp4() -> None:
    weights, histograms, _ = material()
    even = Frontier(weights, histograms, TOKENS, relief=1.0).fractions(5.4)
    relieved = Frontier(weights, histograms, TOKENS, relief=0.1).fractions(5.4)
    assert relieved.weights > even.weights and relieved.activations < even.activations


@pytest.mark.parametrize(("good", "bad"), [(4.5, 8.0), (8.0, 4.5)])
def test_the_furthest_point_that_holds(good: float, bad: float) -> None:
    tried = []

    def holds(bits: float) -> bool:
        tried.append(bits)
        return abs(bits - good) <= 1.3

    point = furthest(holds, good, bad, steps=12)
    assert abs(point - good) == pytest.approx(1.3, abs=3.5 / 2**12) and holds(point)
    assert len(tried) == 14 and good not in tried
    assert furthest(lambda bits: True, good, bad, steps=3) == bad
    assert furthest(lambda bits: False, good, bad, steps=3) == good
