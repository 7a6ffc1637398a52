"""How much compensation should be damped, decided on text that is not evaluated on.

    python runs/damping.py MODEL --calib TEXT [--other TEXT] [--damping 0.03 0.1 0.3] [--fp4 0.7 1]

Calibrates on windows of the first half of TEXT, since ``runs/accuracy.py`` evaluates on the second
where it has one text for both, and prints the mean token KL from the original, in nats, on other
windows of that half and on the beginning of another text: damping guards against the second.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from accuracy import Setting, measure
from rich.console import Console
from transformers.utils import logging

from fgmp import evaluation_windows
from fgmp.assign import weights
from fgmp.assign.compensate import factorize
from fgmp.data import choose_windows
from fgmp.evaluation.perplexity import batches, logits_of
from fgmp.model.source import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--other", help="a text of another kind")
    parser.add_argument("--damping", type=float, nargs="+", default=[0.03, 0.1, 0.3, 1.0])
    parser.add_argument("--fp4", type=float, nargs="+", default=[0.7, 1.0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, default=60, help="to measure on, of each text")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    args = parser.parse_args()
    logging.disable_progress_bar()
    args.cache.mkdir(parents=True, exist_ok=True)

    tokenizer, original = load_tokenizer(args.model), load_model(args.model).eval()
    windows = evaluation_windows(args.calib, tokenizer, args.seq_len)
    text = choose_windows(
        windows[: len(windows) // 2].flatten(),
        samples=args.samples,
        seq_len=args.seq_len,
        seed=0,
        source=args.calib,
    )
    judges = {"held out": text.held_out[: args.windows]}
    if args.other:
        judges["other"] = evaluation_windows(args.other, tokenizer, args.seq_len)[: args.windows]
    wanted = {n: [logits_of(original, batch) for batch in batches(w)] for n, w in judges.items()}
    state = args.cache / f"{text.fingerprint[:8]}-{Path(args.model).name}.calibration.safetensors"
    setting = Setting(args.model, text, args.seq_len, 0, state, Console(stderr=True))

    print("| FP4 | damping | " + " | ".join(f"KL, {name}" for name in judges) + " |")
    print("|---" * (2 + len(judges)) + "|")
    for fp4 in args.fp4:
        for damping in args.damping:
            weights.factorize = partial(factorize, damping=damping)  # type: ignore[assignment]
            model = setting.quantized(fp4=fp4)
            kl = [
                measure(model, wanted[n], w).kl.mean().item() / (w.shape[1] - 1)
                for n, w in judges.items()
            ]
            print(f"| {fp4:.0%} | {damping:g} | " + " | ".join(f"{k:.5f}" for k in kl) + " |")


if __name__ == "__main__":
    sys.exit(main())
