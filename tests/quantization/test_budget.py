"""Every budget is met, whatever it counts: bits, bytes, energy or perplexity.

The judges count by themselves: bytes of the tensors to save, pairs of formats block by block, the
loss of the result.
"""

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from conftest import make_model
from small_runs import (
    POINTS,
    activation_blocks,
    likely_tokens,
    mean_loss,
    quantized,
    share,
    stored_bytes,
    weight_blocks,
)
from torch import Tensor, nn

import fgmp
from fgmp import InputError, Recipe
from fgmp.formats.activation import quantize as quantize_activation
from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware.inference import Work
from fgmp.hardware.relative_energy import percent_of_fp8
from fgmp.model.linear import mixed_linears
from fgmp.model.store import config_of
from fgmp.quantization.uniform import uniform


def test_a_budget_is_met_by_weights_and_activations_together(tokens: Tensor) -> None:
    model = quantized(tokens, bits=5.4)
    in_fp4, blocks = weight_blocks(model)
    mean = (in_fp4 / blocks + share(activation_blocks(model, "llama", tokens))) / 2
    assert mean == pytest.approx((8 - 5.4) / 3.5, abs=POINTS)
    for bits, mode in ((4.5, "fp4"), (8, "fp8")):
        model = quantized(tokens, bits=bits)
        assert {m.packed.mode for m in mixed_linears(model).values()} == {mode}


# Bytes.


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_has_at_most_max_bytes(family: str, tokens: Tensor) -> None:
    ends = [
        stored_bytes(quantized(tokens, family, fp4=fp4, compensate=False)) for fp4 in (1.0, 0.0)
    ]
    for part in (0.2, 0.61):
        limit = round(ends[0] + part * (ends[1] - ends[0]))
        model = quantized(tokens, family, max_bytes=limit, compensate=False)
        size = stored_bytes(model)
        assert size == config_of(model).result["tensor_bytes"]
        # One more block in FP8 would take 8 bytes, and its row counters if it is a weight's first.
        assert limit - 8 - 4 * 257 < size <= limit
    least = quantized(tokens, family, max_bytes=ends[0], compensate=False)
    assert {m.packed.mode for m in mixed_linears(least).values()} == {"fp4"}
    most = quantized(tokens, family, max_bytes=ends[1], compensate=False)
    assert {m.packed.mode for m in mixed_linears(most).values()} == {"fp8"}
    assert stored_bytes(least) == ends[0] and stored_bytes(most) == ends[1]
    message = rf"max_bytes must be at least {ends[0]:,}, .* FP8: {ends[1]:,}\), got {ends[0] - 1:,}"
    with pytest.raises(InputError, match=message):
        quantized(tokens, family, max_bytes=ends[0] - 1)
    message = r"max_bytes must be more than ([0-9,]+), and ([0-9,]+) is enough, .* got 1$"
    with pytest.raises(InputError, match=message) as refused:
        quantized(tokens, family, max_bytes=1)
    match = re.search(message, str(refused.value))
    below, enough = (int(number.replace(",", "")) for number in match.groups())
    assert below < ends[0] <= enough < 1.1 * ends[0]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(max_bytes=1000), "max_bytes must be more than"),
        (
            Recipe(max_energy=80, rule="difference", sensitivities="powers"),
            r"energies are known of .*, got difference, search, powers",
        ),
        (
            Recipe(max_energy=80, rule="truncated", scales="max", sensitivities="powers"),
            r"energies are known of .*, got truncated, max, powers",
        ),
    ],
)
def test_impossible_budgets_are_refused_before_calibration(
    recipe: Recipe, message: str, tokens: Tensor
) -> None:
    titles: list[str] = []

    def progress(title: str, steps: int) -> AbstractContextManager[Callable[[], None]]:
        titles.append(title)
        return nullcontext(lambda: None)

    with pytest.raises(InputError, match=message):
        fgmp.quantize(make_model("llama"), tokens, recipe, progress=progress)
    assert titles == []


def test_both_choices_of_scales_fit_max_bytes(tokens: Tensor) -> None:
    ends = [stored_bytes(quantized(tokens, fp4=fp4)) for fp4 in (1.0, 0.0)]
    limit = sum(ends) // 2
    model = quantized(tokens, max_bytes=limit, clip="auto")
    assert limit - 400 < stored_bytes(model) <= limit


# Energy.


@torch.no_grad()
def energy_percent(model: nn.Module, tokens: Tensor) -> float:
    """Energy of the formats in a packed model, every pair of blocks counted by itself."""
    original = make_model("llama")
    inputs: dict[str, Tensor] = {}
    for name in mixed_linears(model):

        def keep(_: nn.Module, args: tuple[Tensor], name: str = name) -> None:
            inputs[name] = args[0]

        original.get_submodule(name).register_forward_pre_hook(keep)
    original(input_ids=tokens)
    work = []
    for name, linear in mixed_linears(model).items():
        site = linear.input_site
        a = quantize_activation(inputs[name], site.record).is_fp8.flatten(0, -2)
        w = linear.packed.is_fp8()
        pairs = torch.stack([a[:, None].expand(-1, len(w), -1), w.expand(len(a), -1, -1)])
        mix = {
            (i, j): ((pairs[0] == i) & (pairs[1] == j)).double().mean().item()
            for i in (False, True)
            for j in (False, True)
        }
        work.append(Work(name, str(id(site)), linear.out_features, linear.in_features, mix))
    return percent_of_fp8(work, QuantizerConfig("benefit", "search", "e4m3"))


def test_matrix_products_take_at_most_max_energy(tokens: Tensor) -> None:
    bits = []
    for limit in (75.0, 90.0):
        model = quantized(tokens[:7], max_energy=limit, clip="on", compensate=False)
        budget = config_of(model).result["budget"]
        assert limit - 1 < budget["energy_percent"] <= limit
        # Without a held-out text it is counted on the last eighth of the calibration text.
        assert budget["energy_percent"] == pytest.approx(energy_percent(model, tokens[6:7]))
        bits.append(budget["bits"])
    assert bits[0] < bits[1]
    with pytest.raises(InputError, match=r"max_energy must be at least [67]\d\.\d%, .* got 30%"):
        quantized(tokens, max_energy=30)


# Perplexity.


def test_perplexity_rises_by_at_most_max_increase(tokens: Tensor) -> None:
    """On tokens that the model itself finds likely, so that noise can only make it worse."""
    likely = likely_tokens(tokens)
    calibration, held_out = likely[:5], likely[5:]
    base = uniform(make_model("llama"), quantized(calibration), "fp8")
    bits = []
    for bound in (3.0, 1.4, 0.4):
        lines: list[str] = []
        recipe = Recipe(max_increase=bound, clip="on", compensate=False)
        model = fgmp.quantize(
            make_model("llama"), calibration, recipe, held_out=held_out, report=lines.append
        )
        budget = config_of(model).result["budget"]
        shift = mean_loss(model, held_out) - mean_loss(base, held_out)
        assert budget["increase_percent"] == pytest.approx(100 * math.expm1(shift), abs=1e-6)
        assert budget["increase_percent"] <= bound
        assert budget["increase_low"] <= budget["increase_percent"] <= budget["increase_high"]
        assert any(line.startswith("held-out perplexity is ") for line in lines)
        bits.append(budget["bits"])
    assert 4.5 == bits[0] < bits[1] < bits[2] < 8
    # One step further it would have been too much.
    beyond = quantized(calibration, bits=bits[1] - 3.5 / 2**6, clip="on", compensate=False)
    assert mean_loss(beyond, held_out) - mean_loss(base, held_out) > math.log1p(0.014)
