"""The distribution of activation scores, in little memory.

A calibration run makes billions of block scores. Each site keeps a histogram of S over the bins
of a float with eight mantissa bits, 65,536 counters, fine enough that the share of blocks below
any threshold is off by a few hundredths of a point. One global threshold T then means a
threshold T / unit in each site's own integer scale; it is found by bisection.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgmp.formats.activation import Site, score_unit, scores, site_threshold

_DROPPED_BITS = 15  # of fp32's 23 mantissa bits
_BINS = 1 << (31 - _DROPPED_BITS)


def _bin_of(values: Tensor) -> Tensor:
    return values.float().view(torch.int32) >> _DROPPED_BITS


@dataclass
class ScoreHistogram:
    """Counts of S at one site. ``unit`` is what one count of S is worth in the loss's unit."""

    unit: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def add(self, values: Tensor) -> None:
        """Count scores S, any shape, non-negative."""
        bins = torch.bincount(_bin_of(values).flatten(), minlength=_BINS)
        self.counts += bins.to(self.counts.device)
        self._cumulative: Tensor | None = None

    @property
    def total(self) -> int:
        """Blocks counted."""
        return int(self.counts.sum())

    def count_up_to(self, threshold: float) -> float:
        """How many scores are at most ``threshold``, in units of S; linear within a bin."""
        if threshold < 0:
            return 0.0
        if getattr(self, "_cumulative", None) is None:
            self._cumulative = self.counts.cumsum(0)
        edge = torch.tensor(min(threshold, 2.0**62), dtype=torch.float32)
        index = int(_bin_of(edge))
        low, high = (
            torch.tensor([index, index + 1], dtype=torch.int32) << _DROPPED_BITS
        ).view(torch.float32)
        inside = float((edge - low) / (high - low))
        below = float(self._cumulative[index - 1]) if index else 0.0
        if index == 0:  # zero itself and subnormal scores, of which there are none but zero
            return float(self.counts[0])
        return below + inside * float(self.counts[index])


def global_threshold(histograms: list[ScoreHistogram], fp4_fraction: float) -> float:
    """T such that this share of all blocks, over all sites, has a score of at most T.

    Returns -inf for 0 and inf for 1, which :func:`fgmp.formats.activation.site_threshold` turns
    into the thresholds that decide for every score.
    """
    if fp4_fraction <= 0:
        return -torch.inf
    if fp4_fraction >= 1:
        return torch.inf
    wanted = fp4_fraction * sum(h.total for h in histograms)
    live = [h for h in histograms if h.unit > 0 and h.total]
    always = sum(h.total for h in histograms if h.unit == 0)
    # Bisect on the exponent: scores span hundreds of octaves.
    low, high = -1000.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        reached = always + sum(h.count_up_to(2.0**middle / h.unit) for h in live)
        low, high = (middle, high) if reached < wanted else (low, middle)
    return 2.0**high


def add_scores(histogram: ScoreHistogram, x: Tensor, site: Site) -> None:
    """Score the blocks of one activation tensor and count them."""
    if x.numel():
        histogram.add(scores(x, site))


def new_histogram(site: Site) -> ScoreHistogram:
    """An empty histogram in the unit of ``site``."""
    return ScoreHistogram(unit=score_unit(site))


def achieved_fraction(histogram: ScoreHistogram, threshold: int) -> float:
    """Share of the counted blocks that T_site = ``threshold`` keeps in FP4."""
    return histogram.count_up_to(float(threshold)) / max(histogram.total, 1)


__all__ = [
    "ScoreHistogram",
    "achieved_fraction",
    "add_scores",
    "global_threshold",
    "new_histogram",
    "site_threshold",
]
