"""Every family's matrices become linears, the right ones are chosen, and logits do not change."""

import copy

import pytest
import torch
from conftest import FAMILIES, make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GptOssConfig, PreTrainedConfig, Qwen3MoeConfig
from transformers.pytorch_utils import Conv1D

from fgmp.errors import InputError
from fgmp.model.select import (
    Experts,
    linearize,
    matrices,
    other_linears,
    output_head,
    quantizable,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
MIXTURES: dict[str, PreTrainedConfig] = {
    # Experts with biases, transposed, and a gate of their own with interleaved columns.
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, pad_token_id=0),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2
    ),
}

NAMES = {
    "llama": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen2": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "qwen3": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"},
    "gpt2": {"c_attn", "c_proj", "c_fc"},
    "gpt_neox": {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"},
    "opt": {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"},
    "mixtral": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "gpt_oss": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
    "qwen3_moe": {"q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"},
}
ROUTER = {
    "mixtral": "model.layers.{}.mlp.gate",
    "qwen3_moe": "model.layers.{}.mlp.gate",
    "gpt_oss": "model.layers.{}.mlp.router",
}


def model_of(family: str) -> nn.Module:
    if family in FAMILIES:
        return make_model(family)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[family]).eval()
    for name, parameter in model.named_parameters():
        if "embed" not in name and "norm" not in name:
            parameter.data.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("family", NAMES)
def test_chooses_every_matrix_but_head_and_router(family: str) -> None:
    model = model_of(family)
    linearize(model)
    chosen = quantizable(model)
    assert {name.rpartition(".")[2] for name in chosen} == NAMES[family]
    for name, linear in chosen.items():
        assert model.get_submodule(name) is linear
    special = {"lm_head", "embed_out", ROUTER.get(family, "no router").format(0)}
    assert not special & chosen.keys()
    # Beyond them, embeddings and vectors, nothing is left out.
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = output_head(model)
    routers = {ROUTER.get(family, "").format(layer) + ".weight" for layer in range(2)}
    everything = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables and parameter is not head.weight and name not in routers
    )
    assert sum(linear.weight.numel() for linear in chosen.values()) >= 0.9 * everything


@pytest.mark.parametrize("family", NAMES)
def test_linearizing_does_not_change_logits(family: str, tokens: Tensor) -> None:
    model = model_of(family)
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        linearize(model)
        after = model(input_ids=tokens).logits
    assert not any(isinstance(m, Conv1D) for m in model.modules())
    # Experts are summed in another order, transposed ones multiplied in another: fp32 roundings
    # of sums of some hundred terms.
    assert (after - before).abs().max() <= 1e-5 * before.abs().max()
    assert before.std() > 0.1


@pytest.mark.parametrize("family", NAMES)
def test_linearizing_twice_is_linearizing_once(family: str) -> None:
    model = model_of(family)
    linearize(model)
    names = [name for name, _ in model.named_parameters()]
    linearize(model)
    assert [name for name, _ in model.named_parameters()] == names


def test_conv1d_is_transposed() -> None:
    model = model_of("gpt2")
    conv = model.transformer.h[0].mlp.c_fc
    assert isinstance(conv, Conv1D) and conv.weight.shape == (64, 256)
    linearize(model)
    linear = model.transformer.h[0].mlp.c_fc
    assert type(linear) is nn.Linear and linear.weight.shape == (256, 64)
    assert torch.equal(linear.weight, conv.weight.T) and torch.equal(linear.bias, conv.bias)


def test_experts_are_views_of_the_fused_tensor() -> None:
    model = model_of("mixtral")
    fused = model.model.layers[0].mlp.experts.gate_up_proj
    linearize(model)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, Experts) and len(experts) == 4
    for index, expert in enumerate(experts):
        assert expert.gate_up_proj.weight.data_ptr() == fused[index].data_ptr()


def test_biased_transposed_experts(tokens: Tensor) -> None:
    model = model_of("gpt_oss")
    fused = copy.deepcopy(model.model.layers[0].mlp.experts)
    linearize(model)
    experts = model.model.layers[0].mlp.experts
    assert fused.is_transposed
    for index, expert in enumerate(experts):
        assert torch.equal(expert.gate_up_proj.weight, fused.gate_up_proj[index].T)
        assert torch.equal(expert.gate_up_proj.bias, fused.gate_up_proj_bias[index])
        assert torch.equal(expert.down_proj.weight, fused.down_proj[index].T)
        assert torch.equal(expert.down_proj.bias, fused.down_proj_bias[index])


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "gpt2"])
def test_an_empty_model_gets_the_same_names(family: str) -> None:
    full = model_of(family)
    config = MIXTURES[family] if family in MIXTURES else FAMILIES[family]()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    linearize(full)
    linearize(empty)
    assert list(empty.state_dict()) == list(full.state_dict())
    for name, tensor in empty.state_dict().items():
        assert tensor.shape == full.state_dict()[name].shape, name


def test_patterns() -> None:
    model = model_of("qwen2")
    everything = set(quantizable(model))
    first = {name for name in everything if ".layers.0." in name}
    assert set(quantizable(model, ("*.layers.0.*",))) == first
    assert set(quantizable(model, ("*",), ("*.layers.0.*",))) == everything - first
    assert set(quantizable(model, ("*",), ("*",))) == set()
    assert set(quantizable(model, ("nothing",))) == set()
    assert list(quantizable(model)) == [n for n, _ in model.named_modules() if n in everything]


def test_a_head_must_be_named() -> None:
    model = model_of("qwen2")  # its head is a weight of its own
    assert "lm_head" not in quantizable(model, ("*",))
    assert "lm_head" in quantizable(model, ("*", "lm_head"))
    assert list(quantizable(model, ("lm_*",))) == ["lm_head"]
    assert "lm_head" not in quantizable(model, ("*", "lm_head"), ("lm_head",))


def test_a_tied_head_never() -> None:
    model = model_of("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head" not in quantizable(model)
    assert "lm_head" not in quantizable(model, ("*", "lm_*"), ("lm_head",))
    message = r"include \['\*', 'lm_head'\] names lm_head, whose weight is the embedding's"
    with pytest.raises(InputError, match=message):
        quantizable(model, ("*", "lm_head"))


def test_a_router_must_be_named() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.gate_proj = nn.Linear(16, 4), nn.Linear(16, 16)

    model = nn.ModuleDict({"layer": Layer()})
    assert list(quantizable(model)) == ["layer.gate_proj"]
    assert list(quantizable(model, ("*", "*.gate"))) == ["layer.gate", "layer.gate_proj"]


def test_a_subclass_of_linear_is_one_if_it_computes_one() -> None:
    """What its own ``forward`` computes is compared, or unknown if it takes other inputs."""

    class Renamed(nn.Linear):
        pass

    class Same(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return input @ self.weight.T + self.bias

    class Squared(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).square()

    class Routed(nn.Linear):
        def forward(self, input: Tensor, mask: Tensor) -> Tensor:
            return super().forward(input * mask)

    kinds = {"renamed": Renamed, "same": Same, "squared": Squared, "routed": Routed}
    model = nn.ModuleDict({name: kind(16, 16) for name, kind in kinds.items()})
    assert list(quantizable(model)) == ["renamed", "same"]
    assert other_linears(model) == {"squared": "Squared", "routed": "Routed"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral", "gpt_oss"])
def test_matrices_count_what_multiplies_activations(family: str) -> None:
    model = model_of(family)
    linearize(model)
    found = matrices(model)
    chosen = quantizable(model)
    for name, linear in chosen.items():
        assert found[f"{name}.weight"] == linear.weight.numel()
    rest = found.keys() - {f"{name}.weight" for name in chosen}
    layers = range(len([n for n in found if n.endswith("o_proj.weight")]))
    routers = {ROUTER[family].format(i) + ".weight" for i in layers} if family in ROUTER else set()
    assert rest == {"lm_head.weight"} | routers
    assert found["lm_head.weight"] == 128 * 64
