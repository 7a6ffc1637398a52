"""The tables and plots of the documents are those of the results beside them."""

import figures
import pytest


def test_tables_and_plots_are_those_of_the_results() -> None:
    models = figures.results()
    tables = sum(path.read_text().count("<!-- end -->") for path in figures.PAGES)
    assert tables == len(models) + 8
    for path in figures.PAGES:
        page = path.read_text()
        filled = figures.filled(page, models, figures.other_results())
        assert filled == page, "run python runs/figures.py"
    for model, facts in models.items():
        drawn = (figures.DOCS / "results" / f"accuracy-{model}.svg").read_text()
        assert drawn == figures.plot(model, facts), "run python runs/figures.py"


def test_a_table_without_results_is_an_error() -> None:
    page = "<!-- accuracy-none -->\n<!-- end -->"
    with pytest.raises(KeyError, match="accuracy-none"):
        figures.filled(page, figures.results(), figures.other_results())
