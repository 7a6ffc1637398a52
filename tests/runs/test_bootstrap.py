"""Intervals over what is evaluated and over calibrations, by hand."""

import pytest
import torch
from bootstrap import harms


def test_a_row_is_of_means_and_its_interval_of_both_draws() -> None:
    measured = {
        "fp8": [torch.tensor([0.0, 0.2]), torch.tensor([0.2, 0.0])],
        "ours": [torch.tensor([0.1, 0.5]), torch.tensor([0.5, 0.5])],
        "nvfp4": [torch.tensor([1.0, 1.2]), torch.tensor([1.2, 1.0])],
    }
    rows = harms(measured)
    assert rows["fp8"].recovered_ci95 == [100, 100] and rows["nvfp4"].recovered_ci95 == [0, 0]
    ours = rows["ours"]
    # By calibration 1.1 less 0.3 and less 0.5, of a gap of 1.
    assert ours.recovered_by_seed == pytest.approx([80, 60])
    assert ours.recovered_percent == pytest.approx(70) and ours.mean == pytest.approx(0.4)
    # One draw in 16 takes one window twice and one calibration twice: 0.9, 0.7, 0.7 or 0.5.
    assert ours.recovered_ci95 == pytest.approx([50, 90])
    assert ours.ci95 == pytest.approx([0.1, 0.5])
