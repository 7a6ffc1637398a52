"""Perplexity: the exponential of the mean next-token loss over non-overlapping windows.

A text is tokenized once and cut into windows of L tokens. Each window is a context of its own and
gives L - 1 predictions; the mean is over all predictions. Losses are stored per window, so that two
models can be compared window by window.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.model.select import output_head

_TOKENS_PER_BATCH = 4096
_LOGITS_BYTES_PER_BATCH = 2**29
"""A bound on a batch's fp32 logits. At a vocabulary of 151,936 it leaves one window of 512."""


@dataclass(frozen=True)
class Losses:
    """Losses of a model on windows.

    Attributes:
        by_window: summed loss per window in nats, float64 (B,).
        predictions: predictions per window.
    """

    by_window: Tensor
    predictions: int

    @property
    def predicted_tokens(self) -> int:
        """Number of predictions in all windows."""
        return self.predictions * len(self.by_window)

    @property
    def nll(self) -> float:
        """Mean loss per prediction in nats."""
        return float(self.by_window.sum()) / self.predicted_tokens

    @property
    def perplexity(self) -> float:
        """Exponential of the mean loss per prediction."""
        return math.exp(self.nll)


def vocabulary_size(model: nn.Module) -> int:
    """Number of logits per token; 0 if the model names no output head."""
    return int(getattr(output_head(model), "out_features", 0))


def batches(windows: Tensor, vocabulary: int = 0) -> tuple[Tensor, ...]:
    """Split windows (B, L) into batches of about 4,096 tokens.

    With a large vocabulary a batch has fewer, so that its fp32 logits take at most half a gigabyte
    or it is one window.
    """
    tokens = _TOKENS_PER_BATCH
    if vocabulary:
        tokens = min(tokens, _LOGITS_BYTES_PER_BATCH // (4 * vocabulary))
    return torch.split(windows, max(1, tokens // windows.shape[1]))


@torch.no_grad()
def logits_of(model: nn.Module, batch: Tensor, cache: Any = None) -> Tensor:
    """Logits (B, L, V) for windows, int64 (B, L), in the dtype of the model's passes.

    ``cache`` is a KV cache of Transformers, emptied first. Every token then attends to keys and
    values as the cache returns them, including its own.
    """
    device = next(model.parameters()).device
    state = {} if cache is None else {"past_key_values": cache}
    if cache is not None:
        cache.reset()
    logits: Tensor = model(input_ids=batch.to(device), use_cache=cache is not None, **state).logits
    return logits


def next_token_log_probabilities(model: nn.Module, batch: Tensor, cache: Any = None) -> Tensor:
    """Next-token log-probabilities for windows, int64 (B, L): fp32 (B, L - 1, V).

    ``cache`` is as for :func:`logits_of`.
    """
    return log_probabilities_of(logits_of(model, batch, cache)[:, :-1])


@torch.no_grad()
def log_probabilities_of(logits: Tensor) -> Tensor:
    """Log-probabilities, fp32 (B, T, V), of logits (B, T, V), without gradient.

    Windows are processed one by one, since all at once would take every step through main memory:
    0.3 s instead of 3.4 for bf16 logits of 16 windows of 255 tokens and a vocabulary of 49,152, one
    thread (AMD EPYC, 2026-11-29).
    """
    log_probabilities = torch.empty_like(logits, dtype=torch.float32)
    for window, out in zip(logits, log_probabilities, strict=True):
        torch.log_softmax(window, -1, dtype=torch.float32, out=out)
    return log_probabilities


def loss_of(log_probabilities: Tensor, batch: Tensor) -> Tensor:
    """Summed loss per window in nats, float64 (B,), for windows ``batch``, int64 (B, L)."""
    targets = batch[:, 1:, None].to(log_probabilities.device)
    return -log_probabilities.gather(-1, targets).double().sum((1, 2)).cpu()


def divergence_of(log_probabilities: Tensor, reference: Tensor) -> Tensor:
    """Summed KL divergence per window from ``reference``, in nats, float64 (B,).

    Both arguments are log-probabilities (B, T, V). Windows are processed one by one, as in
    :func:`log_probabilities_of` (0.8 s instead of 4.7).
    """
    pairs = zip(log_probabilities, reference, strict=True)
    return torch.stack([(r.exp() * (r - p)).double().sum() for p, r in pairs]).cpu()


def evaluate(
    model: nn.Module,
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
    cache: Any = None,
) -> Losses:
    """Evaluate a causal LM on windows.

    Args:
        model: the causal LM; put into evaluation mode.
        windows: int64 (B, L).
        advance: called after each batch.
        cache: KV cache, as in :func:`next_token_log_probabilities`; it contains the last batch
            afterwards.
    """
    model.eval()
    losses = []
    for batch in batches(windows, vocabulary_size(model)):
        losses.append(loss_of(next_token_log_probabilities(model, batch, cache), batch))
        advance()
    return Losses(torch.cat(losses), windows.shape[1] - 1)
