"""Histograms of activation scores, and the thresholds that follow from them.

Calibration computes billions of block scores. Each site has a histogram of S over the bins of a
float with eight mantissa bits. A bin is at most 2**-8 of its value wide. With the counts of a bin
taken as evenly spread, fractions are exact to a few hundredths of a percentage point. The exception
are scores that many blocks have in common, which no threshold can separate.

A global threshold T is a threshold T / unit on a site's integer scores. T is found by bisection
over all sites at once.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fgmp.formats.activation import Site, score_unit

_DROPPED_BITS = 15  # of fp32's 23 mantissa bits
_BINS = 1 << (31 - _DROPPED_BITS)
HISTOGRAM_BYTES = _BINS * torch.int64.itemsize
_LARGEST = torch.finfo(torch.float32).max


def _bin_of(values: Tensor) -> Tensor:
    return values.float().view(torch.int32) >> _DROPPED_BITS


def _lower_edge(index: int) -> float:
    return (torch.tensor(index, dtype=torch.int32) << _DROPPED_BITS).view(torch.float32).item()


@dataclass
class ScoreHistogram:
    """Counts of scores S at one site, int64 per bin; an S of 1 stands for a loss of ``unit``."""

    unit: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def add(self, values: Tensor) -> None:
        """Add scores S, int64 of any shape."""
        new_counts = torch.bincount(_bin_of(values).flatten(), minlength=_BINS)
        self.counts += new_counts.to(self.counts.device)

    @property
    def total(self) -> int:
        """Number of blocks counted."""
        return int(self.counts.sum())

    def occupied(self) -> tuple[Tensor, Tensor]:
        """Middle of every bin that has scores, as a loss, float64 (M,), and its count, int64."""
        index = self.counts.nonzero().flatten()
        low, high = (
            (i.int() << _DROPPED_BITS).view(torch.float32).double() for i in (index, index + 1)
        )
        middle = torch.where(index == 0, 0.0, (low + high) / 2)  # the first bin has only zeros
        return middle * self.unit, self.counts[index]

    def count_up_to(self, threshold: float) -> float:
        """Number of scores S that are at most ``threshold``, interpolated within a bin."""
        if threshold < 0:
            return 0.0
        value = torch.tensor(min(threshold, _LARGEST), dtype=torch.float32)
        index = int(_bin_of(value))
        below, in_bin = int(self.counts[:index].sum()), int(self.counts[index])
        if index == 0:  # S is an integer, so the first bin contains only zeros
            return float(in_bin)
        low, high = _lower_edge(index), _lower_edge(index + 1)
        return below + in_bin * (value.item() - low) / (high - low)


def new_histogram(site: Site) -> ScoreHistogram:
    """Empty histogram for the scores of ``site``."""
    return ScoreHistogram(unit=score_unit(site))


def global_threshold(histograms: list[ScoreHistogram], fp4_fraction: float) -> float:
    """Loss T such that a fraction ``fp4_fraction`` of the blocks of all sites scores at most T.

    Returns:
        T; -inf for a fraction of 0 and inf for 1, for which
        :func:`fgmp.formats.activation.site_threshold` makes every block FP8 or FP4.
    """
    if fp4_fraction <= 0:
        return -torch.inf
    if fp4_fraction >= 1:
        return torch.inf
    target = fp4_fraction * sum(h.total for h in histograms)
    sensitive = [h for h in histograms if h.unit > 0]
    unscored = sum(h.total for h in histograms if h.unit == 0)  # a loss of 0: always FP4
    # Bisect on the exponent: scores of different sites are hundreds of octaves apart.
    low, high = -1000.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        reached = unscored + sum(h.count_up_to(math.exp2(middle) / h.unit) for h in sensitive)
        low, high = (middle, high) if reached < target else (low, middle)
    return math.exp2(high)


def achieved_fraction(histogram: ScoreHistogram, threshold: int) -> float:
    """Fraction of the counted blocks that are FP4 for T_site = ``threshold``; 0 without blocks."""
    return histogram.count_up_to(float(threshold)) / max(histogram.total, 1)
