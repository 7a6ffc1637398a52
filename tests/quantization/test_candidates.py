"""Candidates are measured as the models they would be, and the nearest to the original is taken."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import make_model
from small_runs import likely_tokens, quantized, same_state
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.assign.weights import pack_weights
from fgmp.model.linear import mixed_linears
from fgmp.model.losses import causal_lm_loss
from fgmp.model.store import config_of
from fgmp.quantization import candidates
from fgmp.quantization.candidates import Choice, Decision, Tuning, best_of
from fgmp.quantization.held_out import HeldOutMetrics
from fgmp.quantization.install import Assignment
from fgmp.quantization.task import BudgetResult
from fgmp.quantization.uniform import uniform

# The choice by measurements.


def trial(loss: float, kl: float) -> HeldOutMetrics:
    losses = torch.full((4,), loss, dtype=torch.float64)
    return HeldOutMetrics(losses, torch.ones(4, dtype=torch.float64), losses, kl)


def test_the_first_stays_unless_another_is_better() -> None:
    measured = {"on": trial(2.0, 0.2), "off": trial(2.0, 0.2), "nvfp4": trial(2.0, 0.1)}
    assert best_of(measured, ["on", "off"], None, None) == "on"
    assert best_of(measured, ["off", "on"], None, None) == "off"
    assert best_of(measured, ["on", "nvfp4", "off"], None, None) == "nvfp4"
    assert best_of({}, ["on"], None, None) == "on"  # a single candidate is not measured


def test_candidates_within_the_bound_come_first() -> None:
    """Also before one that is nearer to the original; beyond it, the nearest counts again."""
    measured = {"on": trial(2.1, 0.1), "off": trial(2.004, 0.3), "nvfp4": trial(2.003, 0.2)}
    fp8 = trial(2.0, 0.05)
    names = list(measured)
    assert best_of(measured, names, fp8, 0.5) == "nvfp4"
    assert best_of(measured, ["on", "off"], fp8, 0.5) == "off"
    assert best_of(measured, ["off", "on"], fp8, 0.1) == "on"
    assert best_of(measured, names, None, 0.5) == best_of(measured, names, fp8, None) == "on"


def test_a_choice_is_stored_as_plain_types() -> None:
    assignment = Assignment({}, None, {})  # type: ignore[arg-type]
    clip = Decision(True, {"on": 2.0, "off": 2.1}, {"on": 0.1, "off": 0.2})
    choice = Choice(assignment, clip, Decision(None), BudgetResult(bits=5.5))
    decisions = choice.to_dict()
    assert decisions == json.loads(json.dumps(decisions))
    assert decisions == {
        "clip": {
            "used": True,
            "held_out_nll": {"on": 2.0, "off": 2.1},
            "held_out_kl": {"on": 0.1, "off": 0.2},
        },
        "uniform": {"used": None, "held_out_nll": {}, "held_out_kl": {}},
        "budget": {"bits": 5.5},
    }
    tuned = replace(choice, tune=Tuning(False, {"without": 0.1, "with": 0.2}))
    tune = {"used": False, "held_out_kl": {"without": 0.1, "with": 0.2}}
    assert tuned.to_dict() == {**decisions, "tune": tune}


# The choice of scales.


@pytest.mark.parametrize("favoured", ["on", "off"])
def test_auto_keeps_the_lower_held_out_loss(favoured: str, tokens: Tensor) -> None:
    """Whichever it is; the loss is rigged on top of what is measured."""
    packed = {
        clip: mixed_linears(quantized(tokens[:6], clip=clip, fp4=0.9, labels="text"))
        for clip in ("on", "off")
    }
    key = next(iter(packed["on"]))
    assert not torch.equal(packed["on"][key].weight, packed["off"][key].weight)
    calls: list[str] = []

    def rigged(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        loss, predictions = causal_lm_loss(model, sample)
        now = mixed_linears(model).get(key)
        if now is not None:
            clip = "on" if torch.equal(now.weight, packed["on"][key].weight) else "off"
            calls.append(clip)
            loss = loss + (0 if clip == favoured else 100)
        return loss, predictions

    model = fgmp.quantize(
        make_model("llama"), tokens[:6], Recipe(fp4=0.9), loss=rigged, held_out=tokens[6:]
    )
    clip = config_of(model).result["clip"]
    assert clip["used"] == (favoured == "on")
    losses = clip["held_out_nll"]
    assert sorted(losses) == ["off", "on"] and min(losses, key=losses.get) == favoured
    # All NVFP4, which is checked beside them, has scales that were not searched either.
    assert sorted(calls) == ["off"] * 4 + ["on"] * 2
    for name, linear in mixed_linears(model).items():
        assert torch.equal(linear.weight, packed[favoured][name].weight)


def test_auto_measures_the_model_it_would_be(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens[:6], Recipe(fp4=0.9), held_out=tokens[6:])
    losses = config_of(model).result["clip"]["held_out_nll"]
    for clip in ("on", "off"):
        other = quantized(tokens[:6], clip=clip, fp4=0.9)
        with torch.no_grad():
            total = sum(causal_lm_loss(other, t)[0].item() for t in tokens[6:])
        assert losses[clip] == pytest.approx(total / (2 * 23), rel=1e-12)


# Never worse than a uniform format.


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Mixed weights have their rows in reverse order: nothing else makes our blocks bad."""

    def reversed_rows(weights: dict[str, Tensor], *args: Any, **options: Any) -> dict[str, Any]:
        return pack_weights({n: w.flip(0) for n, w in weights.items()}, *args, **options)

    monkeypatch.setattr(candidates, "pack_weights", reversed_rows)
    return monkeypatch


def test_a_uniform_format_that_is_nearer_is_returned(
    tokens: Tensor, spoilt: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(clip="off"), report=lines.append)
    assert any("all NVFP4 was closer to the original on held-out text" in line for line in lines)
    result = config_of(model).result
    assert result["uniform"]["used"] == "nvfp4" and result["fp4_weights"] == 1
    spoilt.undo()
    good = quantized(tokens)
    assert config_of(good).result["uniform"]["used"] is None
    kl = config_of(good).result["uniform"]["held_out_kl"]
    assert set(kl) == {"off", "nvfp4"} and kl["off"] < kl["nvfp4"]
    assert same_state(model, uniform(make_model("llama"), good, "nvfp4"))


def test_all_fp8_is_a_choice_where_a_mix_takes_as_much(tokens: Tensor) -> None:
    """With hardly any FP4 a weight has more than 8 bits: half of one is its block's scale byte."""
    for fp4, expected in ((0.02, {"off", "nvfp4", "fp8"}), (0.5, {"off", "nvfp4"})):
        model = quantized(tokens, fp4=fp4, compensate=False)
        assert set(config_of(model).result["uniform"]["held_out_kl"]) == expected
    assert config_of(quantized(tokens, policy="random")).result["uniform"]["held_out_kl"] == {}


def test_all_fp8_is_a_choice_under_a_budget_that_holds_it(tokens: Tensor) -> None:
    """A mean of 7.9 bits is more than 8 where files count, and so is room for all FP8."""
    plenty = {"bits": 7.9}, {"max_bytes": 10**9}
    for budget, expected in (
        *((b, {"off", "nvfp4", "fp8"}) for b in plenty),
        ({"bits": 6.0}, {"off", "nvfp4"}),
    ):
        model = quantized(tokens, compensate=False, **budget)
        assert set(config_of(model).result["uniform"]["held_out_kl"]) == expected


def test_a_bound_that_only_all_fp8_keeps_returns_it(
    tokens: Tensor, spoilt: pytest.MonkeyPatch
) -> None:
    """Wherever mixed blocks are too bad, there is still a model whose increase is 0."""
    likely = likely_tokens(tokens)  # two sequences of them are held out
    model = quantized(likely, max_increase=0.5, compensate=False)
    result = config_of(model).result
    assert result["uniform"]["used"] == "fp8" and result["fp4_weights"] == 0
    assert result["budget"]["bits"] == 8
    for key in ("increase_percent", "increase_low", "increase_high"):
        assert result["budget"][key] == 0
    kl = result["uniform"]["held_out_kl"]
    assert set(kl) == {"off", "nvfp4", "fp8"} and kl["off"] > 2 * kl["nvfp4"]
    spoilt.undo()
    good = quantized(likely, max_increase=50, compensate=False)
    assert config_of(good).result["budget"]["bits"] < 8
    assert same_state(model, uniform(make_model("llama"), good, "fp8"))


def test_held_out_kl_is_that_of_the_predictions(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens[:5], Recipe(), held_out=tokens[5:])
    result = config_of(model).result
    with torch.no_grad():
        predicted, expected = (
            m(input_ids=tokens[5:]).logits[:, :-1].double().log_softmax(-1)
            for m in (model, make_model("llama"))
        )
    kl = (expected.exp() * (expected - predicted)).sum(-1).mean().item()
    used = "on" if result["clip"]["used"] else "off"
    assert result["clip"]["held_out_kl"][used] == pytest.approx(kl, rel=1e-3)
    assert result["clip"]["held_out_kl"][used] == min(result["clip"]["held_out_kl"].values())
