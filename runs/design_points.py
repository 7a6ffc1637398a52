"""Lanes side by side: area and energy on the operands of a model (docs/energy.md).

    python runs/design_points.py CHECKPOINT ... --data TEXT --liberty FILE -o RESULT.json

Every lane is synthesized once. Lanes with mixed formats are driven by the operands of every
checkpoint; FP8-only lanes and variations by those of the first alone, since FP8 codes hardly depend
on the share of FP4 blocks. Savings are against the best FP8-only lane whose totals are exact.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console

from fgmp.app.commands import Reporter
from fgmp.app.energy import text_windows
from fgmp.app.machines import Measured, Operands, library_of, operands
from fgmp.errors import FGMPError
from fgmp.hardware import inference, silicon, stimulus
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.model.source import load_model

CUTS = ((), ("significands",), ("sums",), ("significands", "sums"), ("products", "sums"))
FP8 = [
    *(Datapath(kind="fp8", addition="complement", cuts=cuts) for cuts in CUTS[2:4]),
    *(Datapath(kind="fp8", cuts=cuts) for cuts in CUTS),
]
MIXED = [replace(silicon.MIXED, shared=False), silicon.MIXED]
VARIATIONS = [
    replace(silicon.MIXED, fp8_cuts=None),
    replace(silicon.MIXED, addition="complement"),
    replace(silicon.MIXED, gated=False),
    replace(silicon.MIXED, cuts=("sums",), fp8_cuts=None),
    replace(silicon.MIXED, cuts=("significands", "sums", "scaled"), fp8_cuts=None),
    replace(silicon.MIXED, k_max=4096),
    replace(silicon.MIXED, accumulator="fp32"),
    replace(silicon.FP8, accumulator="fp32"),
]


CYCLES, WARM_UP = 160, 32
"""Cycles of stimulus, and those at the start that do not count."""


def design_point(
    datapath: Datapath, by_checkpoint: dict[str, Operands], library: Library
) -> tuple[dict[str, Any], dict[str, float]]:
    """Facts of a lane, and its energy per operation by checkpoint."""
    started = time.perf_counter()
    implementation = silicon.implement(datapath.create(), library)
    facts: dict[str, Any] = {
        "kind": datapath.kind,
        "addition": datapath.addition,
        "shared": datapath.shared,
        "gated": datapath.gated,
        "cuts": list(datapath.cuts),
        "fp8_cuts": list(datapath.fp8_cuts or datapath.cuts),
        "accumulator": datapath.accumulator,
        "accumulator_bits": datapath.total_bits,
        **implementation.summary(),
    }
    energy = {}
    for name, collected in by_checkpoint.items():
        ports = stimulus.stimulate(collected.layers, datapath, CYCLES)
        energies = silicon.measure(implementation, ports, WARM_UP)
        mix = {(True, True): 1.0} if datapath.kind == "fp8" else collected.mix
        lane = Measured(name, implementation, energies, datapath, inference.unit_shares(mix))
        energy[name] = lane.per_op
        figures = asdict(lane.figures(1.0))
        facts[name] = {k: v for k, v in figures.items() if k not in facts} | {"parts": lane.parts}
    return facts | {"seconds": time.perf_counter() - started}, energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", help="the first one's operands drive FP8 lanes")
    parser.add_argument("--data", required=True)
    parser.add_argument("--liberty", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    console = Console(stderr=True)
    library = library_of(args.liberty, Reporter(message=console.print))
    by_checkpoint = {}
    for path in args.checkpoints:
        model = load_model(path)
        windows = text_windows(path, model, args.data)
        by_checkpoint[Path(path).name] = operands(model, windows)
    first = dict(list(by_checkpoint.items())[:1])
    best_fp8 = float("inf")
    points = []
    for datapath in (*FP8, *MIXED, *VARIATIONS):
        driven_by = by_checkpoint if datapath in MIXED else first
        facts, energy = design_point(datapath, driven_by, library)
        if datapath in FP8:
            best_fp8 = min(best_fp8, *energy.values())
        else:
            for name, value in energy.items():
                facts[name]["saving_vs_best_fp8_percent"] = 100 * (1 - value / best_fp8)
        points.append(facts)
        console.print(facts["kind"], facts["addition"], facts["cuts"], energy)
        result = {
            "command": "runs/design_points.py",
            **provenance(),
            "library": library.name,
            "data": Path(args.data).name,
            "mix": {name: inference.unit_shares(o.mix) for name, o in by_checkpoint.items()},
            "best_fp8_fj_per_op": best_fp8,
            "points": points,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
