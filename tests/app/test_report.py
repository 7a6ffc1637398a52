"""The one-page report: the numbers that it was given, in a file that needs no other."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fgmp.app.records import inspection_lines
from fgmp.app.report import write_report
from fgmp.evaluation.compare import Row

from .test_records import INSPECTION, ROW, SUMMARY

ROWS = [
    replace(ROW, name="original", perplexity=9.5, kl=0.0, fp4_activations=None),
    replace(ROW, name="fp8", perplexity=9.9),
    replace(ROW, name="nvfp4", perplexity=11.0),
    ROW,
]


class Page(HTMLParser):
    """Texts by element, and attributes of all elements; refuses elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)


def written(tmp_path: Path, **changes: Any) -> str:
    values = {"title": "a title", "rows": ROWS, "summary": SUMMARY, "inspection": INSPECTION}
    write_report(tmp_path / "report.html", **{**values, **changes})
    return (tmp_path / "report.html").read_text(encoding="utf-8")


def test_it_shows_every_number_it_was_given(tmp_path: Path) -> None:
    page = Page(written(tmp_path))
    cells = page.texts["td"]
    for row in ROWS:
        assert row.name in cells and f"{row.perplexity:.3f}" in cells
    facts = dict(zip(page.texts["dt"], page.texts["dd"], strict=True))
    assert facts.items() >= SUMMARY.lines().items()
    assert facts.items() >= inspection_lines(INSPECTION).items()
    assert page.texts["h1"] == ["a title"]


def test_rows_can_be_read_from_it(tmp_path: Path) -> None:
    text = written(tmp_path)
    embedded = re.search(r'<script type="application/json" id="rows">(.*?)</script>', text)
    assert embedded and json.loads(embedded[1]) == [row.to_dict() for row in ROWS]


def test_it_needs_nothing_else(tmp_path: Path) -> None:
    """No script that runs, no file or address that a browser would fetch."""
    text = written(tmp_path)
    for tag, attributes in Page(text).elements:
        assert tag not in ("link", "img", "iframe", "object", "embed")
        assert not {"src", "href", "xlink:href", "onload", "onclick"} & attributes.keys()
        if tag == "script":
            assert attributes["type"] == "application/json"
    assert "http" not in text and "url(" not in text and "@import" not in text


@pytest.mark.parametrize("evil", ["</script><script>", "<b>&amp;", '" onload="x'])
def test_names_cannot_break_out(evil: str, tmp_path: Path) -> None:
    """Names of models and layers are data, in text, in attributes and in JSON."""
    shares = replace(INSPECTION.fp8_share, by_kind={evil: 0.3})
    rows: list[Row] = [replace(ROWS[0], name=evil), *ROWS[1:]]
    inspection = replace(INSPECTION, fp8_share=shares, path=evil)
    page = Page(written(tmp_path, title=evil, rows=rows, inspection=inspection))
    assert page.texts["h1"] == [evil] and evil in page.texts["td"]
    assert evil in page.texts["dd"] and evil in page.texts["text"]
    assert [tag for tag, _ in page.elements].count("script") == 1
    embedded = json.loads(page.texts["script"][0])
    assert embedded[0]["name"] == evil


def test_bars_are_as_long_as_shares(tmp_path: Path) -> None:
    shares = replace(INSPECTION.fp8_share, by_kind={"a": 0.25, "b": 1.0}, by_layer={"0": 0.0})
    page = Page(written(tmp_path, inspection=replace(INSPECTION, fp8_share=shares)))
    bars = [a for tag, a in page.elements if tag == "rect"]
    wide = [float(a["width"] or 0) for a in bars if a["fill"] == "var(--eight)"]
    (full,) = {float(a["width"] or 0) for a in bars if a["fill"] == "var(--four)"}
    assert [width / full for width in wide] == [0.25, 1.0, 0.0, 0.2]


def test_a_gap_that_nothing_is_said_of(tmp_path: Path) -> None:
    """Without a KL gap between FP8 and NVFP4 no share of it is claimed."""
    lead = Page(written(tmp_path)).texts["p"][0]
    assert lead.endswith("71% of the KL gap to NVFP4 recovered.")
    rows = [*ROWS[:-1], replace(ROW, kl_gap_recovered_percent=None)]
    lead = Page(written(tmp_path, rows=rows)).texts["p"][0]
    assert "recovered" not in lead and lead.endswith("+1.20% relative to all-FP8.")
