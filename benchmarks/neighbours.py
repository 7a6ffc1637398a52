"""Seconds of the quickstart alone, and beside processes that keep other cores busy.

    python benchmarks/neighbours.py [--busy N] [--repeats R] [--json]

The runs alternate; every one is a process of its own that writes into a temporary folder. A busy
process counts in a loop. Figures are medians, and the ratio is that of the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from interleaved import machine


def quickstart(busy: int) -> float:
    """Seconds of one run beside ``busy`` processes."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        for _ in range(busy):
            neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.callback(neighbour.wait)
            stack.callback(neighbour.kill)
        command = [sys.executable, "-m", "fgmp", "quickstart", "-o", str(Path(folder) / "out")]
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--busy", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    seconds: dict[int, list[float]] = {0: [], args.busy: []}
    for _ in range(args.repeats):
        for busy, values in seconds.items():
            values.append(quickstart(busy))
    alone, beside = (statistics.median(values) for values in seconds.values())
    facts = {
        **machine(),
        "cores": os.cpu_count(),
        "busy_processes": args.busy,
        "repeats": args.repeats,
        "alone_s": alone,
        "beside_s": beside,
        "ratio": beside / alone,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        print(f"alone {alone:.0f} s, beside {args.busy} busy {beside:.0f} s: {facts['ratio']:.2f}x")


if __name__ == "__main__":
    main()
