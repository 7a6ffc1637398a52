"""Decision rules of the online quantizer: what makes an activation block FP8.

A *rule* maps a block in both formats to an exact integer score S. The block is FP8 if and only if
S exceeds the site's threshold (docs/numerics.md, section 5). With g the per-channel sensitivity, v
the value, and q4 and q8 the value in either format, the rules are

=============  ==============================================================================
difference     sum g (q4 - q8)^2: how far apart the formats are; the paper's
benefit        sum g ((q4 - v)^2 - (q8 - v)^2), at least 0: the error that FP8 avoids
truncated      ``benefit`` for narrow hardware: values in steps of the last bit of the
               smallest candidate scale
random         a hash of the block's FP8 codes, uniform over 0 to 2**60 - 1; a control
=============  ==============================================================================

:data:`RULES` is the only list of rules. The recipe, the checkpoint reader, the C++ and Triton
kernels and the RTL take their names from it. Each entry says which of them implement the rule:

* without C++ or Triton, the operators fall back to the definition in ``formats.activation``;
* without RTL, ``fgmp hw`` refuses the rule;
* without ``in_recipe``, only a policy can choose it.

:func:`register` adds a rule, for experiments; docs/extending.md has an example.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK

if TYPE_CHECKING:
    from torch import Tensor  # the command line reads names from here without waiting for torch


@dataclass(frozen=True)
class Integers:
    """Integers from which a rule computes S, for blocks of 16 values.

    Attributes:
        q4, q8: decoded FP4 and FP8 values as multiples of 2**-10 * t, int64 (..., 16).
        v: the value 6 u, rounded to the same grid, int64 (..., 16).
        g: sensitivities as multiples of 2**-9, int64, broadcastable with ``q4``.
        fp8: E4M3 codes, uint8 (..., 16).
    """

    q4: Tensor
    q8: Tensor
    v: Tensor
    g: Tensor
    fp8: Tensor


def weighted_squares(difference: Tensor, g: Tensor) -> Tensor:
    """Sum of g d^2 over each block: int64 (..., 16), broadcastable, to (...); below 2**60."""
    return (difference.square() * g).sum(-1)


def _difference(x: Integers) -> Tensor:
    return weighted_squares(x.q4 - x.q8, x.g)


def _benefit(x: Integers) -> Tensor:
    return (weighted_squares(x.q4 - x.v, x.g) - weighted_squares(x.q8 - x.v, x.g)).clamp(min=0)


def _random(x: Integers) -> Tensor:
    import torch

    multipliers = torch.tensor(_HASH_MULTIPLIERS, device=x.fp8.device)
    mixed = (x.fp8.long() * multipliers).sum(-1)
    mixed = (mixed ^ (mixed >> 31)) * _HASH_MULTIPLIERS[0]
    return (mixed ^ (mixed >> 29)) & (2**60 - 1)


# Odd 63-bit constants: fractional parts of the golden ratio's multiples.
_HASH_MULTIPLIERS = [(i * 0x9E3779B97F4A7C15 | 1) & (2**63 - 1) for i in range(1, BLOCK + 1)]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One decision rule.

    Attributes:
        score: maps blocks to S, int64 (...), 0 to 2**60 - 1.
        weight_score: score of weight blocks under this rule, a key of
            ``assign.impact.WEIGHT_SCORES``.
        estimated: whether ``fake_quantize`` may decide on fp32 estimates where they are safe.
        truncated: whether values are truncated to the last bit of the smallest candidate scale.
        in_recipe: whether a recipe may name the rule.
        cpu: the rule's code in the C++ kernels (``kernels/cpu/quantize.h``); None where they lack
            it.
        triton: whether the Triton kernels implement the rule.
        rtl: whether the RTL implements the rule.
    """

    score: Callable[[Integers], Tensor]
    weight_score: str = "benefit"
    estimated: bool = False
    truncated: bool = False
    in_recipe: bool = True
    cpu: int | None = None
    triton: bool = False
    rtl: bool = False


RULES: dict[str, Rule] = {
    "difference": Rule(
        score=_difference, weight_score="difference", estimated=True, cpu=0, triton=True, rtl=True
    ),
    "benefit": Rule(score=_benefit, estimated=True, cpu=1, triton=True, rtl=True),
    "truncated": Rule(score=_benefit, truncated=True, rtl=True),
    "random": Rule(score=_random, in_recipe=False, triton=True),
}
"""Every rule by name."""

SCALES: dict[str, tuple[int, ...]] = {"max": (0,), "search": (5, 4, 0, -1)}
"""Candidates for an FP4 block scale, by name: offsets from the FP8 code of the block's largest
magnitude, in descending order.

``max`` is the paper's. ``search`` tries four. Offsets 4 and 5 multiply the scale by about 1.5,
which puts the largest value at 4 instead of 6 (Four Over Six, arXiv 2512.02010); offset -1 clips
it a little. These four reach nine tenths of the gain of all 126 codes."""

SENSITIVITIES = ("e4m3", "powers")
"""Values of per-channel sensitivities: any E4M3 code, or powers of two only."""


def register(name: str, rule: Rule) -> None:
    """Add a rule under a new name.

    Raises:
        InputError: the name is taken.
    """
    if name in RULES:
        raise InputError(f"rule {name!r} exists already; choose another name")
    RULES[name] = rule


def recipe_rules() -> tuple[str, ...]:
    """Names of the rules that a recipe may choose."""
    return tuple(name for name, rule in RULES.items() if rule.in_recipe)


@dataclass(frozen=True, order=True)
class QuantizerConfig:
    """Configuration of an online quantizer, in software or hardware.

    Attributes:
        rule: a key of :data:`RULES`.
        scales: a key of :data:`SCALES`.
        sensitivities: one of :data:`SENSITIVITIES`.

    Raises:
        InputError: an unknown name.
    """

    rule: str = "benefit"
    scales: str = "search"
    sensitivities: str = "e4m3"

    def __post_init__(self) -> None:
        choices: dict[str, Collection[str]]
        choices = {"rule": RULES, "scales": SCALES, "sensitivities": SENSITIVITIES}
        for name, allowed in choices.items():
            if (value := getattr(self, name)) not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

    def __str__(self) -> str:
        return f"{self.rule}, {self.scales}, {self.sensitivities}"


PAPER_QUANTIZER = QuantizerConfig("difference", "max", "e4m3")
"""Configuration of the paper's online quantizer (arXiv 2504.14152)."""
