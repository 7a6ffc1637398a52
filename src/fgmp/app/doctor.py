"""What this machine can do: ``fgmp doctor``."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch
from torch import nn

from fgmp.app.records import Diagnosis, PassSpeed
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.kernels.cpu import library
from fgmp.model.precision import compute_dtype
from fgmp.pack.planes import pack

_PACKAGES = ("torch", "transformers", "safetensors", "triton", "vllm", "lm_eval", "datasets")
_WIDTH = 2048
"""Rows and columns of the matrices that are multiplied."""
_TOKENS = {"one token": 1, "64 tokens": 64}
_REPEATS = 5


def diagnose() -> Diagnosis:
    """Look at the machine, and measure its matrix products for about two seconds."""
    kernels = library.kernels()
    memory = psutil.virtual_memory()
    versions = {name: _version(name) for name in _PACKAGES}
    return Diagnosis(
        versions={"fgmp": version("fgmp"), "python": platform.python_version(), **versions},
        processor=_processor(),
        threads=torch.get_num_threads(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        torch_instruction_set=torch.backends.cpu.get_cpu_capability(),
        kernel_instruction_set=kernels.instruction_set if kernels else None,
        gpus=[torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        memory_bytes=memory.total,
        memory_free_bytes=memory.available,
        bfloat16_runs_in=_name(compute_dtype(torch.bfloat16, torch.device("cpu"))),
        products=[_measure(name, tokens) for name, tokens in _TOKENS.items()],
        advice=_advice(kernels is not None, versions),
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def _measure(name: str, tokens: int) -> PassSpeed:
    """Medians of products of random tokens and one weight, in turn."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator)
    x = torch.randn(tokens, _WIDTH, generator=generator)
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    packed = pack(codes, torch.rand(codes.scale.shape, generator=generator) < 0.1)
    planes = [getattr(packed, plane) for plane in PLANES]
    units, r = (x.sign() * 6).bfloat16(), torch.tensor(1.0)
    narrow, narrow_weight = x.bfloat16(), weight.bfloat16()
    cases: dict[str, Callable[[], object]] = {
        "float32": lambda: nn.functional.linear(x, weight),
        "bfloat16": lambda: nn.functional.linear(narrow, narrow_weight),
        "packed": lambda: ops.packed_linear(units, *planes, r, packed.t, None, torch.float32),
    }
    seconds: dict[str, list[float]] = {case: [] for case in cases}
    for _ in range(_REPEATS):
        for case, run in cases.items():
            started = time.perf_counter()
            run()
            seconds[case].append(time.perf_counter() - started)
    return PassSpeed(name, **{case: statistics.median(s) * 1e3 for case, s in seconds.items()})


def _advice(compiled: bool, versions: dict[str, str | None]) -> list[str]:
    """What is missing, and how to get it."""
    advice = []
    if not compiled:
        advice.append(
            "the C++ kernels are not compiled, so packed models run slowly: install a C++ "
            "compiler (g++ or clang++), then pip install --force-reinstall --no-deps fgmp"
        )
    if torch.cuda.is_available() and find_spec("triton") is None:
        advice.append("Triton is missing, so packed models run slowly on the GPU: install triton")
    if versions["datasets"] is None:
        advice.append("for texts named as Hugging Face datasets: pip install 'fgmp[datasets]'")
    if os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE":
        advice.append(
            "OMP_WAIT_POLICY=ACTIVE makes waiting threads spin, which is slow beside other "
            "processes: unset it"
        )
    return advice
