"""LoRA adapters on packed linears, by PEFT: the packed weights stay, the adapters train.

PEFT asks its configuration how a layer that it does not know gets an adapter; the answer is
:class:`packed_lora`'s class. Gradients pass through all packed linears, those without an adapter
too, as those of their dequantized weights (:mod:`fgmp.model.gradients`).

An adapter cannot be merged into a packed weight, whose rounding would lose it, and variants of LoRA
that read or change the weight, such as DoRA, are refused.
"""

import copy
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from fgmp.errors import InputError
from fgmp.model.gradients import differentiate
from fgmp.model.linear import MixedLinear, mixed_linears

ALL_LINEAR = "all-linear"
"""PEFT's name for every linear but the output head; here, every packed linear."""

_PLAIN = (True, False, "gaussian", "orthogonal")
"""Values of ``init_lora_weights`` that do not depend on the weight."""


def add_lora(model: nn.Module, config: Any, adapter_name: str = "default") -> Any:
    """Attach new LoRA adapters to a packed model of Transformers, ready to train.

    Args:
        model: from :func:`fgmp.quantize` or loaded; changed in place.
        config: ``peft.LoraConfig``; its ``target_modules`` name packed linears or others.
        adapter_name: name of the adapter.

    Returns:
        The ``peft.PeftModel``. Its ``save_pretrained`` writes the adapter alone.

    Raises:
        InputError: PEFT is not installed, the model is not packed, or the adapter is of a kind that
            packed linears do not have.
    """
    _require(model)
    from peft import get_peft_model

    return get_peft_model(_trainable(model), _prepared(config, model), adapter_name)


def load_lora(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", *, train: bool = False
) -> Any:
    """Attach LoRA adapters that PEFT saved to a packed model of Transformers.

    Args:
        model: from :func:`fgmp.quantize` or loaded; changed in place.
        folder: folder or hub name of the adapter.
        adapter_name: name of the adapter.
        train: whether the adapter is trained further.

    Returns:
        The ``peft.PeftModel``.

    Raises:
        InputError: as :func:`add_lora`.
    """
    _require(model)
    from peft import PeftConfig, PeftModel

    config = _prepared(PeftConfig.from_pretrained(str(folder)), model)
    return PeftModel.from_pretrained(
        _trainable(model), str(folder), adapter_name, is_trainable=train, config=config
    )


def _require(model: nn.Module) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InputError("LoRA adapters need the package peft: pip install 'fgmp[lora]'")
    if not mixed_linears(model):
        raise InputError(f"{type(model).__name__} has no packed linears: use PEFT itself")


def _trainable(model: nn.Module) -> nn.Module:
    differentiate(mixed_linears(model).values())
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.passes_gradients = True
    return model


def _prepared(config: Any, model: nn.Module) -> Any:
    """Copy of a PEFT configuration that knows packed linears.

    Raises:
        InputError: an adapter that is not LoRA, or that depends on the weight.
    """
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise InputError(
            f"adapters on packed linears must be LoRA, got a {type(config).__name__} of PEFT"
        )
    if config.init_lora_weights not in _PLAIN:
        raise InputError(
            "init_lora_weights must not depend on the weight, which is packed: one of "
            f"{', '.join(map(repr, _PLAIN))}, got {config.init_lora_weights!r}"
        )
    config = copy.deepcopy(config)
    if config.target_modules == ALL_LINEAR:
        config.target_modules = set(mixed_linears(model))
    config._register_custom_module({MixedLinear: packed_lora()})
    return config


@cache
def packed_lora() -> type[Any]:
    """PEFT's layer class for a packed linear with an adapter."""
    from peft.tuners.lora.layer import Linear

    class PackedLora(Linear):
        """A packed linear, and beside it the product of two small matrices."""

        @property
        def lora_variants(self) -> dict[tuple[str, ...], Any]:
            """Plain LoRA alone: others read or change the weight."""
            return {(): None}

        def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
            assert isinstance(module, MixedLinear)
            return module.in_features, module.out_features

        def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
            """Refuse: rounding to packed formats would lose the adapter.

            Raises:
                InputError: always.
            """
            raise InputError(
                "adapters cannot be merged into packed weights: serve both, or merge into the "
                "original and quantize that"
            )

    return PackedLora
