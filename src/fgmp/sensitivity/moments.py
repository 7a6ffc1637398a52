"""Second moments of a site's input, for error compensation.

With x a token's activation in the original model and q its quantized version, the moments are sums
over the calibration tokens:

    H = sum q q^T        C = sum x q^T        fp32 (K, K) each

They give the output error sum |W x - V q|^2 of any weight V against the original W, a quadratic
form in V, without running the model. :mod:`fgmp.assign.compensate` minimizes it.

C occurs only in W C = sum (W x) q^T. Where the weights of a site have few rows for their width, as
a Transformer's down projection, W C is summed instead: it is smaller, and so is its cost.

Both grow with the square of a layer's width. They are therefore collected after the Fisher
information, for a few sites at a time (:mod:`fgmp.quantization.sequential`), and freed once the
weights are packed.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

MOMENT_BYTES = 2 * 4
"""Bytes per entry of H and C."""

_PANEL = 1024
"""Columns of H that are added to at a time; what lies below the diagonal is copied."""


@dataclass
class Moments:
    """Moments of one site's input, fp32.

    Attributes:
        h: H (K, K).
        c: C (K, K), or W C for the rows of all weights of the site (N, K).
        rows: rows of ``c`` by linear, if it is W C.
    """

    h: Tensor
    c: Tensor
    rows: dict[str, slice] = field(default_factory=dict)

    def drift(self, name: str, weight: Tensor) -> Tensor:
        """W (C - H), fp32 (N, K), for the weight W (N, K) of the linear of this name."""
        weight = weight.float()
        if name in self.rows:
            return torch.addmm(self.c[self.rows[name]], weight, self.h, alpha=-1)
        return weight @ (self.c - self.h)


class Source:
    """What a site's input x enters C as: x itself, or W x where that is narrow.

    Args:
        weights: of the linears that read the site, (N, K) each, by name.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        k = next(iter(weights.values())).shape[1]
        self.rows: dict[str, slice] = {}
        self.weight: Tensor | None = None
        if 2 * sum(len(weight) for weight in weights.values()) <= k:
            self.weight = torch.cat([weight.float() for weight in weights.values()])
            ends = torch.tensor([len(weight) for weight in weights.values()]).cumsum(0).tolist()
            starts = [0, *ends]
            for name, start, stop in zip(weights, starts, ends, strict=False):
                self.rows[name] = slice(start, stop)

    def __call__(self, x: Tensor) -> Tensor:
        """Tokens (..., K) as they enter C, fp32 (T, K) or (T, N)."""
        x = x.flatten(0, -2).float()
        return x if self.weight is None else x @ self.weight.T


def new_moments(k: int, device: torch.device, rows: Mapping[str, slice] | None = None) -> Moments:
    """Moments of no tokens, zeros, for inputs of width ``k``; ``rows`` as a ``Source`` has them."""
    height = max((r.stop for r in rows.values()), default=k) if rows else k
    zeros = torch.zeros(height, k, device=device)
    return Moments(torch.zeros(k, k, device=device), zeros, dict(rows or {}))


def add_moments(moments: Moments, x: Tensor, q: Tensor) -> None:
    """Add tokens: original activations ``x`` and quantized activations ``q``.

    Args:
        moments: changed in place.
        x: (..., K), or what a ``Source`` made of it.
        q: (..., K).
    """
    q = q.flatten(0, -2).float()
    for start in range(0, q.shape[1], _PANEL):
        here = slice(start, start + _PANEL)
        panel = moments.h[: here.stop, here]
        panel.addmm_(q[:, : here.stop].T, q[:, here])
        moments.h[here, :start] = panel[:start].T
    moments.c.addmm_(x.flatten(0, -2).float().T, q)
