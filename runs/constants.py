"""What compensation's two constants should be, decided on text that is not evaluated on.

    python runs/constants.py damping MODEL --calib TEXT [--other TEXT] [--values 0.03 0.1 0.3]
    python runs/constants.py relief MODEL --calib TEXT [--other TEXT] [--values 0.1 0.2 0.4]

``damping`` keeps compensated weights near the original's, ``relief`` is what compensation is taken
to leave of the weights' harm, by which a budget is divided. Calibrates on windows of the first half
of TEXT, since ``runs/accuracy.py`` evaluates on the second where it has one text for both, and
prints the mean token KL from the original, in nats, on windows of that half that ``quantize`` was
not given and on the beginning of another text: damping guards against the second.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

import torch
from accuracy import Setting, measure, stream
from rich.console import Console
from torch import nn
from transformers.utils import logging

from fgmp import evaluation_windows, solve
from fgmp.assign import weights
from fgmp.assign.compensate import factorize
from fgmp.data import choose_windows
from fgmp.evaluation.perplexity import batches, logits_of
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of


def damped(setting: Setting, value: float, fp4: float) -> nn.Module:
    """The model at these shares of FP4 blocks, with another damping."""
    weights.factorize = partial(factorize, damping=value)  # type: ignore[assignment]
    return setting.quantized(fp4=fp4)


def relieved(setting: Setting, value: float, fp4: float) -> nn.Module:
    """The model at this mean share of FP4 blocks, divided by another relief."""
    solve.RELIEF = value  # type: ignore[attr-defined]
    return setting.quantized(bits=stream(fp4))


CONSTANTS = {
    "damping": (damped, [0.03, 0.1, 0.3, 1.0], [0.7, 1.0]),
    "relief": (relieved, [0.05, 0.1, 0.2, 0.4, 1.0], [0.7, 0.9]),
}
"""How to try a constant, its values, shares of FP4."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constant", choices=CONSTANTS)
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--other", help="a text of another kind")
    parser.add_argument("--values", type=float, nargs="+")
    parser.add_argument("--fp4", type=float, nargs="+", help="shares of FP4 blocks")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60, help="to measure on, of each text")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.cache.mkdir(parents=True, exist_ok=True)
    trial, values, shares = CONSTANTS[args.constant]

    tokenizer, original = load_tokenizer(args.model), load_model(args.model).eval()
    windows = evaluation_windows(args.calib, tokenizer, args.seq_len)
    windows = windows[: len(windows) // 2]
    text = choose_windows(
        windows.flatten(),
        samples=args.samples,
        seq_len=args.seq_len,
        seed=0,
        source=args.calib,
    )
    seen = torch.cat([text.samples, text.held_out])
    fresh = [not (seen == window).all(1).any() for window in windows]
    judges = {"same text": windows[fresh][: args.windows]}
    if args.other:
        judges["other"] = evaluation_windows(args.other, tokenizer, args.seq_len)[: args.windows]
    wanted = {n: [logits_of(original, batch) for batch in batches(w)] for n, w in judges.items()}
    state = args.cache / f"{text.fingerprint[:8]}-{Path(args.model).name}.calibration.safetensors"
    setting = Setting(args.model, text, args.seq_len, 0, state, Console(stderr=True))

    names = ["FP4", args.constant, "FP4 weights", "FP4 activations", *(f"KL, {n}" for n in judges)]
    print(f"| {' | '.join(names)} |\n" + "|---" * len(names) + "|")
    for fp4 in args.fp4 or shares:
        for value in args.values or values:
            model = trial(setting, value, fp4)
            result = config_of(model).result
            kl = [
                measure(model, wanted[n], w).kl.mean().item() / (w.shape[1] - 1)
                for n, w in judges.items()
            ]
            cells = [f"{fp4:.0%}", f"{value:g}"]
            cells += [f"{result[name]:.1%}" for name in ("fp4_weights", "fp4_activations")]
            print(f"| {' | '.join(cells + [f'{k:.5f}' for k in kl])} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
