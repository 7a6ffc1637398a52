"""Time and memory of quantizing and evaluating, against passes that they cannot do without.

    python benchmarks/quantize.py [MODEL] [--samples N] [--seq-len L] [--repeats R] [--json]

Without MODEL, the demonstration model. Measures, R times in turn:

    passes      forward and backward over the calibration sequences with plain autograd, every
                weight gradient formed: what any gradient-based calibration pays
    quantize    all of ``fgmp.quantize``, and of it calibration
    evaluate    perplexity of the original and of the packed model on the same windows

Prints medians: seconds, seconds per million quantized parameters, the method's own work (all but
calibration) over the passes, and predicted and measured peak memory.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from fgmp import Recipe, quantize
from fgmp.app.quickstart import MODEL
from fgmp.data import CalibrationText, choose_windows, tokenize
from fgmp.demo.text import docstrings, standard_library
from fgmp.evaluation.perplexity import evaluate
from fgmp.model.linear import mixed_linears
from fgmp.model.losses import causal_lm_loss
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.recipe import PAPER

EVALUATED = 16
"""Held-out windows to evaluate on."""


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds and result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def passes(model: torch.nn.Module, samples: torch.Tensor) -> None:
    """Run forward and backward, one sequence at a time, with gradients of all parameters."""
    for sample in samples:
        total, _ = causal_lm_loss(model, sample)
        total.backward()
        model.zero_grad()


def one_turn(name: str, text: CalibrationText) -> tuple[dict[str, float], torch.nn.Module]:
    """Seconds of each step, and the packed model."""
    windows = text.held_out[:EVALUATED]
    original = load_model(name)
    seconds = {"passes": timed(lambda: passes(original, text.samples))[0]}
    mixed = load_model(name)
    seconds["quantize"], _ = timed(
        lambda: quantize(mixed, text.samples, Recipe(**PAPER), held_out=text.held_out)
    )
    seconds["calibration"] = config_of(mixed).result["seconds"]["calibration"]
    seconds["own work"] = seconds["quantize"] - seconds["calibration"]
    seconds["evaluate original"], _ = timed(lambda: evaluate(original, windows))
    seconds["evaluate packed"], _ = timed(lambda: evaluate(mixed, windows))
    return seconds, mixed


def show(facts: dict[str, Any]) -> None:
    """Print the facts as text."""
    for name, value in facts["seconds"].items():
        print(f"{name:<20} {value:8.2f} s")
    print(f"{facts['seconds_per_million_parameters']:.2f} s per million quantized parameters")
    print(f"own work over forward and backward passes: {facts['own_work_over_passes']:.2f}")
    print(
        f"peak memory {facts['peak_bytes'] / 1e6:.0f} MB, "
        f"predicted {facts['peak_bytes_predicted'] / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    seq_len = min(args.seq_len, context_length(load_model(args.model)))
    stream = tokenize(list(docstrings(standard_library())), tokenizer)
    text = choose_windows(stream, samples=args.samples, seq_len=seq_len, seed=0)

    times: dict[str, list[float]] = {}
    for _ in range(args.repeats):
        seconds, mixed = one_turn(args.model, text)
        for name, value in seconds.items():
            times.setdefault(name, []).append(value)
    parameters = sum(m.packed.n * m.packed.k for m in mixed_linears(mixed).values())
    median = {name: statistics.median(values) for name, values in times.items()}
    result = config_of(mixed).result
    facts = {
        "model": args.model.rstrip("/").rsplit("/", 1)[-1],
        "parameters": parameters,
        "sequences": len(text.samples),
        "seq_len": seq_len,
        "threads": torch.get_num_threads(),
        "repeats": args.repeats,
        "seconds": median,
        "seconds_per_million_parameters": median["quantize"] / parameters * 1e6,
        "own_work_over_passes": statistics.median(
            own / base for own, base in zip(times["own work"], times["passes"], strict=True)
        ),
        "peak_bytes": result["peak_bytes"],
        "peak_bytes_predicted": result["peak_bytes_predicted"],
    }
    if args.json:
        print(json.dumps(facts))
    else:
        show(facts)


if __name__ == "__main__":
    main()
