"""``fgmp hw``: the accelerator's commands. Parse, call, print."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fgmp.console import Json, print_facts, show, stderr
from fgmp.hardware.array import Array
from fgmp.hardware.silicon import MIXED
from fgmp.progress import bars

app = typer.Typer(
    help="The accelerator: Verilog, verification, area and energy. Needs `pip install 'fgmp[hw]'`.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

Checkpoint = Annotated[Path, typer.Argument(metavar="DIR", help="An fgmp checkpoint.")]
Lanes = Annotated[int, typer.Option(help="Weight rows at a time.")]
Rows = Annotated[int, typer.Option(help="Activation rows at a time.")]
Reuse = Annotated[int, typer.Option(help="Cycles that a weight block stays in its lane.")]
Shared = Annotated[
    bool,
    typer.Option("--shared/--separate", help="One unit for both mixed pairs of formats, or two."),
]
KMax = Annotated[int, typer.Option(help="Longest dot product.")]
OutputsMax = Annotated[int, typer.Option(help="Most output features.")]


@app.command()
def rtl(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    lanes: Lanes = 4,
    rows: Rows = 1,
    reuse: Reuse = 16,
    shared: Shared = True,
    k_max: KMax = 4096,
    outputs_max: OutputsMax = 4096,
    rule: Annotated[
        str, typer.Option(help="The quantizer's: benefit, difference or truncated.")
    ] = "benefit",
    scales: Annotated[str, typer.Option(help="The quantizer's: search or max.")] = "search",
    sensitivities: Annotated[
        str, typer.Option(help="The quantizer's: e4m3, or powers of two.")
    ] = "e4m3",
    as_json: Json = False,
) -> None:
    """Write Verilog, the ports of every module and the memory map."""
    from fgmp.hardware.export import write_rtl

    array = _array(lanes, rows, reuse, shared, k_max, outputs_max)
    array = replace(array, rule=rule, scales=scales, sensitivities=sensitivities)
    show(write_rtl(output, array, bars(stderr)), as_json, print_facts)


@app.command()
def verify(
    checkpoint: Checkpoint,
    tokens: Annotated[int, typer.Option(min=1, help="Activation rows.")] = 4,
    outputs: Annotated[
        int, typer.Option(min=0, help="Rows of each weight; 0 for all.", show_default=True)
    ] = 4,
    layers: Annotated[str, typer.Option(help="Only sites whose name contains this.")] = "",
    simulator: Annotated[
        str, typer.Option(help="amaranth, or verilator where that is installed.")
    ] = "amaranth",
    lanes: Lanes = 4,
    rows: Rows = 1,
    reuse: Reuse = 16,
    shared: Shared = True,
    k_max: KMax = 4096,
    outputs_max: OutputsMax = 4096,
    as_json: Json = False,
) -> None:
    """Run layers through the simulated accelerator and compare with the reference, bit for bit.

    Activations are drawn at random for each site; the last row holds a value that is not finite.
    Exits with 1 if a bit differs.
    """
    from fgmp.hardware.verify import verify as compare

    found = compare(
        checkpoint,
        _array(lanes, rows, reuse, shared, k_max, outputs_max),
        tokens=tokens,
        outputs=outputs or None,
        simulator=simulator,
        match=layers,
        stages=bars(stderr),
    )
    show(found, as_json, _print_verified)
    if found["mismatches"]:
        raise typer.Exit(1)


def _array(lanes: int, rows: int, reuse: int, shared: bool, k_max: int, outputs_max: int) -> Array:
    datapath = replace(MIXED, k_max=k_max, reuse=reuse, shared=shared)
    return Array(datapath=datapath, lanes=lanes, rows=rows, outputs_max=outputs_max)


def _print_verified(found: dict[str, Any]) -> None:
    cycles = found["cycles"]
    print_facts(
        {
            "layers": f"{found['layers']} sites, {found['linears']} linears, "
            f"{found['tokens']} tokens",
            "outputs compared": f"{found['vectors']:,}",
            "mismatches": f"{found['mismatches']:,} {', '.join(found['wrong'])}".strip(),
            "cycles": f"{cycles['cycles']:,}, {cycles['working']:,} of them at work",
            "waits": ", ".join(
                f"{cycles[name]:,} for {what}"
                for name, what in (
                    ("first", "the first tiles"),
                    ("activations", "the quantizer"),
                    ("weights", "weights"),
                    ("epilogue", "the epilogue"),
                )
            ),
            "time": f"{found['seconds']:.1f} s, {found['simulator']}",
        }
    )
