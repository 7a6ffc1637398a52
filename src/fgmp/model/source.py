"""Load the model a user names, quantized or not, and refuse what is not a causal LM."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fgmp.errors import InputError
from fgmp.model.store import load
from fgmp.pack.checkpoint import QUANT_METHOD


def load_model(name: str) -> nn.Module:
    """A causal LM by folder or hub name; an fgmp checkpoint comes back packed.

    An fp16 model is loaded as fp32: gradients of a summed loss overflow fp16.

    Raises:
        InputError: nothing is there, it is not a causal LM, or something else quantized it.
    """
    config = _config(name)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method")
        if method != QUANT_METHOD:
            raise InputError(f"model {name}: already quantized, by {method!r}")
        return load(name) if Path(name).is_dir() else _from_pretrained(name, "auto")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    known = {known} if isinstance(known, str) else set(known)
    architectures = config.architectures or []
    if known and architectures and known.isdisjoint(architectures):
        raise InputError(
            f"model {name}: not a causal language model but {', '.join(architectures)}"
        )
    half = getattr(config, "dtype", None) == torch.float16
    return _from_pretrained(name, torch.float32 if half else "auto")


def is_quantized(name: str) -> bool:
    """Whether ``name`` is an fgmp checkpoint."""
    quantization = getattr(_config(name), "quantization_config", None)
    return quantization is not None and dict(quantization).get("quant_method") == QUANT_METHOD


def load_tokenizer(name: str) -> Any:
    """The tokenizer beside a model."""
    _config(name)  # a model that is not there at all has a better message
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {name}: no tokenizer can be loaded: {_first_line(error)}"
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
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"model {name}: cannot be loaded: {_first_line(error)}") from error


def _from_pretrained(name: str, dtype: torch.dtype | str) -> nn.Module:
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"model {name}: cannot be loaded: {_first_line(error)}") from error
    return model


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
