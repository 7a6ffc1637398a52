"""Second moments of a site's input, for error compensation.

With x a token's activation in the original model and q its quantized version, the moments are sums
over the calibration tokens:

    H = sum q q^T        D = sum (x - q) q^T = C - H, with C = sum x q^T        fp32 (K, K) each

H is GPTQ's Hessian up to a factor of 2. Up to a constant, H and C give the output error
sum |W x - V q|^2 of any weight V, a quadratic form in V, without running the model.
:mod:`fgmp.assign.compensate` minimizes it.

D occurs only in W D = sum W (x - q) q^T. Where the weights of a site have few rows for their width,
as a Transformer's down projection, W D is summed instead: it is smaller, and so is its cost.

Variants of a quantized model whose inputs q agree share H. Where inputs differ, each needs its own:
on a small model in FP4, the H of another variant raised the KL divergence by a tenth.

Both grow with the square of a layer's width. They are therefore collected after the Fisher
information, for a few sites at a time (:mod:`fgmp.quantization.sequential`), and freed once the
weights are packed.
"""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOMENT_BYTES = 2 * 4
"""Bytes per entry of H and D."""

_PANEL = 512
"""Columns of H that are added to at a time; what lies below the diagonal is copied."""


@dataclass
class Moments:
    """Moments of one site's input, fp32.

    Attributes:
        h: H (K, K), which variants may share.
        d: D (K, K), or W D for the rows of all weights of the site (N, K).
        rows: rows of ``d`` by linear, if it is W D.
        roots: Cholesky factors of H by damping, shared with H; see ``assign.compensate``.
    """

    h: Tensor
    d: Tensor
    rows: dict[str, slice] = field(default_factory=dict)
    roots: dict[float, Tensor | None] = field(default_factory=dict)

    def drift(self, name: str, weight: Tensor) -> Tensor:
        """W D, fp32 (N, K), a tensor of its own, for the weight W (N, K) of a linear by name."""
        return self.d[self.rows[name]].clone() if name in self.rows else weight.float() @ self.d

    def variant(self) -> "Moments":
        """Moments of another variant, which shares H."""
        return Moments(self.h, torch.zeros_like(self.d), self.rows, self.roots)


class Source:
    """What a difference x - q enters D as: itself, or multiplied by W where that is narrow.

    Args:
        weights: of the linears that read the site, (N, K) each, by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.rows: dict[str, slice] = {}
        self.weight: Tensor | None = None
        heights = [len(weight) for weight in weights.values()]
        if 2 * sum(heights) <= next(iter(weights.values())).shape[1]:
            self.weight = torch.cat([weight.float() for weight in weights.values()])
            stops = itertools.accumulate(heights)
            for name, height, stop in zip(weights, heights, stops, strict=True):
                self.rows[name] = slice(stop - height, stop)

    def __call__(self, difference: Tensor) -> Tensor:
        """Differences (T, K) as they enter D, (T, K) or (T, N)."""
        return difference if self.weight is None else difference @ self.weight.T


def new_moments(k: int, device: torch.device, source: Source | None = None) -> Moments:
    """Moments of no tokens, zeros, for inputs of width ``k``."""
    weight = source.weight if source else None
    d = torch.zeros(k if weight is None else len(weight), k, device=device)
    return Moments(torch.zeros(k, k, device=device), d, source.rows if source else {})


def add_moments(
    moments: Moments,
    x: Tensor,
    q: Tensor,
    source: Source | None = None,
    *,
    to_h: bool = True,
) -> None:
    """Add tokens, in place.

    Args:
        moments: changed.
        x, q: original and quantized activations, (..., K).
        source: the one that ``moments`` were created with.
        to_h: whether H counts these tokens; it must count each once for all variants.
    """
    x, q = x.flatten(0, -2).float(), q.flatten(0, -2).float()
    difference = x - q
    moments.d.addmm_((source(difference) if source else difference).T, q)
    if to_h:
        for start in range(0, q.shape[1], _PANEL):
            here = slice(start, start + _PANEL)
            panel = moments.h[: here.stop, here]
            panel.addmm_(q[:, : here.stop].T, q[:, here])
            moments.h[here, :start] = panel[:start].T
