"""Sums of squared weight gradients, stored per element or as two factors.

With y = x W^T, g = dL/dy and n predictions in total, F_w in nats^2 per token has two forms:

    exact       F_w[i, j] = (1/n) sum over sequences (sum over tokens g_i x_j)^2
    factored    F_w[i, j] = (1/n) (sum over tokens g_i^2) (sum over tokens x_j^2) / tokens

The second is the expectation of the first if gradients and inputs are independent and the tokens of
a sequence uncorrelated: the diagonal of K-FAC (arXiv 1503.05671). For a weight (N, K) it stores N +
K values instead of N K, and forms no weight gradient.

Readers see no difference: both map a linear's name to F_w, fp32 (N, K). The factored form computes
the outer product at each access and does not cache it.
"""

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Squares(Protocol):
    """Accumulator of squared weight gradients."""

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        """Add one sequence: inputs ``x`` (T, K) of a linear, gradients (T, N) of its outputs, fp32.

        For a linear that ran more than once, one call has the tokens of all runs.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Sums by unique name, for storing them or loading into them."""

    def result(self, predictions: int) -> Mapping[str, Tensor]:
        """F_w by linear, fp32 (N, K); overwrites the sums."""


class ExactSquares:
    """Sums of squared weight gradients, fp32 (N, K) each."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.sums = {
            name: torch.zeros_like(linear.weight, dtype=torch.float32)
            for name, linear in linears.items()
        }

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        g = gradient.T @ x
        self.sums[name].addcmul_(g, g)

    def tensors(self) -> dict[str, Tensor]:
        return {f"weight.{name}": squares for name, squares in self.sums.items()}

    def result(self, predictions: int) -> Mapping[str, Tensor]:
        for squares in self.sums.values():
            squares /= predictions
        return self.sums


class FactoredSquares:
    """Sums over tokens of squared output gradients, fp32 (N,), and of squared inputs, fp32 (K,)."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.outputs, self.inputs, self.tokens = {}, {}, {}
        for name, linear in linears.items():
            device = linear.weight.device
            self.outputs[name] = torch.zeros(linear.out_features, device=device)
            self.inputs[name] = torch.zeros(linear.in_features, device=device)
            self.tokens[name] = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, name: str, x: Tensor, gradient: Tensor) -> None:
        self.outputs[name] += gradient.square().sum(0)
        self.inputs[name] += x.square().sum(0)
        self.tokens[name] += len(x)

    def tensors(self) -> dict[str, Tensor]:
        sums = {f"output.{name}": g2 for name, g2 in self.outputs.items()}
        sums |= {f"input.{name}": x2 for name, x2 in self.inputs.items()}
        return sums | {f"tokens.{name}": count for name, count in self.tokens.items()}

    def result(self, predictions: int) -> Mapping[str, Tensor]:
        return OuterProducts(
            {name: g2 / predictions for name, g2 in self.outputs.items()},
            {name: x2 / self.tokens[name].clamp(min=1) for name, x2 in self.inputs.items()},
        )


class OuterProducts(Mapping[str, Tensor]):
    """Matrices of rank one by name, fp32 (N, K), computed from (N,) and (K,) at each access."""

    def __init__(self, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> None:
        self.rows, self.columns = rows, columns

    def __getitem__(self, name: str) -> Tensor:
        return torch.outer(self.rows[name], self.columns[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


SQUARES: dict[str, type[ExactSquares] | type[FactoredSquares]] = {
    "exact": ExactSquares,
    "factored": FactoredSquares,
}
"""Accumulators by the recipe's key ``fisher``."""
