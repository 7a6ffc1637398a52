"""The uniform twin: an exact allocation, by scores from their definition, within the bytes."""

import itertools
from dataclasses import replace

import pytest
import torch
from conftest import make_model
from small_runs import quantized
from torch import Tensor

from fgmp.assign.weights import group_scale
from fgmp.evaluation.compare import weight_bits
from fgmp.formats.activation import fake_quantize
from fgmp.formats.codec import decode_e4m3
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import quantize_weight
from fgmp.model.linear import mixed_linears, sites, weight_holders
from fgmp.model.observe import observed_inputs
from fgmp.model.select import linearize
from fgmp.quantization import twin as module
from fgmp.quantization.twin import allocate, best_subset, reason_against, site_gains, twin
from fgmp.quantization.uniform import Template, uniform

# The allocation.


def brute_force(gains: dict[str, float], costs: dict[str, int], room: int) -> float:
    """Largest sum of gains of any subset that fits."""
    subsets = itertools.chain.from_iterable(
        itertools.combinations(gains, size) for size in range(len(gains) + 1)
    )
    fitting = (s for s in subsets if sum(costs[name] for name in s) <= room)
    return max(sum(gains[name] for name in s) for s in fitting)


@pytest.mark.parametrize("seed", range(20))
def test_the_subset_is_the_best(seed: int) -> None:
    """Costs of few values, as layers have, and costs that have no common divisor."""
    g = torch.Generator().manual_seed(seed)
    names = [f"n{i}" for i in range(9)]
    gains = dict(zip(names, torch.randn(9, generator=g).add(0.5).tolist(), strict=True))
    values = [12, 30, 42] if seed % 2 else list(range(7, 60))
    picks = torch.randint(len(values), (9,), generator=g).tolist()
    costs = {name: values[i] for name, i in zip(names, picks, strict=True)}
    for room in (0, 11, 60, 100, sum(costs.values())):
        chosen = best_subset(gains, costs, room)
        assert sum(costs[name] for name in chosen) <= room
        assert sum(gains[n] for n in chosen) == pytest.approx(brute_force(gains, costs, room))
        assert all(gains[name] > 0 for name in chosen)


def test_costs_are_rounded_up_where_there_are_too_many_units(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MAX_CAPACITY", 10)
    gains, costs = {"a": 2.0, "b": 2.0, "c": 3.5}, {"a": 499, "b": 498, "c": 997}
    assert best_subset(gains, costs, 1000) == {"a", "b"}
    assert best_subset(gains, costs, 996) == {"a"} or best_subset(gains, costs, 996) == {"b"}


# The scores.


def test_gains_by_their_definition(tokens: Tensor) -> None:
    mixed = quantized(tokens)
    template, original = Template.of(mixed), make_model("llama")
    inputs: dict[str, Tensor] = {}
    with observed_inputs(original, template.linears_of, inputs.__setitem__), torch.no_grad():
        original(input_ids=tokens)
    gains = site_gains(original, template, tokens)
    assert gains.keys() == template.sites.keys()
    for owner, names in template.linears_of.items():
        site, x = template.sites[owner], inputs[owner]
        weights = [original.get_submodule(name).weight.detach() for name in names]
        t = group_scale(weights)
        error = {}
        for fp8, threshold in ((False, THRESHOLD_ALL_FP4), (True, THRESHOLD_ALL_FP8)):
            nearest = replace(site, threshold=threshold, rule="difference", scales="max")
            q = fake_quantize(x, nearest)[0].double() * site.t
            total = 0.0
            for w in weights:
                codes = quantize_weight(w, t)
                v = codes.units(torch.full_like(codes.scale, fp8).bool()).double() * t
                total += (q @ v.T - x.double() @ w.double().T).square().sum(-1).mean().item()
            error[fp8] = total
        f_x = (decode_e4m3(site.sensitivity).double() * site.gamma).sum().item()
        norm = sum(w.double().square().sum().item() for w in weights)
        expected = f_x / norm * (error[False] - error[True])
        assert gains[owner] == pytest.approx(expected, rel=1e-4)  # outputs are fp32


def test_only_the_first_tokens_are_scored(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    template = Template.of(quantized(tokens))
    monkeypatch.setattr(module, "_SCORED_TOKENS", 2 * tokens.shape[1])
    first = site_gains(make_model("llama"), template, tokens)
    assert first == site_gains(make_model("llama"), template, tokens[:2])
    assert first != site_gains(make_model("llama"), template, tokens[:1])


# The twin.


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
@pytest.mark.parametrize("fp4", [0.7, 0.95])
def test_the_twin_has_no_more_bytes(family: str, fp4: float, tokens: Tensor) -> None:
    mixed = quantized(tokens, family, fp4=fp4)
    template = Template.of(mixed)
    fp8 = allocate(make_model(family), template, tokens)
    model = twin(make_model(family), template, fp8)
    assert weight_bits(model) <= weight_bits(mixed)
    by_owner = {owner: owner in fp8 for owner in template.sites}
    for owner, site in sites(model).items():
        expected = THRESHOLD_ALL_FP8 if by_owner[owner] else THRESHOLD_ALL_FP4
        assert site.record.threshold == expected
        for name in template.linears_of[owner]:
            mode = mixed_linears(model)[name].packed.mode
            assert mode == ("fp8" if by_owner[owner] else "fp4")
    # One more site in FP8 would be too many bytes, or gain nothing.
    gains = site_gains(linearized(family), template, tokens)
    for owner in template.sites.keys() - fp8:
        more = twin(make_model(family), template, fp8 | {owner})
        assert gains[owner] <= 0 or weight_bits(more) > weight_bits(mixed)


def linearized(family: str) -> torch.nn.Module:
    model = make_model(family)
    linearize(model)
    return model


def test_the_ends_are_the_uniform_models(tokens: Tensor) -> None:
    mixed = quantized(tokens)
    for name, all_of_them in (("fp8", True), ("nvfp4", False)):
        template = Template.of(uniform(make_model("llama"), mixed, name))
        template = replace(template, policy="fisher")
        fp8 = allocate(make_model("llama"), template, tokens)
        assert fp8 == (template.sites.keys() if all_of_them else frozenset())


def test_a_checkpoint_without_fisher_information_has_no_twin(tokens: Tensor) -> None:
    assert reason_against(Template.of(quantized(tokens))) is None
    assert reason_against(Template.of(quantized(tokens, policy="fisher-per-layer"))) is None
    for policy in ("error", "random", "fp8"):
        reason = reason_against(Template.of(quantized(tokens, policy=policy)))
        assert reason and f"the checkpoint's policy is {policy}" in reason


def test_weights_are_freed_as_they_are_packed(tokens: Tensor) -> None:
    template, original = Template.of(quantized(tokens)), make_model("llama")
    first = original.model.layers[0].self_attn.q_proj
    model = uniform(original, template, "fp8")
    assert first.weight.is_meta and model is original
    assert not any(p.is_meta for p in model.parameters())
    assert weight_holders(model).keys() == set(template.holders)
