"""Rows of a table from measurements: means over calibrations, and paired bootstrap intervals.

A draw of the bootstrap takes windows and, for a row with several, calibrations, both with
replacement. All rows see the same draws, so noise that rows share cancels in their differences.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from bootstrap import Draws, interval, recovered
from measuring import Measured
from torch import Tensor

SMALLEST_GAP = 1.005
"""A share of the perplexity gap is reported from this ratio of all-NVFP4 to all-FP8 on."""

UNIFORM = ("nvfp4", "fp8")
"""Rows whose difference is the gap."""


def summarize(
    measured: Mapping[str, Sequence[Measured]],
    original: Tensor,
    predictions: int,
    versus: Mapping[str, Sequence[str]],
) -> list[dict[str, Any]]:
    """Summarize every row.

    Args:
        measured: measurements of each row, one per calibration. A row may have fewer calibrations
            than another; it is then compared on those that both have.
        original: losses of the original model by window, float64 (B,).
        predictions: predictions in a window.
        versus: names of the rows that a row is compared with.
    """
    table = Table(measured, original, predictions)
    return [table.row(name, versus.get(name, ())) for name in measured]


class Table:
    """Measurements of all rows, and the draws that they share; arguments of :func:`summarize`."""

    def __init__(
        self, measured: Mapping[str, Sequence[Measured]], original: Tensor, predictions: int
    ) -> None:
        self.measured, self.original, self.predictions = measured, original, predictions
        self.draws = Draws(len(original), max(map(len, measured.values())))

    def row(self, name: str, versus: Sequence[str]) -> dict[str, Any]:
        """One row, as plain JSON types."""
        rows = self.measured[name]
        seeds = len(rows)
        share, shares = self.recovered(name, seeds)
        divergences = [m.kl for m in rows]
        return {
            "name": name,
            "seeds": seeds,
            "bits_per_weight": sum(m.bits_per_weight for m in rows) / seeds,
            "fp4_activations": sum(m.fp4_activations for m in rows) / seeds,
            "perplexity": self.perplexity(name, seeds),
            "ci95": self.perplexity_interval(name),
            "kl": torch.stack(divergences).mean().item() / self.predictions,
            "kl_ci95": interval(self.drawn(divergences)),
            "gap_recovered_percent": self.perplexity_gap_recovered(name, seeds),
            "kl_gap_recovered_percent": share,
            "kl_gap_recovered_ci95": interval(shares),
            "kl_gap_recovered_by_seed": self.recovered_by_seed(name),
            "kl_gap_recovered_points_over": {
                other: self.points_over(name, other) for other in versus if other in self.measured
            },
            "revisions": sorted({m.revision for m in rows}),
        }

    def drawn(self, values: Sequence[Tensor]) -> Tensor:
        """Means per prediction, (RESAMPLES,), of values (B,) of one calibration after the other."""
        return self.draws.means(values) / self.predictions

    def recovered(self, name: str, seeds: int) -> tuple[float, Tensor]:
        """Percent of the KL gap that a row closes: of all windows, and of each draw."""
        rows = [[m.kl for m in self.measured[n][:seeds]] for n in (name, *UNIFORM)]
        means = [torch.stack(row).mean() / self.predictions for row in rows]
        return recovered(*means).item(), recovered(*map(self.drawn, rows))

    def recovered_by_seed(self, name: str) -> list[float]:
        """Percent of the KL gap that a row closes, by calibration."""
        nvfp4, fp8 = (self.measured[n] for n in UNIFORM)
        return [
            recovered(m.kl.mean(), nvfp4[i].kl.mean(), fp8[i].kl.mean()).item()
            for i, m in enumerate(self.measured[name])
        ]

    def points_over(self, name: str, other: str) -> dict[str, Any]:
        """Points of KL gap by which a row lies over another, on the calibrations of both."""
        seeds = min(len(self.measured[name]), len(self.measured[other]))
        ours, theirs = self.recovered(name, seeds), self.recovered(other, seeds)
        return {"points": ours[0] - theirs[0], "ci95": interval(ours[1] - theirs[1])}

    def perplexity(self, name: str, seeds: int) -> float:
        """Perplexity of a row's mean loss over its first calibrations."""
        loss = torch.stack([m.loss for m in self.measured[name][:seeds]]).mean(0)
        return math.exp(loss.sum().item() / len(self.original) / self.predictions)

    def perplexity_interval(self, name: str) -> list[float]:
        """95% interval of the perplexity, paired with the original's loss."""
        base = self.original.sum().item() / len(self.original) / self.predictions
        shift = self.drawn([m.loss - self.original for m in self.measured[name]])
        return [math.exp(base + d) for d in interval(shift)]

    def perplexity_gap_recovered(self, name: str, seeds: int) -> float | None:
        """Percent of the perplexity gap that a row closes; None where there is hardly one."""
        row, nvfp4, fp8 = (self.perplexity(n, seeds) for n in (name, *UNIFORM))
        if nvfp4 <= SMALLEST_GAP * fp8:
            return None
        return 100 * (nvfp4 - row) / (nvfp4 - fp8)
