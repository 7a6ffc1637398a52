"""``fgmp hw``: the accelerator's commands. Parse, call, print."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fgmp.app.console import Json, print_lines, show, stderr
from fgmp.app.reporter import terminal_reporter
from fgmp.errors import InputError
from fgmp.formats.rules import QuantizerConfig
from fgmp.progress import bars

if TYPE_CHECKING:
    from fgmp.app.energy import EnergyResult, Synthesis
    from fgmp.hardware.array import Array
    from fgmp.hardware.export import RtlFiles
    from fgmp.hardware.verify import Verification

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
    ] = QuantizerConfig.rule,
    scales: Annotated[
        str, typer.Option(help="The quantizer's: search or max.")
    ] = QuantizerConfig.scales,
    sensitivities: Annotated[
        str, typer.Option(help="The quantizer's: e4m3, or powers of two.")
    ] = QuantizerConfig.sensitivities,
    as_json: Json = False,
) -> None:
    """Write Verilog, the ports of every module and the memory map."""
    from fgmp.hardware.export import write_rtl

    array = _array(lanes, rows, reuse, shared, k_max, outputs_max)
    array = replace(array, quantizer=QuantizerConfig(rule, scales, sensitivities))
    show(write_rtl(output, array, bars(stderr)), as_json, _print_rtl)


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

    verification = compare(
        checkpoint,
        _array(lanes, rows, reuse, shared, k_max, outputs_max),
        tokens=tokens,
        outputs=outputs or None,
        simulator=simulator,
        match=layers,
        stages=bars(stderr),
    )
    show(verification, as_json, _print_verification)
    if verification.mismatches:
        raise typer.Exit(1)


Liberty = Annotated[
    Path | None,
    typer.Option(help="Cell library, plain or gzip. [default: the embedded one, ratios only]"),
]


@app.command("synth")
def synthesize(liberty: Liberty = None, as_json: Json = False) -> None:
    """Area, cells and depth of every unit, by Yosys and abc."""
    from fgmp.app.energy import synthesize_units

    show(synthesize_units(liberty, terminal_reporter()), as_json, _print_units)


@app.command("energy")
def energy(
    directory: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="An fgmp checkpoint.")],
    liberty: Liberty = None,
    data: Annotated[
        str | None,
        typer.Option(help="TEXT for the activations. [default: docstrings of the Python library]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw the figures in.")] = None,
    as_json: Json = False,
) -> None:
    """Energy of the lanes on the model's own operands, and of serving it.

    Synthesizes the recommended lane, the best FP8-only lane, an FP4-only lane and the quantizer,
    runs the model's operands through their gates with and without delays, and adds up what a
    prefill and a decode take.
    """
    from fgmp.app.energy import energy as measure
    from fgmp.pack.checkpoint import require_writable

    if plot:
        require_writable(plot)
        if plot.is_dir() or not plot.parent.is_dir():
            kind = "is a folder" if plot.is_dir() else f"there is no folder {plot.parent}"
            raise InputError(f"--plot {plot}: {kind}")
    result = measure(directory, liberty, data, terminal_reporter())
    show(result, as_json, _print_energy)
    if plot:
        from fgmp.hardware.plot import figures

        try:
            plot.write_text(figures(result.to_dict()), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--plot {plot}: could not be written: {error.strerror}") from error


def _array(
    lanes: int, rows: int, reuse: int, shared: bool, k_max: int, outputs_max: int
) -> "Array":
    from fgmp.hardware.array import Array
    from fgmp.hardware.silicon import MIXED

    datapath = replace(MIXED, k_max=k_max, reuse=reuse, shared=shared)
    return Array(datapath=datapath, lanes=lanes, rows=rows, outputs_max=outputs_max)


def _print_rtl(files: "RtlFiles") -> None:
    print_lines(
        {
            "output": str(files.output),
            "modules": ", ".join(files.modules),
            "latency": f"{files.latency} cycles of a lane",
        }
    )


def _print_verification(result: "Verification") -> None:
    cycles = result.cycles
    waits = {
        "first": "the first tiles",
        "activations": "the quantizer",
        "weights": "weights",
        "epilogue": "the epilogue",
    }
    print_lines(
        {
            "layers": f"{result.layers} sites, {result.linears} linears, {result.tokens} tokens",
            "outputs compared": f"{result.vectors:,}",
            "mismatches": f"{result.mismatches:,} {', '.join(result.wrong)}".strip(),
            "cycles": f"{cycles['cycles']:,}, {cycles['working']:,} of them at work",
            "waits": ", ".join(f"{cycles[name]:,} for {what}" for name, what in waits.items()),
            "time": f"{result.seconds:.1f} s, {result.simulator}",
        }
    )


def _print_units(synthesis: "Synthesis") -> None:
    table = Table("unit", f"area, {synthesis.area_unit}", "cells", "depth", box=SIMPLE_HEAD)
    for name, unit in synthesis.units.items():
        table.add_row(name, f"{unit['area_um2']:,.0f}", f"{unit['cells']:,}", str(unit["depth"]))
    Console().print(table)


def _print_energy(result: "EnergyResult") -> None:
    table = Table("lane", "area", "zero delay", "with glitches", box=SIMPLE_HEAD)
    for name, lane in result.lanes.items():
        energies = (f"{value:.3g}" for value in (lane.zero_delay, lane.inertial))
        table.add_row(name, f"{lane.area_um2:,.0f}", *energies)
    Console().print(table)
    print_lines(result.lines())
