"""The impact of keeping a weight block in FP4 rather than FP8.

    I(v) = sum F_i (Q4(v_i) - Q8(v_i))^2

Half of it estimates the loss increase in nats a token (arXiv 2504.14152, equation 3), for
weights and activations alike, so scores of different layers compare.
"""

from torch import Tensor

from fgmp.formats.codec import to_blocks
from fgmp.formats.weight import WeightCodes


def weight_impact(codes: WeightCodes, fisher: Tensor) -> Tensor:
    """I of every block: float64 (N, G) from codes and F_w (N, K) in nats^2 a token."""
    difference = (codes.fp4_units() - codes.fp8_units()).double() * codes.t
    return (difference.square_() * to_blocks(fisher.double())).sum(-1)
