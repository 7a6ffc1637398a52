"""Tokens per second of a Llama with random weights: packed against Transformers, bf16 and fp32.

    python benchmarks/generate.py [--json] [--layers L] [--hidden H] [--ffn F] [--fp8 SHARE]
                                  [--tokens T] [--repeats R] [--save DIR]

The default is TinyLlama's shape, 1.1 billion parameters, 0.97 of them in packed linears. All
models decode greedily from the same prompt with a KV cache, in turn. The dtype of a packed model is
that of its head, embedding, norms and attention. ``model_bytes`` is the size of a model's tensors.
``over_unquantized`` compares with the faster of the two unquantized models. With --save, the packed
model is written as a checkpoint and nothing is timed: a large one for benchmarks/memory.py.
"""

import argparse
import json
import statistics
import time
from typing import Any

import torch
from interleaved import machine, random_weight
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fgmp.formats.activation import Site, multiplier
from fgmp.model.convert import install
from fgmp.model.precision import run_in
from fgmp.model.select import quantizable
from fgmp.model.store import CONFIG_ATTRIBUTE, save
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig

UNQUANTIZED = ("bf16", "fp32")

SITES = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""Linears of a Llama layer that read the same activation."""

QUANTIZER = ("difference", "max")
"""Rule and scales of the activation quantizer: the paper's."""


def original(args: argparse.Namespace) -> LlamaForCausalLM:
    """Llama with random weights, bf16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 512),
        max_position_embeddings=2048,
    )
    model: LlamaForCausalLM = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.eval()


def pack(model: LlamaForCausalLM, share: float) -> None:
    """Replace the linears of the layers by random planes, in place.

    Args:
        model: the Llama.
        share: probability of an FP8 block.
    """
    linears = quantizable(model)
    groups: dict[str, list[str]] = {}
    for name in linears:
        parent, _, leaf = name.rpartition(".")
        site = next(members for members in SITES if leaf in members)
        groups.setdefault(f"{parent}.{site[0]}", []).append(name)
    weights = {
        name: random_weight(linear.out_features, linear.in_features, share, seed)
        for seed, (name, linear) in enumerate(linears.items())
    }
    records = {}
    for owner in groups:
        k = linears[owner].in_features
        sensitivity = torch.full((k,), 0x38, dtype=torch.uint8)
        records[owner] = Site(multiplier(8.0), sensitivity, 1.0, 2**44, *QUANTIZER)
    install(model, weights, records, groups)
    rule, scales = QUANTIZER
    sites = {owner: SiteConfig(names, rule, 0.5, scales) for owner, names in groups.items()}
    setattr(model, CONFIG_ATTRIBUTE, CheckpointConfig(sites=sites))


def model_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def decode(model: LlamaForCausalLM, tokens: int) -> float:
    """Decode and return tokens per second after the prompt."""
    prompt = torch.arange(1, 17)[None]
    with torch.no_grad():
        first = model(prompt, use_cache=True)
        cache, token = first.past_key_values, first.logits[:, -1:].argmax(-1)
        start = time.perf_counter()
        for _ in range(tokens):
            out = model(token, past_key_values=cache, use_cache=True)
            cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
        return tokens / (time.perf_counter() - start)


def measure(models: dict[str, LlamaForCausalLM], tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Let models decode in turn; medians over the repeats, also of ratios within a turn."""
    for model in models.values():
        decode(model, 2)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            rates[name].append(decode(model, tokens))
    medians = {name: statistics.median(rates[name]) for name in models}
    peer = max(UNQUANTIZED, key=medians.__getitem__)
    return [
        {
            "name": name,
            "tokens_per_second": medians[name],
            "over_unquantized": statistics.median(
                a / b for a, b in zip(rates[name], rates[peer], strict=True)
            ),
            "model_bytes": model_bytes(model),
        }
        for name, model in models.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--fp8", type=float, default=0.1)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--save")
    args = parser.parse_args()

    packed = original(args)
    pack(packed, args.fp8)
    if args.save:
        save(packed, args.save)
        return
    wide = original(args)
    pack(wide, args.fp8)
    models = {
        "packed bf16": packed,
        "packed fp32": run_in(wide, "float32"),
        "bf16": original(args),
        "fp32": original(args).float(),
    }
    rows = measure(models, args.tokens, args.repeats)
    facts = {
        **machine(),
        "layers": args.layers,
        "hidden": args.hidden,
        "ffn": args.ffn,
        "fp8_share": args.fp8,
        "threads": torch.get_num_threads(),
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:<12} {row['tokens_per_second']:6.2f} tokens/s"
            f" {row['over_unquantized']:5.2f} x unquantized  {row['model_bytes'] / 1e6:6.0f} MB"
        )


if __name__ == "__main__":
    main()
