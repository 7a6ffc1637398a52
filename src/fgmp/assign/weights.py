"""From weights and their sensitivities to packed planes: scale, score, assign, compensate, pack."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.assign.clip import search_scale_codes
from fgmp.assign.compensate import compensated, factorize
from fgmp.assign.policy import Policy, weight_scores
from fgmp.formats.weight import nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack
from fgmp.sensitivity.moments import Moments


def group_scale(weights: Iterable[Tensor]) -> float:
    """The tensor scale that the weights of one site share."""
    return tensor_scale(max(w.abs().max().item() for w in weights))


@dataclass(frozen=True)
class ScoredWeights:
    """Weights before assignment, by linear.

    Attributes:
        scales: E4M3 codes of FP4 block scales, uint8 (N, G).
        scores: of the blocks, float64 (N, G).
        t: tensor scales.
        clipped: whether scales were searched.
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
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> ScoredWeights:
    """Choose block scales and score the blocks with them.

    Args:
        weights: (N, K) by linear.
        fisher: F_w of the same shapes; all zero for an expert that no token reached, whose scales
            are then searched with equal weights.
        groups: linears that share an input and a tensor scale, those of one site.
        policy: what a square counts.
        rule: which squares, ``difference`` or ``benefit``.
        clipped: search the scales of FP4 blocks; else they round to nearest.
        seed: of the policy that chooses at random.
        advance: called after each weight.
    """
    generator = torch.Generator().manual_seed(seed)
    found = ScoredWeights({}, {}, {}, clipped)
    for names in groups:
        t = group_scale(weights[name] for name in names)
        for name in names:
            weight, f = weights[name], fisher[name]
            if clipped:
                scales = search_scale_codes(weight, _counts(policy, f), t)
            else:
                scales = nearest_scale_codes(weight.float(), t)
            codes = quantize_weight(weight, t, scales)
            found.scales[name], found.t[name] = scales, t
            found.scores[name] = weight_scores(policy, rule, codes, weight, f, generator)
            advance()
    return found


def pack_weights(
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    groups: Collection[list[str]],
    policy: Policy,
    scored: ScoredWeights,
    masks: Mapping[str, Tensor],
    moments: Mapping[str, Moments] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, PackedWeight]:
    """Compensate, and pack.

    Args:
        weights, fisher, groups: as :func:`score_weights` had them.
        policy: what a square counts.
        scored: what that function returned.
        masks: which blocks are FP8, bool (N, G) by linear; see :func:`policy.weight_masks`.
        moments: of each group's input, by the first of its linears, to compensate with. Without,
            each weight is rounded by itself.
        advance: called after each weight.
    """
    packed = {}
    for names in groups:
        factors = factorize(moments[names[0]]) if moments else None
        for name in names:
            t = scored.t[name]
            if factors:
                counts = _counts(policy, fisher[name]) if scored.clipped else None
                codes = compensated(weights[name], factors, masks[name], t, counts)
            else:
                codes = quantize_weight(weights[name], t, scored.scales[name])
            packed[name] = pack(codes, masks[name])
            advance()
    return packed


def _counts(policy: Policy, fisher: Tensor) -> Tensor:
    """What an element's square counts in the search of scales."""
    sensitive = policy.sensitivity == "fisher" and bool(fisher.any())
    return fisher if sensitive else torch.ones_like(fisher)
