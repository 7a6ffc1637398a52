"""Memory of a process that loads a checkpoint, against the size of its tensors.

    python benchmarks/memory.py CHECKPOINT [--json]

``held_bytes`` is the size of its parameters and buffers. ``loaded_bytes`` is how much the process
grew by loading, ``used_bytes`` by loading and one forward pass, which touches every page. Both are
resident memory by the kernel's count. A tiny model runs first, so that libraries do not count.
"""

import argparse
import gc
import json

import psutil
import torch
from interleaved import machine
from transformers import LlamaConfig, LlamaForCausalLM

import fgmp


def resident() -> int:
    """Resident bytes of this process."""
    gc.collect()
    return psutil.Process().memory_info().rss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    token = torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 64}
        heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads))(token)
        before = resident()
        model = fgmp.load(args.checkpoint)
        loaded = resident() - before
        model(token)
        used = resident() - before
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    facts = {**machine(), "held_bytes": held, "loaded_bytes": loaded, "used_bytes": used}
    if args.json:
        print(json.dumps(facts))
        return
    for name in ("held", "loaded", "used"):
        print(f"{name:<8} {facts[f'{name}_bytes'] / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
