"""How every command prints: one JSON object, or labelled lines."""

import json
from dataclasses import dataclass
from typing import Any

import pytest

from fgmp.app.console import print_lines, show


@dataclass
class Figures:
    """A result with whatever values."""

    values: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        return self.values


def refuse(result: Figures) -> None:
    raise AssertionError("nothing but JSON may be printed")


def strict(text: str) -> Any:
    """JSON by the standard, which has no NaN and no infinity."""

    def constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=constant)


def test_json_is_one_object_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    show(Figures({"text": "two\nlines", "list": [1, 2.5, None]}), True, refuse)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and out.endswith("}\n")
    assert strict(out) == {"text": "two\nlines", "list": [1, 2.5, None]}


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    nan, inf = float("nan"), float("inf")
    show(Figures({"a": nan, "b": {"c": [1.0, -inf, (inf, 2)]}, "d": "nan", 0.5: 1}), True, refuse)
    assert strict(capsys.readouterr().out) == {
        "a": None,
        "b": {"c": [1.0, None, [None, 2]]},
        "d": "nan",
        "0.5": 1,
    }


def test_without_json_the_result_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[Figures] = []
    result = Figures({})
    show(result, False, shown.append)
    assert shown == [result] and capsys.readouterr().out == ""


def test_lines_are_labelled_and_never_markup(capsys: pytest.CaptureFixture[str]) -> None:
    """A path may contain what looks like a style."""
    print_lines({"checkpoint": "a[bold]b[/]", "size": "12 bytes"})
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ["checkpoint", "a[bold]b[/]"]
    assert second.split() == ["size", "12", "bytes"]
    assert first.index("a[") == second.index("12")  # texts begin in one column
