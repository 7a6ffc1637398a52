"""Scores of weight blocks: the increase in loss if a block is FP4 rather than FP8.

    difference    sum F_i (Q4(v_i) - Q8(v_i))^2                          the paper's *impact*
    benefit       sum F_i ((Q4(v_i) - v_i)^2 - (Q8(v_i) - v_i)^2)        at least 0

Half of either estimates a loss increase in nats per token (arXiv 2504.14152, equation 3). That
holds for weights and activations, so scores are comparable across layers. The impact measures the
difference between the two formats. The benefit measures the reduction in error from FP4 to FP8,
which is zero if a block happens to lie on its FP4 grid.

:func:`block_scores` computes either without the codes, in C++ where that is compiled.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fgmp.formats.codec import block_sums, to_blocks
from fgmp.formats.weight import WeightCodes, quantize_weight
from fgmp.kernels.cpu.library import kernels


def weight_impact(codes: WeightCodes, fisher: Tensor) -> Tensor:
    """Impact of every block, float64 (N, G).

    Args:
        codes: the weight in both formats.
        fisher: F_w (N, K), in nats^2 per token.
    """
    difference = (codes.fp4_units() - codes.fp8_units()).double() * codes.t
    return block_sums(difference.square_() * to_blocks(fisher.double()))


def weight_benefit(codes: WeightCodes, weight: Tensor, fisher: Tensor) -> Tensor:
    """Benefit of every block, float64 (N, G).

    Args:
        codes: the weight in both formats.
        weight: before rounding, (N, K).
        fisher: F_w (N, K), in nats^2 per token.
    """
    v, f = to_blocks(weight.double()), to_blocks(fisher.double())
    fp4 = (codes.fp4_units().double() * codes.t).sub_(v).square_()
    fp8 = (codes.fp8_units().double() * codes.t).sub_(v).square_()
    return block_sums(fp4.sub_(fp8).mul_(f)).clamp_(min=0)


def _difference(codes: WeightCodes, weight: Tensor, sensitivity: Tensor) -> Tensor:
    return weight_impact(codes, sensitivity)


WEIGHT_SCORES: dict[str, Callable[[WeightCodes, Tensor, Tensor], Tensor]] = {
    "difference": _difference,
    "benefit": weight_benefit,
}
"""Scores of weight blocks by name; ``formats.rules.Rule.weight_score`` is one of these names."""


def block_scores(
    weight: Tensor, scale_codes: Tensor, t: float, sensitivity: Tensor, score: str
) -> Tensor:
    """Scores of the blocks of a weight, float64 (N, G).

    Args:
        weight: finite, (N, K).
        scale_codes: E4M3 codes of the FP4 block scales, uint8 (N, G).
        t: tensor scale.
        sensitivity: weights of squared errors, (N, K).
        score: a key of :data:`WEIGHT_SCORES`.
    """
    compiled, of_cpu = kernels(), weight.device.type == "cpu"
    if compiled and of_cpu and sensitivity.dtype == torch.float32:
        tensors = (weight.float().contiguous(), sensitivity.contiguous(), scale_codes.contiguous())
        return compiled.weight_scores(*tensors, t, score)
    return WEIGHT_SCORES[score](quantize_weight(weight, t, scale_codes), weight, sensitivity)
