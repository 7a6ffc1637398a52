"""Lanes side by side: area against energy, on a model's own operands (docs/energy.md).

    python runs/design_points.py CHECKPOINT ... --data TEXT --liberty FILE -o RESULT.json

Every lane is synthesized once and driven by the operands of every checkpoint; FP8-only lanes and
variations by those of the first alone, for FP8 codes hardly depend on the share of FP4 blocks.
Savings are against the best FP8-only lane whose totals are exact.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console

from fgmp import accelerator
from fgmp.accelerator import Measured, Operands, library_of, operands
from fgmp.hardware import inference, silicon, stimulus
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.model.source import load_model
from fgmp.workflow import Reporter

_CUTS = ((), ("significands",), ("sums",), ("significands", "sums"), ("products", "sums"))
FP8 = [
    *(Datapath(kind="fp8", addition="complement", cuts=cuts) for cuts in _CUTS[2:4]),
    *(Datapath(kind="fp8", cuts=cuts) for cuts in _CUTS),
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


def point(
    datapath: Datapath, found: dict[str, Operands], library: Library
) -> tuple[dict[str, Any], dict[str, float]]:
    """Facts of a lane, and its energy an operation by checkpoint."""
    started = time.perf_counter()
    made = silicon.implement(datapath.create(), library)
    facts: dict[str, Any] = {
        "kind": datapath.kind,
        "addition": datapath.addition,
        "shared": datapath.shared,
        "gated": datapath.gated,
        "cuts": list(datapath.cuts),
        "fp8_cuts": list(datapath.fp8_cuts or datapath.cuts),
        "accumulator": datapath.accumulator,
        "accumulator_bits": datapath.total_bits,
        **made.summary(),
    }
    energy = {}
    for name, own in found.items():
        ports = stimulus.stimulate(own.layers, datapath, 160)
        measured = silicon.measure(made, ports, 32)
        mix = {(True, True): 1.0} if datapath.kind == "fp8" else own.mix
        lane = Measured(name, made, measured, datapath, inference.unit_shares(mix))
        energy[name] = lane.per_op
        facts[name] = lane.facts(1.0) | {"parts": lane.parts}
        for key in ("cuts", *made.summary()):
            del facts[name][key]
    return facts | {"seconds": time.perf_counter() - started}, energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoints", nargs="+", help="the first one's operands drive FP8 lanes")
    parser.add_argument("--data", required=True)
    parser.add_argument("--liberty", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    console = Console(stderr=True)
    library = library_of(given.liberty, Reporter(line=console.print))
    found = {}
    for path in given.checkpoints:
        model = load_model(path)
        found[Path(path).name] = operands(model, accelerator.text_windows(path, model, given.data))
    first = dict(list(found.items())[:1])
    best = float("inf")
    rows = []
    for datapath in (*FP8, *MIXED, *VARIATIONS):
        facts, energy = point(datapath, found if datapath in MIXED else first, library)
        if datapath in FP8:
            best = min(best, *energy.values())
        else:
            for name, value in energy.items():
                facts[name]["saving_vs_best_fp8_percent"] = 100 * (1 - value / best)
        rows.append(facts)
        console.print(facts["kind"], facts["addition"], facts["cuts"], energy)
        result = {
            "command": "runs/design_points.py",
            **provenance(),
            "library": library.name,
            "data": Path(given.data).name,
            "mix": {name: inference.unit_shares(own.mix) for name, own in found.items()},
            "best_fp8_fj_per_op": best,
            "points": rows,
        }
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
