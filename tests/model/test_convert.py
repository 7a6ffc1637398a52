"""Packed linears in place of a model's own: put in, taken out again, shared."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.errors import CheckpointError
from fgmp.model.convert import Replacement, install, packed_linears, sharing_copy
from fgmp.model.linear import MixedLinear, mixed_linears, sites
from fgmp.model.select import linearize
from fgmp.model.store import config_of

FAST = Recipe(fp4=0.6, clip="off", compensate=False)


@pytest.fixture(scope="module")
def quantized() -> nn.Module:
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    return fgmp.quantize(make_model("qwen2"), tokens, FAST)


@pytest.fixture
def linears(quantized: nn.Module) -> dict[str, MixedLinear]:
    """Packed linears for an unquantized model of the same family."""
    weights = {name: linear.packed for name, linear in mixed_linears(quantized).items()}
    records = {name: site.record for name, site in sites(quantized).items()}
    linears_of = {owner: site.linears for owner, site in config_of(quantized).sites.items()}
    return packed_linears(make_model("qwen2"), weights, records, linears_of)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=torch.arange(16).unsqueeze(0)).logits


def test_packed_linears_are_those_of_the_quantized_model(
    quantized: nn.Module, linears: dict[str, MixedLinear]
) -> None:
    """One site per owner, which its other readers share; biases are the original's."""
    model = make_model("qwen2")
    owners = {owner: site.linears for owner, site in config_of(quantized).sites.items()}
    for owner, names in owners.items():
        assert {id(linears[name].input_site) for name in names} == {id(linears[owner].input_site)}
        for name in names:
            assert ("input_site" in dict(linears[name].named_modules())) == (name == owner)
    assert any(linear.bias is not None for linear in linears.values())
    Replacement(linears).put(model)
    assert torch.equal(logits(model), logits(quantized))
    assert not any(linear.training for linear in linears.values())


def test_within_is_for_a_while(linears: dict[str, MixedLinear]) -> None:
    """Linears and values come back as the very objects that they were, also after an error."""
    model = make_model("qwen2")
    before, modules = logits(model), dict(model.named_modules())
    data = {name: p.data_ptr() for name, p in model.named_parameters()}
    norm = model.model.norm.weight
    value = torch.full_like(norm, 2.0)
    replacement = Replacement(linears, {"model.norm.weight": value})
    with replacement.within(model):
        assert model.model.norm.weight is norm and torch.equal(norm, value)
        assert mixed_linears(model).keys() == linears.keys()
        changed = logits(model)
    with pytest.raises(RuntimeError, match="inside"), replacement.within(model):
        assert torch.equal(logits(model), changed)
        raise RuntimeError("inside")
    assert {n: id(m) for n, m in model.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == data
    assert torch.equal(logits(model), before) and not torch.equal(changed, before)


def test_a_replacement_that_fails_is_undone() -> None:
    """A value for a parameter that does not exist: the linears are taken out again."""
    model = make_model("llama")
    name = "model.layers.0.mlp.up_proj"
    old = model.get_submodule(name)
    replacement = Replacement({name: nn.Linear(64, 96)}, {"no.such": torch.zeros(1)})
    with pytest.raises(AttributeError), replacement.within(model):
        raise AssertionError("unreachable")
    assert model.get_submodule(name) is old


def test_values_reach_whoever_shares_the_parameter() -> None:
    """A tied head sees the new embedding."""
    model = make_model("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    value = torch.zeros_like(model.lm_head.weight)
    Replacement({}, {"model.embed_tokens.weight": value}).put(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not logits(model).any()


def test_a_copy_shares_every_tensor(linears: dict[str, MixedLinear]) -> None:
    """Replacing layers of it leaves the model as it was."""
    model = make_model("qwen2")
    linearize(model)
    before = logits(model)
    copy = sharing_copy(model)
    assert copy is not model and type(copy) is type(model)
    for (name, a), (_, b) in zip(
        [*model.named_parameters(), *model.named_buffers()],
        [*copy.named_parameters(), *copy.named_buffers()],
        strict=True,
    ):
        assert a is b, name
    assert not {id(m) for m in model.modules()} & {id(m) for m in copy.modules()}
    Replacement(linears).put(copy)
    assert torch.equal(logits(model), before) and not mixed_linears(model)
    assert not torch.equal(logits(copy), before)


def test_installing_is_in_place(quantized: nn.Module) -> None:
    model = make_model("qwen2")
    weights = {name: linear.packed for name, linear in mixed_linears(quantized).items()}
    records = {name: site.record for name, site in sites(quantized).items()}
    linears_of = {owner: site.linears for owner, site in config_of(quantized).sites.items()}
    install(model, weights, records, linears_of)
    assert torch.equal(logits(model), logits(quantized))


def test_a_layer_that_is_quantized_already_cannot_be_loaded_into(
    quantized: nn.Module, tmp_path: Path
) -> None:
    fgmp.save(quantized, tmp_path / "out")
    with pytest.raises(CheckpointError, match="must be a linear layer, got MixedLinear"):
        fgmp.load(tmp_path / "out", fgmp.load(tmp_path / "out"))
