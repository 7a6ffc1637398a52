"""Second moments of a site's input, for error compensation.

With x a token's activation in the original model and q its quantized version, the moments are sums
over the calibration tokens:

    H = sum q q^T        C = sum x q^T        fp32 (K, K) each

H is GPTQ's Hessian up to a factor of 2. Up to a constant, H and C give the output error
sum |W x - V q|^2 of any weight V, a quadratic form in V, without running the model.
:mod:`fgmp.assign.compensate` minimizes it.

Both grow with the square of a layer's width. They are therefore collected after the Fisher
information, for a few sites at a time (:mod:`fgmp.quantization.sequential`), and freed once the
weights are packed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

MOMENT_BYTES = 2 * 4
"""Bytes per entry of H and C."""


@dataclass
class Moments:
    """Moments H (``h``) and C (``c``) of one site's input, fp32 (K, K) each."""

    h: Tensor
    c: Tensor


def new_moments(k: int, device: torch.device) -> Moments:
    """Moments of no tokens, zeros, for inputs of width ``k``."""
    return Moments(torch.zeros(k, k, device=device), torch.zeros(k, k, device=device))


def add_moments(moments: Moments, x: Tensor, q: Tensor) -> None:
    """Add tokens: original activations ``x`` and quantized activations ``q``, (..., K) each."""
    q = q.flatten(0, -2).float()
    moments.h.addmm_(q.T, q)
    moments.c.addmm_(x.flatten(0, -2).float().T, q)
