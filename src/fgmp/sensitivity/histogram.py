"""The distribution of activation scores, in little memory.

A calibration run makes billions of block scores. Each site keeps a histogram of S over the bins
of a float with eight mantissa bits: a bin is at most 2**-8 of its value wide, so with the counts
taken as evenly spread inside it, shares come out within a few hundredths of a point. The
exception are scores that many blocks have in common; those cannot be split by any threshold.

One global threshold T means a threshold T / unit in each site's integer scale; T is found by
bisection over all sites at once.
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
    """Counts of S at one site. ``unit`` is what one count of S is worth in the loss's unit."""

    unit: float
    counts: Tensor = field(default_factory=lambda: torch.zeros(_BINS, dtype=torch.int64))

    def add(self, values: Tensor) -> None:
        """Count scores S, int64, any shape."""
        found = torch.bincount(_bin_of(values).flatten(), minlength=_BINS)
        self.counts += found.to(self.counts.device)

    @property
    def total(self) -> int:
        """Blocks counted."""
        return int(self.counts.sum())

    def count_up_to(self, threshold: float) -> float:
        """How many scores are at most ``threshold``, in units of S."""
        if threshold < 0:
            return 0.0
        value = torch.tensor(min(threshold, _LARGEST), dtype=torch.float32)
        index = int(_bin_of(value))
        below, here = int(self.counts[:index].sum()), int(self.counts[index])
        if index == 0:  # S is an integer, so zero is all there is in the first bin
            return float(here)
        low, high = _lower_edge(index), _lower_edge(index + 1)
        return below + here * (value.item() - low) / (high - low)


def new_histogram(site: Site) -> ScoreHistogram:
    """An empty histogram in the unit of ``site``."""
    return ScoreHistogram(unit=score_unit(site))


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
    live = [h for h in histograms if h.unit > 0]
    worthless = sum(h.total for h in histograms if h.unit == 0)  # FP4 under any threshold
    # Bisect on the exponent: scores of different sites lie hundreds of octaves apart.
    low, high = -1000.0, 1000.0
    for _ in range(80):
        middle = (low + high) / 2
        reached = worthless + sum(h.count_up_to(math.exp2(middle) / h.unit) for h in live)
        low, high = (middle, high) if reached < wanted else (low, middle)
    return math.exp2(high)


def achieved_fraction(histogram: ScoreHistogram, threshold: int) -> float:
    """Share of the counted blocks that T_site = ``threshold`` keeps in FP4; 0 without blocks."""
    return histogram.count_up_to(float(threshold)) / max(histogram.total, 1)
