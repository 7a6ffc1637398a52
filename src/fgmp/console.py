"""How every command prints: one JSON object, or a table of facts; progress goes to stderr."""

import json
import math
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]

stderr = Console(stderr=True)


def show(facts: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print ``facts`` as JSON, or let ``show`` print them."""
    if as_json:
        print(json.dumps(_finite(facts)))
    else:
        show(facts)


def _finite(value: Any) -> Any:
    """JSON has no NaN or infinity: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def print_facts(facts: dict[str, Any]) -> None:
    """One line a fact; what is empty is left out."""
    grid = Table.grid(padding=(0, 2))
    for key, value in facts.items():
        if value is None or value == {} or value == []:
            continue
        shown = f"{value:.6g}" if isinstance(value, float) else str(value)
        grid.add_row(key.replace("_", " "), escape(shown))
    Console().print(grid)
