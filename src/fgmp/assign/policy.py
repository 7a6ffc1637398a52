"""Which blocks get FP8.

A policy is two plain facts: what a square counts (``sensitivity``) and over what a threshold is
taken (``per_layer``). Everything else, scores, quantiles and masks, is shared, so that policies
can be compared on one calibration.

================  =========================================================  ============
policy            score of a block                                           threshold
================  =========================================================  ============
fisher            squares weighted by F: the recipe's ``rule`` says which    one for all
fisher-per-layer  the same                                                   each its own
error             squares unweighted                                         one for all
random            arbitrary                                                  one for all
fp8, nvfp4        none: every block FP8, or FP4                              -
================  =========================================================  ============
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.impact import weight_benefit, weight_impact
from fgmp.formats.activation import Site, fl32, multiplier, power_codes, sensitivity_codes
from fgmp.formats.spec import E4M3, SCALE_MAX_CODE, SCORE_BITS
from fgmp.formats.weight import WeightCodes


@dataclass(frozen=True, kw_only=True)
class Policy:
    """See the module; ``fraction`` fixes the share of FP4 blocks whatever the recipe asks."""

    sensitivity: str  # "fisher", "none" or "random"
    per_layer: bool = False
    fraction: float | None = None


POLICIES = {
    "fisher": Policy(sensitivity="fisher"),
    "fisher-per-layer": Policy(sensitivity="fisher", per_layer=True),
    "error": Policy(sensitivity="none"),
    "random": Policy(sensitivity="random"),
    "fp8": Policy(sensitivity="none", fraction=0.0),
    "nvfp4": Policy(sensitivity="none", fraction=1.0),
}


def weight_scores(
    policy: Policy,
    rule: str,
    codes: WeightCodes,
    weight: Tensor,
    fisher: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Scores of a weight's blocks, float64 (N, G), by ``difference`` or ``benefit``.

    ``truncated`` is for hardware, which scores no weights: they get ``benefit``.
    """
    if policy.sensitivity == "random":
        drawn = torch.rand(codes.scale.shape, generator=generator, dtype=torch.float64)
        return drawn.to(codes.scale.device)
    counts = fisher if policy.sensitivity == "fisher" else torch.ones_like(fisher)
    if rule == "difference":
        return weight_impact(codes, counts)
    return weight_benefit(codes, weight, counts)


def weight_masks(
    policy: Policy, scores: dict[str, Tensor], fp4_fraction: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """FP8 masks and thresholds of all weights: a block is FP8 if its score exceeds the threshold.

    Args:
        policy: decides whether thresholds are global.
        scores: float64 (N, G) by linear.
        fp4_fraction: share of blocks to keep in FP4.

    Returns:
        masks, bool (N, G), and the threshold of each linear.
    """
    if policy.per_layer:
        thresholds = {name: quantile([s], fp4_fraction) for name, s in scores.items()}
    else:
        thresholds = dict.fromkeys(scores, quantile(list(scores.values()), fp4_fraction))
    return {name: s > thresholds[name] for name, s in scores.items()}, thresholds


def quantile(scores: list[Tensor], fp4_fraction: float) -> float:
    """The smallest of float64 scores that at least this share of all of them does not exceed.

    -inf for a share of 0 and inf for 1. Found by bisection over the numbers that float64 has, in
    at most 64 looks at the scores, since sorting them would take three times their memory.
    """
    count = sum(s.numel() for s in scores)
    kept = round(fp4_fraction * count)
    if kept == 0:
        return -torch.inf
    if kept == count:
        return torch.inf
    low = _place(min(s.min().item() for s in scores))
    high = _place(max(s.max().item() for s in scores))
    while low < high:
        middle = (low + high) // 2
        if sum(int((s <= _number(middle)).sum()) for s in scores) >= kept:
            high = middle
        else:
            low = middle + 1
    return _number(low)


def _place(number: float) -> int:
    """Of a float64 among all of them in order, counted from zero."""
    (bits,) = struct.unpack("<q", struct.pack("<d", abs(number)))
    return -int(bits) if number < 0 else int(bits)


def _number(place: int) -> float:
    """The inverse of :func:`_place`."""
    (magnitude,) = struct.unpack("<d", struct.pack("<q", abs(place)))
    return -float(magnitude) if place < 0 else float(magnitude)


def site_record(
    policy: Policy,
    rule: str,
    scales: str,
    g2: Tensor,
    amax: float,
    headroom: float,
    powers: bool = False,
) -> Site:
    """A site's constants before its threshold is known.

    Args:
        policy: what a square counts.
        rule: which squares, a key of ``formats.activation.RULES``; a random policy has its own.
        scales: a key of ``formats.activation.SCALES``.
        g2: F_x, (K,).
        amax: largest calibrated magnitude.
        headroom: factor on ``amax``.
        powers: make sensitivities powers of two.
    """
    r = multiplier(amax * headroom)
    if policy.sensitivity == "fisher":
        codes, gamma = sensitivity_codes(g2)
        codes = power_codes(codes) if powers else codes
        return Site(r, codes, gamma, 0, rule, scales)
    codes = torch.full(g2.shape, SCALE_MAX_CODE, dtype=torch.uint8, device=g2.device)
    if policy.sensitivity == "none":
        return Site(r, codes, fl32(1 / E4M3.max), 0, rule, scales)
    # An arbitrary score has no unit: gamma makes one count of S worth 1, as far as fp32 reaches.
    t = Site(r, codes, 1.0, 0).t
    gamma = fl32(min(2.0**SCORE_BITS / t**2, torch.finfo(torch.float32).max))
    return Site(r, codes, gamma, 0, "random", scales)
