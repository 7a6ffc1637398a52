"""Timing of a lane and internal energy of its cells: OpenSTA and ours (docs/energy.md).

    python runs/opensta.py --liberty FILE [--lane fp4] [--json RESULT.json]

OpenSTA is optional and serves nothing else here: ``apt-get install opensta`` (2.0.17 on Debian 12).
It reads our mapped netlist as Verilog, our clock and slews at ports, and the liberty file without
the power tables of the ground pin: these say where the same charge leaves. Delays, slews and the
longest path are its own.

Its power of the whole lane is not compared: in 2.0.17 the toggle rate of an inner pin cannot be set
(``set_power_activity -pins`` calls a procedure that does not exist). Instead each combinational
cell of the lane stands alone, every input toggling, at one slew and one load. Internal power over
switching power needs no unit of activity.
"""

import argparse
import gzip
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fgmp.app.commands import Reporter
from fgmp.app.machines import library_of
from fgmp.errors import FGMPError, InputError
from fgmp.hardware import silicon
from fgmp.hardware.cells import Cell, Library
from fgmp.hardware.netlist import GATED_FLOPS, ONE, ZERO, Netlist
from fgmp.hardware.silicon import Implementation
from fgmp.hardware.timing import default_slew

LANES = {"mixed": silicon.MIXED, "fp8": silicon.FP8, "fp4": silicon.FP4}
SLEW, LOAD = 20.0, 2.0
"""Slew at the inputs and load of cells that stand alone, in ps and fF."""

_POWER = re.compile(r"^\s*(?:internal|leakage)_power\s*\([^)]*\)\s*\{", re.MULTILINE)
_BRACE = re.compile(r"[{}]")
_GROUND = re.compile(r'related_pg_pin\s*:\s*"?(?:VSS|GND)\b')
_ROW = re.compile(
    r"^\s*([\d.e+-]+)\s+([\d.e+-]+)\s+([\d.e+-]+)\s+[\d.e+-]+\s+u_(\S+)", re.MULTILINE
)


def instance(cell: Cell, name: str, pins: dict[str, str]) -> str:
    """Instance of a cell, one line of structural Verilog."""
    return f"  {cell.name} {name} ({', '.join(f'.{pin}({net})' for pin, net in pins.items())});"


def verilog(netlist: Netlist, library: Library) -> str:
    """The netlist as structural Verilog with clock gates, one scalar port per input bit.

    Outputs are nets that nothing reads.
    """
    flop, inverter = library.flip_flop, library.inverter
    (gate,) = library.clock_gate
    ports = [f"n{net}" for nets in netlist.inputs.values() for net in nets]
    clock = netlist.inputs["clk"][0]
    lines = [f"module top ({', '.join(ports)});", *(f"  input {port};" for port in ports)]
    lines += [f"  supply0 n{ZERO};", f"  supply1 n{ONE};"]

    for i, mapped in enumerate(netlist.gates):
        cell = library.cells[mapped.cell]
        pins = {pin: f"n{net}" for pin, net in zip(cell.capacitance, mapped.inputs, strict=True)}
        lines.append(instance(cell, f"g{i}", pins | {cell.output: f"n{mapped.output}"}))
    gated_flops: dict[tuple[str, int], int] = {}
    for i, register in enumerate(netlist.flops):
        clocked = f"n{clock}"
        if register.enable != ONE:
            group = (register.unit, register.enable)
            index = gated_flops.get(group, 0)
            gated_flops[group] = index + 1
            number = list(netlist.clock_gates).index(group)
            clocked = f"gated_{number}_{index // GATED_FLOPS}"
            if index % GATED_FLOPS == 0:
                tied = dict.fromkeys(gate.capacitance, f"n{ZERO}")
                pins = tied | {gate.clock: f"n{clock}", gate.data: f"n{register.enable}"}
                lines.append(instance(gate, f"c_{clocked}", pins | {gate.output: clocked}))
        stored = f"q{i}" if flop.inverted else f"n{register.output}"
        pins = {flop.clock: clocked, flop.data: f"n{register.data}", flop.output: stored}
        lines.append(instance(flop, f"f{i}", pins))
        if flop.inverted:
            (pin,) = inverter.capacitance
            lines.append(
                instance(inverter, f"i{i}", {pin: stored, inverter.output: f"n{register.output}"})
            )
    return "\n".join([*lines, "endmodule", ""])


def without_ground(path: Path) -> Iterator[str]:
    """Lines of a liberty file without the power groups of the ground pin."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    at = 0
    while match := _POWER.search(text, at):
        end, depth = match.end(), 1
        while depth:
            brace = _BRACE.search(text, end)
            if brace is None:
                raise InputError(f"{path}: a power group does not end")
            depth += 1 if brace[0] == "{" else -1
            end = brace.end()
        yield text[at : match.start()]
        if not _GROUND.search(text, match.start(), end):
            yield text[match.start() : end]
        at = end
    yield text[at:]


def run_sta(folder: Path, commands: str) -> str:
    """Run OpenSTA and return what it prints.

    Raises:
        InputError: it is not installed.
        FGMPError: it reports an error.
    """
    if shutil.which("sta") is None:
        raise InputError("this needs OpenSTA on the path: apt-get install opensta")
    (folder / "run.tcl").write_text(commands + "exit\n")
    command = ["sta", "-no_splash", "-exit", "run.tcl"]
    completed = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    output = completed.stdout + completed.stderr
    if completed.returncode or "Error" in output:
        raise FGMPError(f"OpenSTA: {output.strip()[-800:]}")
    return completed.stdout


def longest_path(lane: Implementation, folder: Path) -> dict[str, float]:
    """Arrival at the end of the longest path in ps: OpenSTA's and ours."""
    netlist, library = lane.netlist, lane.library
    (folder / "top.v").write_text(verilog(netlist, library))
    ports = [f"n{net}" for port, nets in netlist.inputs.items() if port != "clk" for net in nets]
    slew, launch = default_slew(library), lane.timing.flop_delay.mean()
    text = run_sta(
        folder,
        f"""read_liberty cells.lib
read_verilog top.v
link_design top
create_clock -name clk -period {silicon.PERIOD_NS * 1000} n{netlist.inputs["clk"][0]}
set_clock_transition {slew} [get_clocks clk]
set ports [get_ports {{{" ".join(ports)}}}]
set_input_delay {launch} -clock clk $ports
set_input_transition {slew} $ports
report_checks -path_delay max -digits 4
""",
    )
    arrivals = [float(line.split()[0]) for line in text.splitlines() if "data arrival" in line]
    setups = [-float(line.split()[0]) for line in text.splitlines() if "setup time" in line]
    return {"opensta_ps": arrivals[0], "ours_ps": lane.timing.critical, "setup_ps": setups[0]}


def internal_energies(lane: Implementation, folder: Path) -> list[dict[str, Any]]:
    """Internal over switching energy of each cell, OpenSTA's and ours, and leakage in nW."""
    library = lane.library
    cells = [library.cells[name] for name in sorted({gate.cell for gate in lane.netlist.gates})]
    inputs = [f"{cell.name}_{pin}" for cell in cells for pin in cell.capacitance]
    outputs = [f"{cell.name}_{cell.output}" for cell in cells]
    lines = [f"module top ({', '.join([*inputs, *outputs])});"]
    lines += [f"  input {name};" for name in inputs] + [f"  output {name};" for name in outputs]
    for cell in cells:
        pins = {pin: f"{cell.name}_{pin}" for pin in (*cell.capacitance, cell.output)}
        lines.append(instance(cell, f"u_{cell.name}", pins))
    (folder / "cells.v").write_text("\n".join([*lines, "endmodule", ""]))
    reports = "".join(f"report_power -instances u_{cell.name} -digits 8\n" for cell in cells)
    text = run_sta(
        folder,
        f"""read_liberty cells.lib
read_verilog cells.v
link_design top
create_clock -name clk -period 1000
set ports {{{" ".join(inputs)}}}
set_input_transition {SLEW} [get_ports $ports]
set_power_activity -input_ports $ports -activity 1e9 -duty 0.5
set_load {LOAD} [all_outputs]
{reports}""",
    )
    powers = {name: [float(v) for v in values] for *values, name in _ROW.findall(text)}
    switching = LOAD * library.voltage**2 / 2
    rows = []
    for cell in cells:
        internal, switched, leakage = powers[cell.name]
        tables = [e.at(SLEW, LOAD) for e in cell.output_energy]
        pins = [
            e.at(SLEW, 0)
            for energies in cell.input_energy.values()
            for e in energies
            if not e.conditional
        ]
        rows.append(
            {
                "cell": cell.name,
                "inputs": len(cell.capacitance),
                "opensta": internal / switched,
                "ours": (sum(tables) / len(tables) + sum(pins)) / switching,
                "leakage_opensta_nw": leakage * 1e9,
                "leakage_ours_nw": cell.leakage,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--liberty", type=Path, required=True, help="such as ASAP7's")
    parser.add_argument("--lane", choices=LANES, default="fp4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    library = library_of(args.liberty, Reporter(message=Console(stderr=True).print))
    lane = silicon.implement(LANES[args.lane].create(), library)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cells.lib").write_text("".join(without_ground(args.liberty)))
        path, rows = longest_path(lane, folder), internal_energies(lane, folder)
    by_inputs: dict[int, list[float]] = {}
    for row in rows:
        by_inputs.setdefault(row["inputs"], []).append(row["opensta"] / row["ours"])
    result = {
        "command": "runs/opensta.py",
        "library": library.name,
        "lane": args.lane,
        "longest_path": path,
        "internal_energy_opensta_over_ours": {
            n: {"cells": len(q), "min": min(q), "median": float(np.median(q)), "max": max(q)}
            for n, q in sorted(by_inputs.items())
        },
        "cells": rows,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "cells"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
