"""Quantize weights: choose block scales, score blocks, compensate errors, pack planes."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.compensate import factors_of, root_of
from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.assign.policy import Policy, sensitivities, weight_scores
from fgmp.formats.weight import nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack
from fgmp.sensitivity.moments import Moments


def group_scale(weights: Iterable[Tensor]) -> float:
    """Tensor scale that the weights of one site share."""
    return tensor_scale(max(w.abs().max().item() for w in weights))


@dataclass(frozen=True)
class ScoredWeights:
    """Block scales and scores of weights, by linear.

    Attributes:
        scales: E4M3 codes of FP4 block scales, uint8 (N, G).
        scores: scores of blocks, float64 (N, G).
        t: tensor scales.
        clipped: whether the scales come from a scale search.
    """

    scales: dict[str, Tensor]
    scores: dict[str, Tensor]
    t: dict[str, float]
    clipped: bool


def score_weights(
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    groups: Collection[list[str]],
    policy: Policy,
    *,
    rule: str,
    clipped: bool,
    generator: torch.Generator | None = None,
    methods: Methods = DEFAULT_METHODS,
    advance: Callable[[], None] = lambda: None,
) -> ScoredWeights:
    """Choose FP4 block scales and score all blocks under them.

    Args:
        weights: (N, K) by linear.
        fisher: F_w by linear, of the same shapes. It is all zero for an expert that no token
            reached; a scale search then uses equal sensitivities.
        groups: names of the linears of each site, which share a tensor scale.
        policy: which sensitivities weight the squared errors.
        rule: decision rule, a key of ``formats.rules.RULES``.
        clipped: whether to search the scales; otherwise they are those of round to nearest.
        generator: random numbers for the policy ``random``; default: seeded with 0.
        methods: replaceable steps.
        advance: called after each weight.
    """
    generator = generator or torch.Generator().manual_seed(0)
    scored = ScoredWeights({}, {}, {}, clipped)
    for names in groups:
        t = group_scale(weights[name] for name in names)
        for name in names:
            weight, f = weights[name], fisher[name]
            if clipped:
                scales = methods.search_scales(weight, _search_weights(policy, f), t)
            else:
                scales = nearest_scale_codes(weight.float(), t)
            scored.scales[name], scored.t[name] = scales, t
            scored.scores[name] = weight_scores(
                policy, rule, weight, scales, t, f, generator, methods.weight_score
            )
            advance()
    return scored


def pack_weights(
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    groups: Collection[list[str]],
    policy: Policy,
    scored: ScoredWeights,
    masks: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None = None,
    methods: Methods = DEFAULT_METHODS,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, PackedWeight]:
    """Round weights to their assigned formats and pack them, by linear.

    Args:
        weights, fisher, groups, policy: as for :func:`score_weights`.
        scored: result of :func:`score_weights`.
        masks: which blocks are FP8, bool (N, G) by linear; see ``policy.weight_masks``.
        moments: moments of each group's input, by its first linear, for error compensation; None:
            round to nearest.
        methods: replaceable steps.
        advance: called after each weight.
    """
    packed = {}
    for names in groups:
        sums = moments[names[0]] if moments else None
        root = root_of(sums, methods.damping) if sums else None
        for name in names:
            t = scored.t[name]
            if sums and root is not None:
                factors = factors_of(root, sums.drift(name, weights[name]))
                sensitivity = _search_weights(policy, fisher[name]) if scored.clipped else None
                codes = methods.compensate(
                    weights[name], factors, masks[name], t, sensitivity, methods.search_scales
                )
            else:
                codes = quantize_weight(weights[name], t, scored.scales[name])
            packed[name] = pack(codes, masks[name])
            advance()
    return packed


def _search_weights(policy: Policy, fisher: Tensor) -> Tensor:
    """Sensitivities for the scale search; ones where no gradient ever arrived."""
    return sensitivities(policy, fisher) if fisher.any() else torch.ones_like(fisher)
