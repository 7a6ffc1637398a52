"""Predicted and measured peak memory of a run.

The peak is the memory that the process already holds (the model) plus the largest of three:

    calibration   accumulators of F_w, saved tensors, and logits
    packing       accumulators of F_w, moments and factors of compensation, block scores, packed
                  tensors, and the temporaries of scoring the largest weight
    checking      (on held-out text) packed tensors and logits; with tuning also its state and saved
                  tensors

*Saved tensors* are those that autograd saves for the backward pass of one sequence, measured on a
short prefix and scaled up, plus a weight gradient if one is computed. F_w takes four bytes per
quantized parameter; factored, four bytes per row and four per column of a weight.
"""

import os
import resource
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from fgmp.errors import MemoryLimitError
from fgmp.formats.spec import BLOCK
from fgmp.model.losses import Loss
from fgmp.model.observe import differentiable_inputs, frozen
from fgmp.model.select import shared_weights
from fgmp.sensitivity.histogram import HISTOGRAM_BYTES

_PROBE_TOKENS = 64
"""Tokens of the prefix on which saved tensors are measured."""

_FISHER_BYTES = 4
"""Bytes per value of an accumulator of F_w."""

_SCORING_BYTES = 64
"""Bytes per element while scoring one weight: float64 copies of the weight, its Fisher information
and its errors. Measured by ``runs/memory_constants.py``: up to 60."""

_SCORE_BYTES = 8 / BLOCK
"""Bytes per element of the block scores, float64."""

_DEQUANTIZED_BYTES = 4
"""Bytes per element of a dequantized weight."""

_LOGITS_COPIES = 5
"""Copies of one sequence's fp32 logits, in addition to saved tensors: the logits, probabilities of
sampled labels or of the original, log-probabilities, and the gradients of these and of the logits.
An upper bound: ``runs/memory_constants.py`` measures 2 to 3 on a CPU."""

_TUNING_BYTES, _TUNING_COPIES = 12, 2
"""Memory per element of a tuned parameter: 12 bytes for an fp32 master copy and Adam's two moments,
plus two copies in its own dtype, the tuned value and its gradient. If that dtype is not fp32, there
is an fp32 copy of the gradient too."""

_STEP_BYTES, _STEP_COPIES = 4, 2
"""Memory per element of the largest parameter during an optimizer step: 4 bytes for Adam's
denominator, and two gradients in its own dtype before they are accumulated."""

_RANKING = 3
"""Copies of the scores while a budget ranks them: concatenated, sorted, and the permutation."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Predicted bytes of a run.

    Attributes:
        held: memory that the process already holds.
        fisher: accumulators of F_w.
        packed: packed tensors, block scores and histograms.
        working: tensors saved for the backward pass of one sequence, and a weight gradient.
        compensation: moments and factors of the layer inputs of one stage, and cached outputs.
        scoring: temporaries of scoring the largest weight.
        logits: copies of one sequence's logits, in addition to ``working``.
        tuning: copies of parameters, Adam's moments and gradients; used after F_w is freed.
    """

    held: int
    fisher: int
    packed: int
    working: int
    compensation: int = 0
    scoring: int = 0
    logits: int = 0
    tuning: int = 0

    @property
    def peak(self) -> int:
        """Predicted peak: the largest of calibration, packing, and checking or tuning."""
        return self.held + max(self._calibration_or_packing, self._checking_or_tuning)

    @property
    def peaks_in_tuning(self) -> bool:
        """Whether the peak would be lower without tuning."""
        return bool(self.tuning) and self._checking_or_tuning > self._calibration_or_packing

    @property
    def _calibration_or_packing(self) -> int:
        packing = self.packed + self.compensation + self.scoring
        return self.fisher + max(packing, self.working + self.logits)

    @property
    def _checking_or_tuning(self) -> int:
        tuning = self.tuning + self.working if self.tuning else 0
        return self.packed + tuning + self.logits


def estimate(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    sample: Any,
    loss: Loss,
    packed_bytes_per_parameter: float,
    *,
    variants: int = 1,
    ranked: bool = False,
    fisher: str = "exact",
    compensation: int = 0,
    tuned: bool = False,
    vocabulary: int = 0,
    held: int | None = None,
    saved: int | None = None,
) -> MemoryEstimate:
    """Predict the peak of quantizing a model.

    It is not known yet which linears share a site, so each linear is charged for a histogram.

    Args:
        model: the linearized model.
        linears: linears to quantize, by name.
        sample: one calibration sequence.
        loss: loss whose gradients are squared.
        packed_bytes_per_parameter: bytes per quantized parameter of all packed models held at once.
        variants: number of variants (with and without scale search); each scores all weights.
        ranked: whether a budget ranks the scores.
        fisher: form of F_w, ``exact`` or ``factored``.
        compensation: bytes of moments and factors.
        tuned: whether the rest of the model is tuned.
        vocabulary: size of the vocabulary of a causal language model, else 0.
        held: bytes that the process will hold before the run; None: those that it holds now.
        saved: bytes of :func:`saved_bytes`; None: they are measured.
    """
    shared = shared_weights(linears)
    holders = {name: linear for name, linear in linears.items() if name not in shared}
    parameters = sum(linear.weight.numel() for linear in holders.values())
    device = next(model.parameters()).device
    largest = max(linear.weight.numel() for linear in linears.values())
    # Measure saved tensors first: its passes load libraries and fill caches, which stay allocated
    # and must be part of ``held``.
    working = saved_bytes(model, linears, sample, loss) if saved is None else saved
    scores = (variants + _RANKING * ranked) * _SCORE_BYTES
    weights = {id(linear.weight) for linear in linears.values()}
    rest = [p for p in model.parameters() if id(p) not in weights]
    tuning = sum(_TUNING_BYTES * p.numel() + _TUNING_COPIES * p.nbytes for p in rest)
    tuning += sum(4 * p.numel() for p in rest if p.dtype != torch.float32)
    tuning += max((_STEP_BYTES * p.numel() + _STEP_COPIES * p.nbytes for p in rest), default=0)
    if fisher == "exact":
        working += 2 * _FISHER_BYTES * largest
    return MemoryEstimate(
        held=held_bytes(device) if held is None else held,
        fisher=fisher_bytes(holders, fisher),
        packed=int((packed_bytes_per_parameter + scores) * parameters)
        + HISTOGRAM_BYTES * len(linears),
        working=working,
        compensation=compensation,
        scoring=_SCORING_BYTES * largest,
        logits=_LOGITS_COPIES * 4 * len(sample) * vocabulary if vocabulary else 0,
        tuning=tuning + _DEQUANTIZED_BYTES * largest if tuned else 0,
    )


def require(estimate: MemoryEstimate, device: torch.device) -> None:
    """Check that a run fits in free memory.

    Raises:
        MemoryLimitError: the run needs more memory than is free.
    """
    extra, free = estimate.peak - estimate.held, free_bytes(device)
    if extra > free:
        tune_hint = "" if not estimate.peaks_in_tuning else "tune: 0, "
        raise MemoryLimitError(
            f"quantizing needs {extra / 1e9:.2f} GB more on {device}, {free / 1e9:.2f} GB are "
            f"free; use {tune_hint}a shorter seq_len, fisher: factored, compensate: false, or a "
            "machine with more memory"
        )


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds now: resident set, or allocated memory of a GPU."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Free bytes, within the container's limit if there is one."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    for limit, used, cached in _CGROUPS:
        try:
            limit_bytes, used_bytes = int(Path(limit).read_text()), int(Path(used).read_text())
            stat = dict(line.split() for line in Path(cached[0]).read_text().splitlines())
        except (OSError, ValueError):  # no such file, or no limit
            continue
        # What counts as used includes cached files, which the system can drop.
        free = min(free, limit_bytes - used_bytes + int(stat.get(cached[1], 0)))
    return free


_CGROUPS = (
    (
        "/sys/fs/cgroup/memory.max",
        "/sys/fs/cgroup/memory.current",
        ("/sys/fs/cgroup/memory.stat", "inactive_file"),
    ),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        ("/sys/fs/cgroup/memory/memory.stat", "total_inactive_file"),
    ),
)
"""Cgroup files, v2 and v1: limit, usage, and (file, key) of the reclaimable page cache."""


def reset_peak(device: torch.device) -> None:
    """Reset the measured peak, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """Largest number of bytes held since :func:`reset_peak`."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def fisher_bytes(linears: dict[str, nn.Linear], fisher: str) -> int:
    """Bytes of the sums that F_w is made of."""
    if fisher == "exact":
        return _FISHER_BYTES * sum(linear.weight.numel() for linear in linears.values())
    return _FISHER_BYTES * sum(sum(linear.weight.shape) for linear in linears.values())


def saved_bytes(model: nn.Module, linears: dict[str, nn.Linear], sample: Any, loss: Loss) -> int:
    """Bytes that autograd saves for the backward pass of one calibration sequence.

    Measured on a short prefix and scaled up. The tensors may be fake.
    """
    short, ratio = sample, 1.0
    if isinstance(sample, Tensor) and sample.ndim == 1 and len(sample) > _PROBE_TOKENS:
        short, ratio = sample[:_PROBE_TOKENS], len(sample) / _PROBE_TOKENS
    saved: dict[int, torch.UntypedStorage] = {}  # holds references, so identities stay unique

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage._cdata] = storage
        return tensor

    # As in calibration, parameters are frozen; only inputs of linears require gradients.
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(differentiable_inputs(linears.values(), count))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor))
        total, _ = loss(model, short)
        for parameter in model.parameters():
            saved.pop(parameter.untyped_storage()._cdata, None)
        size = sum(storage.nbytes() for storage in saved.values())
        saved.clear()
        if total.requires_grad:
            total.backward()
    return int(size * ratio)
