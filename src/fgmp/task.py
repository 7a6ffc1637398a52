"""What quantizing works on: the task it was given, and what scoring found out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fgmp.assign.policy import Policy
from fgmp.assign.weights import ScoredWeights
from fgmp.fingerprint import sha256
from fgmp.formats.activation import Site
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity.fisher import Loss, causal_lm_loss, drawn_label_loss
from fgmp.sensitivity.histogram import ScoreHistogram
from fgmp.unfinished import Unfinished


@dataclass(frozen=True, eq=False)
class Task:
    """A model to quantize, how, and by what text.

    Attributes:
        model: linearized; in its original state between calls.
        linears: those to quantize, by name.
        samples: calibration sequences.
        held_out: sequences that candidates are compared on.
        loss: runs a sequence.
        recipe: what the result shall be.
        progress, report: as ``quantize`` was given them.
        kept: folder for what is done before all is.
    """

    model: nn.Module
    linears: dict[str, nn.Linear]
    samples: Sequence[Any] | Tensor
    held_out: Sequence[Any] | Tensor
    loss: Loss
    recipe: Recipe
    progress: Stages = silent
    report: Callable[[str], None] = lambda line: None
    kept: Path | None = None

    @property
    def fisher_loss(self) -> Loss:
        """The loss whose gradients count: the next-token loss may draw its labels."""
        drawn = self.recipe.labels == "model" and self.loss is causal_lm_loss
        return drawn_label_loss if drawn else self.loss

    def unfinished(self, *what: Any) -> Unfinished | None:
        """Where work on this model by these texts is kept, if it is.

        Args:
            what: all else that decides the result, but for the recipe, which counts without what
                comes after packing.
        """
        if self.kept is None:
            return None
        recipe = {**self.recipe.to_dict(), "tune": None}
        known = [version("fgmp"), recipe, self.model.state_dict(), list(self.samples)]
        return Unfinished(self.kept, sha256([*known, *what]))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The weights to quantize."""
        return {name: linear.weight.detach() for name, linear in self.linears.items()}


@dataclass(frozen=True, eq=False)
class Scored:
    """What is known of a model before its blocks get formats.

    Attributes:
        linears_of: names of the linears that read a site, by the one that owns it.
        records: of the sites, without threshold.
        histograms: of the sites' block scores.
        variants: scored weights, by each way of choosing scales.
        policy: the recipe's.
        predictions: tokens of the calibration.
    """

    linears_of: dict[str, list[str]]
    records: dict[str, Site]
    histograms: dict[str, ScoreHistogram]
    variants: list[ScoredWeights]
    policy: Policy
    predictions: int
