"""Losses of one sequence, for calibration.

A :data:`Loss` returns the *summed* loss of one sequence in nats and its number of predictions:
calibration squares gradients of sums (docs/numerics.md, section 8). The two losses here are for
causal language models of Transformers. Other modules can be quantized with a loss of their own.
"""

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.storage.fingerprint import bytes_of

Loss = Callable[[nn.Module, Any], tuple[Tensor, int]]
"""Loss function: (model, sequence) to (summed loss in nats, number of predictions)."""


def next_token_logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """Logits for all tokens but the first of a sequence, int64 (T,): fp32 (T - 1, V)."""
    tokens = tokens.to(next(model.parameters()).device)
    logits: Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0, :-1]
    return logits.float()


def causal_lm_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """Summed next-token loss of one sequence, int64 (T,), in nats; T - 1 predictions."""
    logits = next_token_logits(model, tokens)
    loss = nn.functional.cross_entropy(logits, tokens[1:].to(logits.device), reduction="sum")
    return loss, len(tokens) - 1


def sampled_label_loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
    """:func:`causal_lm_loss` with labels sampled from the model's own predictions.

    The mean of its squared gradients is the true Fisher information: the curvature of the KL
    divergence from the model. Labels of the text give the empirical Fisher information instead
    (arXiv 1905.12558). Sampling is seeded by the tokens, so equal sequences get equal labels.

    Returns:
        The summed loss of a sequence, int64 (T,), in nats, and T - 1 predictions.
    """
    logits = next_token_logits(model, tokens)
    seed = int.from_bytes(hashlib.sha256(bytes_of(tokens)).digest()[:7], "little")
    generator = torch.Generator(logits.device).manual_seed(seed)
    probabilities = logits.detach().softmax(-1)
    if probabilities.isnan().any():  # nothing can be sampled; the caller refuses a NaN loss
        return probabilities.sum(), len(probabilities)
    labels = probabilities.multinomial(1, generator=generator).squeeze(-1)
    del probabilities  # as large as the logits
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(labels)
