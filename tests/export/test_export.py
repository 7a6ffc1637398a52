"""Exports, read by the programs that they are for: plain Transformers and compressed-tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fgmp
from fgmp import CheckpointError, InputError, Recipe
from fgmp.evaluation.perplexity import divergence_of, next_token_log_probabilities
from fgmp.export.export import RECORD, export
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.linear import MixedLinear, mixed_linears, sites
from fgmp.pack import checkpoint

POLICIES = {"fp4": Recipe(policy="nvfp4", clip="off"), "fp8": Recipe(policy="fp8", clip="off")}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of one small Llama by name: all FP4, all FP8, and mixed."""
    samples = torch.randint(128, (4, 24), generator=torch.Generator().manual_seed(1))
    root = tmp_path_factory.mktemp("checkpoints")
    for name, recipe in {**POLICIES, "mixed": Recipe(fp4=0.6, clip="off")}.items():
        fgmp.save(fgmp.quantize(make_model("llama"), samples, recipe), root / name)
    return {path.name: path for path in root.iterdir()}


def contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """config.json, the record of losses, and all tensors."""
    config, record = (json.loads((folder / n).read_text()) for n in ("config.json", RECORD))
    return config, record, load_file(folder / "model.safetensors")


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def without_activation_quantization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        MixedLinear, "forward", lambda self, x: nn.functional.linear(x, self.weight, self.bias)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_is_the_model_without_activation_quantization(
    family: str, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantized = fgmp.quantize(make_model(family), tokens[:4], Recipe(fp4=0.6, clip="off"))
    fgmp.save(quantized, tmp_path / "in")
    result = export(tmp_path / "in", tmp_path / "out", "dense", windows=tokens)
    assert result.max_relative_error == 0  # the files are fp32
    assert result.unquantized_sites == len(sites(quantized))
    reference = next_token_log_probabilities(quantized, tokens)
    without_activation_quantization(monkeypatch)
    expected = logits(quantized, tokens)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(dense) is type(quantized)
    assert not mixed_linears(dense)
    assert torch.allclose(logits(dense, tokens), expected, rtol=1e-4, atol=1e-5)
    kl = divergence_of(next_token_log_probabilities(dense, tokens), reference).sum()
    assert result.kl == pytest.approx(kl.item() / tokens[:, 1:].numel(), rel=1e-3)
    plain = make_model(family)
    plain.save_pretrained(tmp_path / "plain")
    shapes = {n: t.shape for n, t in load_file(tmp_path / "plain/model.safetensors").items()}
    config, _, tensors = contents(tmp_path / "out")
    assert {n: t.shape for n, t in tensors.items()} == shapes
    assert "quantization_config" not in config


def test_dense_in_bf16_says_what_rounding_loses(tokens: Tensor, tmp_path: Path) -> None:
    model = make_model("llama").bfloat16()
    quantized = fgmp.quantize(model, tokens[:4], Recipe(fp4=0.6, clip="off"))
    fgmp.save(quantized, tmp_path / "in")
    result = export(tmp_path / "in", tmp_path / "out", "dense")
    config, record, tensors = contents(tmp_path / "out")
    assert config["dtype"] == "bfloat16" and record == result.to_dict()
    largest = 0.0
    for name, linear in mixed_linears(quantized).items():
        exact, stored = linear.weight.double(), tensors[f"{name}.weight"]
        assert stored.dtype == torch.bfloat16
        error = (stored.double() - exact).abs()
        largest = max(largest, (error / exact.abs()).nan_to_num().max().item())
        assert result.weight_error[name] == pytest.approx((error.norm() / exact.norm()).item())
    assert result.max_relative_error == pytest.approx(largest)
    assert 0 < largest <= 2.0**-8  # half a unit in the last of eight bits
    assert result.kl is None


def test_dense_refuses_a_dtype_without_the_range(folders: dict[str, Path], tmp_path: Path) -> None:
    model = fgmp.load(folders["mixed"])
    first = next(iter(mixed_linears(model).values()))
    first.weight_t.fill_(1e3)
    with pytest.raises(InputError, match=r"q_proj.weight: torch.float16 cannot hold its values"):
        export(folders["mixed"], tmp_path / "out", "dense", model=nn.Module.half(model))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("mode", "mixed"), [("fp4", None), ("fp8", None), ("mixed", "per-layer")])
@torch.no_grad()
def test_compressed_tensors_reads_the_weights(
    mode: str, mixed: str | None, folders: dict[str, Path], tokens: Tensor, tmp_path: Path
) -> None:
    """Transformers' loader, with compressed-tensors' configuration, names and decompression."""
    pytest.importorskip("compressed_tensors")
    result = export(folders[mode], tmp_path / "out", "compressed-tensors", mixed=mixed)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert logits(loaded, tokens).isfinite().all()  # the first pass decompresses
    original = mixed_linears(fgmp.load(folders[mode]))
    assert len(original) == sum(result.linears.values())
    for name, linear in original.items():
        read = loaded.get_submodule(name).weight.double()
        error = ((read - linear.weight).norm() / linear.weight.norm()).item()
        assert abs(error - result.weight_error[name]) < 2.0**-8  # bf16
    assert loaded.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("to", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("mode", POLICIES)
def test_uniform_exports_keep_the_weights(
    to: str, mode: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    result = export(folders[mode], tmp_path / "out", to)
    config, record, tensors = contents(tmp_path / "out")
    assert record == result.to_dict()
    assert set(result.weight_error.values()) == {0.0}
    linears = mixed_linears(fgmp.load(folders[mode]))
    other = {"fp4": "nvfp4", "fp8": "fp8"}[mode]
    assert {k: n for k, n in result.linears.items() if n} == {other: len(linears)}
    assert result.mixed_sites == 0
    assert result.searched_sites == (8 if mode == "fp4" else 0)
    assert config["quantization_config"]["quant_method"] == to
    assert config["quantization_config"]["ignore"] == ["lm_head"]
    assert (tmp_path / "out/hf_quant_config.json").exists() == (to == "modelopt")
    assert not [n for n in tensors if "input_site" in n or n.endswith(("weight_t", "weight_shape"))]
    assert tensors["model.embed_tokens.weight"].dtype == torch.float32
    name, linear = next(iter(linears.items()))
    packed = linear.packed
    bytes_of = packed.low if mode == "fp4" else packed.fp8
    part = "weight_packed" if (to, mode) == ("compressed-tensors", "fp4") else "weight"
    assert torch.equal(tensors[f"{name}.{part}"].view(torch.uint8), bytes_of)


@torch.no_grad()
def test_the_measured_loss_is_that_of_max_scales(
    folders: dict[str, Path], tokens: Tensor, tmp_path: Path
) -> None:
    result = export(folders["fp4"], tmp_path / "out", "modelopt", windows=tokens)
    model, emulated = fgmp.load(folders["fp4"]), fgmp.load(folders["fp4"])
    for site in sites(emulated).values():
        assert site.scales == "search"
        site.scales, site._record = "max", None
    reference = next_token_log_probabilities(model, tokens)
    kl = divergence_of(next_token_log_probabilities(emulated, tokens), reference).sum()
    assert result.kl == kl.item() / tokens[:, 1:].numel() > 0


@torch.no_grad()
def test_a_mixed_checkpoint_per_layer(
    folders: dict[str, Path], tokens: Tensor, tmp_path: Path
) -> None:
    result = export(
        *(folders["mixed"], tmp_path / "out", "compressed-tensors"),
        mixed="per-layer",
        windows=tokens,
    )
    config, record, tensors = contents(tmp_path / "out")
    model = fgmp.load(folders["mixed"])
    assert result.mixed_sites == len(sites(model)) and result.kl is not None and result.kl > 0
    assert record["kl"] == result.kl
    groups = config["quantization_config"]["config_groups"].values()
    targets = [name for group in groups for name in group["targets"]]
    assert sorted(targets) == sorted(mixed_linears(model))
    assert all(result.linears.values()), "this checkpoint has linears of both formats"
    for group in groups:
        part = "weight_packed" if group["weights"]["num_bits"] == 4 else "input_scale"
        assert all(f"{name}.{part}" in tensors for name in group["targets"])
    # Linears that read one tensor have one format and one scale, which fused layers need.
    for owner in sites(model):
        if owner.endswith("q_proj"):
            stem = owner.removesuffix("q_proj")
            parts = [{n.rpartition(".")[2] for n in tensors if n.startswith(f"{stem}{x}_proj.")}
                     for x in "qkv"]  # fmt: skip
            assert parts[0] == parts[1] == parts[2]


def test_refusals_leave_nothing_behind(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").write_text("")
    plain = tmp_path / "plain"
    make_model("llama").save_pretrained(plain)
    for arguments, options, message in (
        ((folders["mixed"], out, "modelopt"), {}, "q_proj.weight: has FP4 and FP8 blocks"),
        ((folders["fp4"], out, "gguf"), {}, "to must be one of"),
        ((folders["fp4"], out, "dense"), {"mixed": "per-layer"}, "needs the target"),
        ((folders["fp4"], used, "dense"), {}, "already exists"),
        ((plain, out, "dense"), {}, "not an fgmp checkpoint"),
        ((tmp_path / "none", out, "dense"), {}, "config.json"),
    ):
        with pytest.raises(InputError, match=message):
            export(*arguments, **options)
        assert not out.exists()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in folders["fp4"].iterdir():
        data = bytearray(path.read_bytes())
        if path.suffix == ".safetensors":
            data[-1] ^= 1
        (damaged / path.name).write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC-32"):
        export(damaged, out, "dense")
    assert not out.exists()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_an_export_that_ends_early_leaves_nothing_behind(
    error: BaseException,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The tensors are written last, when everything else is there."""
    seen: list[str] = []

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        seen.extend(p.name for p in path.parent.iterdir())
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises((InputError, KeyboardInterrupt)):
        export(folders["fp4"], tmp_path / "out", "modelopt")
    assert {"config.json", RECORD} <= set(seen)
    assert not list(tmp_path.iterdir())


def test_other_files_are_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for path in folders["fp4"].iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "templates").mkdir()
    (source / "templates" / "a.jinja").write_text("x")
    for name in ("fgmp_run.json", "fgmp_scores.json", "README.md"):  # of the checkpoint alone
        (source / name).write_text("{}")
    export(source, tmp_path / "out", "modelopt")
    assert sorted(p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")
                  ) == sorted([
        *("config.json", RECORD, "generation_config.json", "hf_quant_config.json"),
        *("model.safetensors", "templates", "templates/a.jinja", "tokenizer.json"),
    ])  # fmt: skip


def test_thresholds_are_those_of_the_formats(folders: dict[str, Path]) -> None:
    """What ``plan`` takes for a site of one format is what such checkpoints have."""
    for name, threshold in (("fp4", THRESHOLD_ALL_FP4), ("fp8", THRESHOLD_ALL_FP8)):
        thresholds = {int(s.threshold) for s in sites(fgmp.load(folders[name])).values()}
        assert thresholds == {threshold}
