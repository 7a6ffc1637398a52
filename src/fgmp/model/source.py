"""Load the model a user names, quantized or not, and refuse what is not a causal LM."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fgmp.errors import InputError
from fgmp.model.store import first_line, load, pretrained
from fgmp.pack.checkpoint import QUANT_METHOD


def load_model(name: str) -> nn.Module:
    """A causal LM by folder or hub name; an fgmp checkpoint comes back packed.

    An fp16 model is loaded as fp32: gradients of a summed loss overflow fp16.

    Raises:
        InputError: nothing is there, it is not a causal LM, or something else quantized it.
    """
    config = _config(name)
    method = _quantized_by(name, config)
    if method == QUANT_METHOD:
        return load(name) if Path(name).is_dir() else pretrained(AutoModelForCausalLM, name)
    if method is not None:
        raise InputError(f"model {name}: already quantized, by {method!r}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    known = {known} if isinstance(known, str) else set(known)
    architectures = config.architectures or []
    if known and architectures and known.isdisjoint(architectures):
        raise InputError(
            f"model {name}: not a causal language model but {', '.join(architectures)}"
        )
    half = getattr(config, "dtype", None) == torch.float16
    return pretrained(AutoModelForCausalLM, name, torch.float32 if half else "auto")


def is_quantized(name: str) -> bool:
    """Whether ``name`` is an fgmp checkpoint."""
    return _quantized_by(name, _config(name)) == QUANT_METHOD


def _quantized_by(name: str, config: Any) -> str | None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        raise InputError(
            f"model {name}: quantization_config must be a mapping, got {quantization!r}"
        )
    return str(quantization.get("quant_method"))


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model."""
    _config(name)  # a model that is not there at all has a better message
    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # of many kinds, all meaning that it cannot be had
        raise InputError(
            f"model {name}: no tokenizer can be loaded: {first_line(error)}"
        ) from error


def context_length(model: nn.Module, default: int = 2048) -> int:
    """Positions the model can take, as its configuration says."""
    config = getattr(model, "config", None)
    for key in ("max_position_embeddings", "n_positions", "max_sequence_length"):
        value = getattr(config, key, None)
        if isinstance(value, int) and value > 0:
            return value
    return default


def _config(name: str) -> Any:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        raise InputError(f"model {name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name)
    except Exception as error:  # of many kinds, all meaning that it cannot be had
        raise InputError(f"model {name}: cannot be loaded: {first_line(error)}") from error
