"""Bootstrap of 95% intervals over evaluated items and calibrations, paired across rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


class Draws:
    """Draws with replacement, the same for every row of a table.

    Args:
        count: number of windows or sentences that rows are evaluated on.
        calibrations: largest number of calibrations of a row.
    """

    def __init__(self, count: int, calibrations: int) -> None:
        source = torch.Generator().manual_seed(0)
        self._picks = torch.randint(count, (RESAMPLES, count), generator=source)
        self._calibrations = {
            n: torch.randint(n, (n, RESAMPLES), generator=source)
            for n in range(1, calibrations + 1)
        }

    def means(self, values: Sequence[Tensor]) -> Tensor:
        """Mean of each draw, (RESAMPLES,), from values (count,) of each calibration."""
        means = torch.stack([v[self._picks].mean(-1) for v in values])
        return means.gather(0, self._calibrations[len(values)]).mean(0)


def interval(values: Tensor) -> list[float]:
    """Bounds of 95% of the resampled values (D,)."""
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return [float(v) for v in values.quantile(ends)]


def recovered(harm: Tensor, nvfp4: Tensor, fp8: Tensor) -> Tensor:
    """Percent of the gap from all NVFP4 to all FP8 that a row closes."""
    return 100 * ((nvfp4 - harm) / (nvfp4 - fp8))


@dataclass(frozen=True)
class Harm:
    """KL or drift (*harm*) of a row, and the fraction of the gap that it closes.

    Attributes:
        mean, ci95: over items and calibrations.
        recovered_percent, recovered_ci95: percent of the gap from all NVFP4 to all FP8.
        recovered_by_seed: likewise, by calibration.
    """

    mean: float
    ci95: list[float]
    recovered_percent: float
    recovered_ci95: list[float]
    recovered_by_seed: list[float]


def harms(measured: dict[str, list[Tensor]]) -> dict[str, Harm]:
    """Harm of every row, relative to all-FP8 and all-NVFP4.

    Args:
        measured: values (count,) of each calibration, by row; ``fp8`` and ``nvfp4`` among them. All
            rows have as many calibrations.
    """
    draws = Draws(len(measured["fp8"][0]), len(measured["fp8"]))
    drawn = {name: draws.means(row) for name, row in measured.items()}
    means = {name: torch.stack(row).mean() for name, row in measured.items()}
    seeds = range(len(measured["fp8"]))
    by_seed = [{name: row[seed].mean() for name, row in measured.items()} for seed in seeds]

    def share(row: dict[str, Tensor], name: str) -> Tensor:
        return recovered(row[name], row["nvfp4"], row["fp8"])

    return {
        name: Harm(
            means[name].item(),
            interval(drawn[name]),
            share(means, name).item(),
            interval(share(drawn, name)),
            [share(row, name).item() for row in by_seed],
        )
        for name in measured
    }
