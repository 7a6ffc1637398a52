"""Which way of quantizing a model is nearest to the original, on text that was held out.

All candidates see the same sequences side by side with the original. Of a causal language model
the measure is the mean KL of a candidate's predictions from the original's: it does not see
whether a wrong prediction happened to be lucky, and so tells candidates apart on far less text
than the loss does. Of any other model there is only the loss, and then a difference counts where
it exceeds two of its standard errors.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.model.convert import put
from fgmp.sensitivity.fisher import Loss, causal_lm_loss, frozen, next_token_logits

_CLEAR = 2.0
"""Standard errors."""


@dataclass(frozen=True)
class Trial:
    """What held-out sequences said of one candidate.

    Attributes:
        losses: summed loss of each sequence in nats, float64 (B,).
        predictions: in each sequence, float64 (B,).
        kl: mean KL from the original, nats a prediction; None where only a loss is known.
    """

    losses: Tensor
    predictions: Tensor
    kl: float | None

    @property
    def nll(self) -> float:
        """Mean loss, nats a prediction."""
        return float(self.losses.sum() / self.predictions.sum())

    @property
    def harm(self) -> float:
        """What the candidate with the least of it is chosen by."""
        return self.nll if self.kl is None else self.kl

    def clearly_better(self, other: "Trial") -> bool:
        """Less harm than ``other``, and by KL or by more than the loss is noisy."""
        if self.kl is not None and other.kl is not None:
            return self.kl < other.kl
        shift, error = self._shift(other)
        return shift + _CLEAR * error < 0

    def increase_percent(self, base: "Trial") -> float:
        """By how much perplexity exceeds that of ``base``."""
        return 100 * math.expm1(self._shift(base)[0])

    def increase_interval(self, base: "Trial") -> tuple[float, float]:
        """Two standard errors on either side of it, sequences compared in pairs."""
        shift, error = self._shift(base)
        low, high = (100 * math.expm1(shift + sign * _CLEAR * error) for sign in (-1, 1))
        return low, high

    def _shift(self, other: "Trial") -> tuple[float, float]:
        """Difference of the mean losses, and its standard error; that of one sequence is inf."""
        total = self.predictions.sum()
        difference = self.losses - other.losses
        shift = float(difference.sum() / total)
        if len(difference) < 2:
            return shift, math.inf
        residual = difference - shift * self.predictions
        count = len(difference)
        error = residual.square().sum().sqrt() * math.sqrt(count / (count - 1)) / total
        return shift, float(error)


@torch.no_grad()
def trials(
    model: nn.Module,
    original: Mapping[str, nn.Module],
    candidates: Mapping[str, Mapping[str, nn.Module]],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Trial]:
    """Measure candidates on sequences.

    Args:
        model: holds ``original``, and does so again afterwards.
        original: modules by name.
        candidates: what takes their places, by the candidate's name.
        samples: sequences, each given to ``loss`` as it is.
        loss: KL is measured where this is ``causal_lm_loss``.
        advance: called after each sequence.
    """
    losses: dict[str, list[float]] = {name: [] for name in candidates}
    divergence = dict.fromkeys(candidates, 0.0)
    counts = []
    language = loss is causal_lm_loss
    with frozen(model):
        try:
            for sample in samples:
                reference = _log_probabilities(model, sample) if language else None
                for name, modules in candidates.items():
                    put(model, modules)
                    if reference is None:
                        value, count = loss(model, sample)
                    else:
                        own = _log_probabilities(model, sample)
                        targets = sample[1:].to(own.device)
                        value = nn.functional.nll_loss(own, targets, reduction="sum")
                        count = len(targets)
                        terms = nn.functional.kl_div(
                            own, reference, reduction="none", log_target=True
                        )
                        divergence[name] += float(terms.sum(dtype=torch.float64))
                    losses[name].append(float(value))
                put(model, original)
                counts.append(count)
                advance()
        finally:
            put(model, original)
    predictions = torch.tensor(counts, dtype=torch.float64)
    total = float(predictions.sum())
    return {
        name: Trial(
            torch.tensor(values, dtype=torch.float64),
            predictions,
            divergence[name] / total if language else None,
        )
        for name, values in losses.items()
    }


def _log_probabilities(model: nn.Module, tokens: Tensor) -> Tensor:
    return next_token_logits(model, tokens).log_softmax(-1)
