"""What a packed KV cache costs in quality and saves in bytes.

    python runs/kv_cache.py MODEL --calib TEXT --data TEXT [--seq-len 256] [--windows 200] [--json]

The model's own weights and activations stay as they are (MODEL may also be an fgmp checkpoint);
every token attends to packed keys and values, its own included. KL is the mean token KL from the
same model with a cache in its own precision, in nats; the *gap* is that of all-NVFP4 less that of
all-FP8. Bytes are those of the planes that the cache holds, over the tokens of the evaluation. If
both texts are the same file, the cache is calibrated on windows of its first half and evaluated on
its second.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from provenance import provenance
from torch import Tensor

from fgmp import evaluation_windows
from fgmp.data import choose_windows
from fgmp.evaluation.perplexity import batches, logits_of, loss_of
from fgmp.formats.spec import BLOCK
from fgmp.model.cache import PackedCache, packed_cache
from fgmp.model.source import context_length, load_model, load_tokenizer

ROWS = {
    "fp8": ("fp8", 0.0),
    "nvfp4": ("nvfp4", 1.0),
    "mixed 70%": ("mixed", 0.7),
    "mixed 90%": ("mixed", 0.9),
}


def measure(
    model: torch.nn.Module, cache: PackedCache, reference: list[Tensor], windows: Tensor
) -> dict[str, float]:
    """Perplexity, KL, bytes and FP4 share on the windows."""
    loss = kl = stored = wide = 0.0
    for batch, wanted in zip(batches(windows), reference, strict=True):
        own = logits_of(model, batch, cache)
        loss += loss_of(own, batch).sum().item()
        kl += (wanted.exp() * (wanted - own)).double().sum().item()
        stored += cache.nbytes
        packed = [p for layer in cache.layers for p in layer.packed]
        wide += sum(int(p.is_fp8().sum()) for p in packed)
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    values = cache.values_per_token * windows.numel()
    return {
        "perplexity": math.exp(loss / predictions),
        "kl": kl / predictions,
        "fp4": 1 - wide * BLOCK / values,
        "bytes_per_token": stored / windows.numel(),
        "bits_per_value": 8 * stored / values,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model).eval()
    seq_len = min(args.seq_len, context_length(model))
    windows = evaluation_windows(args.data, tokenizer, seq_len)
    calibration = evaluation_windows(args.calib, tokenizer, seq_len)
    if args.calib == args.data:
        calibration, windows = windows.chunk(2)
    windows = windows[: args.windows]
    samples = choose_windows(
        calibration.flatten(), samples=args.samples, seq_len=seq_len, seed=0, source=args.calib
    ).samples
    reference = [logits_of(model, batch) for batch in batches(windows)]
    losses = [loss_of(r, b) for r, b in zip(reference, batches(windows), strict=True)]
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    rows: list[dict[str, object]] = []
    caches = {name: packed_cache(model, samples, *row) for name, row in ROWS.items()}
    for name, cache in caches.items():
        rows.append({"name": name, **measure(model, cache, reference, windows)})
    fp8, nvfp4 = (row["kl"] for row in rows[:2])
    for row in rows:
        row["kl_gap_recovered_percent"] = 100 * (nvfp4 - row["kl"]) / (nvfp4 - fp8)  # type: ignore[operator]
    facts = {
        "model": Path(args.model).name,
        "calibration_tokens": samples.numel(),
        "seq_len": seq_len,
        "evaluation_tokens": predictions,
        **provenance(),
        "perplexity": math.exp(torch.cat(losses).sum().item() / predictions),
        "bytes_per_token_bf16": caches["fp8"].values_per_token * torch.bfloat16.itemsize,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)


def _print(facts: dict) -> None:
    print("| cache | perplexity | KL | KL gap recovered | FP4 | bytes a token | bits a value |")
    print("|---" * 7 + "|")
    own = facts["bytes_per_token_bf16"]
    print(f"| bf16 | {facts['perplexity']:.3f} | 0 | - | - | {own:,} | 16 |")
    for row in facts["rows"]:
        print(
            f"| {row['name']} | {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {row['kl_gap_recovered_percent']:.1f}% | {row['fp4']:.1%} "
            f"| {row['bytes_per_token']:,.0f} | {row['bits_per_value']:.2f} |"
        )


if __name__ == "__main__":
    main()
