"""Loading and saving of fgmp checkpoints by ``from_pretrained`` and ``save_pretrained``.

Importing this module registers ``quant_method: "fgmp"`` with Transformers, which has no other way
to discover it. Before Transformers loads the tensors of a model, the reader of this package puts
validated packed linears into it. Transformers then loads the remaining tensors under their usual
names.

Transformers' own writer would drop the checksums and could leave half a checkpoint. A packed model
therefore has a ``save_pretrained`` of its own, which calls :func:`fgmp.save`; ``push_to_hub`` calls
that in turn.
"""

import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fgmp.errors import CheckpointError, InputError
from fgmp.model.convert import install_from
from fgmp.pack.checkpoint import QUANT_METHOD, CheckpointConfig, read_config
from fgmp.pack.folder import CONFIG, weight_files
from fgmp.pack.reader import Reader


@register_quantization_config(QUANT_METHOD)
class FgmpConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """``quantization_config`` in the form of Transformers; holds the dictionary unchanged."""

    def __init__(self, **values: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.values = {**values, "quant_method": QUANT_METHOD}

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.values)


@register_quantizer(QUANT_METHOD)
class FgmpQuantizer(HfQuantizer):  # type: ignore[misc]
    """Loads packed models; quantizing is ``fgmp.quantize``'s."""

    requires_calibration = True
    passes_gradients = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check the format version before the model is built.

        Raises:
            CheckpointError: an unknown version, or a malformed configuration.
        """
        CheckpointConfig.from_dict(self.quantization_config.to_dict())

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError("an fgmp checkpoint must be loaded from safetensors files")
        config = CheckpointConfig.from_dict(self.quantization_config.to_dict())
        folder = Path(checkpoint_files[0]).parent
        if sorted(weight_files(folder)) != sorted(map(Path, checkpoint_files)):
            raise CheckpointError(
                f"{folder}: its weights are {[f.name for f in weight_files(folder)]}, but "
                f"Transformers reads {[Path(f).name for f in checkpoint_files]}"
            )
        reader = Reader(checkpoint_files)
        reader.require_own_config(read_config(folder), folder / CONFIG)
        reader.verify()
        install_from(model, config, reader)
        # Transformers would only log a missing tensor, and initialize it at random.
        stored = {*reader.names, *(getattr(model, "all_tied_weights_keys", None) or {})}
        for name, _ in model.named_parameters():
            if name not in stored:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint")

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        model.requires_grad_(False)
        _replace_writer(model)
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Always False: the checkpoint is already quantized."""
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of parameters that are not quantized; codes and scales keep theirs."""
        return dtype

    def is_serializable(self) -> bool:
        """Always False: Transformers' own writer, which asks for it, would drop the checksums."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: after :func:`fgmp.model.adapters.add_lora`."""
        return self.passes_gradients


def mark_quantized(model: nn.Module, config: CheckpointConfig) -> None:
    """Mark a model as quantized for Transformers, as if Transformers had loaded it."""
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer = FgmpQuantizer(FgmpConfig(**config.to_dict()))
        _replace_writer(model)


def _replace_writer(model: Any) -> None:
    """Give one model :func:`save_pretrained`; a partial, which copies and pickles with it."""
    model.save_pretrained = partial(save_pretrained, model)


_UNSUPPORTED = ("state_dict", "variant", "distributed_checkpoint")


def save_pretrained(
    model: Any,
    save_directory: str | Path,
    is_main_process: bool = True,
    push_to_hub: bool = False,
    max_shard_size: int | str = "5GB",
    repo_id: str | None = None,
    **options: Any,
) -> None:
    """Write a packed model of Transformers as an fgmp checkpoint.

    Args:
        model: from :func:`fgmp.quantize` or loaded; if PEFT adapters are attached, Transformers
            writes these alone.
        save_directory: must not exist, or be empty. It appears complete or not at all. Tokenizers
            are saved after it, into the same folder.
        is_main_process: nothing is written by other processes.
        push_to_hub: upload the checkpoint after it is written.
        max_shard_size: larger checkpoints are split into files of at most this size.
        repo_id: repository on the hub; default: the folder's name.
        options: others of Transformers. Those of the upload are passed to ``push_to_hub``;
            ``save_original_format`` and ``save_peft_format`` have no effect on a checkpoint.

    Raises:
        InputError: a target in use, a full disk, or an option that cannot be fulfilled.
    """
    if getattr(model, "_hf_peft_config_loaded", False):
        type(model).save_pretrained(model, save_directory, is_main_process, **options)
        return
    for name in _UNSUPPORTED:
        if options.pop(name, None):
            raise InputError(f"save_pretrained: {name} is not supported for fgmp checkpoints")
    if not is_main_process:
        return
    # Not at the top: importing it imports Transformers, which imports this module.
    from fgmp.model.store import save

    save(model, save_directory, max_shard_size=max_shard_size)
    if push_to_hub:
        ignored = ("save_original_format", "save_peft_format")
        upload = {name: value for name, value in options.items() if name not in ignored}
        model.push_to_hub(repo_id or Path(save_directory).name, **upload)
