"""The plugin in vLLM: greedy tokens are those of ``fgmp generate`` in fp32.

Run in vLLM's own environment (docs/serving.md): ``pytest -m vllm tests/serving``. Every case starts
vLLM, which takes about half a minute on idle cores.

Prompts' log-probabilities agree within fp32 rounding; vLLM and Transformers differ by 5e-6 on the
original model. Tokens that follow must be equal for the demonstration model on text. A model of
random weights is less certain of its next token, and rounding now and then moves an activation to
another code, or a token to another expert. So one prompt of five may go another way.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import fgmp
from fgmp.model.precision import run_in
from fgmp.serving.source import Source

from .checkpoints import CONTEXT, FAMILIES, RECIPES, write_random, write_trained

pytestmark = pytest.mark.vllm

TOKENS = 32
ROUNDING = 1e-4
"""Median difference of log-probabilities: 20 times what was measured; a wrong code makes 1e-2."""

START_SECONDS = 600
EAGER = {"enforce_eager": True, "dtype": "float32", "max_model_len": CONTEXT}
SERVE = ["--enforce-eager", "--max-model-len", str(CONTEXT), "--dtype", "float32"]


def environment(**settings: str) -> dict[str, str]:
    """Variables of a process that runs vLLM."""
    mine = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    base = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**mine, **base, "VLLM_LOGGING_LEVEL": "WARNING", "HF_HUB_OFFLINE": "1", **settings}


RANDOM = [[5], [40, 41, 42, 43], list(range(60, 100)), [7] * 17, [200, 3, 90, 14, 15, 92, 65]]
TEXT = (
    "Return a new list",
    "The method",
    "If the file does not exist, it is created, or else it is opened for reading. The",
    "Raised when an operation",
    "This function takes a string and",
)


def prompts_of(folder: Path) -> list[list[int]]:
    """Text for the demonstration model, any tokens for random models."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    trained = len(tokenizer) > 300
    return [tokenizer(text).input_ids for text in TEXT] if trained else RANDOM


def expected_tokens(folder: Path) -> list[list[int]]:
    model: Any = run_in(fgmp.load(folder), "float32")
    outputs = []
    for prompt in prompts_of(folder):
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
        with torch.no_grad():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        outputs.append(output[0, len(prompt) :].tolist())
    return outputs


def require_equal(folder: Path, tokens: list[list[int]], *, different: int = 0) -> None:
    """Check greedy tokens; those of at most ``different`` prompts may go another way."""
    pairs = list(zip(tokens, expected_tokens(folder), strict=True))
    others = [pair for pair in pairs if pair[0] != pair[1]]
    assert len(others) <= different, others


def require_close(folder: Path, log_probabilities: list[list[float]]) -> None:
    """Check the log-probabilities of the prompts' own tokens."""
    model: Any = run_in(fgmp.load(folder), "float32")
    differences = []
    for prompt, values in zip(prompts_of(folder), log_probabilities, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt])).logits[0, :-1]
        following = torch.tensor(prompt[1:], dtype=torch.int64)  # none, for a prompt of one token
        expected = logits.log_softmax(-1)[torch.arange(len(following)), following]
        differences.append((expected - torch.tensor(values)).abs())
    assert torch.cat(differences).median() < ROUNDING


def offline(folder: Path, options: dict[str, Any], **settings: str) -> list[list[int]]:
    """Tokens by ``LLM(folder)``, whose log-probabilities are checked."""
    script = [sys.executable, str(Path(__file__).with_name("offline.py")), str(folder)]
    arguments = [json.dumps(options), json.dumps(prompts_of(folder)), str(TOKENS)]
    done = subprocess.run(
        [*script, *arguments],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=START_SECONDS,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stdout + done.stderr
    result = json.loads(lines[0].removeprefix("RESULT "))
    require_close(folder, result["log_probabilities"])
    tokens: list[list[int]] = result["tokens"]
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    folder = write_random(tmp_path / "out", family)
    require_equal(folder, offline(folder, EAGER), different=1)


def test_joined_layers_of_several_modes(tmp_path: Path) -> None:
    folder = write_trained(tmp_path / "out", RECIPES["nearly-fp4"])
    reader = Source(folder).reader
    attention = (f"model.layers.{layer}.self_attn" for layer in range(4))
    modes = [{reader.packed(f"{name}.{part}_proj").mode for part in "qkv"} for name in attention]
    assert {"fp4", "mixed"} in modes
    require_equal(folder, offline(folder, EAGER))


def test_a_quantized_output_head(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "out", "llama", RECIPES["head"])
    require_equal(folder, offline(folder, EAGER), different=1)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_two_ranks(tmp_path: Path, family: str) -> None:
    """The only KV head of this Llama is replicated."""
    folder = write_random(tmp_path / "out", family)
    options = {**EAGER, "tensor_parallel_size": 2}
    tokens = offline(folder, options, VLLM_CPU_OMP_THREADS_BIND="0|1")
    require_equal(folder, tokens, different=1)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compiled(tmp_path: Path, family: str) -> None:
    folder = write_random(tmp_path / "out", family)
    cache = str(tmp_path / "cache")
    tokens = offline(folder, {**EAGER, "enforce_eager": False}, VLLM_CACHE_ROOT=cache)
    require_equal(folder, tokens, different=1)


def test_chunked_prefill_and_prefix_caching(tmp_path: Path) -> None:
    folder = write_trained(tmp_path / "out", RECIPES["mixed"])
    chunks = {"max_num_batched_tokens": 16, "max_num_seqs": 4, "enable_chunked_prefill": True}
    tokens = offline(folder, {**EAGER, **chunks, "enable_prefix_caching": True})
    require_equal(folder, tokens)


# --- over HTTP -----------------------------------------------------------------------------------


@contextmanager
def served(folder: Path, *options: str) -> Iterator[str]:
    """Address of a server that ``fgmp serve`` started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "fgmp", "serve", str(folder), "--port", str(port), *options]
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(START_SECONDS):
            time.sleep(1)
            assert process.poll() is None, f"ended with {process.returncode}"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                continue
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def post(address: str, folder: Path, prompt: list[int], **options: Any) -> bytes:
    body = {"model": str(folder), "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{address}/v1/completions",
        json.dumps({**body, "return_token_ids": True, **options}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        answer: bytes = response.read()
    return answer


def completion(address: str, folder: Path, prompt: list[int]) -> list[int]:
    tokens: list[int] = json.loads(post(address, folder, prompt))["choices"][0]["token_ids"]
    return tokens


@pytest.mark.parametrize("recipe", ["mixed", "fp4", "fp8"])
def test_over_http(tmp_path: Path, recipe: str) -> None:
    folder = write_trained(tmp_path / "out", RECIPES[recipe])
    with served(folder, *SERVE) as address:
        require_equal(folder, [completion(address, folder, p) for p in prompts_of(folder)])
        if recipe == "mixed":
            check_concurrency_and_stream(address, folder)


def check_concurrency_and_stream(address: str, folder: Path) -> None:
    """Sixteen requests at once, and one answer token by token, are the same."""
    expected = expected_tokens(folder)
    prompts = (prompts_of(folder) * 4)[:16]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda prompt: completion(address, folder, prompt), prompts))
    assert answers == (expected * 4)[:16]
    lines = post(address, folder, prompts[1], stream=True).decode().split("\n\n")
    events = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    streamed = [token for event in events for token in event["choices"][0]["token_ids"] or []]
    assert len(events) > TOKENS // 2 and streamed == expected[1]


def test_a_mixture_over_http(tmp_path: Path) -> None:
    folder = write_random(tmp_path / "out", "qwen3_moe")
    with served(folder, *SERVE) as address:
        require_equal(
            folder, [completion(address, folder, p) for p in prompts_of(folder)], different=1
        )


# --- refusals ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("vllm") / "out", "llama")


def test_a_bad_checkpoint_ends_the_server_with_one_sentence(folder: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(folder, tmp_path / "bad"))
    weights = bad / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    command = [sys.executable, "-m", "fgmp", "serve", str(bad)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and "its bytes must have CRC-32" in lines[0], done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "not served with LoRA adapters"),
        ({"tensor_parallel_size": 2}, "must be a multiple of 16, got 40"),
    ],
)
def test_refusals(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    sizes = {"intermediate_size": 80}
    folder = write_random(tmp_path / "out", "llama", changes=sizes)
    with pytest.raises(AssertionError, match=message):
        offline(folder, {**EAGER, **options}, VLLM_CPU_OMP_THREADS_BIND="nobind")


def test_a_newer_format_is_refused_by_vllm(folder: Path, tmp_path: Path) -> None:
    newer = Path(shutil.copytree(folder, tmp_path / "newer"))
    config = json.loads((newer / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(AssertionError, match="format_version must be 1, got 2"):
        offline(newer, EAGER)
