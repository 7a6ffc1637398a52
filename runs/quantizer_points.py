"""Quantizers side by side: area and energy on a model's own activations (docs/energy.md).

    python runs/quantizer_points.py CHECKPOINT --data TEXT [--liberty FILE] -o RESULT.json

Every quantizer sees the activations of the same checkpoint, and records with its own rule and
sensitivities. Thresholds are chosen anew so that as many blocks stay in FP4. ``percent`` is the
quantizer's energy per block over that of the lane's operations per quantized block, for the linears
of the checkpoint and of Llama-2-7B.
"""

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console

from fgmp.app.commands import Reporter
from fgmp.app.energy import text_windows
from fgmp.app.machines import library_of, measure, operands, quantizer
from fgmp.formats.activation import Site, power_codes, quantize
from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware import inference
from fgmp.hardware.inference import Work
from fgmp.hardware.silicon import OPERATIONS
from fgmp.hardware.stimulus import SiteInput
from fgmp.model.source import load_model

POINTS = [
    QuantizerConfig("difference", "max", "e4m3"),
    QuantizerConfig("difference", "max", "powers"),
    QuantizerConfig("benefit", "max", "e4m3"),
    QuantizerConfig("benefit", "search", "e4m3"),
    QuantizerConfig("benefit", "search", "powers"),
    QuantizerConfig("truncated", "search", "e4m3"),
    QuantizerConfig("truncated", "search", "powers"),
]


def with_quantizer(source: SiteInput, config: QuantizerConfig) -> SiteInput:
    """The site under another quantizer, with a threshold that keeps its share of FP4 blocks."""
    site = source.site
    powers = config.sensitivities == "powers"
    codes = power_codes(site.sensitivity) if powers else site.sensitivity
    other = replace(site, rule=config.rule, scales=config.scales, sensitivity=codes)
    share = 1 - quantize(source.x, site).is_fp8.float().mean().item()
    return SiteInput(source.x, replace(other, threshold=_threshold(source, other, share)))


def _threshold(source: SiteInput, site: Site, fp4: float) -> int:
    scores = quantize(source.x, site).score.flatten().sort().values
    fp4_blocks = round(fp4 * len(scores))
    return int(scores[fp4_blocks - 1]) if fp4_blocks else -1


def operations_per_block(work: list[Work]) -> float:
    """Operations of the lanes per quantized block."""
    sites = {linear.site: linear for linear in work}
    blocks = sum(linear.groups for linear in sites.values())
    return OPERATIONS * sum(linear.n * linear.groups for linear in work) / blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True)
    parser.add_argument("--liberty", type=Path)
    parser.add_argument("--only", default="", help="quantizers whose name contains this")
    parser.add_argument("--lane", type=float, help="the lane's energy per operation, for percents")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    console = Console(stderr=True)
    reporter = Reporter(message=console.print)
    library = library_of(args.liberty, reporter)
    model = load_model(args.checkpoint)
    collected = operands(model, text_windows(args.checkpoint, model, args.data))
    llama = inference.llama_2_7b({(False, False): 1.0})
    reach = {
        Path(args.checkpoint).name: operations_per_block(collected.work),
        "Llama-2-7B": operations_per_block(llama),
    }
    rows: list[dict[str, Any]] = []
    for point in POINTS:
        if args.only not in str(point):
            continue
        started = time.perf_counter()
        sites = [with_quantizer(source, point) for source in collected.sites]
        (measured,) = measure([quantizer(sites)], library, reporter)
        inertial = measured.energies.inertial
        row = {
            **asdict(point),
            **measured.implementation.summary(),
            "zero_delay_a_block": measured.energies.zero_delay.total,
            "inertial_a_block": inertial.total,
            "by_cause": inertial.by_cause(),
            "by_unit": inertial.by_unit(),
        }
        if args.lane:
            row["percent"] = {
                name: 100 * inertial.total / (operations * args.lane)
                for name, operations in reach.items()
            }
        rows.append(row | {"seconds": time.perf_counter() - started})
        console.print(str(point), row["area_um2"], row["inertial_a_block"])
        result = {
            "command": "runs/quantizer_points.py",
            **provenance(),
            "library": library.name,
            "data": Path(args.data).name,
            "lane_an_operation": args.lane,
            "points": rows,
        }
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
