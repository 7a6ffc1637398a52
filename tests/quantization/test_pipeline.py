"""Quantizing reaches the requested shares, under every policy, and resumes to the same bits."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from small_runs import (
    POINTS,
    Watch,
    activation_blocks,
    quantized,
    same_state,
    share,
    weight_blocks,
    weight_masks,
)
from torch import Tensor, nn

import fgmp
from fgmp import InputError, Recipe
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.losses import causal_lm_loss, sampled_label_loss
from fgmp.model.store import config_of
from fgmp.quantization import memory
from fgmp.quantization.pipeline import prepare
from fgmp.sensitivity.fisher import calibrate


@pytest.mark.parametrize("family", FAMILIES)
def test_reaches_the_asked_shares(family: str, tokens: Tensor) -> None:
    model = quantized(tokens, family, fp4=0.7, fp4_activations=0.55)
    in_fp4, blocks = weight_blocks(model)
    assert in_fp4 == round(0.7 * blocks)
    result = config_of(model).result
    assert result["fp4_weights"] == pytest.approx(in_fp4 / blocks, abs=1e-12)
    counts = activation_blocks(model, family, tokens)
    assert share(counts) == pytest.approx(0.55, abs=0.2 * POINTS)
    assert result["fp4_activations"] == pytest.approx(share(counts), abs=0.2 * POINTS)
    # Of a single site the histogram tells less: a bin may hold many of its few blocks.
    for owner, site in config_of(model).sites.items():
        in_fp4, blocks = counts[owner]
        assert site.fp4_fraction == pytest.approx(in_fp4 / max(blocks, 1), abs=2 * POINTS)


@pytest.mark.parametrize("fp4", [0.0, 0.1, 0.5, 0.95, 1.0])
def test_every_share(fp4: float, tokens: Tensor) -> None:
    model = quantized(tokens, fp4=fp4)
    in_fp4, blocks = weight_blocks(model)
    assert in_fp4 == round(fp4 * blocks)
    assert share(activation_blocks(model, "llama", tokens)) == pytest.approx(fp4, abs=0.2 * POINTS)


def test_the_quantized_model_runs_close_to_its_share(tokens: Tensor) -> None:
    """Its own activations differ a little from those that were calibrated on."""
    model = quantized(tokens, fp4=0.7)
    for site in sites(model).values():
        site.counting = True
    with torch.no_grad():
        model(input_ids=tokens)
    in_fp4, blocks, _ = (
        sum(c) for c in zip(*(s.counts for s in sites(model).values()), strict=True)
    )
    assert in_fp4 / blocks == pytest.approx(0.7, abs=2 * POINTS)


@pytest.mark.parametrize("policy", ["fisher", "fisher-per-layer", "error", "random"])
def test_every_policy_reaches_its_share(policy: str, tokens: Tensor) -> None:
    model = quantized(tokens, policy=policy, fp4=0.6)
    in_fp4, blocks = weight_blocks(model)
    counts = activation_blocks(model, "llama", tokens)
    if policy == "fisher-per-layer":
        for linear in mixed_linears(model).values():
            fp4 = ~linear.packed.is_fp8()
            assert int(fp4.sum()) == round(0.6 * fp4.numel())
        for owner, count in counts.items():
            # Of one site's few hundred blocks a handful lie in the bin where the threshold is.
            assert count[0] / count[1] == pytest.approx(0.6, abs=2 * POINTS), owner
    else:
        assert in_fp4 == round(0.6 * blocks)
        # Random scores follow from the codes, which repeat now and then.
        assert share(counts) == pytest.approx(0.6, abs=(2 if policy == "random" else 0.2) * POINTS)
    rule = "random" if policy == "random" else "benefit"
    assert {site.rule for site in config_of(model).sites.values()} == {rule}


def test_policies_differ(tokens: Tensor) -> None:
    policies = ("fisher", "fisher-per-layer", "error", "random")
    flags = {}
    for policy in policies:
        flags[policy] = weight_masks(quantized(tokens, policy=policy, fp4=0.6, compensate=False))
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


@pytest.mark.parametrize("labels, loss", [("model", sampled_label_loss), ("text", causal_lm_loss)])
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


def test_labels_of_the_model_and_of_the_text(tokens: Tensor, tmp_path: Path) -> None:
    """Calibrations not mistaken for each other; another loss, here the text's, has its own."""
    file, recipe = tmp_path / "run.safetensors", {"clip": "off", "compensate": False}

    def masks(labels: str, **options: Any) -> Tensor:
        return weight_masks(
            fgmp.quantize(make_model("llama"), tokens, Recipe(labels=labels, **recipe), **options)
        )

    sampled, text = masks("model", calibration=file), masks("text")
    another = masks("model", loss=lambda model, sample: causal_lm_loss(model, sample))
    assert not torch.equal(sampled, text)
    assert torch.equal(another, text)
    message = f"^{file}: a calibration of another loss, or with other labels"
    with pytest.raises(InputError, match=message):
        masks("text", calibration=file)


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
    in_fp4, blocks = weight_blocks(model)
    assert in_fp4 == round(0.7 * blocks)
    exact = quantized(tokens, family, fp4=0.7)
    assert config_of(model).recipe["fisher"] == "factored"
    # Another ranking of the blocks, but a near one: chance alone agrees on 58% of them.
    agreement = (weight_masks(model) == weight_masks(exact)).double().mean().item()
    assert 0.8 < agreement < 1


def test_headroom_widens_the_range(tokens: Tensor) -> None:
    plain, wide = (quantized(tokens, headroom=h, compensate=False) for h in (1.0, 2.0))
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
    ("samples", "got"),
    [
        (lambda t: [t[:1]], r"samples must be token ids, .* got shape \[1, \d+\] as sequence 0"),
        (lambda t: t[:, :1], r"got shape \[1\] as sequence 0"),
        (lambda t: [t[0], {"input_ids": t[1]}], "got dict as sequence 1"),
        (lambda t: t.float(), "got torch.float32 as sequence 0"),
    ],
)
def test_what_is_no_sequence_is_refused_first(
    samples: Callable[[Tensor], Any], got: str, tokens: Tensor
) -> None:
    with pytest.raises(InputError, match=got):
        fgmp.quantize(make_model("llama"), samples(tokens))


def test_held_out_text_must_hold_something(tokens: Tensor) -> None:
    message = "max_increase needs at least 2 held-out sequences, got 1"
    with pytest.raises(InputError, match=message):
        fgmp.quantize(make_model("llama"), tokens, Recipe(max_increase=1), held_out=tokens[:1])
    with pytest.raises(InputError, match="held_out needs at least one sequence, got none"):
        fgmp.quantize(make_model("llama"), tokens, held_out=tokens[:0])


def test_a_quantized_model_is_not_quantized_again(tokens: Tensor) -> None:
    model = fgmp.quantize(make_model("llama"), tokens[:2], Recipe(compensate=False))
    with pytest.raises(InputError, match="is already quantized; pass the unquantized model"):
        fgmp.quantize(model, tokens[:2])


def test_unreached_experts_are_reported(tokens: Tensor) -> None:
    lines: list[str] = []
    model = make_model("mixtral")
    fgmp.quantize(model, tokens[:1, :2], Recipe(clip="off"), report=lines.append)
    # Two tokens with two experts each, in each of two layers, reach half of the experts.
    assert any("sites received no calibration tokens" in line for line in lines)
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
    assert same_state(model, quiet)


def test_the_same_twice(tokens: Tensor) -> None:
    one, two = quantized(tokens, policy="random"), quantized(tokens, policy="random")
    assert same_state(one, two)


def test_every_step_is_reported_as_progress(tokens: Tensor) -> None:
    watch = Watch(make_model("llama"))
    fgmp.quantize(watch.model, tokens, progress=watch)
    assert [stage.title for stage in watch.stages] == [
        "calibrating",
        "scoring activations",
        "scoring weights",
        "scoring weights",
        "compensating",
        "checking on held-out text",
    ]
    assert all(stage.done == stage.steps for stage in watch.stages)


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
    in_fp4, blocks = weight_blocks(model)
    assert blocks == 48 * 2 + 20 * 3 and in_fp4 == round(0.5 * blocks)
    assert config_of(model).calibration == {
        "sequences": 2,
        "predictions": 39,
        "dtype": "float32",
    }
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


# Stored calibrations.


@pytest.mark.parametrize("recipe", [{"clip": "on"}, {"policy": "random"}])
def test_a_calibration_gives_the_bits_of_calibrating(
    recipe: dict[str, object], tokens: Tensor, tmp_path: Path
) -> None:
    """As an object or from a file, any number of times; an object leaves no partial results."""
    asked = Recipe(**{"clip": "off", "compensate": False, **recipe})
    expected = fgmp.quantize(make_model("llama"), tokens[:4], asked)
    task = prepare(make_model("llama"), tokens[:4], asked).task
    calibration = calibrate(task.model, task.linears, task.samples, task.fisher_loss)
    file, resume = tmp_path / "calibration.safetensors", tmp_path / "unfinished"
    for stored in (calibration, calibration, file, file):
        watch = Watch(make_model("llama"))
        lines: list[str] = []
        reused = stored is calibration or file.exists()
        model = fgmp.quantize(
            watch.model,
            tokens[:4],
            asked,
            calibration=stored,
            resume=resume if stored is calibration else None,
            progress=watch,
            report=lines.append,
        )
        assert same_state(model, expected)
        assert config_of(model).calibration == config_of(expected).calibration
        assert sum(stage.sequences for stage in watch.of("calibrating")) == (0 if reused else 4)
        assert any(str(file) in line for line in lines) == (reused and stored is file)
    assert not resume.exists()


@pytest.mark.parametrize("place", ["tensors", "header"])
def test_a_damaged_calibration_file_is_refused_by_name(
    place: str, tokens: Tensor, tmp_path: Path
) -> None:
    file = tmp_path / "calibration.safetensors"
    fgmp.quantize(make_model("llama"), tokens[:2], Recipe(clip="off"), calibration=file)
    flip(file, place)
    damaged = file.read_bytes()
    with pytest.raises(InputError, match=f"^{file}: "):
        fgmp.quantize(make_model("llama"), tokens[:2], Recipe(clip="off"), calibration=file)
    assert file.read_bytes() == damaged


# Partial results.


def flip(file: Path, place: str) -> None:
    """Flip one bit in the middle of a state file's header, or of its tensors."""
    content = bytearray(file.read_bytes())
    header = int.from_bytes(content[:8], "little")
    assert header < len(content) - 8 or place == "header"
    position = 8 + header // 2 if place == "header" else (8 + header + len(content)) // 2
    content[position] ^= 1
    file.write_bytes(content)


@dataclass
class Whole:
    """A run that stored every partial result: its model, and its files by name."""

    model: nn.Module
    files: dict[str, bytes]

    def restore(self, resume: Path) -> None:
        """Put all files into a folder."""
        for name, content in self.files.items():
            (resume / name).write_bytes(content)

    def equals(self, model: nn.Module) -> bool:
        """Whether a model has the same bits, and the same results were measured on the way."""
        one, other = vars(config_of(self.model)), vars(config_of(model))
        facts = ("sites", "calibration", "result")
        return same_state(model, self.model) and all(one[key] == other[key] for key in facts)


def run_every_stage(resume: Path, watch: Watch, report: Callable[[str], None]) -> nn.Module:
    """Quantize the first layer of a small model by all stages that there are."""
    tokens = torch.randint(128, (6, 24), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(max_increase=0.01, tune=2, include=("*.layers.0.*",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fgmp.quantization.tune.SAVE_EVERY_SECONDS", -1)
        # What is tuned is used, so that its damage would show.
        patch.setattr("fgmp.quantization.tune.best_of", lambda *_: "with")
        return fgmp.quantize(
            watch.model,
            tokens[:4],
            recipe,
            held_out=tokens[4:],
            resume=resume,
            progress=watch,
            report=report,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    resume = tmp_path_factory.mktemp("whole")
    model = run_every_stage(resume, Watch(make_model("llama")), lambda line: None)
    return Whole(model, {file.name: file.read_bytes() for file in resume.iterdir()})


def test_what_is_finished_is_not_done_again(whole: Whole, tmp_path: Path) -> None:
    whole.restore(tmp_path)
    watch = Watch(make_model("llama"))
    lines: list[str] = []
    assert whole.equals(run_every_stage(tmp_path, watch, lines.append))
    assert all(stage.done == stage.steps for stage in watch.stages)
    running = {stage.title for stage in watch.stages if stage.sequences}
    assert running == {"checking on held-out text"}
    assert not any("done again" in line for line in lines)


PARTS = {
    "calibration": ("tensors", "header"),
    "activation-scores": ("tensors", "header"),
    "weight-scores-nearest": ("tensors", "header"),
    "weight-scores-searched": ("tensors", "header"),
    "stage-00000": ("tensors", "header"),
    "stage-00003": ("tensors", "header"),
    "tuning": ("tensors", "header"),
    "increase": ("header",),  # one number, and no tensor
}


def test_every_stage_stores_partial_results(whole: Whole) -> None:
    """One file per stage, but for numbers of the points that were tried."""
    parts = [name[17:].removesuffix(".safetensors") for name in whole.files]
    assert set(PARTS) | {"stage-00001", "stage-00002"} == set(parts)
    for part, count in (("calibration", 1), ("activation-scores", 1), ("tuning", 1)):
        assert parts.count(part) == count
    assert parts.count("stage-00000") == 1 and parts.count("increase") > 2


@pytest.mark.parametrize(
    ("part", "place"), [(part, place) for part, places in PARTS.items() for place in places]
)
def test_one_flipped_bit_never_changes_the_result(
    part: str, place: str, whole: Whole, tmp_path: Path
) -> None:
    """The damaged stage is reported and done again, to the same bits."""
    whole.restore(tmp_path)
    file = next(iter(sorted(tmp_path.glob(f"*-{part}.safetensors"))))
    flip(file, place)
    assert file.read_bytes() != whole.files[file.name]
    lines: list[str] = []
    model = run_every_stage(tmp_path, Watch(make_model("llama")), lines.append)
    assert whole.equals(model)
    (line,) = [line for line in lines if str(file) in line]
    assert line.endswith(f"{part.replace('-', ' ')} is done again")
    assert file.read_bytes() == whole.files[file.name]
