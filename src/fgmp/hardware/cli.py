"""``fgmp hw``: the accelerator's commands. Parse, call, print."""

from pathlib import Path
from typing import Annotated, Any

import typer

from fgmp.console import Json, print_facts, show

app = typer.Typer(
    help="The accelerator: Verilog, verification, area and energy. Needs `pip install 'fgmp[hw]'`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@app.callback()
def hardware() -> None:
    """Keeps the group a group while it has one command."""


@app.command()
def rtl(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    as_json: Json = False,
) -> None:
    """Write the Verilog and the list of its ports."""
    from fgmp.hardware.design import write_rtl

    facts: dict[str, Any] = write_rtl(output)
    show(facts, as_json, print_facts)
