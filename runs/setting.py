"""A model and its calibration text: what every row of a table is quantized from.

The figures of docs/accuracy.md come about in these steps, one file each:

    setting     a model, its calibration text, and the calibrations made of them
    rows        functions of a setting that return a quantized model: this package's recipes,
                ``baselines`` and ablations (``estimates``, ``hessian``, ``transforms``)
    measuring   loss and KL divergence of a model on evaluation windows
    summary     means over calibrations, and paired intervals
    accuracy    the command: measures rows and writes ``docs/results/accuracy-MODEL.json``
    figures     tables and plots of docs/accuracy.md, from those files
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from torch import Tensor, nn

from fgmp import Recipe, quantize
from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.data import CalibrationText
from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.model.losses import causal_lm_loss, sampled_label_loss
from fgmp.model.select import linearize, quantizable
from fgmp.model.source import load_model
from fgmp.progress import bars
from fgmp.recipe import PAPER
from fgmp.sensitivity.fisher import Calibration, calibrate

ROUND_TO_NEAREST = {**PAPER, "clip": "off"}
"""The paper's settings without its scale search of weights."""

Transform = Callable[[nn.Module, Tensor], nn.Module]
"""(model, calibration windows) to the model with other weights that compute the same."""

ResultT = TypeVar("ResultT")


def format_bits(fp4: float) -> float:
    """Bits per value of the formats at this fraction of FP4 blocks, as ``Recipe.bits`` counts."""
    return FP8_BITS - fp4 * (FP8_BITS - FP4_BITS)


@dataclass(eq=False)
class Setting:
    """A model and its calibration text.

    Attributes:
        name: folder or hub name of the model.
        text: calibration and held-out sequences.
        seq_len, seed: of ``text``; recipes store them.
        stem: first part of the path of every file that keeps a calibration.
        console: where progress goes.
    """

    name: str
    text: CalibrationText
    seq_len: int
    seed: int
    stem: Path
    console: Console
    results: dict[Callable[..., Any], Any] = field(default_factory=dict, init=False, repr=False)

    def load(self) -> nn.Module:
        """Load the original model."""
        return load_model(self.name)

    def linearized(self) -> tuple[nn.Module, dict[str, nn.Linear]]:
        """Load the original model, and the linears that a recipe quantizes by default."""
        model = self.load()
        linearize(model)
        return model, quantizable(model)

    def recipe(self, **fields: object) -> Recipe:
        """Recipe with these fields. Block scales are searched unless ``fields`` say otherwise.

        The default, ``clip: auto``, lets a short held-out text decide; rows would differ by that.
        """
        known = {"clip": "on", "seq_len": self.seq_len, "seed": self.seed}
        return Recipe(**{**known, **fields})  # type: ignore[arg-type]

    def quantized(
        self,
        transform: Transform | None = None,
        *,
        calibration: Calibration | None = None,
        methods: Methods = DEFAULT_METHODS,
        **fields: object,
    ) -> nn.Module:
        """Quantize the model.

        Args:
            transform: changes the original first.
            calibration: sensitivities; None: those of the recipe, kept in a file.
            methods: replaced steps.
            fields: of the recipe.
        """
        recipe = self.recipe(**fields)
        model = self.load()
        if transform is not None:
            model = transform(model, self.text.samples)
        return quantize(
            model,
            self.text.samples,
            recipe,
            held_out=self.text.held_out,
            calibration=calibration or self.calibration_file(recipe, transform),
            methods=methods,
            progress=bars(self.console),
        )

    def calibrated(self, **fields: object) -> Calibration:
        """Calibration of the original for a recipe, kept in the file that `quantized` reads."""
        recipe = self.recipe(**fields)
        model, linears = self.linearized()
        loss = sampled_label_loss if recipe.labels == "model" else causal_lm_loss
        file = self.calibration_file(recipe)
        return calibrate(model, linears, self.text.samples, loss, fisher=recipe.fisher, file=file)

    def calibration_file(self, recipe: Recipe, transform: Transform | None = None) -> Path:
        """File that keeps the calibration of a recipe."""
        name = "plain" if transform is None else transform.__name__
        kind = f"{name}-{recipe.fisher}-{recipe.labels}"
        return self.stem.with_name(f"{self.stem.name}.{kind}.safetensors")

    @cached_property
    def base(self) -> nn.Module:
        """A quantized model whose sites and activation scales the baselines use; not to be run."""
        return self.quantized(**ROUND_TO_NEAREST)

    def once(self, compute: "Callable[[Setting], ResultT]") -> ResultT:
        """Result of a function of this setting, computed at the first call."""
        if compute not in self.results:
            self.results[compute] = compute(self)
        result: ResultT = self.results[compute]
        return result
