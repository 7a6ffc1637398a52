"""One budget of bits for weights and activations together, by marginal harm per bit.

A block that goes from FP8 to FP4 saves the same bits everywhere, but of what total? Bits are a
mean over weights and a mean over activation values, and a budget is the mean of those two: half a
bit a value for each, whatever their numbers. Per bit so saved, with scores in nats a token,

    a weight block harms        relief * score * (number of weight blocks)
    an activation block harms   score * (number of activation blocks a token)

and what spends a budget with the least harm is one limit on both, found by bisection. ``relief`` is
what compensation leaves of the harm of weights: it acts on them and hardly on activations.

Every other kind of budget, a size, an energy, a perplexity, is a condition on a point of this one
frontier, and :func:`furthest` finds the point where it just holds.
"""

import math
from collections.abc import Callable, Collection

import torch
from torch import Tensor

from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.sensitivity.histogram import ScoreHistogram

RELIEF = 0.4
"""Share of the weights' harm that compensation is taken to leave: between 0.4 and 0.6 three models
are indifferent (``runs/constants.py``, docs/results.md)."""

_OCTAVES = 400.0


class Frontier:
    """The shares of FP4 blocks that meet any budget with least harm.

    Args:
        scores: of the weight blocks, in nats a token.
        histograms: of the activation blocks that ``tokens`` calibration tokens sent by.
        tokens: see above.
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

    def shares(self, bits: float) -> tuple[float, float]:
        """Shares of weights and of activations in FP4 at a mean of ``bits``, 4.5 to 8."""
        wanted = (FP8_BITS - bits) / (FP8_BITS - FP4_BITS)
        if wanted <= 0 or wanted >= 1:
            return (0.0, 0.0) if wanted <= 0 else (1.0, 1.0)
        low, high = -_OCTAVES, _OCTAVES
        for _ in range(80):
            middle = (low + high) / 2
            reached = sum(self._under(math.exp2(middle))) / 2
            low, high = (middle, high) if reached < wanted else (low, middle)
        return self._under(math.exp2(high))

    def _under(self, limit: float) -> tuple[float, float]:
        """Shares of the blocks whose harm per bit is within ``limit``."""
        weight_factor, activation_factor = self._factors
        below = torch.searchsorted(self._ranked, limit / weight_factor, right=True).item()
        reached = sum(
            h.count_up_to(limit / activation_factor / h.unit) if h.unit else h.total
            for h in self._histograms
        )
        return below / len(self._ranked), reached / self._total


def furthest(holds: Callable[[float], bool], good: float, bad: float, steps: int) -> float:
    """The bits nearest to ``bad`` at which something holds, by bisection from ``good``.

    It is taken to hold at ``good``; what is returned is that or bits at which it was seen to.
    """
    if holds(bad):
        return bad
    for _ in range(steps):
        middle = (good + bad) / 2
        good, bad = (middle, bad) if holds(middle) else (good, middle)
    return good
