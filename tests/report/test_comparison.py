"""Rows as tables: known columns first, others under their names, and files of rows."""

import json
from pathlib import Path
from typing import Any

import pytest

from fgmp.errors import FGMPError, InputError
from fgmp.report.comparison import COLUMNS, Cell, Column, cell, columns_of, read_comparison

ROW = {"name": "fgmp", "perplexity": 10.5, "ci95": [10.0, 11.0], "kl": 0.02}


def test_known_columns_come_first_and_unknown_ones_have_their_names() -> None:
    columns = columns_of([{"new_key": 1, "kl": 0.1, "name": "a"}, {"name": "b", "kl_p99": 1.0}])
    assert list(columns) == ["name", "kl", "kl_p99", "new_key"]
    assert columns["kl"] is COLUMNS["kl"]
    assert columns["new_key"] == Column("new key")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("perplexity", 10.51234, Cell("10.512", 10.51234)),
        ("ci95", [10.0, 11.0], Cell("10.000 to 11.000", 10.0)),
        ("fp4_activations", 0.7, Cell("70.0%", 0.7)),
        ("fp4_activations", None, Cell("-")),
        ("top1_agreement_percent", 97.25, Cell("97.2%", 97.25)),
        ("vs_fp8_percent", 1.5, Cell("+1.50%", 1.5)),
        ("name", "<b>", Cell("<b>")),
        ("kl", float("nan"), Cell("nan")),
        ("other", True, Cell("True")),
    ],
)
def test_cells(key: str, value: Any, expected: Cell) -> None:
    assert cell(value, COLUMNS.get(key, Column(key))) == expected


def test_a_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text(json.dumps({"rows": [ROW, {"name": "uniform", "kl": 0.1}], "bos": False}))
    rows = read_comparison(path)
    assert rows.source == "compare.json"
    assert rows.rows == [ROW, {"name": "uniform", "kl": 0.1}]
    assert rows.named("uniform") == {"name": "uniform", "kl": 0.1}
    assert rows.named("nvfp4") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "not JSON"),
        ("[]", "must be the output of `fgmp compare --json`"),
        ('{"rows": []}', "must be the output of `fgmp compare --json`"),
        ('{"rows": [3]}', r"rows\[0\]: must be an object with a name, got 3"),
        ('{"rows": [{"kl": 3}]}', r"rows\[0\]: must be an object with a name"),
        ('{"rows": [{"name": "a", "kl": {}}]}', r"rows\[0\]\.kl: must be a number"),
        ('{"rows": [{"name": "a", "ci95": [[1]]}]}', r"rows\[0\]\.ci95: must be a number"),
        ('{"rows": [{"name": "a", "ci95": []}]}', r"rows\[0\]\.ci95: must be a number"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "compare.json"
    path.write_text(content)
    with pytest.raises(FGMPError, match=message):
        read_comparison(path)
    with pytest.raises(InputError, match="No such file"):
        read_comparison(tmp_path / "none.json")
