"""Quantizing reaches the requested shares, under every policy, and resumes to the same bits."""

import copy
import math
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from small_runs import (
    POINTS,
    activation_blocks,
    quantized,
    share,
    weight_blocks,
)
from torch import Tensor, nn

import fgmp
from fgmp import InputError, Recipe
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.losses import causal_lm_loss
from fgmp.model.store import config_of
from fgmp.quantization import memory


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
    samples: Callable[[Tensor], Any], match: str, tokens: Tensor
) -> None:
    with pytest.raises(InputError, match=match):
        fgmp.quantize(make_model("llama"), samples(tokens))


def test_held_out_text_must_hold_something(tokens: Tensor) -> None:
    expected = "max_increase needs at least 2 held-out sequences, an eighth of 16 samples, got 1"
    with pytest.raises(InputError, match=expected):
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
