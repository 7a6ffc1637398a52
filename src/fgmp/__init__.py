"""Fine-grained mixed-precision quantization: every block of 16 values is NVFP4 or FP8.

    import fgmp
    model = fgmp.quantize(model, samples, fgmp.Recipe(fp4=0.7))
    fgmp.save(model, "out", tokenizer)
    model = fgmp.load("out")

After ``import fgmp``, ``transformers.AutoModelForCausalLM.from_pretrained`` loads such checkpoints,
too. The names below are imported when they are first used, so that importing the package takes
milliseconds. The command line is ``fgmp --help``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fgmp.model.registration import register as _register

if TYPE_CHECKING:
    from fgmp.data import calibration_text, evaluation_windows
    from fgmp.errors import CheckpointError, FGMPError, InputError, MemoryLimitError
    from fgmp.model.store import load, save
    from fgmp.quantization.pipeline import quantize
    from fgmp.recipe import Recipe

__all__ = [
    "CheckpointError",
    "FGMPError",
    "InputError",
    "MemoryLimitError",
    "Recipe",
    "calibration_text",
    "evaluation_windows",
    "load",
    "quantize",
    "save",
]

_MODULES = {
    "fgmp.errors": ("CheckpointError", "FGMPError", "InputError", "MemoryLimitError"),
    "fgmp.recipe": ("Recipe",),
    "fgmp.data": ("calibration_text", "evaluation_windows"),
    "fgmp.model.store": ("load", "save"),
    "fgmp.quantization.pipeline": ("quantize",),
}

_register()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    for module, names in _MODULES.items():
        if name in names:
            value = getattr(import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'fgmp' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
