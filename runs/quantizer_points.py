"""Quantizers side by side: area and energy on a model's own activations (docs/energy.md).

    python runs/quantizer_points.py CHECKPOINT --data TEXT [--liberty FILE] -o RESULT.json

Every quantizer sees the activations of the one checkpoint, and records of its own rule and
sensitivities; thresholds are chosen anew so that as many blocks stay in FP4. ``percent`` is of
the dot-product energy that the checkpoint's lane takes for the outputs of its linears, and of
Llama-2-7B's: the quantizer's energy a block over that of the operations a block takes part in.
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
from fgmp.accelerator import QUANTIZER, library_of, measure, operands, quantizer
from fgmp.formats.activation import Site, power_codes, quantize
from fgmp.hardware import inference
from fgmp.hardware.inference import Work
from fgmp.hardware.silicon import OPERATIONS
from fgmp.hardware.stimulus import SiteInput
from fgmp.model.source import load_model
from fgmp.workflow import Reporter

POINTS = [
    ("difference", "max", "e4m3"),
    ("difference", "max", "powers"),
    ("benefit", "max", "e4m3"),
    ("benefit", "search", "e4m3"),
    ("benefit", "search", "powers"),
    ("truncated", "search", "e4m3"),
    ("truncated", "search", "powers"),
]


def as_asked(source: SiteInput, rule: str, scales: str, sensitivities: str) -> SiteInput:
    """The site under another quantizer, with a threshold that keeps its share of FP4 blocks."""
    site = source.site
    codes = power_codes(site.sensitivity) if sensitivities == "powers" else site.sensitivity
    other = replace(site, rule=rule, scales=scales, sensitivity=codes)
    share = 1 - quantize(source.x, site).is_fp8.float().mean().item()
    return SiteInput(source.x, replace(other, threshold=_threshold(source, other, share)))


def _threshold(source: SiteInput, site: Site, fp4: float) -> int:
    scores = quantize(source.x, site).score.flatten().sort().values
    kept = round(fp4 * len(scores))
    return int(scores[kept - 1]) if kept else -1


def operations_a_block(work: list[Work]) -> float:
    """Operations of the lanes for each block that is quantized."""
    sites = {linear.site: linear for linear in work}
    blocks = sum(linear.groups for linear in sites.values())
    return OPERATIONS * sum(linear.n * linear.groups for linear in work) / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--liberty", type=Path)
    parser.add_argument("--only", default="", help="quantizers whose name contains this")
    parser.add_argument("--lane", type=float, help="the lane's energy an operation, for percents")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    console = Console(stderr=True)
    reporter = Reporter(line=console.print)
    library = library_of(given.liberty, reporter)
    model = load_model(given.checkpoint)
    found = operands(model, accelerator.text_windows(given.checkpoint, model, given.data))
    llama = inference.llama_2_7b({(False, False): 1.0})
    reach = {
        Path(given.checkpoint).name: operations_a_block(found.work),
        "Llama-2-7B": operations_a_block(llama),
    }
    rows: list[dict[str, Any]] = []
    for point in POINTS:
        if given.only not in ", ".join(point):
            continue
        started = time.perf_counter()
        sites = [as_asked(source, *point) for source in found.sites]
        (measured,) = measure([quantizer(sites)], library, reporter)
        inertial = measured.energies.inertial
        row = {
            **dict(zip(QUANTIZER, point, strict=True)),
            **measured.implementation.summary(),
            "zero_delay_a_block": measured.energies.zero_delay.total,
            "inertial_a_block": inertial.total,
            "by_cause": inertial.by_cause(),
            "by_unit": inertial.by_unit(),
        }
        if given.lane:
            row["percent"] = {
                name: 100 * inertial.total / (operations * given.lane)
                for name, operations in reach.items()
            }
        rows.append(row | {"seconds": time.perf_counter() - started})
        console.print(point, row["area_um2"], row["inertial_a_block"])
        result = {
            "command": "runs/quantizer_points.py",
            **provenance(),
            "library": library.name,
            "data": Path(given.data).name,
            "lane_an_operation": given.lane,
            "points": rows,
        }
        given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
