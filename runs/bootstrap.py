"""95% intervals by a bootstrap over what is evaluated and over calibrations, paired across rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 2000


class Draws:
    """The same draws for every row of a table, all with replacement.

    Args:
        count: windows or sentences that every row was evaluated on.
        calibrations: the most that a row has.
    """

    def __init__(self, count: int, calibrations: int) -> None:
        source = torch.Generator().manual_seed(0)
        self._picks = torch.randint(count, (RESAMPLES, count), generator=source)
        self._calibrations = {
            n: torch.randint(n, (n, RESAMPLES), generator=source)
            for n in range(1, calibrations + 1)
        }

    def means(self, values: Sequence[Tensor]) -> Tensor:
        """Means, (RESAMPLES,), of values (count,) of one calibration after the other."""
        means = torch.stack([v[self._picks].mean(-1) for v in values])
        return means.gather(0, self._calibrations[len(values)]).mean(0)


def interval(values: Tensor) -> list[float]:
    """95% of the drawn values, (D,), lie between these."""
    ends = torch.tensor([0.025, 0.975], dtype=values.dtype)
    return [float(v) for v in values.quantile(ends)]


def recovered(harm: Tensor, nvfp4: Tensor, fp8: Tensor) -> Tensor:
    """How much of the gap from all NVFP4 to all FP8 a row closes, in percent."""
    return 100 * ((nvfp4 - harm) / (nvfp4 - fp8))


@dataclass(frozen=True)
class Harm:
    """What a row costs, as a mean over all and its interval, and how much of the gap it closes."""

    mean: float
    ci95: list[float]
    recovered_percent: float
    recovered_ci95: list[float]
    recovered_by_seed: list[float]


def harms(measured: dict[str, list[Tensor]]) -> dict[str, Harm]:
    """Every row beside all FP8 and all NVFP4.

    Args:
        measured: of each row, ``fp8`` and ``nvfp4`` among them, values (count,) of one calibration
            after the other, as many for every row.
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
