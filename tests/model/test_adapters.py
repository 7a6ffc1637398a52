"""LoRA adapters on packed linears: they train, everything else stays, and PEFT saves them."""

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from peft import IA3Config, LoraConfig
from torch import Tensor
from transformers.trainer_utils import validate_quantization_for_training

import fgmp
from fgmp import InputError, Recipe
from fgmp.model.adapters import add_lora, load_lora
from fgmp.model.linear import mixed_linears

# PEFT 0.21 reads a property that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TOKENS = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters") / "checkpoint"
    fgmp.save(fgmp.quantize(make_model("llama"), TOKENS, Recipe(clip="off")), path)
    return path


def lora(**options: Any) -> LoraConfig:
    values = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**values, **options})


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


def trained(model: Any) -> list[float]:
    """Losses of ten steps on a few sequences."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(10):
        loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_an_adapter_trains_and_comes_back(folder: Path, tmp_path: Path, targets: Any) -> None:
    base = fgmp.load(folder)
    before = copy.deepcopy(base.state_dict())
    unadapted = logits(base)
    model = add_lora(base, lora(target_modules=targets))
    assert torch.equal(logits(model), unadapted), "a new adapter adds zero"
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trainable and all(".lora_" in name for name in trainable)
    adapted = len(mixed_linears(base)) if targets == "all-linear" else 4
    assert len(trainable) == 2 * adapted
    losses = trained(model)
    assert losses[-1] < losses[0] - 0.1
    result = logits(model)
    assert not torch.equal(result, unadapted)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_lora(fgmp.load(folder), tmp_path / "adapter")
    assert torch.equal(logits(loaded), result)
    assert not any(p.requires_grad for p in loaded.parameters())
    further = load_lora(fgmp.load(folder), tmp_path / "adapter", train=True)
    assert trained(further)[-1] < losses[-1]
    with model.disable_adapter():
        assert torch.equal(logits(model), unadapted)
    after = model.unload()
    assert before.keys() == after.state_dict().keys()
    assert all(torch.equal(before[name], t) for name, t in after.state_dict().items())
    after.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(fgmp.load(tmp_path / "base")), unadapted)


def test_gradients_pass_linears_without_an_adapter(folder: Path) -> None:
    """As those of the dequantized weights: an adapter below is trained through packed linears."""
    model = add_lora(fgmp.load(folder), lora(target_modules=r".*layers\.0\.self_attn\.q_proj"))
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    (b,) = (p for name, p in model.named_parameters() if "lora_B" in name)
    assert b.grad is not None and b.grad.abs().max() > 0


def test_transformers_trains_only_with_an_adapter(folder: Path) -> None:
    base = fgmp.load(folder)
    with pytest.raises(ValueError, match="purely quantized models"):
        validate_quantization_for_training(base)
    validate_quantization_for_training(add_lora(base, lora()))


def test_an_adapter_is_not_merged(folder: Path) -> None:
    model = add_lora(fgmp.load(folder), lora())
    with pytest.raises(InputError, match="cannot be merged into packed weights"):
        model.merge_and_unload()


def test_an_adapted_model_is_no_checkpoint(folder: Path, tmp_path: Path) -> None:
    base = fgmp.load(folder)
    add_lora(base, lora())
    with pytest.raises(InputError, match=r"q_proj: must be a packed linear .* PEFT saves adapters"):
        base.save_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lora(init_lora_weights="pissa"), "init_lora_weights must not depend on the weight"),
        (IA3Config(target_modules=["q_proj"], feedforward_modules=[]), "must be LoRA, got a IA3"),
    ],
)
def test_other_adapters_are_refused(folder: Path, config: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_lora(fgmp.load(folder), config)


def test_variants_that_read_the_weight_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"unsupported variant .*use_dora"):
        add_lora(fgmp.load(folder), lora(use_dora=True))


def test_the_callers_configuration_is_not_changed(folder: Path) -> None:
    config = lora(target_modules="all-linear")
    add_lora(fgmp.load(folder), config)
    assert config.target_modules == "all-linear" and config._custom_modules is None


def test_an_unquantized_model_is_refused() -> None:
    with pytest.raises(InputError, match="has no packed linears: use PEFT itself"):
        add_lora(make_model("llama"), lora())


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "peft" else find(name)
    )
    with pytest.raises(InputError, match="need the package peft"):
        add_lora(fgmp.load(folder), lora())
