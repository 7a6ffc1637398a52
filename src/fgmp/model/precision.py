"""The dtype in which a model's passes run, and the dtypes in which its files store it.

Most CPUs multiply no bf16 numbers. PyTorch then emulates them: on AVX2 a product of 512 tokens
takes five to six times as long as in fp32 (docs/kernels.md). On such a CPU a model of bf16
parameters runs in fp32, which represents each of them exactly. Gradients of a summed loss overflow
fp16, so a model stored in fp16 runs in fp32 everywhere. Saved files and reported sizes keep the
stored dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import psutil
import torch
from torch import Tensor, nn

from fgmp.errors import InputError

CHOICES = ("auto", "float32", "stored")
"""Ways to choose the dtype of passes: fast on the device, fp32, or as the files store it."""

_USABLE = 0.7
"""Fraction of the free memory that the wider parameters may take."""

_ATTRIBUTE = "fgmp_stored_dtypes"


@dataclass(frozen=True)
class _StoredDtypes:
    """Dtypes in a model's files: by name, and that of parameters that get a new name."""

    by_name: Mapping[str, torch.dtype]
    parameters: torch.dtype

    def of(self, name: str, tensor: Tensor) -> torch.dtype:
        default = self.parameters if isinstance(tensor, nn.Parameter) else tensor.dtype
        return self.by_name.get(name, default)


def require_choice(choice: str) -> None:
    """Raise InputError unless ``choice`` is one of :data:`CHOICES`."""
    if choice not in CHOICES:
        raise InputError(f"dtype must be one of {', '.join(CHOICES)}, got {choice!r}")


@cache
def has_bf16_arithmetic() -> bool:
    """Whether this CPU multiplies bf16 numbers (AVX-512 BF16, AMX, Armv8.6)."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is None:  # PyTorch before 2.12
        return bool(torch.cpu._is_avx512_bf16_supported())
    return any(there for name, there in capabilities().items() if "bf16" in name)


def compute_dtype(stored: torch.dtype, device: torch.device, choice: str = "auto") -> torch.dtype:
    """The dtype in which passes of a model run, never less precise than that of its files.

    Args:
        stored: dtype of the model's parameters in its files.
        device: device of the model.
        choice: one of :data:`CHOICES`. fp16 becomes fp32 in any case.

    Raises:
        InputError: no such choice.
    """
    require_choice(choice)
    slow = stored == torch.bfloat16 and device.type == "cpu" and not has_bf16_arithmetic()
    wide = choice == "float32" or stored == torch.float16 or (choice == "auto" and slow)
    return torch.float32 if wide else stored


def run_in(model: nn.Module, choice: str = "auto") -> nn.Module:
    """Convert a model to the dtype of its passes, in place, and return it.

    Saving converts it back to its stored dtypes. A model that was converted before is not changed.
    With ``auto``, a bf16 model whose fp32 copy would not fit in memory stays in bf16, which is slow
    but works.

    Args:
        model: quantized or not; planes and constants of packed layers keep their dtypes.
        choice: as for :func:`compute_dtype`.
    """
    if hasattr(model, _ATTRIBUTE) or next(model.parameters(), None) is None:
        return model
    if dtype_of_passes(model, choice) == stored_dtype(model):
        return model
    # Transformers refuses model.float() on quantized models.
    return nn.Module.float(stored_as(model, model))


def dtype_of_passes(model: nn.Module, choice: str, free: int | None = None) -> torch.dtype:
    """The dtype in which passes of a model run that is in its stored dtype now.

    Args:
        model: only its parameters' shapes, dtypes and device are used.
        choice: as for :func:`compute_dtype`. With ``auto``, a bf16 model whose fp32 copy would not
            fit in memory stays in bf16.
        free: bytes of free memory; None: those of this machine.
    """
    stored = stored_dtype(model)
    dtype = compute_dtype(stored, next(model.parameters()).device, choice)
    free = psutil.virtual_memory().available if free is None else free
    if dtype != stored and choice == "auto" and stored != torch.float16:
        return dtype if _fits(model, free) else stored
    return dtype


def stored_as(model: nn.Module, original: nn.Module) -> nn.Module:
    """Record that files store ``model`` in the dtypes that ``original`` has now; returns it."""
    floating = {n: t.dtype for n, t in original.state_dict().items() if t.is_floating_point()}
    setattr(model, _ATTRIBUTE, _StoredDtypes(floating, stored_dtype(original)))
    return model


def _fits(model: nn.Module, free: int) -> bool:
    """Whether an fp32 copy of a model's parameters fits in free memory, with some to spare."""
    more = sum(p.numel() * (4 - p.element_size()) for p in model.parameters())
    return more < _USABLE * free


def stored_dtype(model: nn.Module) -> torch.dtype:
    """Dtype in which a model's files store its parameters; it may run in another.

    It is fp16 if any parameter is stored so, else the dtype of the first parameter.
    """
    stored: _StoredDtypes | None = getattr(model, _ATTRIBUTE, None)
    if stored is not None:
        return stored.parameters
    dtypes = [p.dtype for p in model.parameters()]
    return torch.float16 if torch.float16 in dtypes else dtypes[0]


def stored_dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Dtype in which a model's files store each tensor of ``state_dict()``, by name."""
    stored: _StoredDtypes | None = getattr(model, _ATTRIBUTE, None)
    tensors = model.state_dict(keep_vars=True)
    return {n: t.dtype if stored is None else stored.of(n, t) for n, t in tensors.items()}


@torch.no_grad()
def round_to_stored(model: nn.Module) -> None:
    """Round parameters to their stored dtypes, in place: the values that a reader gets."""
    dtypes = stored_dtypes(model)
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(dtypes[name]))
