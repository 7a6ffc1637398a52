"""How every command prints: one JSON object, or labelled lines; progress goes to stderr.

Names and messages that come from files may hold anything. :func:`printable` shows their control
characters instead of sending them to the terminal, and cuts what is too long to read.
"""

import json
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]

stderr = Console(stderr=True)

_LONGEST = 2000
"""Characters of one text that are shown."""


def printable(text: str) -> str:
    """Rich markup of ``text``: control characters escaped, a long text cut."""
    cut = text[:_LONGEST]
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in cut)
    if len(text) > _LONGEST:
        shown += f"... ({len(text):,} characters)"
    return escape(shown)


class Result(Protocol):
    """A command's result."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""


ResultT = TypeVar("ResultT", bound=Result)


def show(result: ResultT, as_json: bool, show: Callable[[ResultT], None]) -> None:
    """Print ``result`` as JSON, or let ``show`` print it."""
    if as_json:
        print(json.dumps(_finite(result.to_dict())))
    else:
        show(result)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def print_lines(lines: Mapping[str, str]) -> None:
    """Print one labelled line after the other."""
    grid = Table.grid(padding=(0, 2))
    for label, text in lines.items():
        grid.add_row(printable(label), printable(text))
    Console().print(grid)
