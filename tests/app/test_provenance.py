"""What is stored on a run names no folder of its machine."""

from importlib.metadata import version
from pathlib import Path

import pytest

from fgmp.app.provenance import command_line, provenance, without_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("org/model", "org/model"),
        ("/home/me/model", "model"),
        ("../model/", "model"),
        ("~/a/model", "model"),
        ("a/b/c", "c"),
        ("--calib=/home/me/text.txt", "--calib=text.txt"),
        ("--fp4", "--fp4"),
        ("0.7", "0.7"),
    ],
)
def test_folders_are_left_out(name: str, expected: str) -> None:
    assert without_folder(name) == expected


def test_an_existing_path_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert without_folder("a/b") == "b" and without_folder("a/c") == "a/c"


def test_a_command_line_is_one_that_a_shell_reads() -> None:
    arguments = ["/usr/bin/fgmp", "quantize", "/m/my model", "-o", "out", "--bits", "5.4"]
    assert command_line(arguments) == "fgmp quantize 'my model' -o out --bits 5.4"
    assert command_line(["/x/fgmp/__main__.py", "doctor"]) == "fgmp doctor"
    assert command_line(["fgmp", "\udcff"]) == "fgmp '?'"


def test_versions_are_those_installed() -> None:
    facts = provenance("/home/me/model", "fgmp quantize model -o out")
    assert facts["source"] == {"model": "model", "command": "fgmp quantize model -o out"}
    assert facts["versions"]["torch"] == version("torch")
    assert "command" not in provenance("org/name", None)["source"]
