"""The classes that vLLM's model layers call: a configuration, a linear and a mixture of experts.

A layer creates no parameters to load into. Its method remembers the layer's sizes, and after vLLM
has loaded everything else, reads the planes by fgmp's own reader, which verifies them. vLLM's
loader leaves out the names of planes, by :meth:`FgmpConfig.get_checkpoint_weight_mapper`.

vLLM itself decides which rows and columns of a weight belong to this rank: row numbers go through
the layer's ``weight_loader`` in place of a weight. So merged layers, tensor parallelism, replicated
KV heads and padded vocabularies need no rules here.

This is the only module that imports vLLM when it is imported.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper

from fgmp.errors import CheckpointError, InputError
from fgmp.formats.activation import Site
from fgmp.formats.spec import BLOCK
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.pack.checkpoint import QUANT_METHOD, CheckpointConfig
from fgmp.pack.planes import PackedWeight
from fgmp.serving.experts import ACTIVATIONS, stacked
from fgmp.serving.linears import Linears, Parts
from fgmp.serving.shards import columns, take
from fgmp.serving.source import SUFFIXES, Source

_LEFT_OUT = re.compile(rf"({'|'.join(map(re.escape, SUFFIXES))})$")
"""Names of tensors that :class:`Source` reads, and vLLM's loader must not."""

_RENAMED: dict[str, tuple[re.Pattern[str], str]] = {
    "mixtral": (re.compile(r"\.mlp\."), ".block_sparse_moe."),
}
"""Names of Transformers that vLLM's model does not expect, by model type."""

_TRANSPOSED = {"gpt2"}
"""Model types whose unquantized matrices vLLM transposes when it loads them."""


class FgmpConfig(QuantizationConfig):
    """The checkpoint's ``quantization_config``, and the folder that it is in.

    Args:
        values: the configuration, unverified.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        CheckpointConfig.from_dict(values)  # an unknown version ends here
        self.source: Source | None = None
        self.linears: Linears | None = None
        self.model_type = ""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "FgmpConfig":
        """Parse ``quantization_config``.

        Raises:
            CheckpointError: an unknown format version, or a malformed configuration.
        """
        return cls(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float32, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """Smallest compute capability of a GPU: the kernels multiply bf16 numbers."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Open the checkpoint and check what can be checked before vLLM starts its processes.

        Raises:
            CheckpointError: the checkpoint breaks a rule; the message names the rule and the place.
        """
        folder = Path(model_name)
        if not folder.is_dir():
            folder = Path(snapshot_download(model_name, revision=revision))
        self.model_type = getattr(hf_config, "model_type", "")
        self.source = Source(folder)
        self.source.verify(planes=False)
        self.linears = Linears(self.source.config, self.source.reader.names, self._rename)
        self.source.close()

    def _rename(self, name: str) -> str:
        if self.model_type in _RENAMED:
            pattern, new = _RENAMED[self.model_type]
            name = pattern.sub(new, name)
        return name

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Follow the changes of names between Transformers' model and vLLM's."""
        self._open()[1].rename(hf_to_vllm_mapper.map_name)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # a static method in the base class
        """Leave out what :class:`Source` reads, and rename what vLLM expects under other names."""
        patterns: dict[re.Pattern[str], str | None] = {_LEFT_OUT: None}
        if self.model_type in _RENAMED:
            pattern, new = _RENAMED[self.model_type]
            patterns[pattern] = new
        ours = WeightsMapper(orig_to_new_regex=patterns)
        return QuantizationConfig.get_checkpoint_weight_mapper() | ours

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Method of one layer; None: it is no linear, or an output head that is not quantized.

        Raises:
            CheckpointError: the checkpoint does not fit this layer.
            InputError: an option or a kind of model that is not supported.
        """
        _require_supported()
        _, linears = self._open()
        prefix = prefix.lstrip(".")
        if isinstance(layer, RoutedExperts):
            return ExpertsMethod(self, layer, prefix)
        if not isinstance(layer, LinearBase | ParallelLMHead):
            return None
        parts = linears.take(prefix, self.packed_modules_mapping)
        if parts is not None:
            return FgmpLinearMethod(self, parts)
        if isinstance(layer, ParallelLMHead):
            return None
        linears.require_weight(prefix, self.packed_modules_mapping)
        if self.model_type in _TRANSPOSED:
            raise InputError(
                f"{prefix}: vLLM transposes matrices of {self.model_type} that are not quantized, "
                "which fgmp stores as other models do: quantize all of them"
            )
        return UnquantizedLinearMethod()

    def read(self, parts: Parts) -> tuple[Site, list[PackedWeight]]:
        """Read the weights of a layer and its site, once it is known that every linear has one.

        Raises:
            CheckpointError: a linear belongs to no layer, or a tensor breaks a rule.
        """
        source, linears = self._open()
        linears.require_all_taken()
        weights = source.weights(parts)
        if linears.mark_read(parts):
            source.close()
        return weights

    def _open(self) -> tuple[Source, Linears]:
        if self.source is None or self.linears is None:
            raise InputError("fgmp checkpoints are served from a folder or a hub name, got neither")
        return self.source, self.linears


def _require_supported() -> None:
    """Refuse options under which layers would be computed otherwise.

    Raises:
        InputError: names the option.
    """
    config = get_current_vllm_config()
    parallel, model = config.parallel_config, config.model_config
    for used, what in (
        (config.lora_config is not None, "LoRA adapters"),
        (model is not None and model.use_mla, "multi-head latent attention (MLA)"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (parallel.enable_expert_parallel, "expert parallelism"),
    ):
        if used:
            raise InputError(f"fgmp checkpoints are not served with {what}: not supported")


class FgmpLinearMethod(LinearMethodBase):
    """A linear layer of vLLM that consists of one or more packed linears of one site.

    Args:
        config: the checkpoint's.
        parts: its linears.
    """

    def __init__(self, config: FgmpConfig, parts: Parts) -> None:
        self.config, self.parts = config, parts

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Remember the layer's sizes on this rank.

        Raises:
            InputError: tensor parallelism would divide a block of columns.
        """
        if input_size_per_partition != input_size and input_size_per_partition % BLOCK:
            raise InputError(
                f"{self.parts.linears[0]}: a rank's share of its {input_size} columns must be a "
                f"multiple of {BLOCK}, got {input_size_per_partition}: choose another "
                "--tensor-parallel-size"
            )
        self.size = sum(output_partition_sizes)
        self.k, self.k_total = input_size_per_partition, input_size
        self.device = torch.get_default_device()

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Read the planes and keep this rank's rows and columns.

        Raises:
            CheckpointError: a tensor breaks a rule, or has not the shape of this layer.
        """
        site, weights = self.config.read(self.parts)
        for name, weight in zip(self.parts.linears, weights, strict=True):
            if weight.k != self.k_total:
                raise CheckpointError(
                    f"{name}: vLLM's layer has {self.k_total} columns, got {weight.k}"
                )
        first, last = self._columns(layer)
        weights = [columns(weight, first, last) for weight in weights]
        packed = take(weights, self._rows(layer, [weight.n for weight in weights]))
        _keep(
            layer, "weight", {name: getattr(packed, name) for name in (*PLANES, "t")}, self.device
        )
        constants = {
            "r": torch.tensor(site.r, dtype=torch.float32),
            "sensitivity": site.sensitivity[first:last].contiguous(),
            "threshold": torch.tensor(site.threshold, dtype=torch.int64),
        }
        _keep(layer, "input", constants, self.device)
        self.rule, self.scales = site.rule, site.scales

    def _rows(self, layer: Any, sizes: list[int]) -> Tensor:
        """Numbers of this rank's rows, counted through all parts; -1 is a row of padding."""
        numbers = nn.Parameter(torch.zeros(self.size, 1, dtype=torch.int64), requires_grad=False)
        numbers.output_dim = 0  # type: ignore[attr-defined]
        # Counted from 1, since vLLM fills the padding of a vocabulary with 0.
        rows = torch.arange(1, sum(sizes) + 1).unsqueeze(1).split(sizes)
        if sum(sizes) != (total := _total_rows(layer)):
            raise CheckpointError(
                f"{', '.join(self.parts.linears)}: must have {total} rows in vLLM's layer, got "
                f"{sum(sizes)}"
            )
        for shard, part in zip(_shards(layer, len(sizes)), rows, strict=True):
            layer.weight_loader(numbers, part, *shard)
        return numbers.data.flatten() - 1

    def _columns(self, layer: Any) -> tuple[int, int]:
        """First column of this rank, and end."""
        if self.k == self.k_total:
            return 0, self.k
        numbers = nn.Parameter(torch.zeros(1, self.k, dtype=torch.int64), requires_grad=False)
        numbers.input_dim = 1  # type: ignore[attr-defined]
        layer.weight_loader(numbers, torch.arange(self.k_total).unsqueeze(0))
        first = int(numbers.data[0, 0])
        return first, first + self.k

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Quantize ``x`` (..., K) and multiply: (..., N) in the dtype of ``x``."""
        site = (layer.input_r, layer.input_sensitivity, layer.input_threshold)
        units, _ = ops.fake_quantize_activation(x, *site, self.rule, self.scales)
        planes = (getattr(layer, f"weight_{name}") for name in PLANES)
        y: Tensor = ops.packed_linear(units, *planes, layer.input_r, layer.weight_t, bias, x.dtype)
        return y


def _total_rows(layer: Any) -> int:
    """Rows of a layer's weight on all ranks, replicas of KV heads counted once."""
    if isinstance(layer, ParallelLMHead):
        return int(layer.org_vocab_size)
    if isinstance(layer, QKVParallelLinear):
        of_one = layer.head_size + layer.v_head_size
        return int(layer.total_num_heads * layer.head_size + layer.total_num_kv_heads * of_one)
    return int(layer.output_size)


def _shards(layer: nn.Module, count: int) -> list[tuple[Any, ...]]:
    """Arguments by which a layer's ``weight_loader`` knows its parts; none where it is one part."""
    if count == 1:
        return [()]
    if isinstance(layer, QKVParallelLinear) and count == 3:
        return [("q",), ("k",), ("v",)]
    if isinstance(layer, MergedColumnParallelLinear):
        return [(i,) for i in range(count)]
    raise InputError(f"{type(layer).__name__} of {count} linears is not supported by fgmp's plugin")


class ExpertsMethod(FusedMoEMethodBase):
    """The experts of one layer of a mixture, all of them packed.

    Args:
        config: the checkpoint's.
        layer: vLLM's container of the experts.
        prefix: its name.

    Raises:
        CheckpointError: an expert is not quantized.
        InputError: a kind of experts that is not supported.
    """

    def __init__(self, config: FgmpConfig, layer: Any, prefix: str) -> None:
        super().__init__(layer.moe_config)
        self.config, self.prefix = config, prefix
        _, linears = config._open()
        _require_experts(layer, prefix)
        self.first: list[Parts] = []
        self.down: list[Parts] = []
        for expert in range(layer.moe_config.num_experts):
            for name, chosen in (("gate_up_proj", self.first), ("down_proj", self.down)):
                parts = linears.take(f"{prefix}.{expert}.{name}", {})
                if parts is None:
                    raise CheckpointError(
                        f"{prefix}.{expert}.{name}: every expert must be quantized to be served, "
                        "this one is not"
                    )
                chosen.append(parts)

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Remember the layer's sizes on this rank.

        Raises:
            InputError: tensor parallelism would divide a block of columns.
        """
        self.hidden, self.size = hidden_size, intermediate_size_per_partition
        if layer.moe_config.tp_size > 1 and self.size % BLOCK:
            raise InputError(
                f"{self.prefix}: a rank's share of the experts' columns must be a multiple of "
                f"{BLOCK}, got {self.size}: choose another --tensor-parallel-size"
            )
        self.device = torch.get_default_device()

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: vLLM's own kernels are not used."""

    def process_weights_after_loading(self, layer: Any) -> None:
        """Read the planes and keep this rank's rows and columns.

        Raises:
            CheckpointError: a tensor breaks a rule, or has not the shape of this layer.
        """
        first, down = self._read(self.first), self._read(self.down)
        shape = (first[0][1].n, first[0][1].k, down[0][1].n, down[0][1].k)
        total = down[0][1].k
        if shape != (2 * total, self.hidden, self.hidden, total):
            raise CheckpointError(
                f"{self.prefix}: vLLM's experts have a hidden size of {self.hidden}, got weights "
                f"of {shape[:2]} and {shape[2:]}"
            )
        rows, start = self._rows(layer, total), self._first_column(layer, total)
        stop = start + self.size
        first = [(site, take([weight], rows)) for site, weight in first]
        down = [
            (_with_channels(site, start, stop), columns(weight, start, stop))
            for site, weight in down
        ]
        self.stacks = {}
        for name, group in (("first", first), ("down", down)):
            stack = stacked(self.prefix, [w for _, w in group], [s for s, _ in group])
            _keep(layer, name, stack.tensors(), self.device)
            self.stacks[name] = (stack.rule, stack.scales)
        if len(set(self.stacks.values())) > 1:
            raise CheckpointError(f"{self.prefix}: sites of experts must have one rule and scales")
        self.names = [f"{name}_{key}" for name in ("first", "down") for key in stack.tensors()]

    def _read(self, linears: list[Parts]) -> list[tuple[Site, PackedWeight]]:
        return [
            (site, weight) for site, weights in map(self.config.read, linears) for weight in weights
        ]

    def _rows(self, layer: Any, total: int) -> Tensor:
        """Numbers of this rank's rows of gate and up, counted through both."""
        numbers = nn.Parameter(
            torch.full((1, 2 * self.size, 1), -1, dtype=torch.int64), requires_grad=False
        )
        for shard, first in (("w1", 0), ("w3", total)):
            rows = torch.arange(first, first + total).unsqueeze(1)
            layer.weight_loader(numbers, rows, "w13_weight", shard, 0)
        return numbers.data.flatten()

    def _first_column(self, layer: Any, total: int) -> int:
        numbers = nn.Parameter(torch.zeros(1, 1, self.size, dtype=torch.int64), requires_grad=False)
        layer.weight_loader(numbers, torch.arange(total).unsqueeze(0), "w2_weight", "w2", 0)
        return int(numbers.data[0, 0, 0])

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        """Weighted sum of the outputs of each token's experts, (T, H)."""
        result: Tensor = torch.ops.fgmp.packed_experts(
            x,
            topk_weights,
            topk_ids,
            *(getattr(layer, name) for name in self.names),
            *self.stacks["first"],
            layer.activation.value,
        )
        return result


def _require_experts(layer: Any, prefix: str) -> None:
    """Check that the experts are gated linears without biases, clamps and other additions.

    Raises:
        InputError: names the layer.
    """
    moe = layer.moe_config
    limits = (layer.swiglu_limit, layer.swiglu_alpha, layer.swiglu_beta)
    plain = moe.is_act_and_mul and not moe.has_bias and limits == (None, None, None)
    if not plain or layer.apply_router_weight_on_input or layer.activation.value not in ACTIVATIONS:
        raise InputError(
            f"{prefix}: experts of this kind are not supported by fgmp's plugin: they must be "
            f"gated by one of {', '.join(ACTIVATIONS)}, without biases and limits"
        )


def _with_channels(site: Site, start: int, stop: int) -> Site:
    sensitivity = site.sensitivity[start:stop].contiguous()
    return Site(site.r, sensitivity, site.gamma, site.threshold, site.rule, site.scales)


def _keep(
    layer: nn.Module, prefix: str, tensors: Mapping[str, Tensor | None], device: torch.device
) -> None:
    """Put tensors into a layer, as parameters of their own dtypes without gradients.

    They are copied: what the reader returns is a view of its file, which stays mapped and resident
    as long as any view does.
    """
    for name, tensor in tensors.items():
        parameter = None
        if tensor is not None:
            parameter = nn.Parameter(tensor.to(device, copy=True), requires_grad=False)
        layer.register_parameter(f"{prefix}_{name}", parameter)
