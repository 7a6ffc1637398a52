"""The model card: a header that the hub reads, and results that replace themselves alone."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgmp.pack.checkpoint import CheckpointConfig
from fgmp.report.card import END, START, model_card, results, source_metadata, update_card

CONFIG = CheckpointConfig(
    sites={},
    recipe={"fp4": 0.7, "policy": "fisher", "include": ["*"]},
    calibration={"text": "wiki.txt", "sequences": 32, "seq_len": 128},
    result={
        "fp4_weights": 0.7,
        "fp4_activations": 0.75,
        "bits_per_weight": 5.8123,
        "quantized_share": 0.8125,
        "unquantized": ["lm_head.weight"],
    },
)
ROWS = [
    {"name": "original", "perplexity": 9.5, "ci95": [9.5, 9.5], "kl": 0.0},
    {"name": "fgmp", "perplexity": 10.0, "ci95": [9.9, 10.2], "kl": 0.02},
]


def header(card: str) -> Any:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert match
    return yaml.safe_load(match[1])


def test_the_header_is_the_hubs() -> None:
    card = model_card(CONFIG, "org/name", {"license": "mit"})
    assert header(card) == {
        "license": "mit",
        "base_model": "org/name",
        "base_model_relation": "quantized",
        "library_name": "fgmp",
        "pipeline_tag": "text-generation",
        "tags": ["fgmp", "nvfp4", "fp8", "mixed-precision", "quantized"],
    }
    assert "# org/name, quantized by fgmp" in card
    for text in ("70.0%", "5.812 as stored", "75.0%", "5.375", "81.2%", "`lm_head.weight`"):
        assert text in card
    assert "fgmp serve DIR" in card and "fgmp.load" in card
    recipe = re.search(r"```yaml\n(.*?)\n```", card, re.DOTALL)
    assert recipe and yaml.safe_load(recipe[1]) == CONFIG.recipe


def test_a_local_folder_is_no_base_model(tmp_path: Path) -> None:
    card = model_card(CONFIG, str(tmp_path), {})
    assert "base_model" not in header(card)
    assert str(tmp_path.parent) not in card and tmp_path.name.replace("_", "\\_") in card


@pytest.mark.parametrize(
    "name", ["a\n---\nlicense: evil", "<script>", "[x](y) ` | \x1b[31m", START]
)
def test_names_cannot_break_out(name: str) -> None:
    card = model_card(CONFIG, f"/nowhere/{name}", {})
    assert header(card) == header(model_card(CONFIG, "/nowhere/plain", {}))
    assert card.count(START) == card.count(END) == 1
    assert "<script>" not in card and "\x1b" not in card


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense: apache-2.0\ntags: [a]\n---\n# x\n", {"license": "apache-2.0"}),
        (
            "---\r\nlicense: other\r\nlicense_name: llama3\r\nlicense_link: LICENSE\r\n---\r\nx",
            {"license": "other", "license_name": "llama3", "license_link": "LICENSE"},
        ),
        ("---\nlicense: [mit]\n---\n", {}),
        ('---\nlicense: "a\\nb"\n---\n', {}),
        ("---\nlicense: !!python/object/apply:os.system [x]\n---\n", {}),
        ("---\n[\n---\n", {}),
        ("---\njust text\n---\n", {}),
        ("# no header\nlicense: mit\n", {}),
        ("", {}),
    ],
)
def test_the_licence_of_the_source(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    assert source_metadata(path) == expected


def test_no_source_card() -> None:
    assert source_metadata(None) == {}


def test_a_pipe_is_no_card(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "README.md")
    assert source_metadata(tmp_path / "README.md") == {}


def updated(tmp_path: Path, text: str) -> tuple[str | None, str]:
    path = tmp_path / "README.md"
    path.write_bytes(text.encode())
    refusal = update_card(tmp_path, ROWS, "On a text.")
    return refusal, path.read_bytes().decode()


def test_results_replace_what_stands_between_the_markers(tmp_path: Path) -> None:
    card = model_card(CONFIG, "org/name", {})
    refusal, once = updated(tmp_path, f"{card}\r\nMy own words.\r\n")
    assert refusal is None and "Not measured" not in once
    assert "| fgmp | 10.000 | 9.900 to 10.200 | 0.0200 |" in once and "On a text." in once
    assert once.endswith("\r\nMy own words.\r\n")
    assert once.partition(START)[0] == card.partition(START)[0]
    assert updated(tmp_path, once) == (None, once)
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "text",
    [
        "# My own card\n",
        f"{START} no end",
        f"{END}\n{START}",
        f"{END}\n{START}\n{END}",
        f"{START}\n{START}\n{END}",
        f"{START}\n{END}\n{END}",
        f"{START}\n{END}\n{START}\n{END}",
    ],
)
def test_a_card_that_is_not_ours_stays(text: str, tmp_path: Path) -> None:
    refusal, after = updated(tmp_path, text)
    assert after == text and refusal is not None
    assert refusal.endswith("README.md: has no section of fgmp results, left as it is")


def test_a_link_is_not_replaced(tmp_path: Path) -> None:
    """As in a hub cache, whose files other models share."""
    blob = tmp_path / "blob"
    blob.write_text(f"{START}\n{END}")
    (tmp_path / "README.md").symlink_to(blob)
    assert "no regular file" in str(update_card(tmp_path, ROWS, ""))
    assert blob.read_text() == f"{START}\n{END}" and (tmp_path / "README.md").is_symlink()


def test_bytes_that_are_no_text_stay(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(b"\xff" + f"{START}\n{END}".encode())
    assert "could not be updated" in str(update_card(tmp_path, ROWS, ""))


def test_no_card_is_made_where_none_is(tmp_path: Path) -> None:
    assert update_card(tmp_path, ROWS, "") is None
    assert list(tmp_path.iterdir()) == []


def test_modes_stay(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"{START}\n{END}")
    path.chmod(0o640)
    assert update_card(tmp_path, ROWS, "") is None
    assert path.stat().st_mode & 0o777 == 0o640


def test_results_are_plain_text() -> None:
    rows = [{"name": f"a|b\n{END}<b>", "perplexity": 1.0, "new_key": "x`y"}]
    text = results(rows, f"On `{END}`.")
    assert END not in text and "<b>" not in text and "new key" in text
    assert len(text.splitlines()) == 5
