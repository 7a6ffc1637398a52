"""``fgmp_scores.json``: what was written is read, and nothing else is believed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgmp.errors import CheckpointError
from fgmp.report.scores import read_scores

ENTRY = {"zeros": 1, "first": -3, "counts": [1, 2], "sums": [0.1, 0.3], "threshold": 0.2}
GOOD: dict[str, Any] = {
    "version": 1,
    "bins_per_octave": 4,
    "scale_search": True,
    "tokens": 100,
    "window": [64, 16],
    "weights": {"a": {**ENTRY, "scores": "AAA="}},
    "activations": {"a": ENTRY},
}


def read(tmp_path: Path, content: Any) -> Any:
    (tmp_path / "fgmp_scores.json").write_text(json.dumps(content))
    return read_scores(tmp_path)


def test_what_quantize_wrote_is_read(folder: Path) -> None:
    written = json.loads((folder / "fgmp_scores.json").read_text())
    scores = read_scores(folder)
    assert scores == {key: written[key] for key in ("tokens", "window", "weights", "activations")}


def test_absence_is_none(tmp_path: Path) -> None:
    assert read_scores(tmp_path) is None


def test_keys_that_it_does_not_know_are_dropped(tmp_path: Path) -> None:
    read_back = read(tmp_path, {**GOOD, "weights": {"a": {**ENTRY, "more": "<script>"}}})
    assert read_back["weights"] == {"a": ENTRY}


def with_entry(**changes: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {**GOOD, "weights": {"a": {**ENTRY, **changes}}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (list, r"must be a mapping, got \[\]"),
        (lambda: {**GOOD, "version": 2}, "version must be 1, got 2"),
        (lambda: {**GOOD, "bins_per_octave": 8}, "bins_per_octave must be 4, got 8"),
        (lambda: {**GOOD, "tokens": "x"}, "tokens must be a number, got 'x'"),
        (lambda: {**GOOD, "window": [64]}, r"window must be two numbers, got \[64\]"),
        (lambda: {**GOOD, "weights": []}, r"weights must be a mapping, got \[\]"),
        (lambda: {**GOOD, "weights": {"a": 3}}, "weights.a must be a mapping, got 3"),
        (with_entry(first=0.5), "weights.a.first must be an index, got 0.5"),
        (with_entry(first=10**9), "weights.a.first must be an index, got 1000000000"),
        (with_entry(counts=["<b>"]), "weights.a.counts must be a list of numbers, 0 or more"),
        (with_entry(counts=[True, 1]), "weights.a.counts must be a list of numbers"),
        (with_entry(sums=[1.0, float("nan")]), "weights.a.sums must be a list of numbers"),
        (with_entry(sums=[1.0]), "weights.a needs as many sums as counts, got 1"),
        (with_entry(zeros=-1), "weights.a.zeros must be a number, got -1"),
        (with_entry(threshold="1"), "weights.a.threshold must be a number, got '1'"),
        (with_entry(scores="!"), "weights.a.scores must be base64, got '!'"),
        (with_entry(scores=3), "weights.a.scores must be base64, got 3"),
    ],
)
def test_other_values_are_refused(content: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, content())
    assert read(tmp_path, GOOD) is not None
