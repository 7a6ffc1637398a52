"""Scores of weight blocks: the increase in loss if a block is FP4 rather than FP8.

    difference    sum F_i (Q4(v_i) - Q8(v_i))^2                          the paper's *impact*
    benefit       sum F_i ((Q4(v_i) - v_i)^2 - (Q8(v_i) - v_i)^2)        at least 0

Half of either estimates a loss increase in nats per token (arXiv 2504.14152, equation 3). That
holds for weights and activations, so scores are comparable across layers. The impact measures the
difference between the two formats. The benefit measures the reduction in error from FP4 to FP8,
which is zero if a block happens to lie on its FP4 grid.
"""

from collections.abc import Callable

from torch import Tensor

from fgmp.formats.codec import to_blocks
from fgmp.formats.weight import WeightCodes


def weight_impact(codes: WeightCodes, fisher: Tensor) -> Tensor:
    """Impact of every block, float64 (N, G).

    Args:
        codes: the weight in both formats.
        fisher: F_w (N, K), in nats^2 per token.
    """
    difference = (codes.fp4_units() - codes.fp8_units()).double() * codes.t
    return (difference.square_() * to_blocks(fisher.double())).sum(-1)


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
    return fp4.sub_(fp8).mul_(f).sum(-1).clamp_(min=0)


def _difference(codes: WeightCodes, weight: Tensor, sensitivity: Tensor) -> Tensor:
    return weight_impact(codes, sensitivity)


WEIGHT_SCORES: dict[str, Callable[[WeightCodes, Tensor, Tensor], Tensor]] = {
    "difference": _difference,
    "benefit": weight_benefit,
}
"""Scores of weight blocks by name; ``formats.rules.Rule.weight_score`` is one of these names."""
