"""The arguments of a quantization run, and the records that its steps pass on.

``pipeline.prepare`` makes a :class:`Task` of the arguments. Scoring returns :class:`Scores`, the
budget an :class:`OperatingPoint`; ``candidates`` packs the model at that point.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgmp.assign.frontier import Fractions
from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.assign.policy import Policy
from fgmp.assign.weights import ScoredWeights
from fgmp.formats.activation import Site
from fgmp.model.losses import Loss, causal_lm_loss, sampled_label_loss
from fgmp.model.select import shared_weights
from fgmp.progress import Progress, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity.histogram import ScoreHistogram
from fgmp.storage.fingerprint import sha256
from fgmp.storage.resume import PartialResults


@dataclass(frozen=True, eq=False)
class Task:
    """A model to quantize, the recipe, and the calibration and held-out sequences.

    Attributes:
        model: the linearized model; in its original state between steps.
        linears: the linears to quantize, by name.
        samples: calibration sequences.
        held_out: sequences on which candidates are compared.
        loss: runs one sequence.
        recipe: quantization settings.
        methods: replaceable steps.
        progress, report: as in ``pipeline.quantize``.
        resume: folder for resumable partial results; None: nothing is stored.
    """

    model: nn.Module
    linears: dict[str, nn.Linear]
    samples: Sequence[Any] | Tensor
    held_out: Sequence[Any] | Tensor
    loss: Loss
    recipe: Recipe
    methods: Methods = DEFAULT_METHODS
    progress: Progress = silent
    report: Callable[[str], None] = lambda line: None
    resume: Path | None = None

    @property
    def fisher_loss(self) -> Loss:
        """The loss whose gradients are squared; its labels may be sampled from the model."""
        sampled = self.recipe.labels == "model" and self.loss is causal_lm_loss
        return sampled_label_loss if sampled else self.loss

    @cached_property
    def shared(self) -> dict[str, str]:
        """Linears that use the weight of an earlier one, and the name of that one, by name."""
        return shared_weights(self.linears)

    @property
    def weights(self) -> dict[str, Tensor]:
        """Weights to quantize, (N, K) by linear; a shared one under its first linear."""
        linears = self.linears.items()
        return {name: m.weight.detach() for name, m in linears if name not in self.shared}

    def partial_results(self, *inputs: Any) -> PartialResults | None:
        """Resumable partial results of a stage; None where the run stores none.

        Args:
            inputs: what the stage depends on, apart from version, model, calibration text and
                recipe (without ``tune``, which comes after packing).
        """
        if self.resume is None:
            return None
        return PartialResults(self.resume, sha256([self._digest, *inputs]), self.report)

    @cached_property
    def _digest(self) -> str:
        recipe = {**self.recipe.to_dict(), "tune": None}
        model, text = self.model.state_dict(), list(self.samples)
        linears = [list(self.linears), self.shared]
        return sha256([version("fgmp"), recipe, self.methods, linears, model, text])


@dataclass(frozen=True, eq=False)
class Scores:
    """Block scores of a model, before its blocks are assigned formats.

    Attributes:
        linears_of: names of the linears that read a site's tensor, by the site's owner.
        sites: constants of the sites, without threshold.
        histograms: activation block scores by site.
        variants: scored weights, with and without scale search if both are packed.
        policy: the recipe's policy.
        predictions: predicted tokens of the calibration text.
    """

    linears_of: dict[str, list[str]]
    sites: dict[str, Site]
    histograms: dict[str, ScoreHistogram]
    variants: list[ScoredWeights]
    policy: Policy
    predictions: int


@dataclass(frozen=True)
class BudgetResult:
    """What a budget results in; None for other budgets.

    Attributes:
        bits: mean of bits per weight and bits per activation value, of the formats alone.
        energy_percent: energy of matmuls, percent of an FP8-only accelerator's.
        increase_percent: held-out perplexity over all-FP8's, in percent; ``increase_low`` and
            ``increase_high`` are two standard errors below and above.
    """

    bits: float | None = None
    energy_percent: float | None = None
    increase_percent: float | None = None
    increase_low: float | None = None
    increase_high: float | None = None

    def to_dict(self) -> dict[str, float]:
        """The values that are known."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class OperatingPoint:
    """Fractions of FP4 blocks to pack at, and the result of the budget, if any."""

    fractions: Fractions
    budget: BudgetResult = BudgetResult()
