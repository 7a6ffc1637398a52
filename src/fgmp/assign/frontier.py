"""Allocation of bits between weights and activations: the frontier of least loss.

A budget is a mean number of bits: the mean of bits per weight and bits per activation value, with
equal weight for both. Moving a block from FP8 to FP4 lowers that mean. Per bit by which it lowers
the mean, and with scores in nats per token, it costs

    weight block        relief * score * (number of weight blocks)
    activation block    score * (number of activation blocks per token)

For a given mean the loss is least if all moved blocks cost at most a common limit, found by
bisection. ``relief`` is the fraction of the loss from weights that remains after error
compensation, which hardly helps activations.

Every other budget (bytes, energy, perplexity) is a condition on a point of this frontier;
:func:`furthest` finds the last point that satisfies it.
"""

import math
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.sensitivity.histogram import ScoreHistogram

RELIEF = 0.4
"""Fraction of the loss from weights assumed to remain after error compensation. Three models give
the same results for 0.4 and 0.6 (``runs/constants.py relief``, docs/ablations.md)."""

_OCTAVES = 400.0


class Fractions(NamedTuple):
    """Fractions of FP4 blocks, of weights and of activations."""

    weights: float
    activations: float


class Frontier:
    """Fractions of FP4 blocks with the least loss, for any mean number of bits.

    Args:
        scores: weight block scores, in nats per token.
        histograms: activation block scores on ``tokens`` calibration tokens.
        tokens: calibration tokens.
        relief: factor on the scores of weights.
    """

    def __init__(
        self,
        scores: Collection[Tensor],
        histograms: Collection[ScoreHistogram],
        tokens: int,
        *,
        relief: float,
    ) -> None:
        self._ranked = torch.cat([s.flatten() for s in scores]).sort().values
        self._histograms = histograms
        self._total = sum(h.total for h in histograms)
        self._factors = relief * len(self._ranked), self._total / tokens

    def fractions(self, bits: float) -> Fractions:
        """Fractions of FP4 blocks with the least loss at a mean of ``bits``, 4.5 to 8."""
        target = (FP8_BITS - bits) / (FP8_BITS - FP4_BITS)
        if target <= 0 or target >= 1:
            return Fractions(0.0, 0.0) if target <= 0 else Fractions(1.0, 1.0)
        low, high = -_OCTAVES, _OCTAVES
        for _ in range(80):
            middle = (low + high) / 2
            reached = sum(self._under(math.exp2(middle))) / 2
            low, high = (middle, high) if reached < target else (low, middle)
        return self._under(math.exp2(high))

    def _under(self, limit: float) -> Fractions:
        """Fractions of blocks whose cost per bit is at most ``limit``."""
        weight_factor, activation_factor = self._factors
        below = torch.searchsorted(self._ranked, limit / weight_factor, right=True).item()
        reached = sum(
            h.count_up_to(limit / activation_factor / h.unit) if h.unit else h.total
            for h in self._histograms
        )
        return Fractions(below / len(self._ranked), reached / self._total)


def furthest(holds: Callable[[float], bool], good: float, bad: float, steps: int) -> float:
    """The value closest to ``bad`` at which a condition holds, by bisection from ``good``.

    The condition is assumed to hold at ``good``; the result is ``good`` or a value at which it was
    evaluated and held.
    """
    if holds(bad):
        return bad
    for _ in range(steps):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
