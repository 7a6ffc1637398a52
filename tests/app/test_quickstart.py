"""``fgmp quickstart``, run as a newcomer runs it: the command, offline, in an empty folder."""

import json
import os
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest

COLUMNS = {
    "name",
    "perplexity",
    "ci95",
    "kl",
    "kl_p99",
    "top1_agreement_percent",
    "bits_per_weight",
    "bits_per_activation",
    "compression",
    "fp4_activations",
    "vs_fp8_percent",
    "gap_recovered_percent",
    "kl_gap_recovered_percent",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quickstart")


@pytest.fixture(scope="module")
def found(folder: Path) -> Any:
    """What the command prints; stdout must be that one JSON object and nothing else."""
    command = Path(sysconfig.get_path("scripts")) / "fgmp"
    done = subprocess.run(
        [command, "quickstart", "-o", "out", "--json"],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    assert [row["name"] for row in found["rows"]] == ["original", "fp8", "nvfp4", "uniform", "fgmp"]
    return {row["name"]: row for row in found["rows"]}


def test_keys(found: dict[str, Any]) -> None:
    assert set(found) == {"output", "checkpoint", "report", "seconds", "summary", "rows"}
    assert all(set(row) == COLUMNS for row in found["rows"])


def test_report_holds_the_rows(folder: Path, found: dict[str, Any]) -> None:
    page = (folder / found["report"]).read_text()
    embedded = re.search(r'<script type="application/json" id="rows">(.*)</script>', page)
    assert embedded is not None
    assert json.loads(embedded[1]) == found["rows"]
    for row in found["rows"]:
        assert f'<th scope="row">{row["name"]} <small>' in page
        assert f">{row['perplexity']:.3f}</td>" in page
    for panel in ("COMPARISON", "PASSAGES", "SCORES", "ENERGY", "RUN"):
        assert f'data-missing="{panel.lower()}"' not in page


def test_fgmp_lies_between_its_formats(rows: dict[str, dict[str, Any]]) -> None:
    for measure in ("perplexity", "kl"):
        fp8, fgmp, nvfp4 = (rows[name][measure] for name in ("fp8", "fgmp", "nvfp4"))
        assert fp8 < fgmp < nvfp4, measure
    fp8, fgmp, nvfp4 = (rows[name]["bits_per_weight"] for name in ("fp8", "fgmp", "nvfp4"))
    assert nvfp4 < fgmp < fp8


def test_the_gap_is_wide_enough_to_tell_something(rows: dict[str, dict[str, Any]]) -> None:
    """The model is trained until NVFP4 costs it at least 1% of perplexity."""
    assert rows["nvfp4"]["vs_fp8_percent"] >= 1
    assert 0 < rows["fgmp"]["gap_recovered_percent"] < 100


def test_most_of_the_gap_is_closed_at_70_percent_fp4(
    found: dict[str, Any], rows: dict[str, dict[str, Any]]
) -> None:
    """A choice of blocks that is worth nothing, at random, would close about 30% of the KL gap."""
    assert found["summary"]["fp4_fraction"]["weights"] == pytest.approx(0.7, abs=1e-3)
    assert found["summary"]["fp4_fraction"]["activations"] == pytest.approx(0.7, abs=1e-2)
    assert rows["fgmp"]["kl_gap_recovered_percent"] > 60
