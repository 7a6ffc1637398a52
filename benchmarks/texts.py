"""Time and memory of turning a large text into calibration and evaluation windows.

    python benchmarks/texts.py TEXT [MODEL] [--megabytes N] [--json]

Repeats TEXT until it has N megabytes, in a temporary file, and measures with the tokenizer of
MODEL (default: the demonstration model):

    calibration    512 windows of 512 tokens and the held-out windows
    evaluation     all windows of 512 tokens

Prints seconds, and the growth of the peak memory in a process of its own.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path

from fgmp import calibration_text, evaluation_windows
from fgmp.app.quickstart import MODEL
from fgmp.model.source import load_tokenizer

SEQ_LEN = 512
SAMPLES = 512


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def measure(work: str, text: Path, model: str) -> dict[str, float]:
    """Seconds, growth of the peak memory in bytes, and tokens, of one kind of work."""
    tokenizer = load_tokenizer(model)
    tokenizer(["warm up"])
    before, started = peak_bytes(), time.perf_counter()
    if work == "calibration":
        options = {"samples": SAMPLES, "seq_len": SEQ_LEN, "seed": 0}
        windows = calibration_text(text, tokenizer, **options).samples
    else:
        windows = evaluation_windows(text, tokenizer, SEQ_LEN)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "bytes": peak_bytes() - before, "tokens": windows.numel()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    content = args.text.read_bytes()
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "large.txt"
        text.write_bytes(content * round(args.megabytes * 1e6 / len(content)))
        for work in ("calibration", "evaluation"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                facts[work] = pool.apply(measure, (work, text, args.model))
    if args.json:
        print(json.dumps(facts))
        return
    for work, fact in facts.items():
        print(
            f"{work:<12} {fact['seconds']:7.1f} s  peak +{fact['bytes'] / 1e6:,.0f} MB  "
            f"{fact['tokens']:,} tokens"
        )


if __name__ == "__main__":
    main()
