"""Squared distance of compensated rows from the unrounded optimum, over that of round to nearest.

    python runs/compensation.py MODEL --calib TEXT [--fp4 1.0] [--samples 128] [--json]
    python runs/compensation.py --encoder [--samples 256] [--json]

The squared distance of a row is the quadratic form that compensation minimizes
(``assign.compensate``). The model is quantized by the default recipe, and its rows are compared
without the limit by which some fall back to round to nearest (``assign.compensate.LIMIT``). Prints
quantiles of the ratio over all rows, the number of rows beyond the limit, and the largest ratio
with its weight's shape. ``--encoder`` takes the sentence encoder of ``runs/encoder.py``.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import encoder
import torch
from provenance import provenance
from rich.console import Console
from torch import Tensor, nn

from fgmp import Recipe, calibration_text, quantize
from fgmp.assign.compensate import LIMIT, Factors, ScaleSearch, compensated, distances
from fgmp.assign.methods import Methods
from fgmp.assign.scale_search import search_scale_codes
from fgmp.errors import FGMPError
from fgmp.formats.weight import WeightCodes, nearest_scale_codes, quantize_weight
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.progress import bars

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)


@dataclass
class Recorder:
    """Compensates like the default method, and records ratios of rows; a ``Methods.compensate``.

    Attributes:
        ratios: of the rows of each weight, float64 (N,), in order of compensation.
        shapes: of these weights.
    """

    ratios: list[Tensor] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)

    def __call__(
        self,
        weight: Tensor,
        factors: Factors,
        is_fp8: Tensor,
        t: float,
        sensitivity: Tensor | None,
        search: ScaleSearch = search_scale_codes,
    ) -> WeightCodes:
        arguments = (weight, factors, is_fp8, t, sensitivity, search)
        nearest = quantize_weight(weight, t, nearest_scale_codes(weight, t))
        ours, theirs = (
            distances(codes.units(is_fp8) * t, weight, factors)
            for codes in (compensated(*arguments, limit=float("inf")), nearest)
        )
        self.ratios.append((ours / theirs).cpu())
        self.shapes.append(tuple(weight.shape))
        return compensated(*arguments)


def summary(recorder: Recorder) -> dict[str, Any]:
    """Quantiles of all ratios, rows beyond the limit, and the largest ratio.

    Rows that rounding leaves as they are have no ratio and do not count.
    """
    by_weight = [ratios[ratios.isfinite()] for ratios in recorder.ratios]
    largest = [ratios.max().item() if len(ratios) else 0.0 for ratios in by_weight]
    ratios = torch.cat(by_weight)
    levels = torch.tensor(QUANTILES, dtype=ratios.dtype)
    return {
        "rows": len(ratios),
        "quantiles": dict(zip(QUANTILES, ratios.quantile(levels).tolist(), strict=True)),
        "limit": LIMIT,
        "beyond_limit": int((ratios > LIMIT).sum()),
        "largest": max(largest),
        "largest_within_limit": ratios[ratios <= LIMIT].max().item(),
        "shape_of_largest": list(recorder.shapes[largest.index(max(largest))]),
    }


def causal_lm(args: argparse.Namespace) -> Callable[..., nn.Module]:
    """``quantize`` of a language model; takes ``methods``."""
    model = load_model(args.model)
    seq_len = min(args.seq_len, context_length(model))
    text = calibration_text(
        args.calib,
        load_tokenizer(args.model),
        samples=args.samples,
        seq_len=seq_len,
        seed=0,
        bos=False,
    )
    recipe = Recipe(fp4=args.fp4, clip="on")
    return partial(quantize, model, text.samples, recipe, held_out=text.held_out)


def sentence_encoder(args: argparse.Namespace) -> Callable[..., nn.Module]:
    """``quantize`` of the encoder on the first calibration of ``runs/encoder.py``."""
    model, tokenizer = encoder.load()
    _, lines = encoder.split_lines(encoder.sentences(), 512, 1, args.samples)
    samples: Sequence[dict[str, Tensor]] = [
        dict(tokenizer(line, return_tensors="pt", truncation=True)) for line in lines
    ]
    recipe = Recipe(fp4=args.fp4, clip="on")
    return partial(quantize, model, samples, recipe, loss=encoder.projection_loss)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("model", nargs="?")
    which.add_argument("--encoder", action="store_true")
    parser.add_argument("--calib")
    parser.add_argument("--fp4", type=float, default=1.0, help="fraction of FP4 blocks")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.model and not args.calib:
        parser.error("a model needs --calib")
    recorder = Recorder()
    run = sentence_encoder(args) if args.encoder else causal_lm(args)
    run(methods=Methods(compensate=recorder), progress=bars(Console(stderr=True)))
    facts = {
        "model": encoder.NAME if args.encoder else Path(args.model).name,
        "calibration_sequences": args.samples,
        "fp4": args.fp4,
        **provenance(),
        **summary(recorder),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for name in ("rows", "quantiles", "limit", "beyond_limit", "largest", "shape_of_largest"):
        print(f"{name.replace('_', ' '):<20} {facts[name]}")


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
