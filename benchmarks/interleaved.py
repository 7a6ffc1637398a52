"""What the CPU benchmarks share: cases that take turns, cold operands, what machine it was.

Machines are noisy and remember what ran last. So every repetition calls all cases once, in an
order drawn anew, each on the next of several copies of its operands that together exceed the
caches; a case's figure is the median of its repetitions.
"""

import datetime
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fgmp.formats.spec import BLOCK, FP8_BLOCK, SCALE_MAX_CODE
from fgmp.pack.planes import PackedWeight

Case = Callable[[int], object]
"""Called with the number of the repetition."""

COLD_BYTES = 160 << 20
"""Copies of an operand are as many as this has room for: several times the last cache."""


def medians(cases: dict[str, Case], repeats: int) -> dict[str, float]:
    """Seconds of each case; one round more is run before and not counted."""
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
    """How many copies of an operand of ``nbytes`` are cold when taken in turn."""
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


def reading(nbytes: int) -> Case:
    """Add up ``nbytes`` of fp32 numbers that no cache holds: what reading costs at least."""
    buffers = [torch.ones(nbytes // 4) for _ in range(copies(nbytes))]
    return lambda turn: buffers[turn % len(buffers)].sum()


def machine() -> dict[str, Any]:
    """The processor, the versions, the day."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
