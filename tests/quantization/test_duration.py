"""The duration that is announced before a run."""

import json
from pathlib import Path

import pytest
from conftest import make_model
from torch import Tensor

from fgmp import Recipe, quantize
from fgmp.model.store import config_of
from fgmp.quantization.duration import DurationEstimate, spoken
from fgmp.quantization.pipeline import prepare


def test_more_work_takes_longer(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """With passes of one second forward and three with the way back."""
    monkeypatch.setattr(
        "fgmp.quantization.duration._seconds", lambda *_, differentiable: 1 + 2 * differentiable
    )

    def predicted(**recipe: object) -> DurationEstimate:
        chosen = Recipe(**{"clip": "on", "compensate": False, **recipe})
        return prepare(make_model("llama"), tokens[:6], chosen, held_out=tokens[6:]).duration

    plain = predicted()
    assert plain.calibration == 6 * 3 and plain.total == pytest.approx(18 + 6 * 1.1 + 8, abs=0.2)
    compensated = predicted(compensate=True)
    assert compensated.rest - plain.rest == pytest.approx(6 * (2.0 + 3.5))
    assert predicted(compensate=True, clip="auto").rest > compensated.rest + 6 * 3.5
    assert predicted(tune=2).rest - plain.rest == pytest.approx(6 * 2 * 5)


def test_it_is_announced_and_stored(tokens: Tensor, tmp_path: Path) -> None:
    lines: list[str] = []
    model = quantize(make_model("llama"), tokens[:4], Recipe(clip="on"), report=lines.append)
    assert any(line.startswith("the run will take about") for line in lines)
    run = json.loads(json.dumps(config_of(model).run))
    assert 0 < run["seconds_predicted"]["calibration"] < run["seconds_predicted"]["total"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (89, "89 s"), (100, "2 min"), (5000, "83 min"), (7200, "2.0 h")],
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert spoken(seconds) == text
