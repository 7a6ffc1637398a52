"""One budget of bits for weights and activations together, by marginal harm per bit.

A block that goes from FP8 to FP4 saves the same bits everywhere, but of what total? Bits are a
mean over weights and a mean over activation values, and a budget is the mean of those two: half a
bit a value for each, whatever their numbers. Per bit so saved, with scores in nats a token,

    a weight block harms        relief * score * (number of weight blocks)
    an activation block harms   score * (number of activation blocks a token)

and what spends a budget with the least harm is one limit on both, found by bisection. ``relief`` is
what compensation leaves of the harm of weights: it acts on them and hardly on activations.
"""

import math
from collections.abc import Collection

import torch
from torch import Tensor

from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.sensitivity.histogram import ScoreHistogram

RELIEF = 0.4
"""Share of the weights' harm that compensation is taken to leave: an estimate from two models."""

_OCTAVES = 400.0


def joint_fractions(
    scores: Collection[Tensor],
    histograms: Collection[ScoreHistogram],
    tokens: int,
    bits: float,
    *,
    relief: float,
) -> tuple[float, float]:
    """Shares of FP4 blocks, of weights and of activations, that meet a budget with least harm.

    Args:
        scores: of the weight blocks, in nats a token.
        histograms: of the activation blocks that ``tokens`` calibration tokens sent by.
        tokens: see above.
        bits: mean of the bits of a weight and of an activation value, 4.5 to 8.
        relief: factor on the scores of weights.
    """
    wanted = (FP8_BITS - bits) / (FP8_BITS - FP4_BITS)
    if wanted <= 0 or wanted >= 1:
        return (0.0, 0.0) if wanted <= 0 else (1.0, 1.0)
    ranked = torch.cat([s.flatten() for s in scores]).sort().values
    total = sum(h.total for h in histograms)
    weight_factor, activation_factor = relief * len(ranked), total / tokens

    def shares(limit: float) -> tuple[float, float]:
        below = torch.searchsorted(ranked, limit / weight_factor, right=True).item()
        reached = sum(
            h.count_up_to(limit / activation_factor / h.unit) if h.unit else h.total
            for h in histograms
        )
        return below / len(ranked), reached / total

    low, high = -_OCTAVES, _OCTAVES
    for _ in range(80):
        middle = (low + high) / 2
        reached = sum(shares(math.exp2(middle))) / 2
        low, high = (middle, high) if reached < wanted else (low, middle)
    return shares(math.exp2(high))
