"""Which result is nearer: by KL outright, by loss only beyond its noise, sequences in pairs."""

import math

import pytest
import torch
from conftest import make_model
from torch import nn

from fgmp.model.convert import Replacement
from fgmp.model.losses import causal_lm_loss
from fgmp.quantization.held_out import HeldOutMetrics, held_out_metrics

COUNTS = torch.full((50,), 10.0, dtype=torch.float64)


def trial(losses: torch.Tensor, kl: float | None = None, original: float = 0.0) -> HeldOutMetrics:
    counts = COUNTS[: len(losses)]
    return HeldOutMetrics(losses.double(), counts, torch.full_like(counts, original), kl)


def test_the_nearer_loss_is_better_beyond_two_standard_errors() -> None:
    """Whichever side of the original's it lies on: a loss may be anything."""
    g = torch.Generator().manual_seed(0)
    far = torch.rand(50, generator=g) + 4
    noise = torch.randn(50, generator=g)
    noise = (noise - noise.mean()) / noise.std()
    error = 1 / math.sqrt(50)  # of the mean of the squares
    for shift, clear in ((2.1, True), (1.9, False), (-1.0, False)):
        near = (far.square() - noise - shift * error).sqrt()
        for sign in (1, -1):
            assert trial(sign * near).clearly_better(trial(far)) == clear
    assert trial(near).selection_metric == pytest.approx(
        float(near.double().square().mean().sqrt()) / 10
    )
    assert not trial(far[:1] / 9).clearly_better(trial(far[:1]))  # one sequence says nothing


def test_a_kl_counts_outright() -> None:
    base = torch.ones(50)
    assert trial(base + 9, kl=0.1).clearly_better(trial(base, kl=0.2))
    assert not trial(base - 9, kl=0.2).clearly_better(trial(base, kl=0.2))


def test_increase_is_of_perplexity() -> None:
    base = torch.full((50,), 20.0)
    shift = torch.tensor([0.1, 0.3]).repeat(25)
    worse = trial(base + shift)
    assert worse.increase_percent(trial(base)) == pytest.approx(100 * math.expm1(0.02))
    low, high = worse.increase_interval(trial(base))
    error = shift.double().std().item() / math.sqrt(50) / 10
    assert (low, high) == pytest.approx(
        [100 * math.expm1(0.02 + sign * 2 * error) for sign in (-1, 1)], rel=1e-5
    )


def test_the_original_is_back_after_an_error(tokens: torch.Tensor) -> None:
    model = make_model("llama")
    name = "model.layers.0.mlp.up_proj"
    old = model.get_submodule(name)
    with pytest.raises(RuntimeError):
        held_out_metrics(
            model, {"bad": Replacement({name: nn.Linear(7, 7)})}, tokens, causal_lm_loss
        )
    assert model.get_submodule(name) is old
