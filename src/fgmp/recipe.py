"""The user's configuration of a checkpoint; it contains nothing specific to a machine.

A recipe is frozen and stored in the checkpoint that it produced. A recipe file is YAML with the
same keys. An unknown key is an error, and so is a value out of range.

Two keys control the scale search of FP4 blocks: ``clip`` for weights (offline) and ``scales`` for
activations (online).
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fgmp.assign.policy import POLICIES
from fgmp.errors import InputError
from fgmp.formats.rules import (
    PAPER_QUANTIZER,
    SCALES,
    SENSITIVITIES,
    QuantizerConfig,
    recipe_rules,
)
from fgmp.formats.spec import FP4_BITS, FP8_BITS

CLIP_CHOICES = ("auto", "on", "off")
FISHER_CHOICES = ("exact", "factored")
LABEL_CHOICES = ("model", "text")
PAPER: dict[str, Any] = {
    "labels": "text",
    "rule": PAPER_QUANTIZER.rule,
    "scales": PAPER_QUANTIZER.scales,
    "compensate": False,
}
"""Settings of the paper's method (arXiv 2504.14152): ``Recipe(fp4=0.7, **PAPER)``."""
BUDGETS = ("bits", "max_bytes", "max_increase", "max_energy")
"""Budget fields; a recipe sets at most one of them, and then no fractions of FP4 blocks."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        fp4: fraction of weight blocks in FP4, 0 to 1.
        fp4_activations: fraction of activation blocks in FP4 on the calibration set; None: the same
            as ``fp4``.
        bits: budget: mean of bits per weight and bits per activation value, allocated between the
            two to minimize the loss. A value counts 4.5 or 8 bits by its block's format; scale
            bytes of FP8 blocks, counters and padding are not counted. The four budgets are mutually
            exclusive, exclude both fractions, and need ``policy: fisher``.
        max_bytes: budget: bytes of all tensors in the checkpoint.
        max_increase: budget: percent by which perplexity on held-out text may exceed all-FP8's.
        max_energy: budget: energy of the quantized matmuls, percent of an FP8-only accelerator's.
        policy: sensitivities and threshold scope by which blocks get FP8; see
            ``fgmp.assign.policy``.
        fisher: how calibration stores the squared gradients of a weight (N, K): ``exact``, four
            bytes per element, or ``factored``, four bytes per row and per column; see
            ``fgmp.sensitivity.squares``.
        labels: labels of the next-token loss whose gradients are squared. ``model``: sampled from
            the model's own predictions, which gives the true Fisher information; ``text``: the
            next tokens of the text, as in the paper. A custom loss brings its own labels.
        rule: decision rule, the score of a block. ``benefit``: reduction in squared error from FP4
            to FP8; ``difference``: squared difference of the two formats, as in the paper;
            ``truncated``: ``benefit`` on activations truncated to fewer bits, for smaller hardware.
        scales: scale search of FP4 activation blocks: ``search`` tries four scales per block;
            ``max`` uses the absmax scale, as in the paper.
        sensitivities: values of per-channel activation sensitivities: any E4M3 value (``e4m3``), or
            only powers of two (``powers``), for which hardware needs no multiplier.
        clip: scale search of FP4 weight blocks: ``on``, ``off``, or ``auto``. ``auto`` searches
            unless the model without search is closer to the original on held-out text (in KL
            divergence, for a causal language model).
        compensate: error compensation (GPTQ with quantized inputs): weights not yet rounded
            compensate the errors of rounded weights and of quantized activations. Not in the paper;
            see ``fgmp.assign.compensate``.
        tune: epochs over the calibration set in which unquantized parameters (norms, biases,
            embeddings) are trained to match the original's predictions, after packing; 0: none. Not
            in the paper; see ``fgmp.quantization.tune``.
        samples: number of calibration sequences.
        seq_len: tokens per calibration sequence; capped at the model's context.
        seed: random seed for sampling calibration sequences.
        headroom: factor on the largest calibrated activation magnitude (amax); activations saturate
            only above the product.
        include: name patterns (shell style) of the linears to quantize. Output heads and routers
            are quantized only if a pattern other than ``*`` matches them. A head tied to the
            embedding cannot be quantized.
        exclude: name patterns of linears that keep their precision.

    Raises:
        InputError: a value out of range, two budgets, or a budget together with a fraction.
    """

    fp4: float = 0.7
    fp4_activations: float | None = None
    bits: float | None = None
    max_bytes: int | None = None
    max_increase: float | None = None
    max_energy: float | None = None
    policy: str = "fisher"
    fisher: str = "exact"
    labels: str = "model"
    rule: str = QuantizerConfig.rule
    scales: str = QuantizerConfig.scales
    sensitivities: str = QuantizerConfig.sensitivities
    clip: str = "auto"
    compensate: bool = True
    tune: int = 0
    samples: int = 512
    seq_len: int = 512
    seed: int = 0
    headroom: float = 1.0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("include", "exclude"):  # a YAML list arrives here as a list
            value = getattr(self, name)
            valid = isinstance(value, list | tuple) and all(isinstance(p, str) for p in value)
            if not valid:
                raise InputError(f"recipe: {name} must be a list of name patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("fp4", "fp4_activations"):
            value = getattr(self, name)
            if value is None and name == "fp4_activations":
                continue
            if not _is_number(value) or not 0 <= value <= 1:
                raise InputError(f"recipe: {name} must be a fraction from 0 to 1, got {value!r}")
        self._check_budgets()
        if self.policy not in POLICIES:
            raise InputError(
                f"recipe: policy must be one of {', '.join(POLICIES)}, got {self.policy!r}"
            )
        if self.clip not in CLIP_CHOICES:
            raise InputError(f"recipe: clip must be auto, on or off, got {self.clip!r}")
        choices = {
            "fisher": FISHER_CHOICES,
            "labels": LABEL_CHOICES,
            "rule": recipe_rules(),
            "scales": tuple(SCALES),
            "sensitivities": SENSITIVITIES,
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"recipe: {name} must be {_listed(allowed)}, got {getattr(self, name)!r}"
                )
        if self.sensitivities == "powers" and POLICIES[self.policy].sensitivity != "fisher":
            fitting = [name for name, p in POLICIES.items() if p.sensitivity == "fisher"]
            raise InputError(
                f"recipe: sensitivities powers needs policy {_listed(fitting)}, got {self.policy!r}"
            )
        if not isinstance(self.compensate, bool):
            raise InputError(f"recipe: compensate must be true or false, got {self.compensate!r}")
        for name, least in (("tune", 0), ("samples", 1), ("seq_len", 2), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"recipe: {name} must be an integer of at least {least}, got {value!r}"
                )
        if self.seed >= 2**63:
            raise InputError(f"recipe: seed must be below 2^63, got {self.seed}")
        if not _is_number(self.headroom) or not 1 <= self.headroom <= 1024:
            raise InputError(f"recipe: headroom must be from 1 to 1024, got {self.headroom!r}")

    def _check_budgets(self) -> None:
        bits, size = self.bits, self.max_bytes
        increase, energy = self.max_increase, self.max_energy
        if bits is not None and not (_is_number(bits) and FP4_BITS <= bits <= FP8_BITS):
            raise InputError(
                f"recipe: bits must be from {FP4_BITS:g} (all FP4) to {FP8_BITS:g} (all FP8), "
                f"got {bits!r}"
            )
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise InputError(f"recipe: max_bytes must be a number of bytes, got {size!r}")
        if increase is not None and not (
            _is_number(increase) and increase >= 0 and math.isfinite(increase)
        ):
            raise InputError(
                f"recipe: max_increase must be a percentage of 0 or more, got {increase!r}"
            )
        if energy is not None and not (_is_number(energy) and 0 < energy <= 100):
            raise InputError(
                f"recipe: max_energy must be a percentage above 0 and at most 100, got {energy!r}"
            )
        budgets = [name for name in BUDGETS if getattr(self, name) is not None]
        defaults = {"fp4": type(self).fp4, "fp4_activations": None}
        fractions = [name for name, default in defaults.items() if getattr(self, name) != default]
        if len(budgets) > 1 or (budgets and fractions):
            raise _conflict(fractions + budgets)
        policy = POLICIES.get(self.policy)
        if self.budget and policy and not policy.comparable:
            raise InputError(
                f"recipe: {self.budget} needs policy fisher, whose scores of weights and "
                f"activations are comparable, got {self.policy!r}"
            )

    @property
    def budget(self) -> str | None:
        """Name of the budget in use, one of :data:`BUDGETS`; None with fractions of FP4 blocks."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def with_options(self, options: dict[str, Any]) -> "Recipe":
        """Copy of this recipe with some fields replaced; sizes and percentages may be text.

        The option ``fp4`` removes the recipe's budget. A budget resets both fractions of FP4 blocks
        and removes any other budget.

        Raises:
            InputError: ``fp4`` together with a budget, two budgets, or a value out of range.
        """
        options = {key: _parsed(key, value) for key, value in options.items()}
        amounts = [name for name in ("fp4", *BUDGETS) if name in options]
        if len(amounts) > 1:
            raise _conflict(amounts)
        if amounts and amounts[0] != "fp4":
            default = {"fp4": type(self).fp4, "fp4_activations": None}
            options = {**default, **dict.fromkeys(BUDGETS), **options}
        elif amounts:
            options = {**dict.fromkeys(BUDGETS), **options}
        return replace(self, **options)

    @property
    def quantizer(self) -> QuantizerConfig:
        """Configuration of the online activation quantizer."""
        return QuantizerConfig(self.rule, self.scales, self.sensitivities)

    @property
    def activation_fraction(self) -> float:
        """Fraction of activation blocks in FP4, ``fp4`` where ``fp4_activations`` is None."""
        return self.fp4 if self.fp4_activations is None else self.fp4_activations

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types, in field order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe") -> "Recipe":
        """Build a recipe from plain types.

        Raises:
            InputError: an unknown key, with the known ones listed, or a value out of range.
        """
        keys = [f.name for f in fields(cls)]
        for key in values:
            if key not in keys:
                raise InputError(f"{source}: unknown key {key!r}; the keys are {', '.join(keys)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path) -> "Recipe":
        """Read a recipe file.

        Raises:
            InputError: not a readable YAML mapping, an unknown key or a value out of range.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"recipe {path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"recipe {path}: not YAML: {error}") from error
        if values is None:
            values = {}
        if not isinstance(values, dict):
            raise InputError(f"recipe {path}: must be a mapping, got {type(values).__name__}")
        if isinstance(values.get("clip"), bool):  # YAML reads a bare on or off as a boolean
            values["clip"] = "on" if values["clip"] else "off"
        values = {key: _parsed(key, value) for key, value in values.items()}
        return cls.from_dict(values, source=f"recipe {path}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _conflict(names: list[str]) -> InputError:
    return InputError(
        f"recipe: set only one of fp4, {', '.join(BUDGETS)}; got {' and '.join(names)}"
    )


_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _parsed(key: str, value: Any) -> Any:
    """Parse a size such as 4.5M or a percentage such as 1%; return anything else unchanged."""
    if key == "max_bytes" and isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)B?", value)
        if not match:
            raise InputError(
                f"recipe: max_bytes must be a number of bytes, with k, M or G for thousands, "
                f"millions or billions, got {value!r}"
            )
        return round(float(match[1]) * _SUFFIXES[match[2]])
    if key in ("max_increase", "max_energy") and isinstance(value, str):
        match = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?) *%?", value)
        return float(match[1]) if match else value
    return value
