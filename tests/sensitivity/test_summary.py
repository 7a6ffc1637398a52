"""Summaries of scores: bins by their definition, exact at edges."""

import math

import pytest
import torch

from fgmp.sensitivity.summary import BINS_PER_OCTAVE, ScoreSummary, summarize


def bin_of(score: float) -> int:
    """The definition: bin k holds 2**(k / 4) to 2**((k + 1) / 4)."""
    k = math.floor(BINS_PER_OCTAVE * math.log2(score))
    return next(i for i in (k - 1, k, k + 1) if 2 ** (i / 4) <= score < 2 ** ((i + 1) / 4))


def test_scores_are_counted_and_added_up_by_bin() -> None:
    scores = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)).mul(9).exp().double()
    summary = summarize(scores, 1.0)
    counts: dict[int, int] = {}
    sums: dict[int, float] = {}
    for score in scores.flatten().tolist():
        k = bin_of(score)
        counts[k], sums[k] = counts.get(k, 0) + 1, sums.get(k, 0.0) + score
    assert summary.first == min(counts)
    assert {summary.first + i: n for i, n in enumerate(summary.counts) if n} == counts
    for k, total in sums.items():
        assert summary.sums[k - summary.first] == pytest.approx(total, rel=1e-5)  # six digits
    assert (summary.zeros, summary.threshold, summary.blocks) == (0, 1.0, 2000)


@pytest.mark.parametrize("k", [-4000, -130, -4, -1, 0, 1, 2, 3, 4, 400])
def test_edges_belong_to_the_bin_above(k: int) -> None:
    edge = 2.0 ** (k // 4) * 2 ** (k % 4 / 4 - 1) * 2
    assert summarize(torch.tensor([edge], dtype=torch.float64), None).first == k
    under = math.nextafter(edge, 0)
    assert summarize(torch.tensor([under], dtype=torch.float64), None).first == k - 1


def test_zeros_and_negative_scores_are_counted_apart() -> None:
    summary = summarize(torch.tensor([0.0, -0.0, -3.0, 1.5]), math.inf)
    assert summary == ScoreSummary(3, 2, [1], [1.5], None)
    assert summarize(torch.zeros(2, 3), -math.inf) == ScoreSummary(6, 0, [], [], None)


def test_scores_can_occur_many_times() -> None:
    losses, times = torch.tensor([0.0, 1.0, 1.1]), torch.tensor([5, 2, 10])
    assert summarize(losses, 0.5, times) == ScoreSummary(5, 0, [12], [13.0], 0.5)
