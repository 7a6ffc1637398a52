"""The plugin's linear layers without vLLM: its classes, its loaders of weights, on a stand-in.

A smoke test for every run of the suite. The stand-in has the few names that the plugin imports, and
layers whose ``weight_loader`` selects rows and columns as vLLM's do. ``test_vllm.py`` runs the
plugin in vLLM itself.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fgmp
from fgmp.errors import CheckpointError, InputError
from fgmp.model.linear import mixed_linears
from fgmp.pack.checkpoint import read_config

from .checkpoints import write_random

RANKS = 2
JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class Base(nn.Module):
    """A layer of one rank: sizes of this rank and of all of them."""

    def __init__(self, sizes: list[int], columns: int, ranks: int, rank: int) -> None:
        super().__init__()
        self.sizes, self.ranks, self.rank = sizes, ranks, rank
        self.columns, self.output_size = columns, sum(sizes)


class Merged(Base):
    """Joined linears, each divided by rows."""

    def weight_loader(self, parameter: nn.Parameter, loaded: Tensor, shard: int) -> None:
        shares = [size // self.ranks for size in self.sizes]
        start = sum(shares[:shard])
        own = loaded[self.rank * shares[shard] : (self.rank + 1) * shares[shard]]
        parameter.data[start : start + shares[shard]] = own


class Qkv(Merged):
    """Query, key and value; the only head of keys and values is replicated."""

    head_size = v_head_size = 32

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.total_num_heads = self.sizes[0] // 32
        self.total_num_kv_heads = self.sizes[1] // 32

    def weight_loader(self, parameter: nn.Parameter, loaded: Tensor, shard: Any) -> None:
        queries = self.sizes[0] // self.ranks
        if shard == "q":
            parameter.data[:queries] = loaded[self.rank * queries : (self.rank + 1) * queries]
        else:
            start = queries + (0 if shard == "k" else self.sizes[1])
            parameter.data[start : start + len(loaded)] = loaded


class Row(Base):
    """One linear, divided by columns."""

    def weight_loader(self, parameter: nn.Parameter, loaded: Tensor) -> None:
        if loaded.shape[1] == self.columns:  # numbers of columns
            share = self.columns // self.ranks
            loaded = loaded[:, self.rank * share : (self.rank + 1) * share]
        parameter.data.copy_(loaded)


class Mapper:
    """Changes of names by regular expressions."""

    def __init__(self, orig_to_new_regex: dict[Any, str | None] | None = None) -> None:
        self.patterns = orig_to_new_regex or {}

    def __or__(self, other: "Mapper") -> "Mapper":
        return Mapper({**self.patterns, **other.patterns})

    def map_name(self, name: str) -> str | None:
        for pattern, new in self.patterns.items():
            if new is None and pattern.search(name):
                return None
            name = name if new is None else pattern.sub(new, name)
        return name


class Quantization:
    """vLLM's base class of configurations."""

    packed_modules_mapping = JOINED

    @staticmethod
    def get_checkpoint_weight_mapper() -> Mapper:
        return Mapper()


def vllm_config(**changes: Any) -> SimpleNamespace:
    parallel = {"pipeline_parallel_size": 1, "enable_expert_parallel": False}
    values = {"lora_config": None, "model_config": None, **changes}
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel), **values)


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """``fgmp.serving.methods``, imported with the stand-in."""
    layers = "vllm.model_executor.layers"
    contents: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.config": {"get_current_vllm_config": vllm_config},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.fused_moe": {"RoutedExperts": type("RoutedExperts", (), {})},
        f"{layers}.fused_moe.fused_moe_method_base": {
            "FusedMoEMethodBase": type("FusedMoEMethodBase", (), {})
        },
        f"{layers}.linear": {
            "LinearBase": Base,
            "LinearMethodBase": object,
            "MergedColumnParallelLinear": Merged,
            "QKVParallelLinear": Qkv,
            "UnquantizedLinearMethod": type("UnquantizedLinearMethod", (), {}),
        },
        f"{layers}.quantization": {},
        f"{layers}.quantization.base_config": {"QuantizationConfig": Quantization},
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": type("Head", (nn.Module,), {})},
        "vllm.model_executor.models": {},
        "vllm.model_executor.models.utils": {"WeightsMapper": Mapper},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    before = sys.modules.pop("fgmp.serving.methods", None)
    yield importlib.import_module("fgmp.serving.methods")
    del sys.modules["fgmp.serving.methods"]
    if before is not None:
        sys.modules["fgmp.serving.methods"] = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("methods") / "out", "llama")


def opened(methods: Any, folder: Path) -> Any:
    values = read_config(folder)["quantization_config"]
    config = methods.FgmpConfig.from_config(values)
    config.maybe_update_config(str(folder), SimpleNamespace(model_type="llama"))
    config.apply_vllm_mapper(Mapper())
    return config


LAYERS: dict[str, tuple[type[Base], list[int], int]] = {
    "self_attn.qkv_proj": (Qkv, [128, 32, 32], 128),
    "self_attn.o_proj": (Row, [128], 128),
    "mlp.gate_up_proj": (Merged, [192, 192], 128),
    "mlp.down_proj": (Row, [128], 192),
}
"""Class, rows of the parts and columns of every layer of the Llama of these tests."""


def loaded(config: Any, ranks: int, rank: int) -> dict[str, tuple[Any, Base]]:
    """Methods and layers of one rank, by name, loaded as vLLM does."""
    result = {}
    for i in range(2):
        for name, (cls, rows, columns) in LAYERS.items():
            prefix = f"model.layers.{i}.{name}"
            layer = cls(rows, columns, ranks, rank)
            method = config.get_quant_method(layer, prefix)
            divided = cls is Row
            parts = rows if divided else [size // ranks for size in rows]
            if cls is Qkv:
                parts = [rows[0] // ranks, *rows[1:]]
            share = columns // ranks if divided else columns
            method.create_weights(layer, share, parts, columns, sum(rows), torch.float32)
            result[prefix] = (method, layer)
    for method, layer in result.values():
        method.process_weights_after_loading(layer)
    return result


def expected(folder: Path) -> dict[str, Any]:
    return mixed_linears(fgmp.load(folder))


def test_joined_layers_are_their_linears(methods: Any, folder: Path) -> None:
    """Up to the order of sums: rows of other modes are re-packed, and take another kernel."""
    linears = expected(folder)
    for prefix, (method, layer) in loaded(opened(methods, folder), 1, 0).items():
        parent, _, last = prefix.rpartition(".")
        parts = [linears[f"{parent}.{part}"] for part in JOINED.get(last, [last])]
        x = torch.randn(3, layer.columns, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            reference = torch.cat([part(x) for part in parts], -1)
        torch.testing.assert_close(method.apply(layer, x), reference, rtol=1e-5, atol=1e-5)
        assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_ranks_together_are_the_whole_layer(methods: Any, folder: Path) -> None:
    """Rows of ranks one after the other; columns as a sum, which fp32 rounds in another order."""
    ranks = [loaded(opened(methods, folder), RANKS, rank) for rank in range(RANKS)]
    whole = loaded(opened(methods, folder), 1, 0)
    for prefix, (method, layer) in whole.items():
        x = torch.randn(3, layer.columns, generator=torch.Generator().manual_seed(0))
        reference = method.apply(layer, x)
        shares = [x, x] if not isinstance(layer, Row) else x.chunk(RANKS, -1)
        outputs = [
            part[prefix][0].apply(part[prefix][1], share)
            for part, share in zip(ranks, shares, strict=True)
        ]
        if isinstance(layer, Row):
            torch.testing.assert_close(outputs[0] + outputs[1], reference, rtol=1e-5, atol=1e-5)
            continue
        rows = layer.sizes if isinstance(layer, Merged) else []
        own = [rows[0] // 2, *(rows[1:] if isinstance(layer, Qkv) else [rows[1] // 2])]
        first, second = (output.split(own, -1) for output in outputs)
        joined = [torch.cat([first[0], second[0]], -1)]
        for a, b in zip(first[1:], second[1:], strict=True):
            joined += [a] if isinstance(layer, Qkv) else [torch.cat([a, b], -1)]
            assert not isinstance(layer, Qkv) or torch.equal(a, b), "replicated"
        assert torch.equal(torch.cat(joined, -1), reference)


def test_a_bias_is_added(methods: Any, folder: Path) -> None:
    method, layer = loaded(opened(methods, folder), 1, 0)["model.layers.0.mlp.down_proj"]
    x, bias = torch.randn(3, 192), torch.randn(128)
    torch.testing.assert_close(method.apply(layer, x, bias), method.apply(layer, x) + bias)


def test_the_loader_leaves_out_planes(methods: Any, folder: Path) -> None:
    config = opened(methods, folder)
    mapper = config.get_checkpoint_weight_mapper()
    names = methods.Source(folder).reader.names
    rest = [name for name in names if mapper.map_name(name) is not None]
    assert sorted(rest) == sorted(n for n in names if n.endswith(("norm.weight", "tokens.weight"))
                                  or n == "lm_head.weight")  # fmt: skip


def test_what_is_not_quantized_is_vllms(methods: Any, folder: Path) -> None:
    config = opened(methods, folder)
    assert config.get_quant_method(nn.LayerNorm(4), "model.norm") is None
    with pytest.raises(CheckpointError, match="neither quantized nor as a weight"):
        config.get_quant_method(Row([4], 16, 1, 0), "model.layers.0.mlp.router")


def test_a_linear_that_no_layer_takes(methods: Any, folder: Path) -> None:
    config = opened(methods, folder)
    method = config.get_quant_method(Row([128], 192, 1, 0), "model.layers.0.mlp.down_proj")
    layer = Row([128], 192, 1, 0)
    method.create_weights(layer, 192, [128], 192, 128, torch.float32)
    with pytest.raises(CheckpointError, match="no layer of vLLM's model takes this"):
        method.process_weights_after_loading(layer)


def test_refusals(methods: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = opened(methods, folder)
    layer = Row([128], 192, 1, 0)
    method = config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
    with pytest.raises(InputError, match="must be a multiple of 16, got 24"):
        method.create_weights(layer, 24, [128], 192, 128, torch.float32)
    monkeypatch.setattr(methods, "get_current_vllm_config", lambda: vllm_config(lora_config=1))
    with pytest.raises(InputError, match="not served with LoRA adapters"):
        config.get_quant_method(layer, "model.layers.0.mlp.down_proj")
