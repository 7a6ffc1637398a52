"""Time and memory of quantizing, against the calibration's passes that it cannot do without.

    python benchmarks/quantize.py [MODEL] [--samples N] [--seq-len L] [--repeats R] [--json]
    python benchmarks/quantize.py --sizes [NAME ...] [--samples N] [--seq-len L] [--json]
    python benchmarks/quantize.py --draw JSON [...] > docs/results/quantize-sizes.svg

Without MODEL, the demonstration model; with ``--sizes``, Qwen2-shaped models of random weights in
fp32, from 1M to 0.5B quantized parameters, or those named. ``0.5B x 2`` is two of the 24 layers of
the 0.5B shape with a vocabulary of 1,024, for machines where the whole takes too long: its ratios
are those of the layers, and the whole model's are lower, since calibration also pays for its head.

Each turn runs ``fgmp.quantize`` by the default recipe and measures:

    passes       forward and backward over the calibration sequences with plain autograd, every
                 weight gradient formed: what any gradient-based calibration pays
    calibrating, scoring activations, scoring weights, compensating, checking
                 the stages of ``fgmp.quantize``; all but the first are the method's *own work*
    moments, packing
                 parts of compensating; its rest are passes forward through the models
    evaluate     perplexity of the original and of the packed model on the same windows

``--draw`` measures nothing: it draws the seconds of such results by size, whole models only.
Otherwise prints medians over the turns: seconds, seconds per million quantized parameters, own work
over ``calibrating``, with and without the passes forward, and predicted and measured peak memory.
"""

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from interleaved import machine
from loglog import Panel, document
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from fgmp import Recipe, quantize
from fgmp.app.quickstart import MODEL
from fgmp.data import choose_windows, tokenize
from fgmp.demo.text import docstrings, standard_library
from fgmp.evaluation.perplexity import evaluate
from fgmp.model.linear import weight_holders
from fgmp.model.losses import causal_lm_loss
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.model.store import config_of

EVALUATED = 16
"""Held-out windows to evaluate on."""

SIZES = {
    # hidden, intermediate, layers, heads, heads of keys, vocabulary
    "1M": (128, 384, 5, 4, 2, 1024),
    "10M": (320, 1024, 8, 5, 1, 4096),
    "50M": (512, 2048, 14, 8, 2, 16384),
    "0.5B x 2": (896, 4864, 2, 14, 2, 1024),
    "0.5B": (896, 4864, 24, 14, 2, 151936),
}
"""Shapes of models of random weights."""

OWN = ("scoring activations", "scoring weights", "compensating", "checking on held-out text")
PASSES_FORWARD = ("scoring activations", "passes forward", "checking on held-out text")


class Timer:
    """Seconds by name; a ``progress`` of ``quantize``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    @contextmanager
    def __call__(self, title: str, steps: int) -> Iterator[Callable[[], None]]:
        with self.timing(title):
            yield lambda: None

    def wrapped(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.timing(name):
                return function(*args, **kwargs)

        return timed

    def parts(self) -> ExitStack:
        """Within this context, parts of compensation are timed."""
        from fgmp.quantization import candidates, sequential

        stack = ExitStack()
        for name, module, function in (
            ("moments", sequential, "add_moments"),
            ("packing", candidates, "pack_weights"),
        ):
            timed = self.wrapped(name, getattr(module, function))
            stack.enter_context(mock.patch.object(module, function, timed))
        return stack


def passes(model: nn.Module, samples: Tensor) -> None:
    """Run forward and backward, one sequence at a time, with gradients of all parameters."""
    for sample in samples:
        total, _ = causal_lm_loss(model, sample)
        total.backward()
        model.zero_grad()


def one_turn(
    create: Callable[[], nn.Module], samples: Tensor, held_out: Tensor
) -> tuple[dict[str, float], nn.Module]:
    """Seconds of each step, and the packed model."""
    windows, timer = held_out[:EVALUATED], Timer()
    original = create()
    with timer.timing("passes"):
        passes(original, samples)
    mixed = create()
    with timer.timing("quantize"), timer.parts():
        quantize(mixed, samples, Recipe(), held_out=held_out, progress=timer)
    with timer.timing("evaluate original"):
        evaluate(original, windows)
    with timer.timing("evaluate packed"):
        evaluate(mixed, windows)
    seconds = timer.seconds
    parts = seconds["moments"] + seconds["packing"]
    seconds["passes forward"] = seconds["compensating"] - parts
    seconds["own work"] = sum(seconds[stage] for stage in OWN)
    return dict(seconds), mixed


def measured(
    name: str, create: Callable[[], nn.Module], samples: Tensor, held_out: Tensor, repeats: int
) -> dict[str, Any]:
    """Facts about one model, medians over all turns."""
    turns = []
    for _ in range(repeats):
        seconds, mixed = one_turn(create, samples, held_out)
        turns.append(seconds)
    parameters = sum(m.packed.n * m.packed.k for m in weight_holders(mixed).values())
    median = {key: statistics.median(turn[key] for turn in turns) for key in turns[0]}
    run = config_of(mixed).run

    def over_calibration(own: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(own(turn) / turn["calibrating"] for turn in turns)

    return {
        "model": name,
        "parameters": parameters,
        "sequences": len(samples),
        "seq_len": samples.shape[1],
        "repeats": repeats,
        "seconds": median,
        "seconds_per_million_parameters": median["quantize"] / parameters * 1e6,
        "own_work_over_calibration": over_calibration(lambda turn: turn["own work"]),
        "own_work_but_passes_over_calibration": over_calibration(
            lambda turn: turn["own work"] - sum(turn[stage] for stage in PASSES_FORWARD)
        ),
        "seconds_predicted": run["seconds_predicted"],
        "peak_bytes": run["peak_bytes"],
        "peak_bytes_predicted": run["peak_bytes_predicted"],
    }


def random_model(name: str) -> nn.Module:
    """A Qwen2 of random weights in one of :data:`SIZES`."""
    hidden, intermediate, layers, heads, key_heads, vocabulary = SIZES[name]
    torch.manual_seed(0)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            tie_word_embeddings=True,
        )
    ).eval()


def random_tokens(name: str, count: int, seq_len: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out sequences, an eighth as many."""
    generator = torch.Generator().manual_seed(0)
    held_out = max(1, count // 8)
    shape = (count + held_out, seq_len)
    tokens = torch.randint(SIZES[name][-1], shape, generator=generator)
    return tokens[:count], tokens[count:]


def plot(rows: list[dict[str, Any]]) -> str:
    """SVG of the seconds by model size, whole and per million quantized parameters."""
    whole = sorted((r for r in rows if " x " not in r["model"]), key=lambda r: r["parameters"])
    millions = [row["parameters"] / 1e6 for row in whole]
    seconds = [row["seconds"]["quantize"] for row in whole]
    rates = [row["seconds_per_million_parameters"] for row in whole]
    across = "million quantized parameters"
    return document(
        [
            Panel(list(zip(millions, seconds, strict=True)), across, "seconds to quantize"),
            Panel(
                list(zip(millions, rates, strict=True)),
                across,
                "seconds per million",
                proportional=False,
            ),
        ]
    )


def show(row: dict[str, Any]) -> None:
    """Print one model's facts as text."""
    print(f"{row['model']}: {row['parameters'] / 1e6:.1f}M quantized parameters")
    for name, value in row["seconds"].items():
        print(f"  {name:<26} {value:8.2f} s")
    print(f"  {row['seconds_per_million_parameters']:.2f} s per million quantized parameters")
    print(
        f"  own work over calibration: {row['own_work_over_calibration']:.2f}, without passes "
        f"forward {row['own_work_but_passes_over_calibration']:.2f}"
    )
    for name, predicted in (("calibrating", "calibration"), ("quantize", "total")):
        seconds = row["seconds_predicted"][predicted]
        print(f"  {name}: {row['seconds'][name]:.0f} s, predicted {seconds:.0f} s")
    print(
        f"  peak memory {row['peak_bytes'] / 1e6:.0f} MB, "
        f"predicted {row['peak_bytes_predicted'] / 1e6:.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=str(MODEL))
    parser.add_argument("--sizes", nargs="*", choices=SIZES, help="default: all")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--draw", type=Path, nargs="+", metavar="JSON", help="draw results as SVG")
    args = parser.parse_args()
    if args.draw:
        results = [json.loads(path.read_text()) for path in args.draw]
        print(plot([row for result in results for row in result["rows"]]), end="")
        return
    rows = []
    if args.sizes is not None:
        for name in args.sizes or SIZES:
            samples, held_out = random_tokens(name, args.samples, args.seq_len)
            create = partial(random_model, name)
            rows.append(measured(name, create, samples, held_out, args.repeats))
    else:
        tokenizer = load_tokenizer(args.model)
        seq_len = min(args.seq_len, context_length(load_model(args.model)))
        stream = tokenize(list(docstrings(standard_library())), tokenizer)
        text = choose_windows(stream, samples=args.samples, seq_len=seq_len, seed=0)
        name = args.model.rstrip("/").rsplit("/", 1)[-1]
        rows.append(
            measured(
                name, partial(load_model, args.model), text.samples, text.held_out, args.repeats
            )
        )
    facts = {
        **machine(),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for row in rows:
        show(row)


if __name__ == "__main__":
    main()
