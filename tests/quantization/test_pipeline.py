"""Quantizing reaches the shares that were asked for, under every policy, and chooses clipping.

Shares are counted by the definition: weights block by block in the packed planes, activations by
running the sites that came out over the activations of the unquantized model.
"""

import copy
import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fgmp
from fgmp import InputError, Recipe
from fgmp.quantization import candidates
from fgmp.assign.weights import pack_weights
from fgmp.formats.activation import quantize as quantize_activation
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.hardware.relative_energy import percent_of_fp8
from fgmp.hardware.inference import Work
from fgmp.quantization.held_out import Trial
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.select import linearize
from fgmp.model.store import config_of, tensors_to_save
from fgmp.quantization.pipeline import uniform
from fgmp.quantization import memory
from fgmp.sensitivity.fisher import causal_lm_loss, drawn_label_loss
from fgmp.storage.resume import Unfinished


def quantized(tokens: Tensor, family: str = "llama", **recipe: object) -> nn.Module:
    return fgmp.quantize(make_model(family), tokens, Recipe(**{"clip": "off", **recipe}))


def weight_blocks(model: nn.Module) -> tuple[int, int]:
    """FP4 blocks and all blocks of all weights."""
    flags = [m.packed.is_fp8() for m in mixed_linears(model).values()]
    return sum(int((~f).sum()) for f in flags), sum(f.numel() for f in flags)


@torch.no_grad()
def activation_blocks(model: nn.Module, family: str, tokens: Tensor) -> dict[str, list[int]]:
    """FP4 blocks and all blocks, by site, of the unquantized model's activations."""
    original = make_model(family)
    linearize(original)
    counts = {owner: [0, 0] for owner in sites(model)}
    for owner, site in sites(model).items():

        def count(_: nn.Module, args: tuple[Tensor], owner: str = owner, site=site) -> None:
            is_fp8 = quantize_activation(args[0], site.record).is_fp8
            counts[owner][0] += int((~is_fp8).sum())
            counts[owner][1] += is_fp8.numel()

        original.get_submodule(owner).register_forward_pre_hook(count)
    for sample in tokens:
        original(input_ids=sample[None])
    return counts


def share(counts: dict[str, list[int]]) -> float:
    return sum(c[0] for c in counts.values()) / sum(c[1] for c in counts.values())


POINTS = 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_reaches_the_asked_shares(family: str, tokens: Tensor) -> None:
    model = quantized(tokens, family, fp4=0.7, fp4_activations=0.55)
    kept, blocks = weight_blocks(model)
    assert kept == round(0.7 * blocks)
    result = config_of(model).result
    assert result["fp4_weights"] == pytest.approx(kept / blocks, abs=1e-12)
    counts = activation_blocks(model, family, tokens)
    assert share(counts) == pytest.approx(0.55, abs=0.2 * POINTS)
    assert result["fp4_activations"] == pytest.approx(share(counts), abs=0.2 * POINTS)
    # Of a single site the histogram tells less: a bin may hold many of its few blocks.
    for owner, site in config_of(model).sites.items():
        kept, blocks = counts[owner]
        assert site.fp4_fraction == pytest.approx(kept / max(blocks, 1), abs=2 * POINTS)


@pytest.mark.parametrize("fp4", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_every_share(fp4: float, tokens: Tensor) -> None:
    model = quantized(tokens, fp4=fp4)
    kept, blocks = weight_blocks(model)
    assert kept == round(fp4 * blocks)
    assert share(activation_blocks(model, "llama", tokens)) == pytest.approx(fp4, abs=0.2 * POINTS)


def test_the_quantized_model_runs_close_to_its_share(tokens: Tensor) -> None:
    """Its own activations differ a little from those that were calibrated on."""
    model = quantized(tokens, fp4=0.7)
    for site in sites(model).values():
        site.counting = True
    with torch.no_grad():
        model(input_ids=tokens)
    kept, blocks, _ = (sum(c) for c in zip(*(s.counts for s in sites(model).values()), strict=True))
    assert kept / blocks == pytest.approx(0.7, abs=2 * POINTS)


@pytest.mark.parametrize("policy", ["fisher", "fisher-per-layer", "error", "random"])
def test_every_policy_reaches_its_share(policy: str, tokens: Tensor) -> None:
    model = quantized(tokens, policy=policy, fp4=0.6)
    kept, blocks = weight_blocks(model)
    counts = activation_blocks(model, "llama", tokens)
    if policy == "fisher-per-layer":
        for linear in mixed_linears(model).values():
            fp4 = ~linear.packed.is_fp8()
            assert int(fp4.sum()) == round(0.6 * fp4.numel())
        for owner, count in counts.items():
            # Of one site's few hundred blocks a handful lie in the bin where the threshold is.
            assert count[0] / count[1] == pytest.approx(0.6, abs=2 * POINTS), owner
    else:
        assert kept == round(0.6 * blocks)
        # Random scores follow from the codes, which repeat now and then.
        assert share(counts) == pytest.approx(0.6, abs=(2 if policy == "random" else 0.2) * POINTS)
    rule = "random" if policy == "random" else "benefit"
    assert {site.rule for site in config_of(model).sites.values()} == {rule}


def test_policies_differ(tokens: Tensor) -> None:
    flags = {}
    for policy in ("fisher", "fisher-per-layer", "error", "random"):
        model = quantized(tokens, policy=policy, fp4=0.6)
        flags[policy] = torch.cat(
            [m.packed.is_fp8().flatten() for m in mixed_linears(model).values()]
        )
    for one in flags:
        for other in flags:
            assert torch.equal(flags[one], flags[other]) == (one == other)


@pytest.mark.parametrize(
    ("policy", "mode", "threshold"),
    [("fp8", "fp8", THRESHOLD_ALL_FP8), ("nvfp4", "fp4", THRESHOLD_ALL_FP4)],
)
def test_uniform_policies(policy: str, mode: str, threshold: int, tokens: Tensor) -> None:
    model = quantized(tokens, policy=policy, fp4=0.3)
    assert {m.packed.mode for m in mixed_linears(model).values()} == {mode}
    assert {site.record.threshold for site in sites(model).values()} == {threshold}
    result = config_of(model).result
    assert result["fp4_weights"] == result["fp4_activations"] == (mode == "fp4")


def test_fisher_protects_what_matters(tokens: Tensor) -> None:
    """FP8 blocks of a layer whose errors hardly reach the loss become FP4, and the other way."""
    model = make_model("llama")
    model.model.layers[0].mlp.down_proj.weight.data *= 1e-3  # so gate and up hardly matter
    fgmp.quantize(model, tokens, Recipe(fp4=0.7, clip="off"))
    fp8 = {n: m.packed.is_fp8().double().mean() for n, m in mixed_linears(model).items()}
    assert fp8["model.layers.0.mlp.gate_proj"] < 0.01
    assert fp8["model.layers.1.mlp.gate_proj"] > 0.1


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


def test_auto_holds_out_the_last_eighth(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(fp4=0.9))
    assert config_of(model).calibration["sequences"] == 7
    explicit = fgmp.quantize(make_model("llama"), tokens[:7], Recipe(fp4=0.9), held_out=tokens[7:])
    assert (
        config_of(model).result["clip"]["held_out_nll"]
        == config_of(explicit).result["clip"]["held_out_nll"]
    )
    with pytest.raises(InputError, match="max_increase needs at least 3 sequences, got 2"):
        quantized(tokens[:2], max_increase=1.0)
    with pytest.raises(InputError, match="clip=auto needs at least 2 sequences, got 1"):
        fgmp.quantize(make_model("llama"), tokens[:1])


# Budgets.


def stored_bytes(model: nn.Module) -> int:
    """Of all tensors that saving would write."""
    return sum(t.nbytes for t in tensors_to_save(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_a_checkpoint_has_at_most_max_bytes(family: str, tokens: Tensor) -> None:
    ends = [
        stored_bytes(quantized(tokens, family, fp4=fp4, compensate=False)) for fp4 in (1.0, 0.0)
    ]
    for share in (0.2, 0.61):
        limit = round(ends[0] + share * (ends[1] - ends[0]))
        model = quantized(tokens, family, max_bytes=limit, compensate=False)
        found = stored_bytes(model)
        assert found == config_of(model).result["tensor_bytes"]
        # One more block in FP8 would take 8 bytes, and its row counters if it is a weight's first.
        assert limit - 8 - 4 * 257 < found <= limit
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
    found = re.search(message, str(refused.value))
    below, enough = (int(number.replace(",", "")) for number in found.groups())
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
def test_hopeless_budgets_are_refused_before_calibration(
    recipe: Recipe, message: str, tokens: Tensor
) -> None:
    stages: list[str] = []

    def stage(title: str, steps: int) -> AbstractContextManager[Callable[[], None]]:
        stages.append(title)
        return nullcontext(lambda: None)

    with pytest.raises(InputError, match=message):
        fgmp.quantize(make_model("llama"), tokens, recipe, progress=stage)
    assert stages == []


def test_both_choices_of_scales_fit_max_bytes(tokens: Tensor) -> None:
    ends = [stored_bytes(quantized(tokens, fp4=fp4)) for fp4 in (1.0, 0.0)]
    limit = sum(ends) // 2
    model = quantized(tokens, max_bytes=limit, clip="auto")
    assert limit - 400 < stored_bytes(model) <= limit


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
    return percent_of_fp8(work, "benefit, search, e4m3")


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


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    return sum(causal_lm_loss(model, t)[0].item() for t in tokens) / tokens[:, 1:].numel()


def test_perplexity_rises_by_at_most_max_increase(tokens: Tensor) -> None:
    """On tokens that the model itself finds likely, so that noise can only make it worse."""
    with torch.no_grad():
        likely = tokens.clone()
        for i in range(1, likely.shape[1]):
            logits = make_model("llama")(input_ids=likely[:, :i]).logits
            likely[:, i] = logits[:, -1].argmax(-1)
    calibration, held_out = likely[:5], likely[5:]
    base = uniform(make_model("llama"), quantized(calibration), "fp8", 0.0)
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
        assert any("perplexity on held-out text is" in line for line in lines)
        bits.append(budget["bits"])
    assert 4.5 == bits[0] < bits[1] < bits[2] < 8
    # One step further it would have been too much.
    beyond = quantized(calibration, bits=bits[1] - 3.5 / 2**6, clip="on", compensate=False)
    assert mean_loss(beyond, held_out) - mean_loss(base, held_out) > math.log1p(0.014)


def test_an_increase_that_only_all_fp8_keeps(tokens: Tensor, monkeypatch: Any) -> None:
    """Whatever our own blocks do, there is always a model whose increase is 0."""
    monkeypatch.setattr(Trial, "increase_percent", lambda self, base: 1.0 - (self == base))
    monkeypatch.setattr(Trial, "__eq__", lambda a, b: torch.equal(a.losses, b.losses))
    model = quantized(tokens, max_increase=0.5)
    assert config_of(model).result["uniform"]["used"] == "fp8"
    assert config_of(model).result["budget"]["increase_percent"] == 0


# Never worse than a uniform format.


def test_a_uniform_format_that_is_nearer_is_returned(
    tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing makes our blocks worse than NVFP4 on purpose, so they are spoilt here."""
    good = quantized(tokens)
    assert config_of(good).result["uniform"]["used"] is None
    kl = config_of(good).result["uniform"]["held_out_kl"]
    assert set(kl) == {"off", "nvfp4"} and kl["off"] < kl["nvfp4"]

    def spoilt(*args: Any, **named: Any) -> dict[str, Any]:
        packed = pack_weights(*args, **named)
        return {n: replace(p, low=p.low.flip(0)) for n, p in packed.items()}

    monkeypatch.setattr(candidates, "pack_weights", spoilt)
    lines: list[str] = []
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(clip="off"), report=lines.append)
    assert any("all NVFP4 is nearer to the original on held-out text" in line for line in lines)
    result = config_of(model).result
    assert result["uniform"]["used"] == "nvfp4" and result["fp4_weights"] == 1
    monkeypatch.undo()
    nvfp4 = uniform(make_model("llama"), good, "nvfp4", 1.0)
    for key, value in nvfp4.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


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


def test_held_out_kl_is_that_of_the_predictions(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens[:5], Recipe(), held_out=tokens[5:])
    result = config_of(model).result
    with torch.no_grad():
        own, wanted = (
            m(input_ids=tokens[5:]).logits[:, :-1].double().log_softmax(-1)
            for m in (model, make_model("llama"))
        )
    kl = (wanted.exp() * (wanted - own)).sum(-1).mean().item()
    used = "on" if result["clip"]["used"] else "off"
    assert result["clip"]["held_out_kl"][used] == pytest.approx(kl, rel=1e-3)
    assert result["clip"]["held_out_kl"][used] == min(result["clip"]["held_out_kl"].values())


@pytest.mark.parametrize("labels, loss", [("model", drawn_label_loss), ("text", causal_lm_loss)])
def test_memory_is_predicted_of_the_loss_that_is_differentiated(
    labels: str, loss: object, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    estimate = memory.estimate

    def noted(*args: Any, **kwargs: Any) -> memory.MemoryEstimate:
        seen.append(args[3])
        return estimate(*args, **kwargs)

    monkeypatch.setattr(memory, "estimate", noted)
    quantized(tokens, labels=labels, compensate=False)
    assert seen == [loss]


def test_labels_of_the_model_and_of_the_text(tokens: Tensor, tmp_path: Any) -> None:
    """Calibrations not mistaken for each other; another loss, here the text's, has its own."""
    state, recipe = tmp_path / "kept.safetensors", {"clip": "off", "compensate": False}

    def masks(labels: str, **options: Any) -> list[Tensor]:
        model = fgmp.quantize(
            make_model("llama"), tokens, Recipe(labels=labels, **recipe), **options
        )
        return [m.packed.is_fp8() for m in mixed_linears(model).values()]

    drawn, text = masks("model", state=state), masks("text")
    own = masks("model", loss=lambda model, sample: causal_lm_loss(model, sample))
    assert any(not torch.equal(a, b) for a, b in zip(drawn, text, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, text, strict=True))
    with pytest.raises(InputError, match="a calibration of another loss, or other labels"):
        masks("text", state=state, reuse=True)


# What is quantized, and how far.


def test_include_and_exclude(tokens: Tensor) -> None:
    model = quantized(tokens, include=("*.layers.1.*",), exclude=("*.down_proj",))
    names = set(mixed_linears(model))
    assert names and all(n.startswith("model.layers.1.") for n in names)
    assert not any(n.endswith("down_proj") for n in names)
    result = config_of(model).result
    assert "model.layers.0.mlp.up_proj.weight" in result["unquantized"]
    elements = sum(m.packed.n * m.packed.k for m in mixed_linears(model).values())
    everything = sum(
        p.numel() for n, p in make_model("llama").named_parameters() if p.ndim == 2
    )  # the tied embedding counts once, as the head
    assert result["quantized_share"] == pytest.approx(elements / everything)
    bits = 8 * sum(m.packed.nbytes for m in mixed_linears(model).values()) / elements
    assert result["bits_per_weight"] == pytest.approx(bits)


def test_no_linear(tokens: Tensor) -> None:
    with pytest.raises(
        InputError, match=r"no linear layer to quantize: include \['x\*'\] .* LlamaForCausalLM's"
    ):
        quantized(tokens, include=("x*",))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_factored_fisher_information(family: str, tokens: Tensor) -> None:
    model = quantized(tokens, family, fp4=0.7, fisher="factored")
    kept, blocks = weight_blocks(model)
    assert kept == round(0.7 * blocks)
    exact = quantized(tokens, family, fp4=0.7)
    assert config_of(model).recipe["fisher"] == "factored"
    flags = [
        torch.cat([m.packed.is_fp8().flatten() for m in mixed_linears(x).values()])
        for x in (model, exact)
    ]
    # Another ranking of the blocks, but a near one: chance alone agrees on 58% of them.
    agreement = (flags[0] == flags[1]).double().mean().item()
    assert 0.8 < agreement < 1


def test_headroom_widens_the_range(tokens: Tensor) -> None:
    plain, wide = quantized(tokens), quantized(tokens, headroom=2.0)
    for owner, site in sites(plain).items():
        # 12 bits: half of the multiplier, save for rounding down.
        assert sites(wide)[owner].record.r == pytest.approx(site.record.r / 2, rel=2**-11)


def test_sites_share_one_weight_scale(tokens: Tensor) -> None:
    model = quantized(tokens)
    linears = mixed_linears(model)
    original = make_model("llama")
    for site in config_of(model).sites.values():
        amax = max(original.get_submodule(n).weight.abs().max().item() for n in site.linears)
        for name in site.linears:
            assert linears[name].packed.t.item() == pytest.approx(amax / 2688, rel=1e-6)


def test_a_weight_that_is_not_finite_is_named(tokens: Tensor) -> None:
    for value in (math.nan, math.inf):
        model = make_model("llama")
        model.model.layers[1].self_attn.v_proj.weight.data[3, 5] = value
        with pytest.raises(
            InputError,
            match=rf"model\.layers\.1\.self_attn\.v_proj\.weight holds {value} at \[3, 5\]",
        ):
            fgmp.quantize(model, tokens, Recipe(clip="off"))


def test_no_samples(tokens: Tensor) -> None:
    with pytest.raises(InputError, match="at least one calibration sequence, got none"):
        quantized(tokens[:0])


@pytest.mark.parametrize(
    ("samples", "found"),
    [
        (lambda t: [t[:1]], r"samples must be token ids, .* got shape \[1, \d+\] as sequence 0"),
        (lambda t: t[:, :1], r"got shape \[1\] as sequence 0"),
        (lambda t: [t[0], {"input_ids": t[1]}], "got dict as sequence 1"),
        (lambda t: t.float(), "got torch.float32 as sequence 0"),
    ],
)
def test_what_is_no_sequence_is_refused_first(
    samples: Callable[[Tensor], Any], found: str, tokens: Tensor
) -> None:
    with pytest.raises(InputError, match=found):
        fgmp.quantize(make_model("llama"), samples(tokens))


def test_held_out_text_must_hold_something(tokens: Tensor) -> None:
    wanted = "max_increase needs at least 2 held-out sequences, an eighth of 16 samples, got 1"
    with pytest.raises(InputError, match=wanted):
        fgmp.quantize(make_model("llama"), tokens, Recipe(max_increase=1), held_out=tokens[:1])
    with pytest.raises(InputError, match="held_out needs at least one sequence, got none"):
        fgmp.quantize(make_model("llama"), tokens, held_out=tokens[:0])


def test_a_quantized_model_is_not_quantized_again(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens[:2], Recipe(compensate=False))
    with pytest.raises(InputError, match="is quantized already; quantize its original"):
        fgmp.quantize(model, tokens[:2])


def test_unreached_experts_are_reported(tokens: Tensor) -> None:
    lines: list[str] = []
    model = make_model("mixtral")
    fgmp.quantize(model, tokens[:1, :2], Recipe(clip="off"), report=lines.append)
    # Two tokens with two experts each, in each of two layers, reach half of the experts.
    assert any("sites were reached by no calibration token" in line for line in lines)
    idle = {o for o, s in sites(model).items() if s.record.gamma == 0}
    shares = {o: s.fp4_fraction for o, s in config_of(model).sites.items()}
    assert idle and all(shares[owner] == 1 for owner in idle)
    assert all(torch.isfinite(m.weight).all() for m in mixed_linears(model).values())
    with torch.no_grad():
        assert model(input_ids=tokens).logits.isfinite().all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_dropout_plays_no_part(family: str, tokens: Tensor) -> None:
    quiet = quantized(tokens, family)
    model = make_model(family).train()
    fgmp.quantize(model, tokens, Recipe(clip="off"))
    assert model.training and all(m.training for m in mixed_linears(model).values())
    assert config_of(model).sites == config_of(quiet).sites
    for name, value in quiet.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_the_same_twice(tokens: Tensor) -> None:
    one, two = quantized(tokens, policy="random"), quantized(tokens, policy="random")
    for name, value in one.state_dict().items():
        assert torch.equal(two.state_dict()[name], value), name


def test_progress_tells_every_step(tokens: Tensor) -> None:
    from contextlib import contextmanager

    stages: list[list[object]] = []

    @contextmanager
    def stage(title: str, steps: int):
        entry: list[object] = [title, steps, 0]
        stages.append(entry)

        def advance() -> None:
            entry[2] += 1

        yield advance

    fgmp.quantize(make_model("llama"), tokens, progress=stage)
    assert [s[0] for s in stages] == [
        "calibrating",
        "scoring activations",
        "scoring weights",
        "scoring weights",
        "compensating",
        "compensating",
        "checking on held-out text",
    ]
    assert all(steps == done for _, steps, done in stages)


# Any module, with a loss of its own.


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 20), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def net_loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    x, y = sample
    return (model(x) - y).square().sum(), len(x)


def test_any_module() -> None:
    g = torch.Generator().manual_seed(0)
    samples = [(torch.randn(n, 20, generator=g), torch.randn(n, 20, generator=g)) for n in (30, 9)]
    model = fgmp.quantize(Net(), samples, Recipe(fp4=0.5, clip="off"), loss=net_loss)
    assert list(mixed_linears(model)) == ["layers.0", "layers.2"]
    kept, blocks = weight_blocks(model)
    assert blocks == 48 * 2 + 20 * 3 and kept == round(0.5 * blocks)
    assert config_of(model).calibration == {"sequences": 2, "predictions": 39}
    with torch.no_grad():
        x = samples[0][0]
        error = (model(x) - Net()(x)).abs().max()
    assert 0 < error < 0.2


# Baselines on the same sites.


@pytest.mark.parametrize(("name", "fp4"), [("fp8", 0.0), ("nvfp4", 1.0)])
def test_uniform_baselines(name: str, fp4: float, tokens: Tensor) -> None:
    mixed = quantized(tokens)
    base = uniform(make_model("llama"), mixed, name, fp4)
    assert base.training == mixed.training
    assert {m.packed.mode for m in mixed_linears(base).values()} == {name.removeprefix("nv")}
    assert list(sites(base)) == list(sites(mixed))
    for owner, site in sites(base).items():
        assert site.record.r == sites(mixed)[owner].record.r
        assert site.record.threshold == (THRESHOLD_ALL_FP4 if fp4 else THRESHOLD_ALL_FP8)
    for linear, other in zip(
        mixed_linears(base).values(), mixed_linears(mixed).values(), strict=True
    ):
        assert linear.packed.t == other.packed.t
    asked = quantized(tokens, policy=name, rule="difference", scales="max", compensate=False)
    for key, linear in mixed_linears(asked).items():
        assert torch.equal(linear.weight, mixed_linears(base)[key].weight)
    with torch.no_grad():
        assert torch.equal(base(input_ids=tokens).logits, asked(input_ids=tokens).logits)


def test_baselines_are_of_the_model_that_was_quantized(tokens: Tensor) -> None:
    """Also where all that the checkpoint knows is there, and the model has more layers."""
    mixed = quantized(tokens)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 3
    longer = AutoModelForCausalLM.from_config(config)
    message = "LlamaForCausalLM: not a quantized LlamaForCausalLM: model.layers.2.* got none and"
    with pytest.raises(InputError, match=message):
        uniform(longer, mixed, "fp8", 0.0)


def logit_error(model: nn.Module, tokens: Tensor) -> float:
    """Mean squared distance from the original's logits."""
    with torch.no_grad():
        exact = make_model("llama")(input_ids=tokens).logits
        return (model(input_ids=tokens).logits - exact).square().mean().item()


@pytest.mark.parametrize("fp4", [0.7, 1.0])
def test_compensation_brings_logits_nearer(fp4: float, tokens: Tensor) -> None:
    """By a fifth and more on this model, and keeps every format where it was."""
    plain, better = (quantized(tokens, fp4=fp4, clip="on", compensate=c) for c in (False, True))
    assert logit_error(better, tokens) < 0.8 * logit_error(plain, tokens)
    for name, linear in mixed_linears(plain).items():
        assert torch.equal(linear.packed.is_fp8(), mixed_linears(better)[name].packed.is_fp8())


def test_a_budget_is_met_by_weights_and_activations_together(tokens: Tensor) -> None:
    model = quantized(tokens, bits=5.4)
    kept, blocks = weight_blocks(model)
    mean = (kept / blocks + share(activation_blocks(model, "llama", tokens))) / 2
    assert mean == pytest.approx((8 - 5.4) / 3.5, abs=POINTS)
    for bits, mode in ((4.5, "fp4"), (8, "fp8")):
        model = quantized(tokens, bits=bits)
        assert {m.packed.mode for m in mixed_linears(model).values()} == {mode}


def test_mixed_lies_between_its_baselines(tokens: Tensor) -> None:
    """Nearer to the original than NVFP4, not as near as FP8: mean squared logit errors.

    Compensated it is nearer than FP8 on the tokens that it was compensated on.
    """
    mixed = quantized(tokens, compensate=False)
    models: dict[str, nn.Module] = {
        "fp8": uniform(make_model("llama"), mixed, "fp8", 0.0),
        "fgmp": mixed,
        "nvfp4": uniform(make_model("llama"), mixed, "nvfp4", 1.0),
    }
    with torch.no_grad():
        wanted = make_model("llama")(input_ids=tokens).logits
        errors = {
            name: (model(input_ids=tokens).logits - wanted).square().mean().item()
            for name, model in models.items()
        }
    assert errors["fp8"] < errors["fgmp"] < errors["nvfp4"]
    fewer = quantized(tokens, fp4=0.3, compensate=False)
    with torch.no_grad():
        assert (fewer(input_ids=tokens).logits - wanted).square().mean() < errors["fgmp"]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda m: m.half()])
def test_a_copied_quantized_model_still_runs(
    make: Callable[[nn.Module], nn.Module], tokens: Tensor
) -> None:
    model = quantized(tokens)
    weights = {n: m.weight for n, m in mixed_linears(model).items()}
    other = make(model)
    for name, linear in mixed_linears(other).items():
        assert torch.equal(linear.weight, weights[name])
    with torch.no_grad():
        assert other(input_ids=tokens).logits.isfinite().all()


def test_what_was_packed_is_taken_up_by_the_same_run_only(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys: list[str] = []

    class Watched(Unfinished):
        def __init__(self, folder: Path, key: str) -> None:
            keys.append(key)
            super().__init__(folder, key)

    monkeypatch.setattr("fgmp.quantization.task.Unfinished", Watched)

    def key(model: nn.Module, tokens: Tensor = tokens, **recipe: object) -> str:
        asked = Recipe(**{"clip": "off", **recipe})
        keys.clear()
        fgmp.quantize(model, tokens, asked, held_out=tokens[:1], unfinished=tmp_path)
        return keys[0]

    wanted = key(make_model("llama"))
    other = make_model("llama")  # by what no gradient shows
    other.register_buffer("unused", torch.zeros(1))
    assert key(make_model("llama"), tune=1) == wanted  # it comes after
    made = [
        key(other),
        key(make_model("llama"), tokens[:-1]),
        key(make_model("llama"), fp4=0.5),
        key(make_model("llama"), clip="on"),
        key(make_model("llama"), fp4_activations=0.5),
    ]
    assert len({wanted, *made}) == 1 + len(made)
