"""Rows of ``runs/accuracy.py``, by name: each a function of a setting that returns a packed model.

``ROWS`` are this package's recipes and the baselines. Each of ``ABLATIONS`` changes one thing about
another row, whose name stands before the last comma. ``VERSUS`` says which rows are compared.
"""

import math
from collections.abc import Callable

import baselines
import hessian
import transforms
from estimates import ESTIMATES
from setting import ROUND_TO_NEAREST, Setting, Transform, format_bits
from torch import nn

from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.formats.spec import BLOCK
from fgmp.model.linear import mixed_linears
from fgmp.pack.planes import packed_bytes
from fgmp.quantization.uniform import uniform
from fgmp.recipe import PAPER

Row = Callable[[Setting], nn.Module]


def recipe(methods: Methods = DEFAULT_METHODS, **fields: object) -> Row:
    """Row of a recipe of this package."""
    return lambda setting: setting.quantized(methods=methods, **fields)


def with_estimate(label: str, **fields: object) -> Row:
    """Row of a recipe whose sensitivities are another estimate, a key of ``ESTIMATES``."""
    estimate = ESTIMATES[label]
    return lambda setting: setting.quantized(calibration=setting.once(estimate), **fields)


def transformed(transform: Transform, **fields: object) -> Row:
    """Row of a recipe for a model whose weights are transformed first."""
    return lambda setting: setting.quantized(transform, **fields)


def all_of(format_name: str) -> Row:
    """Row of one format, ``fp8`` or ``nvfp4``, rounded to nearest."""
    return lambda setting: uniform(setting.load(), setting.base, format_name)


def at_weight_bits(setting: Setting, bits: float) -> nn.Module:
    """Quantize by the default recipe with as many FP8 weight blocks as fit ``bits`` per weight.

    Every byte counts, and every weight counts as one that mixes formats. The same fraction of
    activation blocks is in FP8.
    """
    shapes = [(m.packed.n, m.packed.k) for m in mixed_linears(setting.base).values()]
    blocks = sum(n * -(-k // BLOCK) for n, k in shapes)
    per_fp8_block = packed_bytes(BLOCK, BLOCK, 2) - packed_bytes(BLOCK, BLOCK, 1)
    without_fp8 = sum(packed_bytes(n, k, 1) - per_fp8_block for n, k in shapes)
    room = bits / 8 * sum(n * k for n, k in shapes) - without_fp8
    return setting.quantized(fp4=1 - math.floor(room / per_fp8_block) / blocks)


LOCAL_HESSIAN = Methods(compensate=hessian.compensated)

TRANSFORMS = {
    "scales migrated": transforms.migrate,
    "channels sorted": transforms.reorder,
    "rotated": transforms.rotate,
    "blocks rotated": transforms.rotate_blocks,
}

ROWS: dict[str, Row] = {
    "fp8": all_of("fp8"),
    "nvfp4": all_of("nvfp4"),
    "paper 70%": recipe(fp4=0.7, **PAPER),
    "paper 90%": recipe(fp4=0.9, **PAPER),
    "ours 70%": recipe(fp4=0.7),
    "ours 90%": recipe(fp4=0.9),
    "ours 100%": recipe(fp4=1.0),
    "ours, mean of 70%": recipe(bits=format_bits(0.7)),
    "ours, mean of 90%": recipe(bits=format_bits(0.9)),
    "autoquantize 5.4 bits": lambda s: baselines.autoquantize(s, 5.4),
    "ours at 5.4 bits": lambda s: at_weight_bits(s, 5.4),
    "autoquantize 6.0 bits": lambda s: baselines.autoquantize(s, 6.0),
    "ours at 6.0 bits": lambda s: at_weight_bits(s, 6.0),
    "nvfp4, MSE scales": recipe(fp4=1.0, policy="error", **PAPER),
    "nvfp4, four over six": baselines.four_over_six,
    "nvfp4, GPTQ": baselines.gptq,
    "70% by channel": lambda s: baselines.by_channel(s, 0.7),
    "90% by channel": lambda s: baselines.by_channel(s, 0.9),
}
"""This package, the paper's method and the baselines."""

PASSES = 10
"""Passes over the calibration text in the tuned rows."""

TUNED: dict[str, dict[str, float]] = {
    "ours 100%": {"fp4": 1.0},
    "ours, mean of 70%": {"bits": format_bits(0.7)},
    "ours, mean of 90%": {"bits": format_bits(0.9)},
}
"""Rows that are measured again with tuned parameters, by name, and their recipes."""

ABLATIONS: dict[str, Row] = {
    "ours 85% weights, 55% activations": recipe(fp4=0.85, fp4_activations=0.55),
    "ours 70%, no compensation": recipe(fp4=0.7, compensate=False),
    "ours 90%, no compensation": recipe(fp4=0.9, compensate=False),
    "ours 100%, no compensation": recipe(fp4=1.0, compensate=False),
    "ours 70%, factored Fisher": recipe(fp4=0.7, fisher="factored"),
    "ours 90%, factored Fisher": recipe(fp4=0.9, fisher="factored"),
    **{
        f"ours {fp4:.0%}, Fisher {label}": with_estimate(label, fp4=fp4)
        for label in ("by token", "at the quantized point")
        for fp4 in (0.7, 0.9)
    },
    "ours 70%, labels of the text": recipe(fp4=0.7, labels="text"),
    "ours 90%, labels of the text": recipe(fp4=0.9, labels="text"),
    "ours 100%, labels of the text": recipe(fp4=1.0, labels="text"),
    "ours, mean of 70%, labels of the text": recipe(bits=format_bits(0.7), labels="text"),
    "ours, mean of 90%, labels of the text": recipe(bits=format_bits(0.9), labels="text"),
    "ours 70%, rule difference": recipe(fp4=0.7, rule="difference"),
    "ours 70%, scales max": recipe(fp4=0.7, scales="max"),
    "ours 90%, scales max": recipe(fp4=0.9, scales="max"),
    "ours 70%, local Hessian": recipe(LOCAL_HESSIAN, fp4=0.7),
    "ours 100%, local Hessian": recipe(LOCAL_HESSIAN, fp4=1.0),
    "ours 70%, power-of-two sensitivities": recipe(fp4=0.7, sensitivities="powers"),
    "ours 70%, truncated squares": recipe(fp4=0.7, rule="truncated"),
    "ours 70%, no clipping": recipe(fp4=0.7, clip="off"),
    "ours 100% weights, FP8 activations": recipe(fp4=1.0, fp4_activations=0.0),
    "ours FP8 weights, 100% activations": recipe(fp4=0.0, fp4_activations=1.0),
    "paper 80%": recipe(fp4=0.8, **PAPER),
    **{
        f"paper {fp4:.0%}, {label}": recipe(fp4=fp4, **{**PAPER, **change})
        for label, change in {
            "no clipping": {"clip": "off"},
            "per layer": {"policy": "fisher-per-layer"},
            "no sensitivity": {"policy": "error"},
            "random": {"policy": "random"},
        }.items()
        for fp4 in (0.7, 0.9)
    },
    "paper 70%, weights only": recipe(fp4=0.7, fp4_activations=0.0, **PAPER),
    "paper 70%, activations only": recipe(fp4=0.0, fp4_activations=0.7, **PAPER),
    "nvfp4 weights, FP8 activations": recipe(fp4=1.0, fp4_activations=0.0, **ROUND_TO_NEAREST),
    "FP8 weights, nvfp4 activations": recipe(fp4=0.0, fp4_activations=1.0, **ROUND_TO_NEAREST),
    **{
        f"ours {fp4:.0%}, {label}": transformed(transform, fp4=fp4)
        for label, transform in TRANSFORMS.items()
        for fp4 in (0.7, 1.0)
    },
}
ABLATIONS |= {f"{name}, tuned": recipe(**fields, tune=PASSES) for name, fields in TUNED.items()}
"""Rows that take one step of the method away or replace it, or that add tuning."""


def ablated(ablation: str) -> str:
    """Name of the row that an ablation changes: what stands before the last comma."""
    return ablation.rpartition(",")[0]


VERSUS: dict[str, tuple[str, ...]] = {
    "ours 70%": ("paper 70%", "70% by channel"),
    "ours 90%": ("paper 90%", "90% by channel"),
    "ours 100%": ("nvfp4, four over six", "nvfp4, GPTQ", "nvfp4, MSE scales"),
    "ours, mean of 70%": ("ours 70%",),
    "ours, mean of 90%": ("ours 90%",),
    "ours at 5.4 bits": ("autoquantize 5.4 bits",),
    "ours at 6.0 bits": ("autoquantize 6.0 bits",),
    **{row: (ablated(row),) for row in ABLATIONS if ablated(row) in ROWS},
    "ours 100%, no compensation": ("ours 100%", "nvfp4, four over six"),
}
"""Rows that a row is compared with, window by window."""
