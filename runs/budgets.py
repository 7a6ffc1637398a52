"""Results of several budgets on one calibration.

    python runs/budgets.py MODEL --calib TEXT [--samples 32] [--seq-len 128] BUDGET=VALUE ...

A budget is one of the recipe's, its value as on the command line of ``fgmp quantize``:
``bits=5.4``, ``max_bytes=700k``, ``max_energy=80%``, ``max_increase=2%``. Prints JSON: for each
budget, the results that the checkpoint would store.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from provenance import provenance
from rich.console import Console
from transformers.utils import logging

from fgmp import Recipe, calibration_text, quantize
from fgmp.data import CalibrationText
from fgmp.errors import FGMPError, InputError
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.progress import bars
from fgmp.recipe import BUDGETS


def recipe_of(budget: str) -> Recipe:
    """Recipe with a budget, given as ``name=value``.

    Raises:
        InputError: no such budget, or a value out of range.
    """
    name, _, value = budget.partition("=")
    if name not in BUDGETS:
        raise InputError(f"a budget is one of {', '.join(BUDGETS)}, got {name!r}")
    return Recipe().with_options({name: yaml.safe_load(value)})


def results(model: str, text: CalibrationText, recipes: dict[str, Recipe]) -> list[dict[str, Any]]:
    """Quantize by each recipe; one calibration serves all."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for budget, recipe in recipes.items():
            quantized = quantize(
                load_model(model),
                text.samples,
                recipe,
                held_out=text.held_out,
                calibration=Path(folder) / "calibration.safetensors",
                progress=bars(Console(stderr=True)),
            )
            rows.append({"budget": budget, "result": config_of(quantized).result})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("budgets", nargs="+", metavar="BUDGET=VALUE")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=128)
    args = parser.parse_args()
    try:
        recipes = {budget: recipe_of(budget) for budget in args.budgets}
    except InputError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    text = calibration_text(
        args.calib,
        load_tokenizer(args.model),
        samples=args.samples,
        seq_len=args.seq_len,
        seed=0,
        bos=False,
    )
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "held_out_sequences": len(text.held_out),
        "seq_len": args.seq_len,
        **provenance(),
        "rows": results(args.model, text, recipes),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
