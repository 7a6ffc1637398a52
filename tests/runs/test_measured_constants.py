"""Scripts behind measured constants: `compensation.py` and `memory_constants.py` of runs/."""

from pathlib import Path

import compensation
import memory_constants
import pytest
import rows
import torch
from tiny_setting import tiny_setting

from fgmp.assign.compensate import LIMIT
from fgmp.assign.methods import Methods
from fgmp.model.linear import mixed_linears


def test_compensation_is_recorded_and_left_alone(tmp_path: Path) -> None:
    setting, recorder = tiny_setting(tmp_path), compensation.Recorder()
    recorded = mixed_linears(setting.quantized(methods=Methods(compensate=recorder), fp4=1.0))
    plain = mixed_linears(rows.ROWS["ours 100%"](setting))
    assert all(torch.equal(plain[n].packed.low, recorded[n].packed.low) for n in plain)
    assert recorder.shapes == [(m.out_features, m.in_features) for m in plain.values()]
    facts = compensation.summary(recorder)
    assert facts["rows"] == sum(m.out_features for m in plain.values())
    assert facts["beyond_limit"] == 0 and facts["largest"] <= LIMIT
    # The reason for compensation: most rows come nearer.
    assert facts["quantiles"][0.5] < 1


def test_rows_beyond_the_limit_are_counted() -> None:
    ratios = [torch.tensor([0.5, 1.0]).double(), torch.tensor([3.0, 9.0, torch.nan]).double()]
    facts = compensation.summary(compensation.Recorder(ratios, [(2, 16), (3, 32)]))
    assert facts["rows"] == 4 and facts["beyond_limit"] == 1
    assert (facts["largest"], facts["largest_within_limit"]) == (9.0, 3.0)
    assert facts["shape_of_largest"] == [3, 32]


def test_the_peak_of_a_step_is_measured() -> None:
    extra, result = memory_constants.extra_bytes(lambda: torch.ones(16_000_000).sum().item())
    assert result == 16_000_000 and extra >= 60_000_000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_with_logits_are_measured(dtype: torch.dtype) -> None:
    copies = memory_constants.logits_copies(20_000, 32, dtype)
    assert list(copies) == [
        "calibrating, labels model",
        "calibrating, labels text",
        "comparing",
        "tuning",
    ]
