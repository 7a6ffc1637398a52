"""Reading takes time and memory in proportion, as recorded, and the plot is that of the result."""

import json
from pathlib import Path

from reading import plot

RESULTS = Path(__file__).parents[2] / "docs" / "results"


def test_the_plot_is_that_of_the_result() -> None:
    facts = json.loads((RESULTS / "reading.json").read_text())
    drawn = (RESULTS / "reading.svg").read_text()
    assert drawn == plot(facts), "run python benchmarks/reading.py --draw docs/results/reading.json"


def test_recorded_times_are_linear() -> None:
    """Ten times as many cost at most 13 times as much, where the cost is not all overhead."""
    facts = json.loads((RESULTS / "reading.json").read_text())
    assert facts["tensors"][-1]["tensors"] == 100_000
    for rows, column in ((facts["tensors"], "tensors"), (facts["sizes"], "megabytes")):
        for few, many in zip(rows[-2:], rows[-1:], strict=False):
            ratio = many[column] / few[column]
            assert many["seconds"] <= 1.3 * ratio * few["seconds"]
            assert 0 < many["peak_mb"] <= 1.3 * ratio * few["peak_mb"]
