"""Which way of quantizing a model is nearest to the original, on text that was held out.

All candidates see the same sequences side by side with the original. Of a causal language model
the measure is the mean KL of a candidate's predictions from the original's: it does not see
whether a wrong prediction happened to be lucky, and so tells candidates apart on far less text
than the loss does. Of any other model there is only the loss. A loss need not be a merit, and a
lower one no better model: what counts is how far it is from the original's, sequence by sequence,
and a difference counts where it exceeds two of its standard errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.model.convert import Replacement
from fgmp.sensitivity.fisher import Loss, causal_lm_loss, frozen, next_token_logits

_CLEAR = 2.0
"""Standard errors."""
_ROWS = 64
"""Predictions whose KL is formed at a time."""


@dataclass(frozen=True)
class Trial:
    """What held-out sequences said of one candidate.

    Attributes:
        losses: summed loss of each sequence in nats, float64 (B,).
        predictions: in each sequence, float64 (B,).
        original: the original's losses.
        kl: mean KL from the original, nats a prediction; None where only a loss is known.
    """

    losses: Tensor
    predictions: Tensor
    original: Tensor
    kl: float | None = None

    @property
    def nll(self) -> float:
        """Mean loss, nats a prediction."""
        return float(self.losses.sum() / self.predictions.sum())

    @property
    def harm(self) -> float:
        """What the candidate with the least of it is chosen by: KL, or the root of the mean squared
        distance of a sequence's loss from the original's, a prediction."""
        return float(self._squares.mean().sqrt()) if self.kl is None else self.kl

    @property
    def _squares(self) -> Tensor:
        """Squared distance of each sequence's mean loss from the original's."""
        return ((self.losses - self.original) / self.predictions).square()

    def clearly_better(self, other: "Trial") -> bool:
        """Less harm than ``other``, and by KL or by more than the distance is noisy."""
        if self.kl is not None and other.kl is not None:
            return self.kl < other.kl
        nearer = other._squares - self._squares
        if len(nearer) < 2:
            return False
        return bool(nearer.mean() > _CLEAR * nearer.std() / math.sqrt(len(nearer)))

    def increase_percent(self, base: "Trial") -> float:
        """By how much perplexity exceeds that of ``base``."""
        return 100 * math.expm1(self._shift(base)[0])

    def increase_interval(self, base: "Trial") -> tuple[float, float]:
        """Two standard errors on either side of it, sequences compared in pairs."""
        shift, error = self._shift(base)
        low, high = (100 * math.expm1(shift + sign * _CLEAR * error) for sign in (-1, 1))
        return low, high

    def _shift(self, other: "Trial") -> tuple[float, float]:
        """Difference of the mean losses, and its standard error; of two sequences or more."""
        total = self.predictions.sum()
        difference = self.losses - other.losses
        shift = float(difference.sum() / total)
        residual = difference - shift * self.predictions
        count = len(difference)
        error = residual.square().sum().sqrt() * math.sqrt(count / (count - 1)) / total
        return shift, float(error)


@torch.no_grad()
def trials(
    model: nn.Module,
    candidates: Mapping[str, Replacement],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Trial]:
    """Measure candidates on sequences.

    Args:
        model: the original, and so again afterwards.
        candidates: what it becomes for a while, by name.
        samples: sequences, each given to ``loss`` as it is.
        loss: KL is measured where this is ``causal_lm_loss``.
        advance: called after each sequence.
    """
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    divergence = dict.fromkeys(candidates, 0.0)
    counts: list[int] = []
    wanted: list[float] = []
    language = loss is causal_lm_loss
    with frozen(model):
        for sample in samples:
            reference = _log_probabilities(model, sample) if language else None
            wanted.append(_loss_of(model, sample, loss, reference)[0])
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
        name: Trial(
            torch.tensor(values, dtype=torch.float64),
            predictions,
            torch.tensor(wanted, dtype=torch.float64),
            divergence[name] / total if language else None,
        )
        for name, values in losses.items()
    }


def _loss_of(
    model: nn.Module, sample: Any, loss: Loss, log_probabilities: Tensor | None
) -> tuple[float, int]:
    """Summed loss and predictions of a sequence; of a language model's, known log-probabilities."""
    if log_probabilities is None:
        value, count = loss(model, sample)
        return float(value), count
    targets = sample[1:].to(log_probabilities.device)
    return float(nn.functional.nll_loss(log_probabilities, targets, reduction="sum")), len(targets)


def _divergence(own: Tensor, wanted: Tensor) -> float:
    """Summed KL in nats of log-probabilities (T, V); some rows at a time, as they are large."""
    return sum(
        float(
            nn.functional.kl_div(o, w, reduction="none", log_target=True).sum(dtype=torch.float64)
        )
        for o, w in zip(own.split(_ROWS), wanted.split(_ROWS), strict=True)
    )


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    return next_token_logits(model, tokens).log_softmax(-1)
