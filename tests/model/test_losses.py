"""Losses of one sequence, against their definitions."""

import math

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

from fgmp.model.losses import causal_lm_loss, next_token_logits, sampled_label_loss


class Biased(nn.Module):
    """Predicts the same distribution at every position, of tokens 0 and 1."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(logit))

    def forward(self, input_ids: Tensor, use_cache: bool) -> object:
        assert not use_cache
        zeros = torch.zeros_like(input_ids, dtype=torch.float32)
        logits = torch.stack([zeros, zeros + self.logit], -1)
        return type("Output", (), {"logits": logits})


def test_the_loss_is_summed_over_predictions(tokens: Tensor) -> None:
    """Not their mean, and the first token is not predicted."""
    model = make_model("llama")
    loss, predictions = causal_lm_loss(model, tokens[0])
    assert predictions == 23
    logits = model(input_ids=tokens[:1]).logits[0].double()
    expected = -sum(logits[i].log_softmax(-1)[tokens[0, i + 1]] for i in range(23))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_logits_are_fp32(tokens: Tensor) -> None:
    model = make_model("llama").bfloat16()
    logits = next_token_logits(model, tokens[0])
    assert logits.dtype == torch.float32 and logits.shape == (23, 128)


def test_sampled_labels_follow_the_model() -> None:
    """Token 1 has probability 0.8: its share of 2,000 labels lies within 5 standard errors."""
    tokens = torch.arange(2001) % 2
    logit = math.log(4.0)
    loss, predictions = sampled_label_loss(Biased(logit), tokens)
    assert predictions == 2000
    low, high = -math.log(0.2), -math.log(0.8)
    share = (low - loss.item() / 2000) / (low - high)
    assert share == pytest.approx(0.8, abs=5 * math.sqrt(0.8 * 0.2 / 2000))
    # The text has half of each, whatever the model thinks.
    assert causal_lm_loss(Biased(logit), tokens)[0].item() == pytest.approx(1000 * (low + high))


def test_equal_sequences_get_equal_labels(tokens: Tensor) -> None:
    """Sampling depends on the tokens alone: not on order, and not on the global generator."""
    model = make_model("llama")
    first = [sampled_label_loss(model, t)[0].item() for t in tokens[:3]]
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    again = [sampled_label_loss(model, t)[0].item() for t in tokens[:3].flip(0)]
    assert again[::-1] == first and len(set(first)) == 3
    assert torch.equal(torch.random.get_rng_state(), state)


def test_gradients_of_sampled_labels_are_centred() -> None:
    """The mean gradient of log p under p is zero; that is what makes it Fisher information."""
    model = Biased(math.log(4.0))
    sums = 0.0
    for seed in range(20):
        tokens = torch.randint(2, (401,), generator=torch.Generator().manual_seed(seed))
        loss, _ = sampled_label_loss(model, tokens)
        (gradient,) = torch.autograd.grad(loss, model.logit)
        sums += gradient.item()
    # One prediction's gradient is p - label, of variance p (1 - p).
    assert abs(sums) < 5 * math.sqrt(8000 * 0.8 * 0.2)


def test_nothing_is_sampled_of_nan(tokens: Tensor) -> None:
    """The caller names the sequence; an exception of the sampler would not."""
    loss, predictions = sampled_label_loss(Biased(float("nan")), tokens[0] % 2)
    assert loss.isnan() and predictions == 23
