"""How well other estimates of the weights' sensitivity rank blocks.

    python runs/sensitivity.py MODEL --calib TEXT [--samples 128] [--seq-len 256] [--cache DIR]
    python runs/sensitivity.py --memory

The first command prints JSON. For each estimate of ``runs/estimates.py`` it gives the Spearman rank
correlation of its block scores with those of the exact F_w, over all blocks and as the median over
linears, and the ratio of the sums of scores. ``exact, half of the text`` says how far F_w agrees
with itself. What an estimate does to accuracy, rows of ``runs/accuracy.py`` say.

The second command prints what calibrating a Llama of 70B parameters holds, from its shapes alone.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from estimates import ESTIMATES
from provenance import provenance
from rich.console import Console
from setting import Setting
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fgmp import Recipe, calibration_text
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import score_weights
from fgmp.errors import FGMPError
from fgmp.model.select import quantizable
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.quantization import memory
from fgmp.quantization.sequential import stage_bytes
from fgmp.sensitivity.squares import SQUARES

Scores = dict[str, Tensor]


def block_scores(weights: Mapping[str, Tensor], fisher: Mapping[str, Tensor]) -> Scores:
    """Scores of all blocks by linear, float64 (N, G), under scales rounded to nearest.

    Such scales do not depend on F_w, so scores differ by F_w alone.
    """
    groups = [[name] for name in weights]
    rule = Recipe().rule
    scored = score_weights(weights, fisher, groups, POLICIES["fisher"], rule=rule, clipped=False)
    return scored.scores


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman rank correlation; equal values share the mean of their ranks."""
    ranked = torch.stack([mean_ranks(a.flatten()), mean_ranks(b.flatten())])
    return torch.corrcoef(ranked)[0, 1].item()


def mean_ranks(values: Tensor) -> Tensor:
    """Ranks from 1, float64 (n,); equal values share the mean of theirs."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def agreement(exact: Scores, other: Scores) -> dict[str, float]:
    """How far two sets of block scores agree."""
    all_exact, all_other = (
        torch.cat([s.flatten() for s in scores.values()]) for scores in (exact, other)
    )
    by_linear = torch.tensor([spearman(exact[name], other[name]) for name in exact])
    return {
        "spearman": spearman(all_exact, all_other),
        "spearman_by_linear_median": by_linear.median().item(),
        "sum_over_exact": (all_other.sum() / all_exact.sum()).item(),
    }


def correlations(setting: Setting) -> dict[str, dict[str, float]]:
    """Agreement of every estimate with the exact F_w."""
    weights = {name: linear.weight.detach() for name, linear in setting.linearized()[1].items()}
    exact = block_scores(weights, setting.calibrated().weights)
    half = replace(
        setting,
        text=replace(setting.text, samples=setting.text.samples[::2]),
        stem=setting.stem.with_name(f"{setting.stem.name}-half"),
    )
    half_scores = block_scores(weights, half.calibrated().weights)
    agreements = {"exact, half of the text": agreement(exact, half_scores)}
    for label, estimate in ESTIMATES.items():
        scores = block_scores(weights, estimate(setting).weights)
        agreements[label] = agreement(exact, scores)
    return agreements


def memory_of_70b() -> dict[str, float]:
    """Gigabytes for calibrating a Llama of 70B parameters, in addition to the model."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = quantizable(model)
    parts = {f"fisher, {kind}": memory.fisher_bytes(linears, kind) for kind in SQUARES}
    parts["moments and factors of a stage, if compensated"] = stage_bytes(model, linears)
    parameters = sum(linear.weight.numel() for linear in linears.values())
    return {
        "quantized_parameters_billions": parameters / 1e9,
        **{f"{name}_gb": size / 1e9 for name, size in parts.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calib")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory_of_70b(), indent=1))
        return
    if not args.model or not args.calib:
        parser.error("a model and --calib, or --memory")
    args.cache.mkdir(parents=True, exist_ok=True)
    seq_len = args.seq_len or min(512, context_length(load_model(args.model)))
    text = calibration_text(
        args.calib,
        load_tokenizer(args.model),
        samples=args.samples,
        seq_len=seq_len,
        seed=0,
        bos=False,
    )
    stem = args.cache / f"{text.fingerprint[:8]}-{Path(args.model).name}-sensitivity"
    setting = Setting(args.model, text, seq_len, 0, stem, Console(stderr=True))
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "seq_len": seq_len,
        **provenance(),
        "estimates": correlations(setting),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
