"""The selection metric: how far a candidate is from the original on held-out text.

All candidates run on the same sequences as the original. For a causal language model the metric is
the mean KL divergence of a candidate's predictions from the original's. It needs far less text than
the loss to separate candidates, because it does not depend on the labels of the text.

For any other model only the loss is known. A lower loss is not necessarily better: the metric is
the distance of a candidate's loss from the original's, sequence by sequence. One candidate is
clearly better if the difference exceeds two standard errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.model.convert import Replacement
from fgmp.model.losses import Loss, causal_lm_loss, next_token_logits
from fgmp.model.observe import frozen

_CLEAR = 2.0
"""Standard errors by which one candidate must beat another."""
_ROWS = 64
"""Predictions whose KL is computed at a time."""


@dataclass(frozen=True)
class HeldOutMetrics:
    """Metrics of one candidate on the held-out sequences.

    Attributes:
        losses: summed loss of each sequence in nats, float64 (B,).
        predictions: number of predictions in each sequence, float64 (B,).
        original: the original's losses, float64 (B,).
        kl: mean KL from the original, nats per prediction; None if only a loss is known.
    """

    losses: Tensor
    predictions: Tensor
    original: Tensor
    kl: float | None = None

    @property
    def nll(self) -> float:
        """Mean loss, nats per prediction."""
        return float(self.losses.sum() / self.predictions.sum())

    @property
    def selection_metric(self) -> float:
        """Selection metric; lower is better.

        KL, or the root mean square distance of a sequence's mean loss from the original's.
        """
        return float(self._squares.mean().sqrt()) if self.kl is None else self.kl

    @property
    def _squares(self) -> Tensor:
        """Squared distance of each sequence's mean loss from the original's."""
        return ((self.losses - self.original) / self.predictions).square()

    def clearly_better(self, other: "HeldOutMetrics") -> bool:
        """Whether the metric is lower than ``other``'s: in KL, or by over two standard errors."""
        if self.kl is not None and other.kl is not None:
            return self.kl < other.kl
        gain = other._squares - self._squares
        if len(gain) < 2:
            return False
        return bool(gain.mean() > _CLEAR * gain.std() / math.sqrt(len(gain)))

    def increase_percent(self, base: "HeldOutMetrics") -> float:
        """Percent by which perplexity exceeds that of ``base``."""
        return 100 * math.expm1(self._shift(base)[0])

    def increase_interval(self, base: "HeldOutMetrics") -> tuple[float, float]:
        """:meth:`increase_percent` less and plus two standard errors, sequences paired."""
        shift, error = self._shift(base)
        low, high = (100 * math.expm1(shift + sign * _CLEAR * error) for sign in (-1, 1))
        return low, high

    def _shift(self, other: "HeldOutMetrics") -> tuple[float, float]:
        """Difference of mean losses and its standard error; needs two sequences or more."""
        total = self.predictions.sum()
        difference = self.losses - other.losses
        shift = float(difference.sum() / total)
        residual = difference - shift * self.predictions
        count = len(difference)
        error = residual.square().sum().sqrt() * math.sqrt(count / (count - 1)) / total
        return shift, float(error)


@torch.no_grad()
def held_out_metrics(
    model: nn.Module,
    candidates: Mapping[str, Replacement],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, HeldOutMetrics]:
    """Measure candidates on sequences.

    Args:
        model: the original; left as it was.
        candidates: replacements of its layers, by name.
        samples: sequences, each given to ``loss`` as it is.
        loss: KL is measured if this is ``causal_lm_loss``.
        advance: called after each sequence.
    """
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    divergence = dict.fromkeys(candidates, 0.0)
    counts: list[int] = []
    original: list[float] = []
    language = loss is causal_lm_loss
    with frozen(model):
        for sample in samples:
            reference = _log_probabilities(model, sample) if language else None
            original.append(_loss_of(model, sample, loss, reference)[0])
            for name, replacement in candidates.items():
                with replacement.within(model):
                    own = None if reference is None else _log_probabilities(model, sample)
                    value, count = _loss_of(model, sample, loss, own)
                losses[name].append(value)
                if own is not None and reference is not None:
                    divergence[name] += _divergence(own, reference)
            counts.append(count)
            advance()
    predictions = torch.tensor(counts, dtype=torch.float64)
    total = float(predictions.sum())
    return {
        name: HeldOutMetrics(
            torch.tensor(values, dtype=torch.float64),
            predictions,
            torch.tensor(original, dtype=torch.float64),
            divergence[name] / total if language else None,
        )
        for name, values in losses.items()
    }


def _loss_of(
    model: nn.Module, sample: Any, loss: Loss, log_probabilities: Tensor | None
) -> tuple[float, int]:
    """Summed loss and number of predictions of a sequence.

    ``log_probabilities`` are a language model's, where they are known already.
    """
    if log_probabilities is None:
        value, count = loss(model, sample)
        return float(value), count
    targets = sample[1:].to(log_probabilities.device)
    return float(nn.functional.nll_loss(log_probabilities, targets, reduction="sum")), len(targets)


def _divergence(own: Tensor, reference: Tensor) -> float:
    """Summed KL in nats of log-probabilities (T, V), some rows at a time to save memory."""
    return sum(
        float(
            nn.functional.kl_div(o, w, reduction="none", log_target=True).sum(dtype=torch.float64)
        )
        for o, w in zip(own.split(_ROWS), reference.split(_ROWS), strict=True)
    )


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    return next_token_logits(model, tokens).log_softmax(-1)
