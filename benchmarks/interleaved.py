"""Shared by the CPU benchmarks: cases in turn, cold operands, facts about the machine.

Timings are noisy and depend on what ran last. So every repetition calls all cases once, in random
order, each on the next of several copies of its operands; the copies together exceed the caches. A
case's figure is the median of its repetitions.
"""

import datetime
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fgmp.formats.activation import Site, multiplier, quantize
from fgmp.formats.spec import BLOCK, FP8_BLOCK, SCALE_MAX_CODE
from fgmp.kernels.cpu.library import kernels
from fgmp.pack.planes import PackedWeight

Case = Callable[[int], object]
"""Called with the number of the repetition."""

COLD_BYTES = 160 << 20
"""Total size of the copies of an operand: several times the last-level cache."""


def medians(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Median seconds of each case; a first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    generator = random.Random(0)
    for turn in range(repeats + 1):
        for name in generator.sample(list(cases), len(cases)):
            start = time.perf_counter()
            cases[name](turn)
            elapsed = time.perf_counter() - start
            if turn:
                seconds[name].append(elapsed)
    return {name: statistics.median(values) for name, values in seconds.items()}


def copies(nbytes: int) -> int:
    """Number of copies of an operand of ``nbytes`` that are cold when used in turn."""
    return max(3, -(-COLD_BYTES // nbytes))


def random_weight(n: int, k: int, share: float, seed: int) -> PackedWeight:
    """Planes of random codes, each block FP8 with probability ``share``."""
    g = torch.Generator().manual_seed(seed)
    groups = -(-k // BLOCK)
    low = torch.randint(256, (n, groups * BLOCK // 2), dtype=torch.uint8, generator=g)
    scale = torch.randint(1, SCALE_MAX_CODE + 1, (n, groups), dtype=torch.uint8, generator=g)
    common = {"shape": torch.tensor([n, k]), "t": torch.tensor(2.0**-20)}
    if share == 0:
        return PackedWeight(low=low, scale=scale, **common)
    is_fp8 = torch.rand(n, groups, generator=g) < share
    row_ptr = torch.zeros(n + 1, dtype=torch.int32)
    row_ptr[1:] = is_fp8.sum(1).cumsum(0)
    # Exponents below 8, so that no code is NaN.
    shape = (int(row_ptr[-1]), BLOCK // 2)
    overflow = torch.randint(256, shape, dtype=torch.uint8, generator=g) & 0x77
    scale[is_fp8] = FP8_BLOCK
    return PackedWeight(low=low, scale=scale, overflow=overflow, row_ptr=row_ptr, **common)


def site(x: torch.Tensor, rule: str, scales: str) -> Site:
    """Constants of a site under which 30% of the blocks of ``x`` are FP8."""
    g = torch.Generator().manual_seed(1)
    sensitivity = torch.randint(1, 0x7F, (x.shape[1],), dtype=torch.uint8, generator=g)
    constants = Site(multiplier(x.abs().max().item()), sensitivity, 1.0, 0, rule, scales)
    scores = quantize(x[:8], constants).score.flatten().sort().values
    return replace(constants, threshold=int(scores[len(scores) * 7 // 10]))


def reading(nbytes: int) -> Case:
    """Case that sums ``nbytes`` of cold fp32 numbers: a lower bound of reading them."""
    buffers = [torch.ones(nbytes // 4) for _ in range(copies(nbytes))]
    return lambda turn: buffers[turn % len(buffers)].sum()


def revision() -> str:
    """Git revision of this tree, with ``+`` if it has changes; "unknown" outside a checkout."""

    def git(*command: str) -> str:
        call = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + "+" * bool(changed)


def machine() -> dict[str, Any]:
    """Processor, instruction sets of PyTorch and of the kernels, revision, version and date."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    compiled = kernels()
    return {
        "processor": model or platform.processor() or platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "kernels": compiled.instruction_set if compiled else None,
        "revision": revision(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
