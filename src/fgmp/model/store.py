"""Save and load quantized models."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgmp.errors import CheckpointError, FGMPError, InputError
from fgmp.model.convert import install_from
from fgmp.model.linear import MixedLinear
from fgmp.model.precision import require_choice, run_in, stored_dtype, stored_dtypes
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CARD, QUANT_METHOD, RUN, SCORES, CheckpointConfig
from fgmp.pack.folder import CONFIG, weight_files
from fgmp.pack.reader import Reader

CONFIG_ATTRIBUTE = "fgmp_config"
"""Attribute of a quantized model that holds its :class:`CheckpointConfig`."""


def config_of(model: nn.Module) -> CheckpointConfig:
    """Configuration of a quantized model, whether quantized here or loaded.

    Raises:
        InputError: the model is not quantized by fgmp.
    """
    config = getattr(model, CONFIG_ATTRIBUTE, None)
    if config is None:
        quantization = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantization is None or quantization.to_dict().get("quant_method") != QUANT_METHOD:
            raise InputError(f"{type(model).__name__} is not a model that fgmp quantized")
        config = CheckpointConfig.from_dict(quantization.to_dict())
    return config


def save(
    model: nn.Module,
    directory: str | Path,
    tokenizer: Any = None,
    max_shard_size: int | str = "5GB",
    extra_files: Iterable[Path] = (),
    card: str | None = None,
) -> None:
    """Write a quantized model to a checkpoint folder.

    Args:
        model: from :func:`fgmp.quantize` or :func:`fgmp.load`. A Transformers model is saved with
            its configuration, any other module with ``quantization_config`` only.
        directory: must not exist, or be empty. It appears complete or not at all.
        tokenizer: if not None, saved in the same folder.
        max_shard_size: larger checkpoints are split into files of at most this size.
        extra_files: copied into the folder, such as a processor's configuration.
        card: text of the model card, if there shall be one.

    Raises:
        InputError: not a quantized model, one with offloaded tensors, a target in use, or a full
            disk.
    """
    config: dict[str, Any] = {}
    if isinstance(model, PreTrainedModel):
        config = {
            **json.loads(model.config.to_json_string()),
            "architectures": [type(model).__name__],
            "dtype": str(stored_dtype(model)).removeprefix("torch."),
        }
    config["quantization_config"] = config_of(model).to_dict()
    _require_whole(model)
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent:
        raise InputError(f"tensor {absent[0]} is offloaded: load the model in memory to save it")

    def write_extra(folder: Path) -> None:
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        for path in extra_files:
            shutil.copyfile(path, folder / path.name)
        if run := config_of(model).run:
            checkpoint.write_json(folder / RUN, run)
        if scores := config_of(model).scores:
            checkpoint.write_json(folder / SCORES, scores, indent=None)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")

    checkpoint.write(Path(directory), tensors_to_save(model), config, write_extra, max_shard_size)


def _require_whole(model: nn.Module) -> None:
    """Check that a model's packed linears are where its configuration says.

    Raises:
        InputError: names the first that is not, as where an adapter was put around it.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in config_of(model).linears:
        module = modules.get(name)
        if not isinstance(module, MixedLinear):
            raise InputError(
                f"{name}: must be a packed linear to be saved, got {type(module).__name__}; PEFT "
                "saves adapters"
            )


def load(directory: str | Path, model: nn.Module | None = None, dtype: str = "stored") -> nn.Module:
    """Load a checkpoint folder.

    Args:
        directory: written by :func:`save`.
        model: for modules that are not of Transformers, an unquantized module of the same
            structure to load into, in place.
        dtype: of the parameters that are not quantized: ``stored``, as in the files; ``float32``;
            or ``auto``, which is fast on this machine.

    Returns:
        The quantized model; ``model`` if it is not None.

    Raises:
        InputError: no fgmp checkpoint can be read there.
        CheckpointError: the checkpoint breaks a rule; the message names the rule and the place.
    """
    require_choice(dtype)
    loaded = _loaded(directory, model)
    return loaded if dtype == "stored" else run_in(loaded, dtype)


def _loaded(directory: str | Path, model: nn.Module | None) -> nn.Module:
    directory = Path(directory)
    raw = checkpoint.read_config(directory)
    config = CheckpointConfig.from_dict(raw["quantization_config"], f"{directory / 'config.json'}")
    if model is None:
        return _load_transformers(directory, raw)
    reader = Reader(weight_files(directory))
    reader.require_own_config(raw, directory / CONFIG)
    install_from(model, config, reader)
    tensors = {name: reader.tensor(name) for name in reader.names}
    if missing := sorted(set(tensors_to_save(model)) - set(tensors)):
        raise CheckpointError(
            f"{directory}: its tensors must fit {type(model).__name__}: missing {missing}"
        )
    for name, old in model.state_dict().items():
        if name in tensors and tensors[name].shape != old.shape:
            raise CheckpointError(
                f"{directory}: tensor {name} must have shape {list(old.shape)} for this model, "
                f"got {list(tensors[name].shape)}"
            )
    model.load_state_dict(tensors, strict=False)
    setattr(model, CONFIG_ATTRIBUTE, config)
    return model


def _load_transformers(directory: Path, raw: dict[str, Any]) -> nn.Module:
    architectures = raw.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    cls = getattr(transformers, names[0], None) if names and isinstance(names[0], str) else None
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise CheckpointError(
            f"{directory / CONFIG}: architectures must name a Transformers model class, "
            f"got {architectures!r:.80}; pass `model` to load into another module"
        )
    _require_layers(directory, raw)
    return pretrained(cls, directory)


_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def _require_layers(directory: Path, config: Mapping[str, Any]) -> None:
    """Check, before a model is built, that the checkpoint has tensors for all layers.

    Raises:
        CheckpointError: names the key, its value and the number of layers.
    """
    names = Reader(weight_files(directory)).names
    indices = [int(part) for name in names for part in name.split(".") if part.isdecimal()]
    bound = max(indices, default=0) + 1
    for key in _LAYER_COUNTS:
        value = config.get(key)
        if isinstance(value, int) and value > bound:
            raise CheckpointError(
                f"{directory / CONFIG}: {key} must be at most {bound}, the layers that "
                f"the tensors are of, got {value}"
            )


def pretrained(cls: Any, name: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """Load a model by ``cls.from_pretrained``, requiring every tensor.

    Args:
        cls: a Transformers model class or auto class.
        name: folder or hub name.
        trust_remote_code: run Python files that come with the model.

    Raises:
        InputError: the model cannot be loaded, lacks a tensor, has one of another shape or one that
            it does not read.
        CheckpointError: it is an fgmp checkpoint and breaks a rule.
    """
    options = {
        "dtype": "auto",
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
        "trust_remote_code": trust_remote_code,
    }
    try:
        model, loading_info = cls.from_pretrained(name, **options)
    except FGMPError:
        raise
    except Exception as error:  # many types are raised, all mean that it cannot be loaded
        raise InputError(f"model {name}: cannot be loaded: {first_line(error)}") from error
    for tensor, shape, expected_shape in sorted(loading_info["mismatched_keys"]):
        raise InputError(
            f"model {name}: tensor {tensor} must have shape {list(expected_shape)} by its "
            f"config.json, got {list(shape)}"
        )
    buffers = ("inv_freq", "masked_bias", "position_ids")
    if unexpected := sorted(k for k in loading_info["unexpected_keys"] if not k.endswith(buffers)):
        more = f" and {len(unexpected) - 1} more" if unexpected[1:] else ""
        raise InputError(
            f"model {name}: {type(model).__name__} does not read tensor {unexpected[0]}{more} of "
            "its files; it would be lost"
        )
    if missing := sorted(loading_info["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"model {name}: its files lack tensor {missing[0]}{more}")
    loaded: nn.Module = model
    return loaded


def first_line(error: BaseException) -> str:
    """First line of an error message, or the error's repr if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """Tensors of a model as files store them, by name, each tied parameter once."""
    return {name: tensor.to(dtype) for name, (tensor, dtype) in _stored(model).items()}


def bytes_to_save(model: nn.Module) -> dict[str, int]:
    """Bytes per tensor of :func:`tensors_to_save`, without materializing them."""
    return {name: t.numel() * dtype.itemsize for name, (t, dtype) in _stored(model).items()}


def _stored(model: nn.Module) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Tensors of a model by name, each with the dtype in which files store it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    seen: set[tuple[int, int, torch.Size]] = set()
    unique = {}
    for name, tensor in state.items():
        # Not the address, which a tensor without memory has not.
        key = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        unique[name] = tensor
    dtypes = stored_dtypes(model)
    return {name: (tensor, dtypes[name]) for name, tensor in unique.items()}
