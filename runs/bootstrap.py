"""95% intervals by a bootstrap over what is evaluated and over calibrations, paired across rows."""

from collections.abc import Sequence

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
