"""Fine-grained mixed-precision quantization: every block of 16 values is NVFP4 or FP8.

    import fgmp
    model = fgmp.quantize(model, samples, fgmp.Recipe(fp4=0.7))
    fgmp.save(model, "out", tokenizer)
    model = fgmp.load("out")

Importing this package also teaches ``transformers.AutoModelForCausalLM.from_pretrained`` to load
such checkpoints. The command line is ``fgmp --help``.
"""

import fgmp.model.transformers  # noqa: F401  registers the checkpoint format
from fgmp.data import calibration_text, evaluation_windows
from fgmp.errors import CheckpointError, FGMPError, InputError, MemoryLimitError
from fgmp.model.store import load, save
from fgmp.pipeline import quantize
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
