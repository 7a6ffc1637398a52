"""The one user configuration: what a checkpoint will be, and nothing about machines.

A recipe is frozen, never edited after construction, and stored with its result. As a file it is
YAML with the same keys; a key that does not exist is an error, so is a value out of range.
"""

import math
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import yaml

from fgmp.errors import InputError
from fgmp.formats.spec import FP4_BITS, FP8_BITS

CLIP_CHOICES = ("auto", "on", "off")
FISHER_CHOICES = ("exact", "factored")
LABEL_CHOICES = ("model", "text")
RULE_NAMES = ("benefit", "difference", "truncated")
SCALES_NAMES = ("search", "max")
SENSITIVITY_NAMES = ("e4m3", "powers")
PAPER: dict[str, Any] = {
    "labels": "text",
    "rule": "difference",
    "scales": "max",
    "compensate": False,
}
"""What makes a recipe the paper's method: ``Recipe(fp4=0.7, **PAPER)``."""
BUDGETS = ("bits", "max_bytes", "max_increase", "max_energy")
"""Instead of shares: fields that say what the result may cost, at most one of them at a time."""
POLICY_NAMES = ("fisher", "fisher-per-layer", "error", "random", "fp8", "nvfp4")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to quantize a model.

    Attributes:
        fp4: share of weight blocks kept in FP4, 0 to 1.
        fp4_activations: share of activation blocks kept in FP4, on the calibration tokens;
            None: the same as ``fp4``.
        bits: instead of the two shares, a budget: the mean of the bits of a weight and of an
            activation value, spent where it does least harm. A value has the bits of its block's
            format, 4.5 or 8; scale bytes of FP8 blocks, counters and padding are not in it. This
            and the three budgets that follow exclude each other and the shares, and need
            ``policy: fisher``.
        max_bytes: the bytes that all tensors of the checkpoint may have.
        max_increase: percent by which perplexity on held-out text may exceed all-FP8's.
        max_energy: percent of the energy that an FP8 machine takes for the same matrix products.
        policy: which blocks get FP8; see ``fgmp.assign.policy``.
        fisher: what calibration keeps of a weight's squared gradients: ``exact``, four bytes a
            weight, or ``factored``, four a row and a column; see ``fgmp.sensitivity.squares``.
        labels: of the next-token loss whose gradients are squared: drawn from the ``model``'s own
            predictions, which makes it the true Fisher information, or the next tokens of the
            ``text``, as the paper has it. Another loss, given to ``quantize``, has its own.
        rule: what makes a block FP8: ``benefit``, how much error that takes away, or
            ``difference``, how far apart the formats are, which is the paper's. ``truncated`` is
            ``benefit`` for narrow hardware: activations are judged with fewer bits.
        scales: block scales of FP4 activations: ``search`` tries four, ``max`` is the paper's.
        sensitivities: of activation channels: ``e4m3``, or ``powers`` of two, for which narrow
            hardware needs no multiplier.
        clip: search the block scale of FP4 weight blocks: ``on``, ``off``, or ``auto``, dropped if
            predictions on a held-out slice of the calibration text are nearer to the original's
            without.
        compensate: let weights not yet rounded make up for the errors of those that are, and of
            the activations; not in the paper. See ``fgmp.assign.compensate``.
        tune: passes over the calibration text in which norms, biases, embeddings and whatever else
            is not quantized are tuned to the packed model, after all else; 0: none. Training, if
            little of it; not in the paper. See ``fgmp.tune``.
        samples: calibration sequences.
        seq_len: tokens in a calibration sequence; capped at the model's context.
        seed: chooses the calibration sequences.
        headroom: activations up to this multiple of the largest calibrated one do not saturate.
        include: name patterns (shell style) of the linears to quantize. A pattern other than
            ``*`` may name an output head or router, which are otherwise left alone; not a head
            that shares its weight with the embedding.
        exclude: name patterns of linears to leave alone.
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
    rule: str = "benefit"
    scales: str = "search"
    sensitivities: str = "e4m3"
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
            listed = isinstance(value, list | tuple) and all(isinstance(p, str) for p in value)
            if not listed:
                raise InputError(f"recipe: {name} must be a list of name patterns, got {value!r}")
            object.__setattr__(self, name, tuple(value))
        for name in ("fp4", "fp4_activations"):
            value = getattr(self, name)
            if value is None and name == "fp4_activations":
                continue
            if not _is_number(value) or not 0 <= value <= 1:
                raise InputError(f"recipe: {name} must be a fraction from 0 to 1, got {value!r}")
        self._check_budgets()
        if self.policy not in POLICY_NAMES:
            raise InputError(
                f"recipe: policy must be one of {', '.join(POLICY_NAMES)}, got {self.policy!r}"
            )
        if self.clip not in CLIP_CHOICES:
            raise InputError(f"recipe: clip must be auto, on or off, got {self.clip!r}")
        pairs = {
            "fisher": FISHER_CHOICES,
            "labels": LABEL_CHOICES,
            "rule": RULE_NAMES,
            "scales": SCALES_NAMES,
            "sensitivities": SENSITIVITY_NAMES,
        }
        for name, known in pairs.items():
            if getattr(self, name) not in known:
                raise InputError(
                    f"recipe: {name} must be {_listed(known)}, got {getattr(self, name)!r}"
                )
        if self.sensitivities == "powers" and not self.policy.startswith("fisher"):
            raise InputError(
                f"recipe: sensitivities powers needs a policy that has some, got {self.policy!r}"
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
        shares = [name for name, default in defaults.items() if getattr(self, name) != default]
        if len(budgets) > 1 or (budgets and shares):
            raise _several(shares + budgets)
        if self.budget and self.policy != "fisher":
            raise InputError(
                f"recipe: {self.budget} needs scores of one unit, policy fisher, "
                f"got {self.policy!r}"
            )

    @property
    def budget(self) -> str | None:
        """Which of :data:`BUDGETS` is given; None where shares are."""
        return next((name for name in BUDGETS if getattr(self, name) is not None), None)

    def with_options(self, given: dict[str, Any]) -> "Recipe":
        """This recipe under options that override it, a size or percentage as text.

        A share of FP4 replaces a budget of the recipe's, a budget shares and any other budget.
        """
        given = {key: _parsed(key, value) for key, value in given.items()}
        amounts = [name for name in ("fp4", *BUDGETS) if name in given]
        if len(amounts) > 1:
            raise _several(amounts)
        if amounts and amounts[0] != "fp4":
            default = {"fp4": type(self).fp4, "fp4_activations": None}
            given = {**default, **dict.fromkeys(BUDGETS), **given}
        elif amounts:
            given = {**dict.fromkeys(BUDGETS), **given}
        return replace(self, **given)

    @property
    def activation_fraction(self) -> float:
        """The asked share of FP4 activation blocks."""
        return self.fp4 if self.fp4_activations is None else self.fp4_activations

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in field order."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe") -> "Recipe":
        """A recipe from plain types; unknown keys are refused with the known ones listed."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"{source}: unknown key {key!r}; the keys are {', '.join(known)}")
        return cls(**values)

    @classmethod
    def from_yaml(cls, path: Path) -> "Recipe":
        """Read a recipe file."""
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


def _listed(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _several(given: list[str]) -> InputError:
    return InputError(f"recipe: give one of fp4, {', '.join(BUDGETS)}, got {' and '.join(given)}")


_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def _parsed(key: str, value: Any) -> Any:
    """A size such as 4.5M, or a percentage such as 1%, as a number; anything else as it is."""
    if key == "max_bytes" and isinstance(value, str):
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMG]?)B?", value)
        if not found:
            raise InputError(
                f"recipe: max_bytes must be a number of bytes, with k, M or G for thousands, "
                f"millions or billions, got {value!r}"
            )
        return round(float(found[1]) * _SUFFIXES[found[2]])
    if key in ("max_increase", "max_energy") and isinstance(value, str):
        found = re.fullmatch(r"(-?[0-9]+(?:\.[0-9]+)?) *%?", value)
        return float(found[1]) if found else value
    return value
