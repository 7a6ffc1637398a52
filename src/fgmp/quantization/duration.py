"""Predicted duration of a run, from two short passes that are timed before it.

Most of a run is passes through the model: forward and backward in calibration, forward in scoring
and compensation. Their number follows from the recipe, and a pass of one calibration sequence is
timed on a prefix. The rest grows with the number of quantized parameters. The constants come from
``benchmarks/quantize.py`` (AVX2, one thread), which prints predicted and measured seconds. Another
process on the machine makes a run longer than predicted.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from fgmp.model.observe import differentiable_inputs, ends_after, frozen
from fgmp.quantization.task import Task

_PROBE_TOKENS = 128
"""Tokens of the prefix that is timed."""
_SCORING_PASSES = 1.1
"""Cost per sequence of scoring activations, in forward passes."""
_COMPENSATION_PASSES, _VARIANT_PASSES = 2.0, 3.5
"""Cost per sequence of compensation, in forward passes: for the original, and for each variant,
including the accumulation of its moments."""
_TUNING_PASSES = 5
"""Cost per sequence and epoch of tuning, in forward passes."""
_SECONDS_PER_PARAMETER = 2e-7
"""Seconds to score, round and pack a parameter, per variant."""


@dataclass(frozen=True)
class DurationEstimate:
    """Predicted seconds of calibration and of the rest of a run."""

    calibration: float
    rest: float

    @property
    def total(self) -> float:
        return self.calibration + self.rest

    def __str__(self) -> str:
        return f"about {spoken(self.total)}, of which calibration takes {spoken(self.calibration)}"


def estimate(task: Task, variants: int) -> DurationEstimate:
    """Predict the duration of a run; runs a few passes on a prefix of the first sequence.

    Args:
        task: what will run.
        variants: number of variants (with and without scale search) that are packed.
    """
    sample, scale = task.samples[0], 1.0
    if isinstance(sample, Tensor) and sample.ndim == 1 and len(sample) > _PROBE_TOKENS:
        scale = len(sample) / _PROBE_TOKENS
        sample = sample[:_PROBE_TOKENS]
    last = list(task.linears.values())[-1]

    def backward() -> None:
        total, _ = task.fisher_loss(task.model, sample)
        if total.requires_grad:
            total.backward()

    def forward() -> None:
        with ends_after(last):
            task.loss(task.model, sample)

    both = scale * _seconds(task, backward, differentiable=True)
    one = scale * _seconds(task, forward, differentiable=False)
    return predict(task, variants, one, both)


def predict(task: Task, variants: int, forward: float, both: float) -> DurationEstimate:
    """Predict the duration of a run from that of its passes.

    Args:
        task: what will run; no weight is read.
        variants: number of variants that are packed.
        forward: seconds of a pass of one sequence through all quantized layers.
        both: seconds of a forward and a backward pass of one sequence.
    """
    sequences, recipe = len(task.samples), task.recipe
    passes = _SCORING_PASSES + recipe.tune * _TUNING_PASSES
    if recipe.compensate:
        passes += _COMPENSATION_PASSES + variants * _VARIANT_PASSES
    holders = (linear for name, linear in task.linears.items() if name not in task.shared)
    parameters = sum(linear.weight.numel() for linear in holders)
    checks = 2 * (variants + 1) * len(task.held_out)
    return DurationEstimate(
        calibration=sequences * both,
        rest=(sequences * passes + checks) * forward
        + variants * parameters * _SECONDS_PER_PARAMETER,
    )


def _seconds(task: Task, run: Callable[[], None], *, differentiable: bool) -> float:
    """The faster of two runs."""
    with ExitStack() as stack:
        stack.enter_context(frozen(task.model))
        linears: list[nn.Module] = list(task.linears.values())
        stack.enter_context(differentiable_inputs(linears) if differentiable else nullcontext())
        times = []
        for _ in range(2):
            started = time.perf_counter()
            run()
            times.append(time.perf_counter() - started)
    return min(times)


def spoken(seconds: float) -> str:
    """A duration in words, such as ``83 min``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
