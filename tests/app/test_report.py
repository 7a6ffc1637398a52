"""``fgmp report`` on the command line: pages, refusals, and the card that results go into."""

import json
import shutil
from pathlib import Path

import pytest

from .cases import TEXT, Place, Run


@pytest.fixture
def compared(place: Place, run: Run, tmp_path: Path) -> Path:
    done = run("compare", place.model, place.checkpoint, "--data", place.text, "--json")
    assert done.code == 0, done.err
    path = tmp_path / "compare.json"
    path.write_text(done.out)
    return path


def test_a_page_with_everything(place: Place, run: Run, compared: Path, tmp_path: Path) -> None:
    page = tmp_path / "new" / "report.html"
    files = ["--compare", compared, "--model", place.model, "--data", place.text]
    done = run("report", place.checkpoint, "-o", page, *files, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    assert result == {
        "report": str(page),
        "bytes": page.stat().st_size,
        "checkpoints": ["checkpoint"],
        "missing": {},
    }
    text = page.read_text(encoding="utf-8")
    row = json.loads(compared.read_text())["rows"][-1]
    assert f"{row['perplexity']:.3f}</td>" in text and "from compare.json" in text
    tokens = len(TEXT) // 64 * 64  # one per byte, in windows as long as the model's context
    assert f"From the first {tokens:,} tokens of text.txt, in windows of 64." in text
    assert "fgmp quantize model -o checkpoint --calib text.txt" in text


def test_rows_are_computed_where_no_file_has_them(
    place: Place, run: Run, compared: Path, tmp_path: Path
) -> None:
    page = tmp_path / "report.html"
    shutil.copytree(place.checkpoint, tmp_path / "second")
    folders = [place.checkpoint, tmp_path / "second"]
    options = ["--compare", compared, "--model", place.model, "--data", place.text]
    done = run("report", *folders, "-o", page, *options, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["checkpoints"] == ["checkpoint", "second"]
    text = page.read_text(encoding="utf-8")
    assert "checkpoint: from compare.json; second: from text.txt" in text


def test_what_is_missing_is_said(place: Place, run: Run, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    done = run("report", place.checkpoint, "-o", page)
    assert done.code == 0, done.err
    assert "checkpoint, comparison  not drawn: `fgmp report DIR" in done.out
    assert "checkpoint, passages" in done.out
    assert "The comparison cannot be drawn" in page.read_text(encoding="utf-8")


def test_names_that_are_equal_are_told_apart(place: Place, run: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shutil.copytree(place.checkpoint, tmp_path / name / "checkpoint")
    folders = [tmp_path / name / "checkpoint" for name in ("a", "b")]
    done = run("report", *folders, "-o", tmp_path / "report.html", "--json")
    assert json.loads(done.out)["checkpoints"] == ["a/checkpoint", "b/checkpoint"]


def test_refusals(place: Place, run: Run, compared: Path, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    checkpoint = place.checkpoint
    for arguments, message in (
        ([checkpoint, "--data", place.text], "--data needs --model"),
        ([checkpoint, "--model", place.model], "--model needs --data"),
        ([checkpoint, "-o", tmp_path / "model.safetensors"], "must be named *.html"),
        ([tmp_path / "none"], "none/config.json"),
        ([place.model], "not an fgmp checkpoint"),
        ([checkpoint, checkpoint], "must be different folders"),
        ([checkpoint, "--compare", tmp_path / "none.json"], "No such file"),
        ([checkpoint, "--compare", place.text], "not JSON"),
        ([checkpoint, "--compare", compared, "--compare", compared], "at most one file per"),
    ):
        done = run("report", *arguments, *([] if "-o" in arguments else ["-o", target]))
        assert done.code == 1 and message in " ".join(done.err.split()), done.err
        assert not target.exists()


def test_a_hostile_name_reaches_no_terminal(place: Place, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.checkpoint, tmp_path / "a\x1b[31m<b>"))
    done = run("report", folder, "-o", tmp_path / "report.html")
    assert done.code == 0 and "\x1b[31m" not in done.out
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in text and "<b>" not in text


# The model card.


def test_quantize_writes_a_card_and_compare_its_results(
    place: Place, run: Run, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(place.checkpoint, tmp_path / "out"))
    card = folder / "README.md"
    assert "Calibrated on text.txt: 6 sequences" in card.read_text()
    card.write_text(card.read_text() + "My own words.\n")
    done = run("compare", place.model, folder, "--data", place.text, "--json")
    row = json.loads(done.out)["rows"][-1]
    text = card.read_text()
    assert f"| fgmp | {row['perplexity']:.3f} |" in text and "Not measured yet" not in text
    assert text.endswith("My own words.\n")
    assert run("inspect", folder).code == 0


def test_a_card_of_the_users_stays_and_that_is_said(place: Place, run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(place.checkpoint, tmp_path / "out"))
    (folder / "README.md").write_text("# Mine\n")
    done = run("compare", place.model, folder, "--data", place.text)
    assert done.code == 0 and "has no section of fgmp results" in " ".join(done.err.split())
    assert (folder / "README.md").read_text() == "# Mine\n"


def test_the_licence_of_the_original_comes_along(place: Place, run: Run, tmp_path: Path) -> None:
    model = Path(shutil.copytree(place.model, tmp_path / "model"))
    (model / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    options = ["--calib", place.text, "--samples", 6, "--seq-len", 32]
    done = run("quantize", model, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert "\nlicense: mit\n" in (tmp_path / "out" / "README.md").read_text()
