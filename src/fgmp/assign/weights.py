"""From weights and their sensitivities to packed planes: scale, score, assign, pack."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from fgmp.assign.clip import search_scale_codes
from fgmp.assign.policy import Policy, weight_masks, weight_scores
from fgmp.formats.weight import nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack


def group_scale(weights: Iterable[Tensor]) -> float:
    """The tensor scale that the weights of one site share."""
    return tensor_scale(max(w.abs().max().item() for w in weights))


def pack_weights(
    weights: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    groups: Iterable[list[str]],
    policy: Policy,
    fp4_fraction: float,
    *,
    clipped: bool,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, PackedWeight]:
    """Choose block scales, score the blocks with them, assign by threshold, and pack.

    Args:
        weights: (N, K) by linear.
        fisher: F_w of the same shapes; all zero for an expert that no token reached, whose scales
            are then searched with equal weights.
        groups: linears that share a tensor scale, those of one site.
        policy: what a squared difference counts, and over what the threshold is taken.
        fp4_fraction: share of blocks to keep in FP4.
        clipped: search the scales of FP4 blocks; else they round to nearest.
        seed: of the policy that chooses at random.
        advance: called after each weight.
    """
    generator = torch.Generator().manual_seed(seed)
    scales, scores, ts = {}, {}, {}
    for names in groups:
        t = group_scale(weights[name] for name in names)
        for name in names:
            weight, f = weights[name], fisher[name]
            sensitive = policy.sensitivity == "fisher" and bool(f.any())
            if clipped:
                scales[name] = search_scale_codes(weight, f if sensitive else torch.ones_like(f), t)
            else:
                scales[name] = nearest_scale_codes(weight.float(), t)
            codes = quantize_weight(weight, t, scales[name])
            scores[name], ts[name] = weight_scores(policy, codes, f, generator), t
            advance()
    masks, _ = weight_masks(policy, scores, fp4_fraction)
    return {
        name: pack(quantize_weight(weight, ts[name], scales[name]), masks[name])
        for name, weight in weights.items()
    }
