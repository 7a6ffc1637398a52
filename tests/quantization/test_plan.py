"""Predictions from a configuration alone: those of the run itself, where no weight matters."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import FAMILIES, make_model
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fgmp import InputError, Recipe, quantize
from fgmp.model.store import config_of
from fgmp.quantization import memory
from fgmp.quantization.duration import DurationEstimate
from fgmp.quantization.memory import MemoryEstimate
from fgmp.quantization.pipeline import prepare
from fgmp.quantization.plan import (
    Prediction,
    first_fit,
    ladder,
    parsed_size,
    parsed_time,
    predict,
    profile_of,
)


def planned(family: str, recipe: Recipe, held_out: int = 2) -> Prediction:
    with FakeTensorMode():
        profile = profile_of(AutoModelForCausalLM.from_config(FAMILIES[family]()), recipe)
        return predict(profile, recipe, 64, held_out)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"fisher": "factored", "clip": "on"}, {"bits": 6.0}])
def test_memory_is_that_of_the_run(family: str, options: dict[str, object], tokens: Tensor) -> None:
    recipe = Recipe(samples=6, seq_len=24, **options)
    run = prepare(make_model(family), tokens[:6], recipe, held_out=tokens[6:]).memory
    plan = planned(family, recipe).memory
    for part in ("fisher", "packed", "compensation", "scoring", "logits", "tuning"):
        assert getattr(plan, part) == pytest.approx(getattr(run, part), abs=64), part
    # Fake passes make an explicit attention mask, which is large beside tensors this small.
    assert 0.8 * run.working < plan.working < 1.6 * run.working


def test_weights_are_held_beside_the_process() -> None:
    held = planned("llama", Recipe(samples=2, seq_len=24)).memory.held
    model = make_model("llama")
    weights = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert held == pytest.approx(memory.held_bytes(torch.device("cpu")) + weights, rel=0.05)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize(
    "options",
    [{"policy": p} for p in ("random", "fp8", "nvfp4")] + [{"policy": "random", "fp4": 0.2}],
)
def test_bytes_are_those_of_the_checkpoint(
    family: str, options: dict[str, object], tokens: Tensor
) -> None:
    recipe = Recipe(samples=6, seq_len=24, clip="on", compensate=False, **options)
    model = quantize(make_model(family), tokens, recipe)
    result = config_of(model).result
    plan = planned(family, recipe)
    # The plan gives every linear a site of its own; a random share of FP8 is off by a few blocks.
    assert 0.999 * result["tensor_bytes"] < plan.checkpoint_bytes < 1.03 * result["tensor_bytes"]
    # At random, each weight gets about the same share of FP8 blocks.
    assert plan.bits_per_weight == pytest.approx(result["bits_per_weight"], rel=0.01)


def test_budgets() -> None:
    half = planned("llama", Recipe(bits=6.25))
    assert half.bits_per_weight == pytest.approx(planned("llama", Recipe(fp4=0.5)).bits_per_weight)
    all_fp8 = planned("llama", Recipe(policy="fp8"))
    unknown = planned("llama", Recipe(max_increase=1.0))
    assert unknown.bits_per_weight is None
    assert unknown.checkpoint_bytes == all_fp8.checkpoint_bytes
    limited = planned("llama", Recipe(max_bytes=all_fp8.checkpoint_bytes - 1))
    assert limited.checkpoint_bytes == all_fp8.checkpoint_bytes - 1


def test_time_is_operations_at_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    module = "fgmp.quantization.plan._seconds_per_operation"
    monkeypatch.setattr(module, lambda shapes, dtype: 1e-9)
    recipe = Recipe(samples=4, seq_len=32, compensate=False, clip="on")
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(FAMILIES["opt"]())
        profile = profile_of(model, recipe)
        duration = predict(profile, recipe, 64, 1).duration
    weights = sum(n * k for n, k in profile.shapes)
    assert profile.forward == 2 * weights
    # There and back, and the head of 64 by 128 too.
    assert profile.both == 2 * (2 * weights + 2 * 64 * 128)
    assert duration.calibration == pytest.approx(4 * 32 * profile.both * 1e-9)
    # Scoring 1.1 passes of 4 sequences, 4 checks of one, and 0.2 microseconds per weight.
    passes = (4 * 1.1 + 4) * 32 * profile.forward * 1e-9
    assert duration.rest == pytest.approx(passes + weights * 2e-7)


def test_sequences_are_capped_at_the_context() -> None:
    assert planned("llama", Recipe(seq_len=512)).recipe.seq_len == 64


def test_a_model_that_depends_on_values_is_refused() -> None:
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(FAMILIES["llama"]())
        forward = model.lm_head.forward
        model.lm_head.forward = lambda x: forward(x) if x.sum() > 0 else x
        with pytest.raises(InputError, match="its passes cannot be followed without weights"):
            profile_of(model, Recipe())


def test_partial_results(tokens: Tensor) -> None:
    """Sums, scores, histograms and packed weights, and the largest of them twice."""
    recipe = Recipe(clip="on", fisher="exact", compensate=False)
    with FakeTensorMode():
        profile = profile_of(AutoModelForCausalLM.from_config(FAMILIES["llama"]()), recipe)
        plain, compensated, factored, both = (
            predict(profile, replace(recipe, **options), 64, 1)
            for options in ({}, {"compensate": True}, {"fisher": "factored"}, {"clip": "auto"})
        )
    weights, blocks = profile.quantized_parameters, sum(n * -(-k // 16) for n, k in profile.shapes)
    histograms = 2**16 * 8 * len(profile.linears)
    assert plain.resume_bytes == 4 * weights + 9 * blocks + 2 * histograms
    packed = compensated.bits_per_weight * weights / 8
    assert compensated.resume_bytes - plain.resume_bytes == pytest.approx(packed)
    assert both.resume_bytes - plain.resume_bytes == 9 * blocks
    sums = 4 * sum(n + k for n, k in profile.shapes)
    assert plain.resume_bytes - factored.resume_bytes == 4 * weights - sums


# Limits.


def costs(memory: Callable[[Recipe], int], seconds: Callable[[Recipe], float]) -> object:
    """A prediction function with these costs."""

    def predicted(recipe: Recipe) -> Prediction:
        held = MemoryEstimate(held=memory(recipe), fisher=0, packed=0, working=0)
        return Prediction(recipe, "float32", held, DurationEstimate(0, seconds(recipe)), 0, 0, 5.7)

    return predicted


def test_the_order_of_changes() -> None:
    assert list(ladder(Recipe(tune=3, samples=100))) == [
        *({"fisher": "factored"}, {"clip": "on"}, {"tune": 0}, {"samples": 50}),
        *({"seq_len": 256}, {"seq_len": 128}, {"compensate": False}),
    ]
    small = Recipe(fisher="factored", clip="off", samples=40, seq_len=200, compensate=False)
    assert list(ladder(small)) == []


def test_only_the_changes_that_are_needed() -> None:
    predicted = costs(lambda r: 100 if r.fisher == "exact" else 20, lambda r: float(r.samples))
    changes, prediction = first_fit(predicted, Recipe(), 50, None)
    assert changes == {"fisher": "factored"} and prediction.recipe == Recipe(fisher="factored")
    assert first_fit(predicted, Recipe(), None, 130)[0] == {"samples": 128}
    assert first_fit(predicted, Recipe(), 50, 130)[0] == {"fisher": "factored", "samples": 128}
    assert first_fit(predicted, Recipe(), 19, None) is None
    assert first_fit(predicted, Recipe(), None, 31) is None
    last = costs(lambda r: 9 if r.compensate else 5, lambda r: 0.0)
    assert first_fit(last, Recipe(), 5, None)[0] == {"compensate": False}


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 * 10**9), ("1.5G", 1500000000), ("500MB", 5 * 10**8), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parsed_size(text) == size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("45min", 2700), ("3h", 10800), ("1.5 h", 5400), ("2d", 172800)],
)
def test_times(text: str, seconds: float) -> None:
    assert parsed_time(text) == seconds


@pytest.mark.parametrize("text", ["", "8X", "-1G", "0", "G", "1e9"])
def test_malformed_sizes(text: str) -> None:
    with pytest.raises(InputError, match="memory must be a size such as 500M or 8G, got"):
        parsed_size(text)


@pytest.mark.parametrize("text", ["", "3", "h", "-1h", "0s", "3 weeks"])
def test_malformed_times(text: str) -> None:
    with pytest.raises(InputError, match="time must be such as 90s, 45min, 3h or 2d, got"):
        parsed_time(text)
