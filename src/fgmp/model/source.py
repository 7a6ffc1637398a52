"""Load a causal LM by name, quantized or not, and its tokenizer."""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import cached_file

from fgmp.errors import InputError
from fgmp.model.precision import (
    dtype_of_passes,
    require_choice,
    run_in,
    stored_as,
    stored_dtype,
)
from fgmp.model.store import first_line, load, pretrained
from fgmp.pack.checkpoint import CARD, QUANT_METHOD
from fgmp.pack.folder import CONFIG, read_json

_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "chat_template.json",
)


class Source:
    """Causal LM in a folder or on the Hugging Face Hub; its configuration is read once.

    Args:
        name: folder or hub name.
        trust_remote_code: run Python files that come with the model. Models that Transformers
            implements never need them; they are never stored.
        dtype: dtype of the model's passes, one of :data:`fgmp.model.precision.CHOICES`.

    Raises:
        InputError: no configuration can be loaded there, the model needs its own Python files, or
            the configuration names an attention implementation on the hub; or no such dtype.
    """

    def __init__(self, name: str, *, trust_remote_code: bool = False, dtype: str = "auto") -> None:
        require_choice(dtype)
        self.name = name
        self.trust_remote_code = trust_remote_code
        self.dtype = dtype
        self.config = _config(name, trust_remote_code)

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

        Raises:
            InputError: not a causal LM, quantized by another method, or not loadable.
            CheckpointError: an fgmp checkpoint breaks a rule of the format.
        """
        if self.is_packed:
            packed = Path(self.name).is_dir()
            return run_in(load(self.name) if packed else self._pretrained(), self.dtype)
        if self._method is not None:
            raise InputError(f"model {self.name}: already quantized, by {self._method!r}")
        self._require_causal_lm()
        return run_in(self._pretrained(), self.dtype)

    def _pretrained(self) -> nn.Module:
        remote = self.trust_remote_code
        return pretrained(AutoModelForCausalLM, self.name, trust_remote_code=remote)

    def skeleton(self, dtype: str = "auto", free: int | None = None) -> nn.Module:
        """The model by its configuration alone, with arbitrary weights, in the dtype of its passes.

        No file of weights is needed. Within a ``FakeTensorMode`` its tensors take no memory.

        Args:
            dtype, free: as for :func:`fgmp.model.precision.dtype_of_passes`.

        Raises:
            InputError: not a causal LM, quantized already, or not buildable.
        """
        if self._method is not None:
            raise InputError(f"model {self.name}: already quantized, by {self._method!r}")
        self._require_causal_lm()
        model = self._built(getattr(self.config, "dtype", None) or torch.float32)
        wide = dtype_of_passes(model, dtype, free)
        return model if wide == stored_dtype(model) else stored_as(self._built(wide), model)

    def _built(self, dtype: torch.dtype) -> nn.Module:
        try:
            model: nn.Module = AutoModelForCausalLM.from_config(
                self.config, dtype=dtype, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # many types are raised, all mean that it cannot be built
            raise InputError(f"model {self.name}: cannot be built: {first_line(error)}") from error
        return model.eval()

    def tokenizer(self) -> Any:
        """Load the model's tokenizer.

        Raises:
            InputError: none can be loaded.
        """
        try:
            return AutoTokenizer.from_pretrained(
                self.name, trust_remote_code=self.trust_remote_code
            )
        except Exception as error:  # many types are raised, all mean that it cannot be loaded
            raise InputError(
                f"model {self.name}: no tokenizer can be loaded: {first_line(error)}"
            ) from error

    def processor_files(self) -> list[Path]:
        """Paths of the model's processor files, which neither its class nor its tokenizer saves."""
        paths = (
            cached_file(
                self.name,
                name,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
            for name in _PROCESSOR_FILES
        )
        return [Path(path) for path in paths if path is not None]

    def card(self) -> Path | None:
        """Path of the model's card, README.md, or None."""
        path = cached_file(
            self.name,
            CARD,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
        return None if path is None else Path(path)

    def require_every_tensor(self, model: nn.Module) -> None:
        """Check that the model class reads every weight in the model's files.

        Other weights would be lost silently. Transformers also ignores buffers, such as masks and
        rotary frequencies; these are harmless and have no name that ends in ``weight``.

        Raises:
            InputError: names the first weight that is not read, and their number.
        """
        folder = Path(self.name)
        if not folder.is_dir():
            return
        unread = [n for n in _tensor_names(folder) if _is_ignored(n, model)]
        if unread:
            more = f" and {len(unread) - 1} more" if unread[1:] else ""
            raise InputError(
                f"model {self.name}: {type(model).__name__} does not read tensor "
                f"{unread[0]}{more}; quantizing would lose it. Remove it from the files, or use a "
                "model class that reads it"
            )

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


_CONTEXT_KEYS = (
    *("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
    *("max_seq_length", "seq_length", "seq_len", "n_ctx", "context_length", "max_context_length"),
    *("max_target_positions",),
)
"""Names of the context length in configurations, most common first."""


def context_length(model: nn.Module, default: int = 2048) -> int:
    """Context length by the model's configuration; ``default`` if it states none.

    The configuration of a text model inside a multimodal one comes first.
    """
    config = getattr(model, "config", None)
    for part in (_text_config(config), config):
        for key in _CONTEXT_KEYS:
            value = getattr(part, key, None)
            if isinstance(value, int) and value > 0:
                return value
    return default


def _text_config(config: Any) -> Any:
    """Configuration of the text model; None if there is none or it is ambiguous."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return getattr(config, "text_config", None)


def _config(name: str, trust_remote_code: bool) -> Any:
    looks_local = name.startswith((".", "/", "~")) or name.count("/") > 1
    folder = Path(name)
    if looks_local and not folder.is_dir():
        raise InputError(f"model {name}: no such folder")
    if folder.is_dir() and not (folder / CONFIG).exists():
        raise InputError(f"model {name}: cannot be loaded: it has no {CONFIG}")
    if folder.is_dir():  # Transformers would wait for a pipe, and run files named by `auto_map`
        _require_harmless(read_json(folder / CONFIG), str(folder / CONFIG), trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # many types are raised, all mean that it cannot be loaded
        raise InputError(f"model {name}: cannot be loaded: {first_line(error)}") from error
    if not folder.is_dir():
        _require_harmless(config.to_dict(), f"model {name}", trust_remote_code)
    return config


_ATTENTION = ("attn_implementation", "_attn_implementation")


def _require_harmless(values: Any, where: str, trust_remote_code: bool) -> None:
    """Check that a configuration does not make Transformers run code from elsewhere.

    Raises:
        InputError: names the key and its value.
    """
    if not isinstance(values, dict):
        return
    implemented = values.get("model_type") in CONFIG_MAPPING_NAMES  # in Transformers itself
    if values.get("auto_map") and not implemented and not trust_remote_code:
        raise InputError(
            f"{where}: auto_map names Python files that come with the model, got "
            f"{values['auto_map']!r:.120}; --trust-remote-code (trust_remote_code=True) runs them"
        )
    for key in _ATTENTION:
        choice = values.get(key)
        if choice is not None and not (isinstance(choice, str) and choice.isidentifier()):
            raise InputError(
                f"{where}: {key} must be an implementation of Transformers, such as sdpa or "
                f"eager, got {choice!r:.120}"
            )
    for value in values.values():
        if isinstance(value, dict):
            _require_harmless({**value, "auto_map": None}, where, trust_remote_code)


def _tensor_names(folder: Path) -> list[str]:
    """Names of all tensors in the safetensors files of a folder."""
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                names += opened.keys()
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: unreadable or truncated: {error}") from error
    return names


def _is_ignored(name: str, model: nn.Module) -> bool:
    """Whether the model's class ignores a weight of this name when it loads."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return name.endswith("weight") and any(re.search(pattern, name) for pattern in patterns)
