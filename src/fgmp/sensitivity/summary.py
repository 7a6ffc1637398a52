"""Summaries of block scores: small enough to be stored with a checkpoint, for its report.

A summary counts the scores of one weight or one activation site in logarithmic bins, four per
octave, and adds up the scores of each bin. From these follow, for a threshold at any edge of a bin,
the number of FP4 blocks and the sum of their scores. Bin k holds scores from 2**(k / 4), included,
to 2**((k + 1) / 4); scores of zero or less are counted apart.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

BINS_PER_OCTAVE = 4

_EDGES = torch.tensor(
    [2 ** (i / BINS_PER_OCTAVE - 1) for i in range(BINS_PER_OCTAVE)], dtype=torch.float64
)
"""Lower edges of the bins of one octave, of mantissas from 0.5 to 1."""


@dataclass(frozen=True)
class ScoreSummary:
    """Scores of the blocks of one weight or site.

    Attributes:
        zeros: number of scores of zero or less.
        first: index k of the first bin.
        counts: number of scores per bin, from ``first``.
        sums: sum of scores per bin, from ``first``, in nats per token.
        threshold: a block is FP8 if its score exceeds it; None: no finite threshold.
    """

    zeros: int
    first: int
    counts: list[int]
    sums: list[float]
    threshold: float | None

    @property
    def blocks(self) -> int:
        """Number of scores."""
        return self.zeros + sum(self.counts)

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return asdict(self)


def summarize(
    scores: Tensor, threshold: float | None, counts: Tensor | None = None
) -> ScoreSummary:
    """Summarize scores.

    Args:
        scores: finite, of any shape.
        threshold: stored in the summary, if it is finite.
        counts: how often each score occurs, int64 of the same shape; default: once.
    """
    scores = scores.detach().double().flatten().cpu()
    times = torch.ones_like(scores) if counts is None else counts.double().flatten().cpu()
    positive = scores > 0
    zeros = int(times[~positive].sum())
    scores, times = scores[positive], times[positive]
    if threshold is not None and abs(threshold) == torch.inf:
        threshold = None
    if not len(scores):
        return ScoreSummary(zeros, 0, [], [], threshold)
    mantissa, exponent = torch.frexp(scores)
    within = torch.bucketize(mantissa, _EDGES, right=True) - 1
    bins = BINS_PER_OCTAVE * (exponent.long() - 1) + within
    first = int(bins.min())
    number = torch.bincount(bins - first, weights=times)
    total = torch.bincount(bins - first, weights=times * scores)
    return ScoreSummary(
        zeros, first, number.long().tolist(), [float(f"{s:.6g}") for s in total.tolist()], threshold
    )
