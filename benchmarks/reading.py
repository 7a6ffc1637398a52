"""Time and memory of reading a checkpoint, by number of tensors and by size.

    python benchmarks/reading.py [--tensors 100 1000 ...] [--megabytes 1 10 ...] [--json]
    python benchmarks/reading.py --json > docs/results/reading.json
    python benchmarks/reading.py --draw docs/results/reading.json > docs/results/reading.svg

Each checkpoint has one packed linear and tensors that are not quantized: many small ones, or one
large one. ``inspect`` verifies all of it, in a process of its own. Both times should grow in
proportion, which the last column shows: microseconds per tensor, or milliseconds per megabyte.
``--draw`` measures nothing: it draws seconds and memory of such a result, on logarithmic axes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from interleaved import machine
from loglog import Panel, document
from torch import Tensor

from fgmp.formats.activation import Site, multiplier
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig, write
from fgmp.pack.planes import pack

_MEASURE = """
import json, sys, time
import torch
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.quantization.memory import held_bytes, peak_bytes, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)  # a new process inherits the peak of the one that started it
before, started = held_bytes(cpu), time.process_time()
inspect_checkpoint(sys.argv[1])
taken = time.process_time() - started
print(json.dumps({"seconds": taken, "peak_mb": (peak_bytes(cpu) - before) / 2**20}))
"""


def checkpoint(folder: Path, extra: dict[str, Tensor]) -> None:
    """Write a checkpoint of one packed linear and ``extra``."""
    weight = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    codes = quantize_weight(weight, tensor_scale(4.0))
    packed = pack(codes, torch.zeros_like(codes.scale, dtype=torch.bool))
    site = Site(multiplier(4.0), torch.full((32,), 0x38, dtype=torch.uint8), 1.0, 0)
    tensors = {f"a.weight_{plane}": t for plane, t in packed.tensors().items()}
    tensors |= {
        "a.input_site.r": torch.tensor(site.r),
        "a.input_site.gamma": torch.tensor(site.gamma),
        "a.input_site.sensitivity": site.sensitivity,
        "a.input_site.threshold": torch.tensor(site.threshold),
    }
    config = CheckpointConfig(sites={"a": SiteConfig(["a"], site.rule, 0.5, site.scales)})
    write(folder, tensors | extra, {"quantization_config": config.to_dict()})


def measure(folder: Path, repeats: int) -> dict[str, float]:
    """Median seconds and megabytes of inspecting, in processes of their own."""
    rows = []
    for _ in range(repeats):
        command = [sys.executable, "-c", _MEASURE, str(folder)]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def by_tensors(count: int, repeats: int) -> dict[str, float]:
    """A checkpoint of ``count`` tensors of four bytes."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        checkpoint(folder, {f"t.{i}": torch.full((), float(i)) for i in range(count)})
        row = measure(folder, repeats)
    return {"tensors": count, **row, "microseconds_per_tensor": 1e6 * row["seconds"] / count}


def by_size(megabytes: int, repeats: int) -> dict[str, float]:
    """A checkpoint with one tensor of so many megabytes."""
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "out"
        checkpoint(folder, {"t": torch.zeros(megabytes << 20, dtype=torch.uint8)})
        row = measure(folder, repeats)
    return {
        "megabytes": megabytes,
        **row,
        "milliseconds_per_megabyte": 1e3 * row["seconds"] / megabytes,
    }


_PANELS = (
    ("tensors", "tensors", "tensors", "seconds", "seconds of CPU"),
    ("tensors", "tensors", "tensors", "peak_mb", "megabytes of memory"),
    ("sizes", "megabytes", "megabytes in the file", "seconds", "seconds of CPU"),
    ("sizes", "megabytes", "megabytes in the file", "peak_mb", "megabytes of memory"),
)
"""Table of the result, its column along x, a label, its column along y, and a label."""


def plot(facts: dict[str, Any]) -> str:
    """SVG with a panel for each of ``_PANELS``; the grey line is proportional to x."""
    return document(
        [
            Panel([(row[column], max(row[measured], 1e-3)) for row in facts[table]], across, up)
            for table, column, across, measured, up in _PANELS
        ]
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tensors", type=int, nargs="+", default=[100, 1000, 10_000, 100_000])
    parser.add_argument("--megabytes", type=int, nargs="+", default=[1, 10, 100, 1000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--draw", type=Path, metavar="JSON", help="draw a result as SVG instead")
    args = parser.parse_args()
    if args.draw:
        print(plot(json.loads(args.draw.read_text())), end="")
        return
    rows = [by_tensors(count, args.repeats) for count in args.tensors]
    sizes = [by_size(size, args.repeats) for size in args.megabytes]
    if args.json:
        print(json.dumps({**machine(), "tensors": rows, "sizes": sizes}, indent=1))
        return
    for table in (rows, sizes):
        print("| " + " | ".join(key.replace("_", " ") for key in table[0]) + " |")
        print("|---" * len(table[0]) + "|")
        for row in table:
            print("| " + " | ".join(f"{value:.4g}" for value in row.values()) + " |")
        print()


if __name__ == "__main__":
    main()
