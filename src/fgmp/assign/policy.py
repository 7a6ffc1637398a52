"""Policies: which blocks get FP8.

A policy is the choice of sensitivities, the weights of squared errors in a score, and of the scope
of a threshold. Everything else (scores, quantiles, masks) is common, so policies can be compared on
one calibration. The recipe's ``rule`` says which squared errors a score sums.

================  ========================================  =======================
policy            score of a block                          threshold
================  ========================================  =======================
fisher            squared errors weighted by F              one for all layers
fisher-per-layer  squared errors weighted by F              one per layer
error             squared errors, unweighted                one for all layers
random            random                                    one for all layers
fp8, nvfp4        none: every block is FP8, or FP4          none
================  ========================================  =======================
"""

import struct
from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.impact import block_scores
from fgmp.assign.methods import WeightScore
from fgmp.errors import InputError
from fgmp.formats.activation import Site, fl32, multiplier, power_codes, sensitivity_codes
from fgmp.formats.rules import RULES, QuantizerConfig
from fgmp.formats.spec import E4M3, SCALE_MAX_CODE, SCORE_BITS
from fgmp.formats.weight import quantize_weight


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Choice of sensitivities and of the scope of a threshold.

    Attributes:
        sensitivity: ``fisher``, ``none`` or ``random``.
        per_layer: whether each layer and each site has a threshold of its own.
        fraction: fraction of FP4 blocks, instead of the recipe's.
    """

    sensitivity: str
    per_layer: bool = False
    fraction: float | None = None

    @property
    def comparable(self) -> bool:
        """Whether scores of weights and activations share a unit, and thresholds are global."""
        return self.sensitivity == "fisher" and not self.per_layer and self.fraction is None


POLICIES = {
    "fisher": Policy(sensitivity="fisher"),
    "fisher-per-layer": Policy(sensitivity="fisher", per_layer=True),
    "error": Policy(sensitivity="none"),
    "random": Policy(sensitivity="random"),
    "fp8": Policy(sensitivity="none", fraction=0.0),
    "nvfp4": Policy(sensitivity="none", fraction=1.0),
}


def register(name: str, policy: Policy) -> None:
    """Add a policy under a new name, which recipes can then choose.

    Raises:
        InputError: the name is taken.
    """
    if name in POLICIES:
        raise InputError(f"policy {name!r} exists already; choose another name")
    POLICIES[name] = policy


def weight_scores(
    policy: Policy,
    rule: str,
    weight: Tensor,
    scale_codes: Tensor,
    t: float,
    fisher: Tensor,
    generator: torch.Generator,
    score: WeightScore | None = None,
) -> Tensor:
    """Scores of a weight's blocks, float64 (N, G).

    Args:
        policy: which sensitivities weight the squared errors.
        rule: decision rule, a key of ``formats.rules.RULES``, which names a score of weight blocks.
        weight: before rounding, (N, K).
        scale_codes: E4M3 codes of the FP4 block scales, uint8 (N, G).
        t: tensor scale.
        fisher: F_w (N, K).
        generator: random numbers for the policy ``random``.
        score: replaces the score that the rule names.
    """
    if policy.sensitivity == "random":
        scores = torch.rand(scale_codes.shape, generator=generator, dtype=torch.float64)
        return scores.to(scale_codes.device)
    sensitivity = sensitivities(policy, fisher)
    if score:
        return score(quantize_weight(weight, t, scale_codes), weight, sensitivity)
    return block_scores(weight, scale_codes, t, sensitivity, RULES[rule].weight_score)


def sensitivities(policy: Policy, fisher: Tensor) -> Tensor:
    """Sensitivities of a weight's elements: F_w, or ones under a policy that uses none."""
    return fisher if policy.sensitivity == "fisher" else torch.ones_like(fisher)


def weight_masks(
    policy: Policy, scores: dict[str, Tensor], fp4_fraction: float
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Masks of FP8 weight blocks: those whose score exceeds a threshold.

    Args:
        policy: whether one threshold holds for all linears or one for each.
        scores: float64 (N, G) by linear.
        fp4_fraction: fraction of FP4 blocks to reach.

    Returns:
        FP8 masks, bool (N, G), and thresholds, both by linear.
    """
    if policy.per_layer:
        thresholds = {name: quantile([s], fp4_fraction) for name, s in scores.items()}
    else:
        thresholds = dict.fromkeys(scores, quantile(list(scores.values()), fp4_fraction))
    return {name: s > thresholds[name] for name, s in scores.items()}, thresholds


def quantile(scores: list[Tensor], fp4_fraction: float) -> float:
    """Quantile of float64 scores: the smallest score with this fraction of them at or below it.

    It is -inf for a fraction of 0 and inf for 1. Found by bisection over the float64 numbers, in at
    most 64 passes over the scores; sorting would take three times their memory.
    """
    count = sum(s.numel() for s in scores)
    fp4_count = round(fp4_fraction * count)
    if fp4_count == 0:
        return -torch.inf
    if fp4_count == count:
        return torch.inf
    low = _place(min(s.min().item() for s in scores))
    high = _place(max(s.max().item() for s in scores))
    while low < high:
        middle = (low + high) // 2
        if sum(int((s <= _number(middle)).sum()) for s in scores) >= fp4_count:
            high = middle
        else:
            low = middle + 1
    return _number(low)


def _place(number: float) -> int:
    """Order-preserving integer key of a float64; 0 for zero."""
    (bits,) = struct.unpack("<q", struct.pack("<d", abs(number)))
    return -int(bits) if number < 0 else int(bits)


def _number(place: int) -> float:
    """Float64 with a given key; the inverse of :func:`_place`."""
    (magnitude,) = struct.unpack("<d", struct.pack("<q", abs(place)))
    return -float(magnitude) if place < 0 else float(magnitude)


def site_constants(
    policy: Policy, quantizer: QuantizerConfig, g2: Tensor, amax: float, headroom: float
) -> Site:
    """Constants of a site, with a threshold of 0 until the scores are known.

    Args:
        policy: which sensitivities weight the squared errors; ``random`` replaces the rule.
        quantizer: configuration of the online quantizer.
        g2: F_x, (K,).
        amax: largest calibrated magnitude.
        headroom: factor on ``amax``.
    """
    rule, scales = quantizer.rule, quantizer.scales
    r = multiplier(amax * headroom)
    if policy.sensitivity == "fisher":
        codes, gamma = sensitivity_codes(g2)
        codes = power_codes(codes) if quantizer.sensitivities == "powers" else codes
        return Site(r, codes, gamma, 0, rule, scales)
    codes = torch.full(g2.shape, SCALE_MAX_CODE, dtype=torch.uint8, device=g2.device)
    if policy.sensitivity == "none":
        return Site(r, codes, fl32(1 / E4M3.max), 0, rule, scales)
    # A random score is no loss: gamma lets an S of 1 stand for 1, within the range of fp32.
    t = Site(r, codes, 1.0, 0).t
    gamma = fl32(min(2.0**SCORE_BITS / t**2, torch.finfo(torch.float32).max))
    return Site(r, codes, gamma, 0, "random", scales)
