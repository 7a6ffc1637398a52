"""Load the model a user names, quantized or not, and refuse what is not a causal LM."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fgmp.errors import InputError
from fgmp.model.store import first_line, load, pretrained, run_as_fp32, stored_dtype
from fgmp.pack.checkpoint import QUANT_METHOD


def load_model(name: str) -> nn.Module:
    """A causal LM by folder or hub name; an fgmp checkpoint comes back packed.

    One in fp16 runs as fp32, see :func:`fgmp.model.store.run_as_fp32`.

    Raises:
        InputError: nothing is there, it is not a causal LM, or something else quantized it.
    """
    config = _config(name)
    method = _quantized_by(name, config)
    if method == QUANT_METHOD:
        return _runnable(load(name) if Path(name).is_dir() else _pretrained(name))
    if method is not None:
        raise InputError(f"model {name}: already quantized, by {method!r}")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type, ())
    known = {known} if isinstance(known, str) else set(known)
    architectures = config.architectures or []
    if known and architectures and known.isdisjoint(architectures):
        raise InputError(
            f"model {name}: not a causal language model but {', '.join(architectures)}"
        )
    return _runnable(_pretrained(name))


def _pretrained(name: str) -> nn.Module:
    return pretrained(AutoModelForCausalLM, name)


def _runnable(model: nn.Module) -> nn.Module:
    return run_as_fp32(model) if stored_dtype(model) == torch.float16 else model


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
