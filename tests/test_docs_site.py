"""The documents as a site: every link leads somewhere, and no page needs a network."""

import re
import subprocess
from pathlib import Path

import docs_site
import pytest

LOADED = re.compile(r'<(?:script|img|iframe|link rel="stylesheet")[^>]*(?:src|href)="([^"]+)"')
"""What a browser loads with a page."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site") / "html"
    docs_site.build(target)
    return target


def test_every_document_is_a_page_that_needs_no_network(site: Path) -> None:
    documents = {path.stem for path in (docs_site.ROOT / "docs").glob("*.md")}
    listed = {page for pages in docs_site.CONTENTS.values() for page in pages}
    assert documents | {"cli", "api", "contributing", "changelog"} == listed
    for page in ("index", *listed):
        loaded = LOADED.findall((site / f"{page}.html").read_text())
        assert loaded and not [path for path in loaded if "//" in path], page
    assert "Try it" in (site / "index.html").read_text()


def test_reference_has_every_command_and_public_name(site: Path) -> None:
    commands = (site / "cli.html").read_text()
    for name in ('id="fgmp-quantize"', 'id="fgmp-hw-synth"', "--max-increase", "--kv-cache"):
        assert name in commands
    assert "Fraction of weight blocks in FP4" in commands
    names = (site / "api.html").read_text()
    assert 'id="fgmp.quantize"' in names and 'id="fgmp.Recipe"' in names


def test_a_link_to_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(docs_site, "command_line", lambda: "# Commands\n\n[x](method.md#nowhere)\n")
    with pytest.raises(subprocess.CalledProcessError):
        docs_site.build(tmp_path / "html")
    assert "nowhere" in capfd.readouterr().err


def test_links_of_the_repository_become_links_of_the_site(tmp_path: Path) -> None:
    (tmp_path / "method.md").touch()
    (tmp_path / "contributing.md").touch()
    text = "[a](docs/method.md#x) [b](CONTRIBUTING.md) [c](../src/fgmp/recipe.py) [d](https://e.f)"
    expected = "[a](method.md#x) [b](contributing.md) c [d](https://e.f)"
    assert docs_site.relinked(text, tmp_path) == expected
