"""What a model comes to under several budgets, of one calibration.

    python runs/budgets.py MODEL --calib TEXT [--samples 32] [--seq-len 128] BUDGET=VALUE ...

A budget is one of the recipe's, its value as on the command line of ``fgmp quantize``:
``bits=5.4``, ``max_bytes=700k``, ``max_energy=80%``, ``max_increase=2%``. Prints JSON: for each
what the checkpoint would say of its result.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import yaml
from provenance import provenance
from rich.console import Console
from transformers.utils import logging

from fgmp import Recipe, calibration_text, quantize
from fgmp.errors import FGMPError
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.progress import bars
from fgmp.recipe import BUDGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("budgets", nargs="+", metavar="BUDGET=VALUE")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    recipes = {}
    for given in args.budgets:
        name, _, value = given.partition("=")
        if name not in BUDGETS:
            parser.error(f"a budget is one of {', '.join(BUDGETS)}, got {name!r}")
        recipes[given] = Recipe().with_options({name: yaml.safe_load(value)})
    logging.disable_progress_bar()
    text = calibration_text(
        args.calib, load_tokenizer(args.model), samples=args.samples, seq_len=args.seq_len, seed=0
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for given, recipe in recipes.items():
            model = quantize(
                load_model(args.model),
                text.samples,
                recipe,
                held_out=text.held_out,
                state=Path(folder) / "calibration.safetensors",
                progress=bars(Console(stderr=True)),
            )
            rows.append({"budget": given, "result": config_of(model).result})
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "held_out_sequences": len(text.held_out),
        "seq_len": args.seq_len,
        **provenance(),
        "rows": rows,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
