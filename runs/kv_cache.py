"""Quality and size of a packed KV cache.

    python runs/kv_cache.py MODEL --calib TEXT --data TEXT [--windows N] [--seeds 3] [--json]

The model's own weights and activations stay as they are (MODEL may also be an fgmp checkpoint).
Every token attends to packed keys and values, its own included. KL is the mean token KL, in nats,
from the same model with a cache in its own precision. The *gap* is the KL of all-NVFP4 less that of
all-FP8.

Values are means over ``--seeds`` calibrations. The 95% interval is a bootstrap over windows and
calibrations, paired across rows. Bytes are those of the planes that the cache holds, over the
tokens of the evaluation. If both texts are the same file, the cache is calibrated on windows of its
first half and evaluated on its second.
"""

import argparse
import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bootstrap import harms
from provenance import provenance
from rich.console import Console
from torch import Tensor, nn

from fgmp import evaluation_windows
from fgmp.data import choose_windows
from fgmp.errors import FGMPError
from fgmp.evaluation.perplexity import (
    batches,
    divergence_of,
    loss_of,
    next_token_log_probabilities,
)
from fgmp.formats.spec import BLOCK
from fgmp.model.cache import PackedCache, packed_cache
from fgmp.model.source import context_length, load_model, load_tokenizer

ROWS = {
    "fp8": ("fp8", 0.0),
    "nvfp4": ("nvfp4", 1.0),
    "mixed 70%": ("mixed", 0.7),
    "mixed 90%": ("mixed", 0.9),
}
"""Mode of the cache and fraction of FP4 blocks, by row."""


@dataclass(frozen=True)
class Measured:
    """One cache on the evaluation windows.

    Attributes:
        loss, kl: sums over each window in nats, float64 (B,).
        fp4: fraction of FP4 blocks.
        bytes_per_token, bits_per_value: of the planes that the cache held.
    """

    loss: Tensor
    kl: Tensor
    fp4: float
    bytes_per_token: float
    bits_per_value: float


def measure(
    model: nn.Module, cache: PackedCache, reference: list[Tensor], windows: Tensor
) -> Measured:
    """Measure a cache on windows, int64 (B, L).

    Args:
        model: whose keys and values are cached.
        cache: emptied before each batch.
        reference: log-probabilities with an unpacked cache, fp32 (b, L - 1, V), by batch.
        windows: evaluation windows.
    """
    stored = fp8_blocks = 0.0
    losses, divergences = [], []
    for batch, original in zip(batches(windows), reference, strict=True):
        log_probabilities = next_token_log_probabilities(model, batch, cache)
        losses.append(loss_of(log_probabilities, batch))
        divergences.append(divergence_of(log_probabilities, original))
        stored += cache.nbytes
        packed = [p for layer in cache.layers for p in layer.packed]
        fp8_blocks += sum(int(p.is_fp8().sum()) for p in packed)
    values = cache.values_per_token * windows.numel()
    return Measured(
        torch.cat(losses),
        torch.cat(divergences),
        fp4=1 - fp8_blocks * BLOCK / values,
        bytes_per_token=stored / windows.numel(),
        bits_per_value=8 * stored / values,
    )


def rows_of(measured: dict[str, list[Measured]], predictions: int) -> list[dict[str, Any]]:
    """Summarize rows: means over calibrations, and intervals over windows and calibrations.

    Args:
        measured: measurements of each row, one per calibration.
        predictions: predictions in a window.
    """
    kl = harms({name: [m.kl / predictions for m in row] for name, row in measured.items()})
    return [
        {
            "name": name,
            "perplexity": math.exp(torch.stack([m.loss for m in row]).mean() / predictions),
            "kl": kl[name].mean,
            "kl_ci95": kl[name].ci95,
            "kl_gap_recovered_percent": kl[name].recovered_percent,
            "kl_gap_recovered_ci95": kl[name].recovered_ci95,
            "kl_gap_recovered_by_seed": kl[name].recovered_by_seed,
            "fp4": statistics.mean(m.fp4 for m in row),
            "bytes_per_token": statistics.mean(m.bytes_per_token for m in row),
            "bits_per_value": statistics.mean(m.bits_per_value for m in row),
        }
        for name, row in measured.items()
    ]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure every row over all calibrations."""
    console = Console(stderr=True)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model).eval()
    seq_len = min(args.seq_len, context_length(model))
    windows = evaluation_windows(args.data, tokenizer, seq_len, bos=False)
    calibration = evaluation_windows(args.calib, tokenizer, seq_len, bos=False)
    if args.calib == args.data:
        calibration, windows = windows.chunk(2)
    windows = windows[: args.windows]
    reference = [next_token_log_probabilities(model, batch) for batch in batches(windows)]
    losses = [loss_of(r, b) for r, b in zip(reference, batches(windows), strict=True)]
    measured: dict[str, list[Measured]] = {name: [] for name in ROWS}
    for seed in range(args.seeds):
        options = {"samples": args.samples, "seq_len": seq_len, "seed": seed}
        samples = choose_windows(calibration.flatten(), **options, source=args.calib).samples
        for name, (mode, fp4) in ROWS.items():
            console.print(f"{name}, calibration {seed}")
            cache = packed_cache(model, samples, mode, fp4)
            measured[name].append(measure(model, cache, reference, windows))
    predictions = windows.shape[1] - 1
    return {
        "model": Path(args.model).name,
        "calibration_sequences": len(samples),
        "seq_len": seq_len,
        "seeds": args.seeds,
        "evaluation_tokens": len(windows) * predictions,
        **provenance(),
        "perplexity": math.exp(torch.cat(losses).mean() / predictions),
        "bytes_per_token_bf16": cache.values_per_token * torch.bfloat16.itemsize,
        "rows": rows_of(measured, predictions),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--seeds", type=int, default=1, help="calibrations to average over")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    facts = run(args)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(table(facts)))


def table(facts: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, and what it was made with."""
    bf16_bytes = facts["bytes_per_token_bf16"]
    lines = [
        "| cache | perplexity | KL | KL gap recovered | by seed | 95% interval | FP4 "
        "| bytes per token | bits per value |",
        "|---" * 9 + "|",
        f"| bf16 | {facts['perplexity']:.3f} | 0 | - | - | - | - | {bf16_bytes:,} | 16 |",
    ]
    for row in facts["rows"]:
        (low, high), seeds = row["kl_gap_recovered_ci95"], row["kl_gap_recovered_by_seed"]
        lines.append(
            f"| {row['name']} | {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {row['kl_gap_recovered_percent']:.1f}% | {min(seeds):.1f} - {max(seeds):.1f} "
            f"| {low:.1f} - {high:.1f} | {row['fp4']:.1%} "
            f"| {row['bytes_per_token']:,.0f} | {row['bits_per_value']:.2f} |"
        )
    return [
        *lines,
        "",
        f"{facts['calibration_sequences']} calibration sequences of {facts['seq_len']} tokens, "
        f"{facts['evaluation_tokens']:,} evaluation tokens, {facts['seeds']} "
        f"calibration{'s' * (facts['seeds'] > 1)}, torch {facts['torch']}, "
        f"revision {facts['revision']}.",
    ]


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
