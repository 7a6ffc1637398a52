"""Loading of fgmp checkpoints by ``AutoModelForCausalLM.from_pretrained``.

Importing this module registers ``quant_method: "fgmp"`` with Transformers, which has no other way
to discover it. Before Transformers loads the tensors of a model, the reader of this package puts
validated packed linears into it. Transformers then loads the remaining tensors under their usual
names.
"""

import copy
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from fgmp.errors import CheckpointError
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
    """Loads packed models; quantizing is ``fgmp.quantize``'s, saving ``fgmp.save``'s."""

    requires_calibration = True

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
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        """Always False: the checkpoint is already quantized."""
        return False

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Dtype of parameters that are not quantized; codes and scales keep theirs."""
        return dtype

    def is_serializable(self) -> bool:
        """Always False, with a warning: ``save_pretrained`` would drop the checksums."""
        logging.getLogger("fgmp").warning("fgmp models are saved by fgmp.save(model, directory)")
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def mark_quantized(model: nn.Module, config: CheckpointConfig) -> None:
    """Mark a model as quantized for Transformers, as if Transformers had loaded it."""
    if isinstance(model, PreTrainedModel):
        model.hf_quantizer = FgmpQuantizer(FgmpConfig(**config.to_dict()))
