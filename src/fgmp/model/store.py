"""Save a quantized model and load it again."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from fgmp.errors import CheckpointError, FGMPError, InputError
from fgmp.model.convert import install_from
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import QUANT_METHOD, CheckpointConfig, Reader

CONFIG_ATTRIBUTE = "fgmp_config"
"""Where a quantized model keeps its :class:`CheckpointConfig`."""

_FP16 = "fgmp_fp16_parameters"
"""Where a model that runs in fp32 keeps the names of parameters that its files hold in fp16."""


def config_of(model: nn.Module) -> CheckpointConfig:
    """The configuration of a quantized model, whichever way it came about."""
    config = getattr(model, CONFIG_ATTRIBUTE, None)
    if config is None:
        quantization = getattr(getattr(model, "config", None), "quantization_config", None)
        if quantization is None or quantization.to_dict().get("quant_method") != QUANT_METHOD:
            raise InputError(f"{type(model).__name__} is not a model that fgmp quantized")
        config = CheckpointConfig.from_dict(quantization.to_dict())
    return config


def stored_dtype(model: nn.Module) -> torch.dtype:
    """What the files of a model hold its parameters in, or most; it may run in another."""
    return torch.float16 if getattr(model, _FP16, ()) else next(model.parameters()).dtype


def run_as_fp32(model: nn.Module) -> nn.Module:
    """The model, in place, with fp32 parameters; files will hold in fp16 those that were.

    For fp16: gradients of a summed loss overflow it, and most CPUs have no arithmetic for it.
    """
    named = model.named_parameters(remove_duplicate=False)
    setattr(model, _FP16, {name for name, p in named if p.dtype == torch.float16})
    return nn.Module.float(model)  # Transformers forbids it where codes could be rounded


def save(
    model: nn.Module, directory: str | Path, tokenizer: Any = None, max_shard_size: str = "5GB"
) -> None:
    """Write a quantized model as a checkpoint folder.

    Args:
        model: from :func:`fgmp.quantize` or :func:`fgmp.load`. A Transformers model is saved with
            its configuration; any other module with the quantization alone.
        directory: must not exist, or be empty. It appears complete or not at all.
        tokenizer: saved beside the model if given.
        max_shard_size: larger checkpoints are split into files of this size.

    Raises:
        InputError: not a quantized model, a target in use, or a full disk.
    """
    config: dict[str, Any] = {}
    if isinstance(model, PreTrainedModel):
        config = {
            **json.loads(model.config.to_json_string()),
            "architectures": [type(model).__name__],
            "dtype": str(stored_dtype(model)).removeprefix("torch."),
        }
    config["quantization_config"] = config_of(model).to_dict()

    def write_extra(folder: Path) -> None:
        generation: Any = getattr(model, "generation_config", None)
        if generation is not None:
            generation.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    checkpoint.write(Path(directory), tensors_to_save(model), config, write_extra, max_shard_size)


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint folder.

    Args:
        directory: written by :func:`save`.
        model: an unquantized module to load into, for modules that are not of Transformers;
            its own weights are replaced.

    Raises:
        CheckpointError: the checkpoint breaks a rule; the message says which, and where.
    """
    directory = Path(directory)
    raw = checkpoint.read_config(directory)
    config = CheckpointConfig.from_dict(raw["quantization_config"], f"{directory / 'config.json'}")
    if model is None:
        return _load_transformers(directory, raw)
    reader = Reader(checkpoint.tensor_files(directory))
    install_from(model, config, reader)
    tensors = {name: reader.tensor(name) for name in reader.names}
    missing = set(tensors_to_save(model)) - set(tensors)
    unexpected = set(tensors) - set(model.state_dict())
    if missing or unexpected:
        raise CheckpointError(
            f"{directory}: its tensors must fit {type(model).__name__}: "
            f"missing {sorted(missing)}, unexpected {sorted(unexpected)}"
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
    architectures = raw.get("architectures") or [None]
    cls = getattr(transformers, str(architectures[0]), None)
    if cls is None:
        raise CheckpointError(
            f"{directory / 'config.json'}: architectures must name a Transformers model class, "
            f"got {architectures}; pass `model` to load into another module"
        )
    return pretrained(cls, directory)


def pretrained(cls: Any, name: str | Path) -> nn.Module:
    """What ``cls.from_pretrained`` makes of a folder or hub name, if all of it is there.

    Raises:
        InputError: it cannot be loaded, lacks a tensor or has one of another shape.
        CheckpointError: it is one of ours and breaks a rule.
    """
    options = {"dtype": "auto", "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, told = cls.from_pretrained(name, **options)
    except FGMPError:
        raise
    except Exception as error:  # of many kinds, all meaning that it cannot be had
        raise InputError(f"model {name}: cannot be loaded: {first_line(error)}") from error
    for tensor, found, wanted in sorted(told["mismatched_keys"]):
        raise InputError(
            f"model {name}: tensor {tensor} must have shape {list(wanted)} by its config.json, "
            f"got {list(found)}"
        )
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise InputError(f"model {name}: its files lack tensor {missing[0]}{more}")
    loaded: nn.Module = model
    return loaded


def first_line(error: BaseException) -> str:
    """Of another library's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else repr(error)


def tensors_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The state as files hold it, without the copies that tied parameters would make."""
    return {name: tensor.to(dtype) for name, (tensor, dtype) in _stored(model).items()}


def bytes_to_save(model: nn.Module) -> dict[str, int]:
    """Of these tensors, which need not be made for it."""
    return {name: t.numel() * dtype.itemsize for name, (t, dtype) in _stored(model).items()}


def _stored(model: nn.Module) -> dict[str, tuple[Tensor, torch.dtype]]:
    """Tensors of the state by name, each with the dtype that a file gives it."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: t for name, t in model.state_dict().items() if name not in tied}
    seen: set[tuple[int, torch.Size]] = set()
    unique = {}
    for name, tensor in state.items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        unique[name] = tensor
    half = getattr(model, _FP16, ())
    return {n: (t, torch.float16 if n in half else t.dtype) for n, t in unique.items()}
