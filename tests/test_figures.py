"""The tables of docs/results.md are what the results beside it say."""

import figures
import pytest


def test_tables_and_plots_are_those_of_the_results() -> None:
    found = figures.results()
    page = (figures.DOCS / "results.md").read_text()
    assert page.count("<!-- end -->") == len(found) + 7
    filled = figures.filled(page, found, figures.results_beside())
    assert filled == page, "run python runs/figures.py"
    for model, facts in found.items():
        drawn = (figures.DOCS / "results" / f"accuracy-{model}.svg").read_text()
        assert drawn == figures.plot(model, facts), "run python runs/figures.py"


def test_a_table_without_results_is_an_error() -> None:
    page = "<!-- accuracy-none -->\n<!-- end -->"
    with pytest.raises(KeyError, match="accuracy-none"):
        figures.filled(page, figures.results(), figures.results_beside())
