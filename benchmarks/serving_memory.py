"""Resident memory of vLLM's worker that serves a checkpoint, beyond one that serves a tiny model.

    python benchmarks/serving_memory.py CHECKPOINT TINY [--json]

TINY is a checkpoint of a few megabytes: its worker's memory is what libraries and the KV cache
take, and is subtracted. Both run in bf16 on one rank, as the files store what is not quantized.
``file_bytes`` is the size of the checkpoint's tensors. Needs vLLM's environment (docs/serving.md).
"""

import argparse
import json
import os
from pathlib import Path

import psutil
from interleaved import machine

KV_CACHE_BYTES = 64 << 20


def worker_bytes(folder: str) -> int:
    """Resident bytes of the largest process of vLLM after it has answered a request."""
    from vllm import LLM, SamplingParams

    sizes = {"max_model_len": 128, "max_num_batched_tokens": 128, "max_num_seqs": 4}
    options = {"enforce_eager": True, "dtype": "bfloat16", "skip_tokenizer_init": True}
    llm = LLM(folder, kv_cache_memory_bytes=KV_CACHE_BYTES, **sizes, **options)
    sampling = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}], sampling)
    children = psutil.Process().children(recursive=True)
    return max(child.memory_info().rss for child in children)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint")
    parser.add_argument("tiny")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    files = Path(args.checkpoint).glob("*.safetensors")
    facts = {**machine(), "file_bytes": sum(file.stat().st_size for file in files)}
    tiny = worker_bytes(args.tiny)
    facts["served_bytes"] = worker_bytes(args.checkpoint) - tiny
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    file, served = facts["file_bytes"], facts["served_bytes"]
    print(
        f"file    {file / 1e6:8.1f} MB\nserved  {served / 1e6:8.1f} MB  ({served / file - 1:+.1%})"
    )


if __name__ == "__main__":
    main()
