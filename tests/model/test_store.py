"""What was quantized, saved and loaded is the same model to the bit, whoever loads it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, make_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig

import fgmp
from fgmp import CheckpointError, InputError, Recipe
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.model.linear import mixed_linears
from fgmp.model.store import (
    config_of,
    tensors_to_save,
)
from fgmp.pack import checkpoint
from fgmp.pack.checksums import of_tensor as checksum

FAST = Recipe(fp4=0.6, clip="off")


def quantized(family: str, tokens: Tensor, recipe: Recipe = FAST) -> nn.Module:
    return fgmp.quantize(make_model(family), tokens[:4], recipe)


@torch.no_grad()
def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens).logits


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_bit_identical_after_loading(
    family: str, tokens: Tensor, tmp_path: Path
) -> None:
    original = logits(make_model(family), tokens)
    model = quantized(family, tokens)
    wanted = logits(model, tokens)
    assert not torch.equal(wanted, original)
    fgmp.save(model, tmp_path / "out")
    ours = fgmp.load(tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for loaded in (ours, theirs):
        assert type(loaded) is type(model)
        assert not loaded.training
        assert not any(p.requires_grad for p in loaded.parameters())
        assert torch.equal(logits(loaded, tokens), wanted)
        assert config_of(loaded) == config_of(model)
    # And once more around.
    fgmp.save(theirs, tmp_path / "again")
    assert tensors_equal(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "out"))
    assert config_in(tmp_path / "again") == config_in(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "again" / "config.json").read_text()


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def tensors_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )


@pytest.mark.parametrize("policy", ["fp8", "nvfp4"])
def test_uniform_packs(policy: str, tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("llama", tokens, Recipe(policy=policy, clip="off"))
    assert {m.packed.mode for m in mixed_linears(model).values()} == {policy.removeprefix("nv")}
    fgmp.save(model, tmp_path / "out")
    assert torch.equal(logits(fgmp.load(tmp_path / "out"), tokens), logits(model, tokens))


def test_other_dtypes(tokens: Tensor, tmp_path: Path) -> None:
    # Not .bfloat16(), which would also round what Transformers keeps in fp32, as it does no more
    # after loading: the frequencies of the rotary embedding.
    model = AutoModelForCausalLM.from_config(FAMILIES["llama"](), dtype=torch.bfloat16).eval()
    model = fgmp.quantize(model, tokens[:4], FAST, dtype="stored")
    wanted = logits(model, tokens)
    assert wanted.dtype == torch.bfloat16
    fgmp.save(model, tmp_path / "out")
    loaded = fgmp.load(tmp_path / "out")
    assert torch.equal(logits(loaded, tokens), wanted)
    wider = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert wider.model.norm.weight.dtype == torch.float32
    for name, linear in mixed_linears(wider).items():
        assert linear.packed.t.dtype == torch.float32
        assert torch.equal(linear.weight, mixed_linears(loaded)[name].weight)


def test_biased_fused_experts(tokens: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    config = GptOssConfig(
        vocab_size=128,
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1)
    fgmp.quantize(model, tokens[:4], FAST)
    fgmp.save(model, tmp_path / "out")
    assert torch.equal(logits(fgmp.load(tmp_path / "out"), tokens), logits(model, tokens))


@pytest.mark.parametrize(
    ("family", "excluded"),
    [("mixtral", "*.experts.1.*"), ("gpt2", "*.c_fc"), ("llama", "*.layers.0.*")],
)
def test_what_was_excluded_is_kept(
    family: str, excluded: str, tokens: Tensor, tmp_path: Path
) -> None:
    model = quantized(family, tokens, Recipe(clip="off", exclude=(excluded,)))
    assert any(
        n != "lm_head.weight" and "gate" not in n for n in config_of(model).result["unquantized"]
    )
    fgmp.save(model, tmp_path / "out")
    assert torch.equal(logits(fgmp.load(tmp_path / "out"), tokens), logits(model, tokens))


def test_a_named_head_is_quantized(tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("qwen2", tokens, Recipe(clip="off", include=("*", "lm_head")))
    assert "lm_head" in mixed_linears(model)
    fgmp.save(model, tmp_path / "out")
    assert torch.equal(logits(fgmp.load(tmp_path / "out"), tokens), logits(model, tokens))


def test_shards(tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("llama", tokens)
    fgmp.save(model, tmp_path / "out", max_shard_size="20KB")
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and set(index["weight_map"].values()) == set(files)
    assert not (tmp_path / "out/model.safetensors").exists()
    for load in (fgmp.load, AutoModelForCausalLM.from_pretrained):
        assert torch.equal(logits(load(tmp_path / "out"), tokens), logits(model, tokens))


def test_files_are_plain_safetensors(tokens: Tensor, tmp_path: Path) -> None:
    """Anyone can list, slice and map them, and find every tensor's checksum."""
    fgmp.save(quantized("llama", tokens), tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", framework="np") as file:
        sums = json.loads(file.metadata()["fgmp_crc32"])
        assert file.metadata()["format"] == "pt"
        assert set(sums) == set(file.keys())
        low = file.get_slice("model.layers.0.mlp.up_proj.weight_low")
        assert low[3:5].shape == (2, 32) and low.get_dtype() == "U8"
    for name, tensor in load_file(tmp_path / "out/model.safetensors").items():
        assert checksum(tensor) == sums[name]


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("load", [fgmp.load, AutoModelForCausalLM.from_pretrained])
def test_damage_to_what_is_not_quantized(
    load: Callable[[Path], nn.Module], name: str, tokens: Tensor, tmp_path: Path
) -> None:
    """Transformers would load it without a word."""
    fgmp.save(quantized("llama", tokens), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start, _ = json.loads(raw[8 : 8 + length])[name]["data_offsets"]
    raw[8 + length + start] ^= 1
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=rf"{name}: its bytes must have CRC-32"):
        load(tmp_path / "out")


def test_the_configuration_is_documented(tokens: Tensor, tmp_path: Path) -> None:
    fgmp.save(quantized("llama", tokens), tmp_path / "out")
    raw = config_in(tmp_path / "out")
    assert raw["model_type"] == "llama" and raw["architectures"] == ["LlamaForCausalLM"]
    text = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    table = text.partition("`quantization_config`:")[2].partition("Readers use")[0]
    documented = [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")]
    documented.remove("shared")  # absent where nothing is shared
    assert list(raw["quantization_config"]) == documented
    site = raw["quantization_config"]["sites"]["model.layers.0.mlp.gate_proj"]
    assert site["linears"] == [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up")]
    assert (site["rule"], site["scales"]) == ("benefit", "search")
    assert 0 <= site["fp4_fraction"] <= 1
    linears = [n for s in raw["quantization_config"]["sites"].values() for n in s["linears"]]
    stored = {n.rpartition(".weight_")[0] for n in tensors_in(tmp_path / "out") if ".weight_" in n}
    assert sorted(linears) == sorted(stored)


def test_tied_tensors_are_stored_once(tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("llama", tokens)
    fgmp.save(model, tmp_path / "out")
    names = set(tensors_in(tmp_path / "out"))
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    loaded = fgmp.load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_a_used_folder_is_refused(tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("llama", tokens)
    used, empty = tmp_path / "used", tmp_path / "empty"
    used.mkdir()
    (used / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="used: already exists; choose another folder"):
        fgmp.save(model, used)
    with pytest.raises(InputError, match=r"mine\.txt: already exists"):
        fgmp.save(model, used / "mine.txt")
    assert (used / "mine.txt").read_text() == "keep me"
    empty.mkdir()
    fgmp.save(model, empty)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "used"]


def test_packed_linears_must_be_where_the_configuration_says(
    tokens: Tensor, tmp_path: Path
) -> None:
    model = quantized("llama", tokens)
    layer = model.model.layers[0].self_attn
    layer.q_proj = nn.Sequential(layer.q_proj)
    with pytest.raises(InputError, match=r"q_proj: must be a packed linear .*, got Sequential"):
        fgmp.save(model, tmp_path / "out")
    del layer.q_proj
    with pytest.raises(InputError, match=r"q_proj: must be a packed linear .*, got NoneType"):
        fgmp.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_offloaded_tensors_are_not_saved(tokens: Tensor, tmp_path: Path) -> None:
    model = quantized("llama", tokens)
    model.model.norm.to("meta")
    with pytest.raises(InputError, match=r"tensor model\.norm\.weight is offloaded"):
        fgmp.save(model, tmp_path / "out")


def test_an_unquantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM is not a model that fgmp quantized"):
        fgmp.save(make_model("llama"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_generation_config_come_along(tokens: Tensor, tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    fgmp.save(quantized("llama", tokens), tmp_path / "out", Tokenizer())
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json",
        "fgmp_run.json",
        "fgmp_scores.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    }


def test_a_card_comes_along_and_no_checksum_covers_it(tokens: Tensor, tmp_path: Path) -> None:
    """``fgmp compare`` changes it; every other file is under a checksum."""
    fgmp.save(quantized("llama", tokens), tmp_path / "out", card="# A card\n")
    assert (tmp_path / "out" / "README.md").read_text() == "# A card\n"
    (tmp_path / "out" / "README.md").write_text("changed")
    inspect_checkpoint(tmp_path / "out")
    (tmp_path / "out" / "fgmp_scores.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"fgmp_scores\.json: its bytes must have CRC-32"):
        inspect_checkpoint(tmp_path / "out")


# Modules that are not of Transformers.


class Net(nn.Module):
    """A plain network; ``config`` is its own and no Transformers configuration."""

    def __init__(self, width: int = 24, inner: int = 20) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.config = {"width": width}
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


def net_loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return (model(x) - x.roll(1, -1)).square().sum(), len(x)


@pytest.fixture
def net() -> nn.Module:
    samples = torch.randn(4, 10, 24, generator=torch.Generator().manual_seed(0))
    return fgmp.quantize(Net(), samples, Recipe(clip="off"), loss=net_loss)


def test_any_module_is_saved_and_loaded_into_a_skeleton(net: nn.Module, tmp_path: Path) -> None:
    fgmp.save(net, tmp_path / "out")
    x = torch.randn(5, 24)
    skeleton = Net()
    skeleton.norm.weight.data.fill_(7)
    loaded = fgmp.load(tmp_path / "out", skeleton)
    assert loaded is skeleton
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))
    assert config_of(loaded) == config_of(net)
    fgmp.save(loaded, tmp_path / "again")
    assert tensors_equal(tensors_in(tmp_path / "again"), tensors_in(tmp_path / "out"))


def test_any_module_needs_its_skeleton(net: nn.Module, tmp_path: Path) -> None:
    fgmp.save(net, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"architectures must name .* pass `model`"):
        fgmp.load(tmp_path / "out")


@pytest.mark.parametrize(
    ("skeleton", "fault"),
    [
        (
            lambda: Net(inner=32),
            r"up\.weight_shape: must be \(32, 24\) for this model, got \(20, 24\)",
        ),
        (lambda: with_norm(12), r"norm\.weight.*\[12\].*\[24\]|norm\.weight.*\[24\].*\[12\]"),
        (lambda: without("up"), "up: the model has no such layer"),
        (lambda: replaced("up", nn.ReLU()), "up: must be a linear layer, got ReLU"),
        (
            lambda: replaced("norm", nn.Identity()),
            r"tensor norm\.bias belongs to no part of this model",
        ),
        (lambda: replaced("extra", nn.Linear(2, 2)), r"missing \['extra\.bias', 'extra\.weight'\]"),
    ],
    ids=["linear shape", "other shape", "no layer", "no linear", "unexpected", "missing"],
)
def test_a_skeleton_that_does_not_fit(
    skeleton: Callable[[], nn.Module], fault: str, net: nn.Module, tmp_path: Path
) -> None:
    fgmp.save(net, tmp_path / "out")
    with pytest.raises(CheckpointError, match=fault):
        fgmp.load(tmp_path / "out", skeleton())


def with_norm(width: int) -> nn.Module:
    return replaced("norm", nn.LayerNorm(width))


def without(name: str) -> nn.Module:
    net = Net()
    delattr(net, name)
    return net


def replaced(name: str, module: nn.Module) -> nn.Module:
    net = Net()
    setattr(net, name, module)
    return net


def test_a_transformers_model_of_another_size_is_refused(tokens: Tensor, tmp_path: Path) -> None:
    fgmp.save(quantized("llama", tokens), tmp_path / "out")
    change_config(tmp_path / "out", intermediate_size=112)
    for load in (fgmp.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(
            CheckpointError,
            match=r"gate_proj\.weight_shape: must be \(112, 64\) for this model, got \(96, 64\)",
        ):
            load(tmp_path / "out")


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_a_parameter_that_the_files_lack_is_told(name: str, tokens: Tensor, tmp_path: Path) -> None:
    """Also if nothing says that it was there."""
    model = quantized("llama", tokens)
    state = tensors_to_save(model)
    del state[name]
    checkpoint.write(
        tmp_path / "out",
        state,
        {
            **json.loads(model.config.to_json_string()),
            "architectures": ["LlamaForCausalLM"],
            "quantization_config": config_of(model).to_dict(),
        },
    )
    for load in (fgmp.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=f"tensor {name} is missing from the checkpoint"):
            load(tmp_path / "out")


def change_config(folder: Path, **changes: Any) -> None:
    (folder / "config.json").write_text(json.dumps({**config_in(folder), **changes}))


def test_generating_with_a_cache_equals_running_whole(tokens: Tensor) -> None:
    """Sites see single tokens then; a block's decision must not depend on its neighbours."""
    model = quantized("llama", tokens)
    prompt = tokens[:1, :8]
    cached = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for length in range(8, 16):
        whole = logits(model, cached[:, :length])[0, -1]
        best = whole.topk(2)
        # fp32 GEMMs of different shapes may round differently: a near tie proves nothing.
        if best.values[0] - best.values[1] > 1e-3:
            assert cached[0, length] == best.indices[0]
