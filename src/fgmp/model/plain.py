"""The unquantized layout of a model, for exports that other programs read.

A quantized model has one linear per matrix (``model.select.linearize``). Files of the original have
GPT-2's matrices transposed, and experts in the layout and under the names of their architecture.
Transformers knows the names; this module undoes what ``linearize`` did.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from fgmp.model.select import is_fused_experts

_EXPERT_MATRICES = {"gate_up_proj": "gate_up_proj", "up_proj": "gate_up_proj"}
"""Name in :class:`fgmp.model.select.Expert` by the name of the fused parameter, if they differ."""


def skeleton(model: Any) -> nn.Module:
    """Unquantized module of the same class and configuration, on the meta device."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        module: nn.Module = type(model)(config)
    return module


def plain_tensors(structure: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under the names and in the layout of the original's files.

    Args:
        structure: from :func:`skeleton`.
        tensors: tensors of the linearized model by name, all in high precision.
    """
    plain = dict(tensors)
    for name, module in structure.named_modules():
        if isinstance(module, Conv1D):
            plain[f"{name}.weight"] = plain[f"{name}.weight"].T.contiguous()
        elif is_fused_experts(module):
            _fuse(name, module, plain)
    _add_other_names(structure, plain)
    reverted: dict[str, Tensor] = revert_weight_conversion(structure, plain)
    return {name: _unshared(tensor) for name, tensor in reverted.items()}


def _fuse(name: str, module: Any, tensors: dict[str, Tensor]) -> None:
    """Replace the matrices and biases of experts by the fused parameters, in place."""
    for parameter, value in module.named_parameters(recurse=False):
        base = parameter.removesuffix("_bias")
        kind = "weight" if base == parameter else "bias"
        matrix = _EXPERT_MATRICES.get(base, base)
        parts = [tensors.pop(f"{name}.{e}.{matrix}.{kind}") for e in range(len(value))]
        fused = torch.stack(parts)
        if kind == "weight" and module.is_transposed:
            fused = fused.transpose(1, 2).contiguous()
        tensors[f"{name}.{parameter}"] = fused


def _add_other_names(structure: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Store the tensors of a module under each of its names, in place, unless Transformers ties."""
    tied = getattr(structure, "all_tied_weights_keys", None) or {}
    names: dict[int, list[str]] = {}
    for name, tensor in structure.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    for group in names.values():
        stored = next((name for name in group if name in tensors), None)
        for name in group:
            if stored is not None and name not in tensors and name not in tied:
                tensors[name] = tensors[stored].clone()


def _unshared(tensor: Tensor) -> Tensor:
    """A tensor with memory of its own; splitting fused experts gives views."""
    alone = tensor.is_meta or tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if alone else tensor.clone()


def obstacles(structure: nn.Module, linears: list[str]) -> dict[str, str]:
    """Reasons why a quantized linear cannot keep its name in the original's files, by linear.

    Formats that pack a weight can only replace a matrix that is one tensor of the original's files,
    stored as (N, K), and read by one module.
    """
    reasons = {}
    modules: dict[str, nn.Module] = dict(structure.named_modules(remove_duplicate=False))
    uses: dict[int, list[str]] = {}
    for name, module in modules.items():
        uses.setdefault(id(module), []).append(name)
    for name in linears:
        module = modules.get(name, structure)
        if isinstance(module, Conv1D):
            reasons[name] = "files of this architecture store it transposed"
        elif not isinstance(module, nn.Linear):
            reasons[name] = "it is part of fused experts"
        elif len(uses[id(module)]) > 1:
            other = next(other for other in uses[id(module)] if other != name)
            reasons[name] = f"the model also uses it as {other}"
    if not reasons:
        plain = plain_tensors(structure, structure.state_dict())
        reasons = {
            name: "files of this architecture store it under another name"
            for name in linears
            if f"{name}.weight" not in plain
        }
    return reasons


def other_linear_layers(structure: nn.Module, linears: list[str]) -> list[str]:
    """Names of the ``nn.Linear`` layers that are not quantized, such as the output head."""
    return [
        name
        for name, module in structure.named_modules()
        if isinstance(module, nn.Linear) and name not in set(linears)
    ]
