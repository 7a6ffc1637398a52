"""The original's layout is that of Transformers' own ``save_pretrained``, for every family."""

from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, make_model
from safetensors.torch import load_file
from torch import nn

from fgmp.model.plain import obstacles, other_linear_layers, plain_tensors, skeleton
from fgmp.model.select import linearize, quantizable
from fgmp.model.store import tensors_to_save


@pytest.mark.parametrize("family", FAMILIES)
def test_undoes_what_linearize_did(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    model.save_pretrained(tmp_path)
    expected = load_file(tmp_path / "model.safetensors")
    structure = skeleton(model)
    assert type(structure) is type(model)
    assert all(p.is_meta for p in structure.parameters())
    linearize(model)
    plain = plain_tensors(structure, tensors_to_save(model))
    assert plain.keys() == expected.keys()
    for name, tensor in plain.items():
        assert torch.equal(tensor, expected[name]), name
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def reasons(family: str) -> dict[str, str]:
    model = make_model(family)
    structure = skeleton(model)
    linearize(model)
    return obstacles(structure, list(quantizable(model)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gpt_neox", "opt"])
def test_plain_linears_can_be_packed(family: str) -> None:
    assert reasons(family) == {}


@pytest.mark.parametrize(
    ("family", "name", "reason"),
    [
        ("gpt2", "transformer.h.0.attn.c_attn", "transposed"),
        ("mixtral", "model.layers.1.mlp.experts.3.down_proj", "fused experts"),
    ],
)
def test_other_matrices_cannot(family: str, name: str, reason: str) -> None:
    assert reason in reasons(family)[name]


def test_a_module_with_two_names_cannot() -> None:
    structure = skeleton(make_model("llama"))
    layers = structure.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    name = "model.layers.0.mlp.up_proj"
    assert obstacles(structure, [name]) == {
        name: "the model also uses it as model.layers.1.mlp.up_proj"
    }


def test_a_module_with_two_names_is_stored_under_both() -> None:
    """Transformers would initialize the other name randomly; embeddings it ties by itself."""
    model = make_model("llama")
    structure = skeleton(model)
    expected = plain_tensors(structure, tensors_to_save(model))
    assert "lm_head.weight" not in expected
    structure.model.layers[1].mlp = structure.model.layers[0].mlp
    tensors = {
        n: t for n, t in tensors_to_save(model).items() if not n.startswith("model.layers.1.mlp")
    }
    plain = plain_tensors(structure, tensors)
    assert plain.keys() == expected.keys()
    name = "mlp.up_proj.weight"
    assert torch.equal(plain[f"model.layers.1.{name}"], expected[f"model.layers.0.{name}"])


def test_other_linear_layers() -> None:
    structure = skeleton(make_model("llama"))
    names = [n for n, m in structure.named_modules() if isinstance(m, nn.Linear)]
    assert other_linear_layers(structure, names[2:-1]) == [*names[:2], "lm_head"]
