"""What a run will take is predicted part by part, and a run that cannot fit is refused."""

import ctypes
import mmap
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

from fgmp.errors import InputError, MemoryLimitError
from fgmp.model.losses import causal_lm_loss
from fgmp.model.select import linearize, quantizable
from fgmp.quantization import memory
from fgmp.quantization.memory import MemoryEstimate, estimate, peak_bytes, require, reset_peak
from fgmp.sensitivity.fisher import calibrate

CPU = torch.device("cpu")


class Chain(nn.Module):
    """x, 8 wide; a linear to 16; tanh; a linear to 4."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def squares(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().sum(), len(x)


def test_parts() -> None:
    model = Chain()
    linears = {"first": model.first, "second": model.second}
    parameters = 8 * 16 + 16 * 4
    result = estimate(model, linears, torch.zeros(10, 8), squares, 0.6)
    assert result.fisher == 4 * parameters
    assert result.scoring == 64 * 8 * 16
    # A float64 score a block of 16, and 65,536 counts for each input.
    assert result.packed == int((0.6 + 0.5) * parameters) + 2 * 8 * 65536
    both = estimate(model, linears, torch.zeros(10, 8), squares, 0.6, variants=2, ranked=True)
    # Two scores; one of them in a row with all others, sorted, and its place.
    assert both.packed - result.packed == 4 * 0.5 * parameters
    # x, the tanh that is also the second input, and the squared output, of ten rows in fp32;
    # then one weight's gradient and its square.
    assert result.working == 10 * 4 * (8 + 16 + 4) + 2 * 4 * 8 * 16
    assert result.held == pytest.approx(memory.held_bytes(CPU), rel=0.05)


def test_the_peak_is_calibrations_or_packings() -> None:
    assert MemoryEstimate(held=1000, fisher=400, packed=70, working=9).peak == 1470
    assert MemoryEstimate(held=1000, fisher=400, packed=7, working=90).peak == 1490


def test_long_sequences_are_scaled_up_from_their_beginning() -> None:
    model = make_model("llama")
    linearize(model)
    linears = quantizable(model)
    seen = []

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        seen.append(len(tokens))
        return causal_lm_loss(model, tokens)

    short, long = (
        estimate(model, linears, torch.zeros(n, dtype=torch.int64), loss, 0).working
        for n in (64, 256)
    )
    gradient = 2 * 4 * max(linear.weight.numel() for linear in linears.values())
    assert seen == [64, 64]
    # Not to the byte: the token ids that embedding keeps are a view of the long sequence.
    assert long - gradient == pytest.approx(4 * (short - gradient), rel=0.01)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_frozen_parameters_change_nothing(family: str, tokens: Tensor) -> None:
    """Calibration freezes them itself; a model that came frozen is no cheaper."""
    model = make_model(family)
    linearize(model)
    linears = quantizable(model)
    before = estimate(model, linears, tokens[0], causal_lm_loss, 0).working
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert trainable
    model.requires_grad_(False)
    assert estimate(model, linears, tokens[0], causal_lm_loss, 0).working == before
    inputs = sum(linear.in_features for linear in linears.values()) * 24 * 4
    assert before > inputs / 2  # q, k and v share theirs
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_refuses_what_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = MemoryEstimate(held=5 * 10**9, fisher=2 * 10**9, packed=0, working=10**9)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1_500_000_000)
    text = (
        "quantizing needs 3.00 GB more on cpu, 1.50 GB are free; "
        "use a shorter seq_len, fisher: factored, compensate: false, or a machine with more memory"
    )
    with pytest.raises(MemoryLimitError, match=f"^{re.escape(text)}$") as caught:
        require(needed, CPU)
    assert isinstance(caught.value, InputError)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 3 * 10**9)
    require(needed, CPU)


@pytest.mark.parametrize(
    ("limit", "used", "stat", "cached"),
    [
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ],
)
def test_a_containers_limit_counts(
    limit: str, used: str, stat: str, cached: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = Path("/sys/fs/cgroup")
    monkeypatch.setattr(memory, "Path", lambda name: tmp_path / Path(name).relative_to(root))
    (tmp_path / "memory").mkdir()
    assert memory.free_bytes(CPU) > 1000
    (tmp_path / limit).write_text("5000\n")
    (tmp_path / used).write_text("4000\n")
    (tmp_path / stat).write_text(f"anon 3400\n{cached} 600\nfile 600\n")
    assert memory.free_bytes(CPU) == 1600
    (tmp_path / limit).write_text("max\n" if limit == "memory.max" else f"{2**63 - 4096}\n")
    assert memory.free_bytes(CPU) > 1600


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to tell")
def test_the_peak_is_measured() -> None:
    reset_peak(CPU)
    before = memory.held_bytes(CPU)
    # Pages of its own: an allocator may have as much left over, and give that.
    with mmap.mmap(-1, 50_000_000) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
    assert peak_bytes(CPU) >= before + 45_000_000


def test_compensation_counts_beside_packing() -> None:
    model = Chain()
    linears = {"first": model.first, "second": model.second}
    result = estimate(model, linears, torch.zeros(10, 8), squares, 0.6, compensation=7000)
    assert result.compensation == 7000
    more = MemoryEstimate(held=1000, fisher=400, packed=70, working=90, compensation=50)
    assert more.peak == 1520


def test_factors_take_rows_and_columns_only() -> None:
    model = Chain()
    linears = {"first": model.first, "second": model.second}
    exact, factored = (
        estimate(model, linears, torch.zeros(10, 8), squares, 0.6, fisher=f)
        for f in ("exact", "factored")
    )
    assert factored.fisher == 4 * (8 + 16 + 16 + 4)
    # No gradient of a weight and no square of it.
    assert exact.working - factored.working == 2 * 4 * 8 * 16
    assert factored.packed == exact.packed and factored.scoring == exact.scoring
    assert MemoryEstimate(held=1000, fisher=4, packed=70, working=90, scoring=60).peak == 1134


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is Linux's to tell")
def release_freed_memory() -> None:
    """Give memory that earlier tests freed back to the system, else it is used without a trace."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # glibc's
        trim(0)


def test_factors_are_all_that_calibration_holds() -> None:
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))
    linears = {name: linear for name, linear in model.named_children()}
    sample = torch.randn(4, 2048)
    taken = {}
    for fisher in ("factored", "exact"):
        release_freed_memory()
        reset_peak(CPU)
        before = memory.held_bytes(CPU)
        calibrate(model, linears, [sample], squares, fisher=fisher)
        taken[fisher] = peak_bytes(CPU) - before
    weights = 4 * 6 * 2048**2
    assert taken["exact"] > 0.9 * weights
    # Not even the gradient of one weight.
    assert taken["factored"] < weights / 6


def test_memory_counts_what_is_tuned() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4))
    linears = {"0": model[0], "1": model[1]}

    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        return model(sample).square().sum(), len(sample)

    plain, tuned = (
        estimate(model, linears, torch.zeros(10, 8), loss, 0.6, tuned=t) for t in (False, True)
    )
    assert plain.logits == 0
    large = estimate(model, linears, torch.zeros(10, 8), loss, 0.6, vocabulary=1000)
    assert large.logits == 5 * 4 * 10 * 1000 and large.working == plain.working
    assert MemoryEstimate(held=9, fisher=5, packed=7, working=3, logits=8).peak == 9 + 5 + 3 + 8
    assert MemoryEstimate(held=9, fisher=1, packed=7, working=3, logits=8).peak == 9 + 7 + 8
    bias, step, dequantized = 4 * (12 + 2 * 4), 4 * (4 + 2 * 4), 4 * 8 * 16
    assert (plain.tuning, tuned.tuning) == (0, bias + step + dequantized)
    least = MemoryEstimate(held=9, fisher=5, packed=7, working=3, tuning=20)
    assert least.peak == 39 and least.peaks_in_tuning
    assert not MemoryEstimate(held=9, fisher=50, packed=7, working=3, tuning=20).peaks_in_tuning
    with pytest.raises(MemoryLimitError, match="use tune: 0, a shorter seq_len"):
        require(replace(least, tuning=1 << 60), torch.device("cpu"))
