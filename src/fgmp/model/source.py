"""Load a causal LM by name, quantized or not, and its tokenizer."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from fgmp.errors import InputError
from fgmp.model.store import first_line, load, pretrained, run_as_fp32, stored_dtype
from fgmp.pack.checkpoint import QUANT_METHOD


class Source:
    """Causal LM in a folder or on the Hugging Face Hub; its configuration is read once.

    Args:
        name: folder or hub name.

    Raises:
        InputError: no configuration can be loaded there.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.config = _config(name)

    @property
    def is_packed(self) -> bool:
        """Whether this is an fgmp checkpoint."""
        return self._method == QUANT_METHOD

    @property
    def _method(self) -> str | None:
        quantization = getattr(self.config, "quantization_config", None)
        if quantization is None:
            return None
        if not isinstance(quantization, dict):
            raise InputError(
                f"model {self.name}: quantization_config must be a mapping, got {quantization!r}"
            )
        return str(quantization.get("quant_method"))

    def load(self) -> nn.Module:
        """Load the model; an fgmp checkpoint is loaded with packed linears.

        A model stored in fp16 runs in fp32: see :func:`fgmp.model.store.run_as_fp32`.

        Raises:
            InputError: not a causal LM, quantized by another method, or not loadable.
            CheckpointError: an fgmp checkpoint breaks a rule of the format.
        """
        if self.is_packed:
            packed = Path(self.name).is_dir()
            return _runnable(load(self.name) if packed else _pretrained(self.name))
        if self._method is not None:
            raise InputError(f"model {self.name}: already quantized, by {self._method!r}")
        self._require_causal_lm()
        return _runnable(_pretrained(self.name))

    def tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            InputError: none can be loaded.
        """
        try:
            return AutoTokenizer.from_pretrained(self.name)
        except Exception as error:  # many types are raised, all mean that it cannot be loaded
            raise InputError(
                f"model {self.name}: no tokenizer can be loaded: {first_line(error)}"
            ) from error

    def _require_causal_lm(self) -> None:
        causal_lms = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(self.config.model_type, ())
        causal_lms = {causal_lms} if isinstance(causal_lms, str) else set(causal_lms)
        architectures = self.config.architectures or []
        if causal_lms and architectures and causal_lms.isdisjoint(architectures):
            raise InputError(
                f"model {self.name}: not a causal language model but {', '.join(architectures)}"
            )


def load_model(name: str) -> nn.Module:
    """Load a causal LM by folder or hub name; see :meth:`Source.load`."""
    return Source(name).load()


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model by folder or hub name; see :meth:`Source.tokenizer`."""
    return Source(name).tokenizer()


def _pretrained(name: str) -> nn.Module:
    return pretrained(AutoModelForCausalLM, name)


def _runnable(model: nn.Module) -> nn.Module:
    return run_as_fp32(model) if stored_dtype(model) == torch.float16 else model


def context_length(model: nn.Module, default: int = 2048) -> int:
    """Context length by the model's configuration; ``default`` if it states none."""
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
    except Exception as error:  # many types are raised, all mean that it cannot be loaded
        raise InputError(f"model {name}: cannot be loaded: {first_line(error)}") from error
