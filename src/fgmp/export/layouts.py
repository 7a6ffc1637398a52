"""Names, bytes and configurations of the formats that an export writes.

With t the weight's tensor scale, s a block's scale, r the multiplier of the activation site and
t_x = fl32(1 / (6 r)) its tensor scale:

    value                       compressed-tensors            ModelOpt
    FP4 = e2m1 * s * t          weight_packed    E2M1 nibbles  weight          E2M1 nibbles
                                weight_scale     s             weight_scale    s
                                weight_global_scale   1 / t    weight_scale_2  t
                                input_global_scale    6 r      input_scale     t_x
    FP8 = e4m3 * (6 t)          weight           E4M3          weight          E4M3
                                weight_scale     6 t           weight_scale    6 t
                                input_scale      6 t_x         input_scale     6 t_x

compressed-tensors divides by its global scales; every other scale is multiplied. Nibbles and block
scales are the bytes of the checkpoint, the even element in the low nibble, rows of scales in
order and not swizzled. A block of zeros keeps the scale 2**-9; compressed-tensors' own writer has
another byte there, with the same value, zero.

A weight and its input have one format. Readers choose activation scales by the largest magnitude of
a block, as ``scales: max`` does; searched ones and thresholds cannot be expressed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from fgmp.formats.spec import BLOCK, FP8_FACTOR
from fgmp.pack.planes import PackedWeight

Tensors = dict[str, Tensor]
"""Tensors of one linear by their names after the linear's."""


@dataclass(frozen=True)
class Layout:
    """Layout of one target format.

    Attributes:
        tensors: tensors of a linear, from its packed weight of mode ``fp4`` or ``fp8`` and the
            multiplier r of its site.
        configuration: content of ``quantization_config`` in config.json, from the mode of every
            quantized linear and the names of linears that are not quantized.
        files: further JSON files by name, from the same arguments.
    """

    tensors: Callable[[PackedWeight, Tensor], Tensors]
    configuration: Callable[[Mapping[str, str], list[str]], dict[str, Any]]
    files: Callable[[Mapping[str, str], list[str]], dict[str, dict[str, Any]]]


def _activation_scale(r: Tensor) -> Tensor:
    """Tensor scale of activations, t_x = fl32(1 / (6 r)); 6 r is exact in fp32."""
    return 1 / (r * FP8_FACTOR)


def _fp4_bytes(packed: PackedWeight) -> tuple[Tensor, Tensor]:
    assert packed.low is not None and packed.scale is not None
    return packed.low, packed.scale.view(torch.float8_e4m3fn)


def _fp8_bytes(packed: PackedWeight) -> Tensor:
    assert packed.fp8 is not None
    return packed.fp8[:, : packed.k].contiguous().view(torch.float8_e4m3fn)


def compressed_tensors(packed: PackedWeight, r: Tensor) -> Tensors:
    """Tensors of a linear in compressed-tensors: ``nvfp4-pack-quantized`` or ``float-quantized``.

    Scales of a whole tensor are float32 (1,).
    """
    if packed.mode == "fp8":
        return {
            "weight": _fp8_bytes(packed),
            "weight_scale": (packed.t * FP8_FACTOR).reshape(1),
            "input_scale": (_activation_scale(r) * FP8_FACTOR).reshape(1),
        }
    low, scale = _fp4_bytes(packed)
    return {
        "weight_packed": low,
        "weight_scale": scale,
        "weight_global_scale": (1 / packed.t).reshape(1),
        "input_global_scale": (r * FP8_FACTOR).reshape(1),
    }


def modelopt(packed: PackedWeight, r: Tensor) -> Tensors:
    """Tensors of a linear in ModelOpt's ``NVFP4`` or ``FP8``; scales of a tensor are float32 ()."""
    if packed.mode == "fp8":
        return {
            "weight": _fp8_bytes(packed),
            "weight_scale": packed.t * FP8_FACTOR,
            "input_scale": _activation_scale(r) * FP8_FACTOR,
        }
    low, scale = _fp4_bytes(packed)
    return {
        "weight": low,
        "weight_scale": scale,
        "weight_scale_2": packed.t.clone(),
        "input_scale": _activation_scale(r),
    }


_COMMON = {"type": "float", "symmetric": True}
_FP4 = {
    **_COMMON,
    "num_bits": 4,
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_FP8 = {**_COMMON, "num_bits": 8, "strategy": "tensor", "dynamic": False}
_GROUPS = {
    "fp4": {
        "format": "nvfp4-pack-quantized",
        "weights": {**_FP4, "dynamic": False},
        "input_activations": {**_FP4, "dynamic": "local"},
    },
    "fp8": {"format": "float-quantized", "weights": _FP8, "input_activations": _FP8},
}
"""Configuration groups of compressed-tensors by mode."""


def _compressed_tensors_configuration(
    modes: Mapping[str, str], ignored: list[str]
) -> dict[str, Any]:
    used = sorted(set(modes.values()))
    uniform = len(used) == 1
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if uniform else [n for n, m in modes.items() if m == mode],
            **_GROUPS[mode],
        }
        for i, mode in enumerate(used)
    }
    return {
        "quant_method": "compressed-tensors",
        "format": _GROUPS[used[0]]["format"] if uniform else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


_ALGORITHMS: dict[str, dict[str, Any]] = {
    "fp4": {"quant_algo": "NVFP4", "group_size": BLOCK},
    "fp8": {"quant_algo": "FP8"},
}


def _algorithm(modes: Mapping[str, str]) -> dict[str, Any]:
    (mode,) = set(modes.values())
    return _ALGORITHMS[mode]


def _producer() -> dict[str, str]:
    return {"name": "fgmp", "version": version("fgmp")}


def _modelopt_configuration(modes: Mapping[str, str], ignored: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "modelopt",
        **_algorithm(modes),
        "ignore": ignored,
        "producer": _producer(),
    }


def _modelopt_files(modes: Mapping[str, str], ignored: list[str]) -> dict[str, dict[str, Any]]:
    quantization = {
        **_algorithm(modes),
        "kv_cache_quant_algo": None,
        "exclude_modules": ignored,
    }
    content = {"producer": _producer(), "quantization": quantization}
    return {"hf_quant_config.json": content}


LAYOUTS = {
    "compressed-tensors": Layout(
        compressed_tensors, _compressed_tensors_configuration, lambda modes, ignored: {}
    ),
    "modelopt": Layout(modelopt, _modelopt_configuration, _modelopt_files),
}
"""Layouts of packed weights, by target format."""
