"""``from_pretrained`` and ``save_pretrained``, and what else of Transformers runs packed models."""

import copy
import json
import pickle
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from app.cases import a_model, a_tokenizer
from conftest import make_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, pipeline
from transformers.utils import hub

import fgmp
from fgmp import Recipe
from fgmp.errors import CheckpointError, InputError
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.model.cache import packed_cache
from fgmp.model.linear import mixed_linears
from fgmp.model.transformers import FgmpConfig, FgmpQuantizer, mark_quantized
from fgmp.pack.checkpoint import FORMAT_VERSION, QUANT_METHOD, CheckpointConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers") / "checkpoint"
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    fgmp.save(fgmp.quantize(make_model("llama"), tokens, Recipe(clip="off")), path)
    return path


def config_in(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    return to


def test_the_configuration_is_carried_unchanged(folder: Path) -> None:
    """Also keys that this version does not know, and not as a reference to its own state."""
    values = {**config_in(folder)["quantization_config"], "later": {"key": [1]}}
    config = FgmpConfig(**values)
    assert config.quant_method == QUANT_METHOD and config.to_dict() == values
    config.to_dict()["later"]["key"].append(2)
    assert config.to_dict() == values
    loaded = AutoConfig.from_pretrained(folder)
    assert loaded.quantization_config == config_in(folder)["quantization_config"]


def test_an_unknown_version_is_refused_before_anything_is_built(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = copied(folder, tmp_path / "broken")
    config = config_in(broken)
    config["quantization_config"]["format_version"] = FORMAT_VERSION + 1
    (broken / "config.json").write_text(json.dumps(config))
    built: list[int] = []
    original = nn.Linear.__init__
    monkeypatch.setattr(
        nn.Linear, "__init__", lambda *a, **k: (built.append(1), original(*a, **k))[1]
    )
    with pytest.raises(CheckpointError, match="format_version"):
        AutoModelForCausalLM.from_pretrained(broken)
    assert not built


def test_a_loaded_model_is_for_inference(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert mixed_linears(model) and not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert isinstance(model.hf_quantizer, FgmpQuantizer)
    assert not model.hf_quantizer.is_trainable and not model.hf_quantizer.is_serializable()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_dtype_is_that_of_what_is_not_quantized(dtype: torch.dtype, folder: Path) -> None:
    """Codes and scales keep theirs, or the model would be another."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.model.embed_tokens.weight.dtype == dtype
    reference = mixed_linears(fgmp.load(folder))
    for name, linear in mixed_linears(model).items():
        assert all(
            torch.equal(linear.packed.tensors()[n], t)
            and linear.packed.tensors()[n].dtype == t.dtype
            for n, t in reference[name].packed.tensors().items()
        )
        record = linear.input_site.record
        assert record.r == reference[name].input_site.record.r


def test_a_quantized_model_is_marked() -> None:
    """So that ``save_pretrained`` is ours, and code that asks for a quantizer finds one."""
    model = make_model("llama")
    config = CheckpointConfig(sites={}, recipe={"fp4": 0.5})
    mark_quantized(model, config)
    assert model.hf_quantizer.quantization_config.to_dict() == config.to_dict()
    plain = nn.Linear(2, 2)
    mark_quantized(plain, config)
    assert not hasattr(plain, "hf_quantizer")


# --- saving --------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_save_pretrained_writes_the_checkpoint_that_was_loaded(
    folder: Path, tmp_path: Path
) -> None:
    """Whoever loaded it, and after copies and pickles; without records of the run and scores."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "first")
    inspect_checkpoint(tmp_path / "first")  # every checksum, every rule
    assert config_in(tmp_path / "first") == config_in(folder)
    first, loaded = (load_file(f / "model.safetensors") for f in (tmp_path / "first", folder))
    assert first.keys() == loaded.keys()
    assert all(torch.equal(first[name], tensor) for name, tensor in loaded.items())
    expected = contents(tmp_path / "first")
    assert expected.keys() == contents(folder).keys() - {"fgmp_run.json", "fgmp_scores.json"}

    fgmp.load(tmp_path / "first").save_pretrained(tmp_path / "again")
    pickle.loads(pickle.dumps(model)).save_pretrained(tmp_path / "pickled")
    assert contents(tmp_path / "again") == contents(tmp_path / "pickled") == expected
    other = copy.deepcopy(model)
    other.model.norm.weight.data.fill_(2)
    other.save_pretrained(tmp_path / "changed")
    changed: Any = fgmp.load(tmp_path / "changed")
    assert (changed.model.norm.weight == 2).all() and not (model.model.norm.weight == 2).any()


def test_a_model_quantized_here_has_it_too(tmp_path: Path) -> None:
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(clip="off"))
    model.save_pretrained(tmp_path / "out", max_shard_size=20_000)
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_a_tokenizer_may_follow(folder: Path, tmp_path: Path) -> None:
    model = fgmp.load(folder)
    model.save_pretrained(tmp_path / "out")
    a_tokenizer().save_pretrained(tmp_path / "out")
    fgmp.load(tmp_path / "out")
    with pytest.raises(InputError, match="already exists"):
        model.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    "option", [{"state_dict": {"a": 1}}, {"variant": "fp16"}, {"distributed_checkpoint": True}]
)
def test_options_that_no_checkpoint_can_fulfil(
    folder: Path, tmp_path: Path, option: dict[str, Any]
) -> None:
    model = fgmp.load(folder)
    with pytest.raises(InputError, match=f"{next(iter(option))} is not supported"):
        model.save_pretrained(tmp_path / "out", **option)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


def test_the_writer_of_transformers_refuses(folder: Path, tmp_path: Path) -> None:
    """It would write no checksums, so what it wrote would not load."""
    with pytest.raises(ValueError, match="quantized with fgmp and is not serializable"):
        PreTrainedModel.save_pretrained(fgmp.load(folder), tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_a_whole_checkpoint_is_uploaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``push_to_hub``, and by ``save_pretrained`` with that option; the hub is a folder here."""
    model = fgmp.load(folder)
    uploads: list[tuple[str, dict[str, bytes]]] = []

    def create_repo(repo_id: str, **options: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(repo_id=f"me/{repo_id}")

    def upload(self: Any, working_dir: str, repo_id: str, **options: Any) -> None:
        uploads.append((repo_id, contents(Path(working_dir))))

    class Card:
        def save(self, path: str) -> None:
            Path(path).write_text("card")

    api = types.SimpleNamespace(create_repo=create_repo)
    monkeypatch.setattr(hub, "hf_api", lambda: api)
    monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *a, **k: Card())
    monkeypatch.setattr(type(model), "_upload_modified_files", upload)
    model.push_to_hub("one")
    model.save_pretrained(tmp_path / "two", push_to_hub=True)
    expected = contents(tmp_path / "two")
    assert uploads == [(f"me/{n}", {**expected, "README.md": b"card"}) for n in ("one", "two")]


# --- running -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint with a tokenizer, of a model that runs in fp32."""
    path = tmp_path_factory.mktemp("talker") / "checkpoint"
    tokens = torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))
    model = fgmp.quantize(a_model(layers=2), tokens, Recipe(clip="off"))
    fgmp.save(model, path, a_tokenizer())
    return path


PROMPT = torch.tensor([a_tokenizer()("The fox").input_ids])


def generated(model: Any, **options: Any) -> Tensor:
    mask = {"attention_mask": torch.ones_like(PROMPT), "pad_token_id": 0}
    output: Tensor = model.generate(PROMPT, **mask, max_new_tokens=12, do_sample=False, **options)
    return output


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map(talker: Path, device_map: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker, device_map=device_map)
    assert torch.equal(generated(model), generated(fgmp.load(talker)))


def test_generation_with_other_caches(talker: Path) -> None:
    """A static cache, one of packed keys and values, and none, of the same tokens."""
    model: Any = fgmp.load(talker)
    expected = generated(model)
    assert torch.equal(generated(model, cache_implementation="static"), expected)
    assert torch.equal(generated(model, use_cache=False), expected)
    tokens = torch.randint(1, 257, (4, 32), generator=torch.Generator().manual_seed(0))
    packed = generated(model, past_key_values=packed_cache(model, tokens, "fp8"))
    assert packed.shape == expected.shape and torch.equal(packed[:, :8], expected[:, :8])


def test_a_pipeline(talker: Path) -> None:
    expected = a_tokenizer().decode(generated(fgmp.load(talker))[0], skip_special_tokens=True)
    for name in (str(talker), fgmp.load(talker)):
        pipe = pipeline("text-generation", model=name, tokenizer=a_tokenizer())
        (answer,) = pipe("The fox", max_new_tokens=12, do_sample=False)
        assert answer["generated_text"] == expected


def test_a_compiled_model(talker: Path) -> None:
    """In one graph; the default backend only fuses what the reference runs one by one."""
    model: Any = fgmp.load(talker)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        expected = model(PROMPT, use_cache=False).logits
        torch.testing.assert_close(compiled(PROMPT, use_cache=False).logits, expected)
