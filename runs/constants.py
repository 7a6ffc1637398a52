"""Choice of compensation's two constants, on text that is not evaluated on.

    python runs/constants.py damping MODEL --calib TEXT [--other TEXT] [--values 0.03 0.1 0.3]
    python runs/constants.py relief MODEL --calib TEXT [--other TEXT] [--values 0.1 0.2 0.4]

``damping`` keeps compensated weights near the original's (``assign.compensate.DAMPING``).
``relief`` is the fraction of the loss from weights that is assumed to remain after compensation;
it affects the allocation of a budget (``assign.frontier.RELIEF``).

Calibrates on windows of the first half of TEXT: ``runs/accuracy.py`` evaluates on the second where
one text is both. Prints the mean token KL from the original, in nats, on windows of the first half
that ``quantize`` did not get, and on the beginning of another text. Too little damping shows on the
other text.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import measure
from rich.console import Console
from setting import Setting, format_bits
from torch import Tensor, nn
from transformers.utils import logging

from fgmp import evaluation_windows
from fgmp.assign.methods import Methods
from fgmp.data import choose_windows
from fgmp.errors import FGMPError
from fgmp.evaluation.perplexity import batches, next_token_log_probabilities
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of


def damped(setting: Setting, value: float, fp4: float) -> nn.Module:
    """Quantize at this fraction of FP4 blocks with another damping."""
    return setting.quantized(methods=Methods(damping=value), fp4=fp4)


def relieved(setting: Setting, value: float, fp4: float) -> nn.Module:
    """Quantize at this mean fraction of FP4 blocks, divided with another relief."""
    return setting.quantized(methods=Methods(relief=value), bits=format_bits(fp4))


@dataclass(frozen=True)
class Constant:
    """How to quantize with a value of the constant; values and fractions of FP4 blocks to try."""

    quantized: Callable[[Setting, float, float], nn.Module]
    values: list[float]
    fp4: list[float]


CONSTANTS = {
    "damping": Constant(damped, [0.03, 0.1, 0.3, 1.0], [0.7, 1.0]),
    "relief": Constant(relieved, [0.05, 0.1, 0.2, 0.4, 1.0], [0.7, 0.9]),
}


def setting_and_windows(args: argparse.Namespace) -> tuple[Setting, dict[str, Tensor]]:
    """Setting of the first half of the text, and windows to measure on, by kind of text."""
    tokenizer = load_tokenizer(args.model)
    windows = evaluation_windows(args.calib, tokenizer, args.seq_len, bos=False)
    windows = windows[: len(windows) // 2]
    text = choose_windows(
        windows.flatten(), samples=args.samples, seq_len=args.seq_len, seed=0, source=args.calib
    )
    seen = torch.cat([text.samples, text.held_out])
    unseen = [not (seen == window).all(1).any() for window in windows]
    measured = {"same text": windows[unseen][: args.windows]}
    if args.other:
        other = evaluation_windows(args.other, tokenizer, args.seq_len, bos=False)
        measured["other"] = other[: args.windows]
    stem = args.cache / f"{text.fingerprint[:8]}-{Path(args.model).name}"
    return Setting(args.model, text, args.seq_len, 0, stem, Console(stderr=True)), measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constant", choices=CONSTANTS)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--other", help="a text of another kind")
    parser.add_argument("--values", type=float, nargs="+")
    parser.add_argument("--fp4", type=float, nargs="+", help="fractions of FP4 blocks")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60, help="to measure on, of each text")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.cache.mkdir(parents=True, exist_ok=True)
    constant = CONSTANTS[args.constant]
    setting, windows = setting_and_windows(args)
    original = load_model(args.model).eval()
    reference = {
        name: [next_token_log_probabilities(original, batch) for batch in batches(w)]
        for name, w in windows.items()
    }
    columns = ["FP4", args.constant, "FP4 weights", "FP4 activations"]
    columns += [f"KL, {name}" for name in windows]
    print(f"| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for fp4 in args.fp4 or constant.fp4:
        for value in args.values or constant.values:
            model = constant.quantized(setting, value, fp4)
            result = config_of(model).result
            cells = [f"{fp4:.0%}", f"{value:g}"]
            cells += [f"{result[name]:.1%}" for name in ("fp4_weights", "fp4_activations")]
            for name, w in windows.items():
                kl = measure(model, reference[name], w).kl.mean().item() / (w.shape[1] - 1)
                cells.append(f"{kl:.5f}")
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
