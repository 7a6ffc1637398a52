"""The paper's method and its ablations: one model, many recipes, one comparison.

    python runs/results.py MODEL --calib TEXT --data TEXT [--windows N] [--json FILE]

Calibrates once, quantizes the model by every recipe below, and measures all of them, all-FP8 and
all-NVFP4 on the same windows in the same run. Prints a Markdown table. If both texts are the
same file, calibration takes windows of its first half and evaluation those of its second.
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from transformers.utils import logging

from fgmp import Recipe, calibration_text, evaluation_windows, quantize
from fgmp.data import choose_windows
from fgmp.evaluation.compare import compare, table
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.pipeline import uniform
from fgmp.progress import bars
from fgmp.recipe import PAPER

RECIPES = {
    "fgmp 70%": {"fp4": 0.7},
    "fgmp 80%": {"fp4": 0.8},
    "fgmp 90%": {"fp4": 0.9},
    "70%, no clipping": {"fp4": 0.7, "clip": "off"},
    "90%, no clipping": {"fp4": 0.9, "clip": "off"},
    "70%, clipping": {"fp4": 0.7, "clip": "on"},
    "90%, clipping": {"fp4": 0.9, "clip": "on"},
    "70%, per layer": {"fp4": 0.7, "policy": "fisher-per-layer"},
    "90%, per layer": {"fp4": 0.9, "policy": "fisher-per-layer"},
    "70%, no sensitivity": {"fp4": 0.7, "policy": "error"},
    "90%, no sensitivity": {"fp4": 0.9, "policy": "error"},
    "70%, random": {"fp4": 0.7, "policy": "random"},
    "90%, random": {"fp4": 0.9, "policy": "random"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--seq-len", type=int, default=None)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="comma-separated names of the recipes to run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    logging.disable_progress_bar()
    console = Console(stderr=True)

    tokenizer, original = load_tokenizer(args.model), load_model(args.model)
    seq_len = args.seq_len or min(512, context_length(original))
    windows = evaluation_windows(args.data, tokenizer, seq_len)
    chosen = {"samples": args.samples, "seq_len": seq_len, "seed": args.seed}
    if args.calib == args.data:
        half = len(windows) // 2
        text = choose_windows(windows[:half].flatten(), **chosen, source=args.calib)
        windows = windows[half:]
    else:
        text = calibration_text(args.calib, tokenizer, **chosen)
    windows = windows[: args.windows]
    wanted = args.only.split(",") if args.only else list(RECIPES)
    models, clip = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in wanted:
            console.rule(name)
            models[name] = quantize(
                load_model(args.model),
                text.samples,
                Recipe(
                    samples=args.samples, seq_len=seq_len, seed=args.seed, **PAPER, **RECIPES[name]
                ),
                held_out=text.held_out,
                state=Path(folder) / "calibration.safetensors",
                progress=bars(console),
            )
            clip[name] = config_of(models[name]).result["clip"]
    some = models[wanted[0]]
    ends = {
        "fp8": uniform(load_model(args.model), some, "fp8", 0.0),
        "nvfp4": uniform(load_model(args.model), some, "nvfp4", 1.0),
    }
    rows = compare(original, {**ends, **models}, windows, bars(console))
    header, *lines = table(rows)
    for line in (header, ["---"] * len(header), *lines):
        print("| " + " | ".join(line) + " |")
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "evaluation_tokens": windows.shape[0] * (windows.shape[1] - 1),
        "seq_len": seq_len,
        "seed": args.seed,
        "torch": torch.__version__,
        "clip": clip,
        "rows": [row.to_dict() for row in rows],
    }
    print(
        f"\n{facts['calibration_sequences']} calibration sequences of {seq_len} tokens, "
        f"{facts['evaluation_tokens']:,} evaluation tokens, seed {args.seed}"
    )
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
