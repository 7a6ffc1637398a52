"""The page as text: complete in itself, and no name in it is markup."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fgmp.evaluation.passages import Passage
from fgmp.report import records
from fgmp.report.blocks import WINDOW
from fgmp.report.gather import gather
from fgmp.report.page import embedded, render, size, write_page
from fgmp.report.records import Checkpoint, Matrix, Rows

ROWS = [
    {"name": "original", "perplexity": 9.5, "ci95": [9.5, 9.5], "kl": 0.0, "vs_fp8_percent": -4.0},
    {"name": "fp8", "perplexity": 9.9, "ci95": [9.8, 10.0], "kl": 0.01, "vs_fp8_percent": 0.0},
    {"name": "uniform", "perplexity": 9.95, "ci95": [9.8, 10.1], "kl": 0.03, "kl_p99": 0.5},
    {"name": "fgmp", "perplexity": 10.0, "ci95": [9.9, 10.2], "kl": 0.02, "kl_p99": 0.4},
]
PASSAGE = Passage(
    tokens=["One", " two\n", " three"],
    kl=[None, 0.25, 1.5],
    peak=2,
    original=[(" three", 0.75), (" four", 0.125)],
    quantized=[(" four", 0.5)],
    actual=(0.75, 0.0625),
)
VOID = {"meta", "input", "link", "img", "br"}


class Page(HTMLParser):
    """Texts by element and attributes of all elements; refuses elements that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)
            if self.open[-1] == "script":
                attributes = self.elements[-1][1]
                self.scripts[attributes.get("id") or attributes["type"] or ""] = data


@pytest.fixture(scope="module")
def page(folder: Path) -> Checkpoint:
    return replace(
        gather(folder, 1, WINDOW),
        comparison=Rows(ROWS, "a file.json"),
        passages=[PASSAGE],
        passages_source="From a text.",
    )


def test_it_has_the_comparison_with_every_column(page: Checkpoint) -> None:
    text = render("a title", [page])
    parsed = Page(text)
    assert parsed.texts["h1"] == ["a title"]
    assert json.loads(parsed.scripts["rows"]) == ROWS
    headings = [t for t in parsed.texts["th"] if t in ("perplexity", "KL", "KL, 99th percentile")]
    assert headings == ["perplexity", "KL", "KL, 99th percentile"]
    assert {"9.950", "0.0300", "0.500", "9.900 to 10.200"} <= set(parsed.texts["td"])
    assert any("at the checkpoint's number of bytes" in t for t in parsed.texts["small"])


def test_it_has_maps_and_windows_of_every_matrix(page: Checkpoint) -> None:
    scripts = Page(render("x", [page])).scripts
    for i, matrix in enumerate(page.matrices):
        assert base64.b64decode(scripts[f"map-0-{i}"]) == matrix.blocks.data
        assert base64.b64decode(scripts[f"window-0-{i}"]) == matrix.window.data
    data = json.loads(scripts["data"])["checkpoints"][0]
    assert [m["name"] for m in data["matrices"]] == [m.facts.name for m in page.matrices]
    assert data["scores"] == json.loads(json.dumps(page.scores))


def test_passages_are_text(page: Checkpoint) -> None:
    text = render("x", [page])
    assert '<span class="k4" title="KL 0.2500"> two\u23ce</span>' in text
    assert '<span class="k9 peak" title="KL 1.5000"> three</span>' in text
    assert "“ three” 75%, “ four” 12%" in text and "and this model 6.2%" in text


def test_decoding_tables_are_those_of_the_formats(page: Checkpoint) -> None:
    formats = json.loads(Page(render("x", [page])).scripts["data"])["formats"]
    assert formats["fp4"][:8] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert formats["fp4"][9] == -0.5 and len(formats["fp4"]) == 16
    assert formats["fp8"][0x38] == 1 and formats["fp8"][0xFE] == -448
    assert formats["fp8"][0x7F] is None and len(formats["fp8"]) == 256


def test_nothing_is_fetched(page: Checkpoint) -> None:
    """No address that a browser would load, and a policy that forbids to."""
    parsed = Page(render("x", [page]))
    for tag, attributes in parsed.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action", "onload", "onclick"} & attributes.keys()
        assert (attributes.get("href") or "#").startswith("#")
    (style,) = parsed.texts["style"]
    assert "url(" not in style and "@import" not in style
    policy = next(a["content"] or "" for _, a in parsed.elements if "http-equiv" in a)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "http" not in policy and "eval" not in policy


def test_the_policy_names_the_scripts(page: Checkpoint) -> None:
    text = render("x", [page])
    match = re.search(r'<script type="module">(.*?)</script>', text, re.DOTALL)
    assert match
    hashed = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
    assert f"sha256-{hashed}" in text.replace("&#43;", "+")


EVIL = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onfocus="alert(1)" autofocus="',
    "{{ 7 * 7 }}${7*7}<!--",
    "&lt;b&gt;",
]


def hostile(page: Checkpoint, evil: str) -> Checkpoint:
    """The checkpoint with a hostile text wherever one can come from a file."""

    def matrix(m: Matrix) -> Matrix:
        facts = replace(m.facts, name=m.facts.name + evil)
        return replace(m, facts=facts, layer=m.layer + evil, kind=m.kind + evil)

    assert page.scores is not None
    return replace(
        page,
        name=evil,
        sentences=[evil],
        facts={evil: evil},
        recipe={evil: evil},
        matrices=[matrix(m) for m in page.matrices],
        sites=[replace(s, layer=s.layer + evil, kind=s.kind + evil) for s in page.sites],
        scores={**page.scores, "weights": {k + evil: v for k, v in page.scores["weights"].items()}},
        comparison=Rows([{**ROWS[0], "name": evil, evil: evil}, *ROWS], evil),
        passages=[replace(PASSAGE, tokens=[evil, "b", evil], original=[(evil, 0.5)])],
        passages_source=evil,
        missing={records.RUN: evil, records.ENERGY: evil},
    )


@pytest.mark.parametrize("evil", EVIL)
def test_names_cannot_break_out(evil: str, page: Checkpoint) -> None:
    """The elements and attributes are those of a page with harmless names of equal number."""
    harmless, harmful = (
        Page(render(name, [hostile(page, name), page])) for name in ("plain", evil)
    )
    tags = [(tag, sorted(attributes)) for tag, attributes in harmless.elements]
    assert [(tag, sorted(attributes)) for tag, attributes in harmful.elements] == tags
    assert harmful.texts["h1"] == [evil]
    data = json.loads(harmful.scripts["data"])["checkpoints"][0]
    assert data["name"] == evil and data["matrices"][0]["kind"].endswith(evil)
    assert json.loads(harmful.scripts["rows"])[0][evil] == evil


@pytest.mark.parametrize("value", ["</script>", "<!--", "a&b", float("nan"), {"<": [1, "\u2028"]}])
def test_embedded_json_has_no_markup(value: Any) -> None:
    text = str(embedded(value))
    assert not set("<>&\u2028") & set(text)
    expected = None if isinstance(value, float) else value
    assert json.loads(text) == expected


def test_missing_panels_are_named(page: Checkpoint) -> None:
    bare = replace(
        page,
        comparison=None,
        passages=None,
        scores=None,
        energy=None,
        missing=dict.fromkeys(
            (records.COMPARISON, records.PASSAGES, records.SCORES, records.ENERGY), "of a reason"
        ),
    )
    parsed = Page(render("x", [bare]))
    named = [a["data-missing"] for _, a in parsed.elements if "data-missing" in a]
    assert set(named) == {"comparison", "passages", "scores", "energy"}
    plots = {a["id"] for _, a in parsed.elements if a.get("class") == "plot"}
    assert "plot-shares" in plots and "plot-energy" not in plots and "plot-tradeoff" not in plots


def test_an_old_page_stays_until_the_new_one_is_complete(page: Checkpoint, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(AttributeError):
        write_page(target, "x", [None])  # type: ignore[list-item]
    assert target.read_text() == "old"
    write_page(target, "x", [page])
    assert target.read_text(encoding="utf-8") == render("x", [page])
    assert list(tmp_path.iterdir()) == [target]


def test_sizes_in_words() -> None:
    sizes = [size(n) for n in (999, 1500, 5_390_000, 2.5e9)]
    assert sizes == ["999 bytes", "1.5 kB", "5.39 MB", "2.5 GB"]
