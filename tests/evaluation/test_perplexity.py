"""Perplexity against a plain loop, and its pieces against definitions spelt out."""

import math

import pytest
import torch
from conftest import make_model
from torch import Tensor

from fgmp.evaluation.perplexity import (
    Losses,
    batches,
    divergence_of,
    evaluate,
    log_probabilities_of,
    loss_of,
    next_token_log_probabilities,
)


def test_perplexity_against_a_plain_loop(tokens: Tensor) -> None:
    model = make_model("llama").double()
    total, n = 0.0, 0
    for window in tokens:
        for position in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :position]).logits[0, -1]
            total -= logits.log_softmax(-1)[window[position]].item()
            n += 1
    losses = evaluate(make_model("llama"), tokens)
    assert losses.predicted_tokens == n == 8 * 23
    # fp32 against float64: each token's loss to about 1e-6.
    assert losses.nll == pytest.approx(total / n, rel=1e-5)
    assert losses.perplexity == pytest.approx(math.exp(total / n), rel=1e-4)
    assert losses.by_window.shape == (8,) and losses.by_window.dtype == torch.float64


def test_batches_hold_all_windows() -> None:
    windows = torch.arange(100).view(50, 2)
    assert [len(b) for b in batches(windows)] == [50]
    long = torch.zeros(5, 1500, dtype=torch.int64)
    assert [len(b) for b in batches(long)] == [2, 2, 1]
    assert [len(b) for b in batches(torch.zeros(2, 9000))] == [1, 1]


def test_loss_of_uniform_predictions_is_log_v() -> None:
    uniform_logits = torch.full((3, 5, 32), -math.log(32))
    losses = loss_of(uniform_logits, torch.zeros(3, 6, dtype=torch.int64))
    assert torch.allclose(losses, torch.full((3,), 5 * math.log(32)).double(), rtol=1e-6)


def test_losses_by_hand() -> None:
    """Three windows of four predictions: 24 nats over 12."""
    losses = Losses(torch.tensor([4.0, 8.0, 12.0], dtype=torch.float64), 4)
    assert losses.predicted_tokens == 12
    assert losses.nll == 2.0 and losses.perplexity == math.exp(2)


def test_probabilities_are_of_the_next_token(tokens: Tensor) -> None:
    """They sum to one, and position i has those for the token after it, from tokens up to it."""
    model = make_model("llama")
    predicted = next_token_log_probabilities(model, tokens)
    assert predicted.shape == (8, 23, 128) and predicted.dtype == torch.float32
    assert torch.allclose(predicted.exp().sum(-1), torch.ones(8, 23), rtol=1e-5)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % 128
    other = next_token_log_probabilities(model, changed)
    assert torch.allclose(other[:, :10], predicted[:, :10], atol=1e-5)
    assert not torch.allclose(other[:, 10:], predicted[:, 10:], atol=1e-3)
    assert not predicted.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_log_probabilities_in_fp32(dtype: torch.dtype) -> None:
    """Window by window is all at once, and narrow logits are widened before the logarithm."""
    logits = (10 * torch.randn(3, 5, 50, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = logits.float().log_softmax(-1)
    assert torch.equal(log_probabilities_of(logits), expected)


def test_divergence_by_its_definition() -> None:
    """Summed over positions, from the second argument: p log(p / q)."""
    generator = torch.Generator().manual_seed(1)
    q, p = (torch.randn(2, 3, 7, generator=generator).log_softmax(-1) for _ in range(2))
    expected = torch.nn.functional.kl_div(
        q.double(), p.double(), log_target=True, reduction="none"
    ).sum((1, 2))
    divergence = divergence_of(q, p)
    assert divergence.dtype == torch.float64
    assert torch.allclose(divergence, expected, rtol=1e-5)
    assert not torch.allclose(divergence_of(p, q), expected, rtol=1e-2)
    assert divergence_of(p, p).tolist() == [0, 0]


def test_evaluating_advances_once_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And leaves the model in evaluation mode: dropout would change every loss."""
    windows = torch.randint(128, (5, 8), generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr("fgmp.evaluation.perplexity._TOKENS_PER_BATCH", 16)
    model = make_model("gpt2").train()
    assert any(isinstance(m, torch.nn.Dropout) and m.p > 0 for m in model.modules())
    steps: list[int] = []
    first = evaluate(model, windows, lambda: steps.append(1))
    assert len(steps) == 3 == len(batches(windows)) and not model.training
    assert torch.equal(evaluate(model, windows).by_window, first.by_window)
