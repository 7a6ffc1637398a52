"""Second moments of a site's input: what errors of rounded weights do to a layer's output.

With x a token's activation in the original model and q its quantized version, the sums over
calibration tokens

    H = sum q q^T        C = sum x q^T        fp32 (K, K) each

tell, without running the model again, how far any other weight V is from the original W in the
layer's output: sum |W x - V q|^2 is a quadratic form in V. :mod:`fgmp.assign.compensate` minimises
it. Both grow with the square of a layer's width, so they are collected after the Fisher
information, for a few sites at a time (:mod:`fgmp.sequential`), and dropped once weights are made.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENT_BYTES = 2 * 4
"""Of H and C, an entry."""


@dataclass
class Moments:
    """Sums over tokens: ``h`` of q q^T and ``c`` of x q^T, fp32 (K, K), in units of x squared."""

    h: Tensor
    c: Tensor


def new_moments(k: int, device: torch.device) -> Moments:
    """Empty sums for inputs of width ``k``."""
    return Moments(torch.zeros(k, k, device=device), torch.zeros(k, k, device=device))


def add_moments(moments: Moments, x: Tensor, q: Tensor) -> None:
    """Add the tokens of one activation tensor and of what it is quantized to, (..., K) each."""
    q = q.flatten(0, -2).float()
    moments.h.addmm_(q.T, q)
    moments.c.addmm_(x.flatten(0, -2).float().T, q)
