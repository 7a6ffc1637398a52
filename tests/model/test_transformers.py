"""``from_pretrained`` of fgmp checkpoints: what Transformers is told, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import fgmp
from fgmp import Recipe
from fgmp.errors import CheckpointError
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
    """So that ``save_pretrained`` refuses, and code that asks for a quantizer finds one."""
    model = make_model("llama")
    config = CheckpointConfig(sites={}, recipe={"fp4": 0.5})
    mark_quantized(model, config)
    assert model.hf_quantizer.quantization_config.to_dict() == config.to_dict()
    plain = nn.Linear(2, 2)
    mark_quantized(plain, config)
    assert not hasattr(plain, "hf_quantizer")
