"""The impact of keeping a weight block in FP4 rather than FP8, by two rules.

    difference    sum F_i (Q4(v_i) - Q8(v_i))^2                          the paper's
    benefit       sum F_i ((Q4(v_i) - v_i)^2 - (Q8(v_i) - v_i)^2)        at least 0

Half of either estimates a loss increase in nats a token (arXiv 2504.14152, equation 3), for
weights and activations alike, so scores of different layers compare. The first asks how far apart
the formats are, the second how much error FP8 takes away, which is nothing where a block happens
to suit its FP4 grid.
"""

from torch import Tensor

from fgmp.formats.codec import to_blocks
from fgmp.formats.weight import WeightCodes


def weight_impact(codes: WeightCodes, fisher: Tensor) -> Tensor:
    """The difference of every block: float64 (N, G) from codes and F_w (N, K) in nats^2 a token."""
    difference = (codes.fp4_units() - codes.fp8_units()).double() * codes.t
    return (difference.square_() * to_blocks(fisher.double())).sum(-1)


def weight_benefit(codes: WeightCodes, weight: Tensor, fisher: Tensor) -> Tensor:
    """The benefit of every block: float64 (N, G), also from the weight (N, K) before rounding."""
    v, f = to_blocks(weight.double()), to_blocks(fisher.double())
    fp4 = (codes.fp4_units().double() * codes.t).sub_(v).square_()
    fp8 = (codes.fp8_units().double() * codes.t).sub_(v).square_()
    return fp4.sub_(fp8).mul_(f).sum(-1).clamp_(min=0)
