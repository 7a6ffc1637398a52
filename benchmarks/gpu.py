"""GPU kernels against cuBLAS and against the memory bandwidth.

    python benchmarks/gpu.py [--json] [--repeats R] [--shape N K]...

Every case is captured in a CUDA graph of several calls, each on its own copy of weights and
activations. The copies together exceed the L2 cache four times, so operands are always cold. Graphs
of all cases of a shape are replayed in turn, R times; a row is the median of its replays, per call.
In the same turns run

    bf16    torch's linear in bf16, by cuBLAS
    fp8     ``torch._scaled_mm`` with E4M3 operands and one scale each, 16 rows at least
    copy    a device-to-device copy of 1 GB: twice its bytes over its time are copy_gbps

Rows: ``decode`` for batches of 1 to 16, ``prefill`` for 512 and 2048, both the packed linear
alone at 0, 10 and 30% FP8 blocks; ``quantize`` the fake quantizer on the same activations.
``copy_share`` is the rate at which a call moves the bytes that it must read and write, over
copy_gbps.
"""

import argparse
import datetime
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.kernels.triton.linear import packed_linear
from fgmp.kernels.triton.quantize import fake_quantize_activation

SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096)]
SHARES = [0.0, 0.1, 0.3]
BATCHES = [1, 4, 8, 16, 512, 2048]
FP8_ROWS = 16
"""``_scaled_mm`` needs a first dimension that is a multiple of this."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        facts: what identifies it.
        nbytes: bytes that a call must read and write.
        call: one call, on the operands of this number.
        copies: sets of operands.
    """

    facts: dict[str, Any]
    nbytes: int
    call: Callable[[int], Tensor]
    copies: int


def random_planes(n: int, k: int, share: float, generator: torch.Generator) -> list[Tensor | None]:
    """Planes of random codes on the GPU; kernels take as long for any values."""
    groups = k // BLOCK

    def random_bytes(*shape: int, high: int = 256) -> Tensor:
        return torch.randint(high, shape, dtype=torch.uint8, device="cuda", generator=generator)

    low, scale = random_bytes(n, k // 2), 1 + random_bytes(n, groups, high=126)
    if share == 0:
        return [low, scale, None, None, None]
    is_fp8 = torch.rand(n, groups, device="cuda", generator=generator) < share
    row_ptr = torch.nn.functional.pad(is_fp8.sum(1).cumsum(0), (1, 0)).int()
    # Exponents below 15, so that no code is NaN.
    overflow = random_bytes(int(row_ptr[-1]), BLOCK // 2) & 0x77
    return [low, scale.masked_fill_(is_fp8, FP8_BLOCK), overflow, row_ptr, None]


def copies_of(nbytes: int) -> int:
    """How many sets of operands exceed the L2 cache four times, at least two."""
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, -(-4 * cache // nbytes))


def size(tensors: list[Tensor | None]) -> int:
    """Bytes of the tensors."""
    return sum(t.nbytes for t in tensors if t is not None)


def linear_cases(n: int, k: int, batch: int, generator: torch.Generator) -> list[Case]:
    """The packed linear at every share of FP8 blocks, and torch's in bf16 and FP8."""
    kind = "decode" if batch <= 16 else "prefill"
    facts = {"shape": [n, k], "batch": batch}
    moved = 2 * batch * (n + k)
    one = torch.ones((), device="cuda")
    cases = []
    for share in SHARES:
        nbytes = size(random_planes(n, k, share, generator))
        sets = [random_planes(n, k, share, generator) for _ in range(copies_of(nbytes))]
        xs = torch.randn(len(sets), batch, k, device="cuda", generator=generator).bfloat16()

        def packed(i: int, xs: Tensor = xs, sets: list[list[Tensor | None]] = sets) -> Tensor:
            return packed_linear(xs[i], *sets[i], one, one, None, torch.bfloat16)

        label = {"kind": kind, "fp8_share": share, **facts}
        cases.append(Case(label, nbytes + moved, packed, len(sets)))
    weights = copies_of(2 * n * k)
    ws = torch.randn(weights, n, k, device="cuda", generator=generator).bfloat16()
    xs = torch.randn(weights, batch, k, device="cuda", generator=generator).bfloat16()
    bf16 = Case(
        {"kind": "bf16", **facts},
        2 * n * k + moved,
        lambda i: torch.nn.functional.linear(xs[i], ws[i]),
        weights,
    )
    weights8 = copies_of(n * k)
    w8 = torch.randn(weights8, n, k, device="cuda", generator=generator).to(torch.float8_e4m3fn)
    rows = -(-batch // FP8_ROWS) * FP8_ROWS
    x8 = torch.randn(weights8, rows, k, device="cuda").to(torch.float8_e4m3fn)
    fp8 = Case(
        {"kind": "fp8", **facts},
        n * k + moved,
        lambda i: torch._scaled_mm(
            x8[i], w8[i].T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
        ),
        weights8,
    )
    return [*cases, bf16, fp8]


def quantizer_cases(k: int, batch: int, generator: torch.Generator) -> list[Case]:
    """The fake quantizer with the paper's rule, and with the slowest."""
    nbytes = batch * (4 * k + k // BLOCK)
    copies = min(copies_of(nbytes), 256)
    xs = torch.randn(copies, batch, k, device="cuda", generator=generator).bfloat16()
    sensitivity = torch.randint(1, 127, (k,), dtype=torch.uint8, device="cuda", generator=generator)
    r, threshold = torch.tensor(64.0, device="cuda"), torch.tensor(2**40, device="cuda")
    cases = []
    for rule, scales in (("difference", "max"), ("benefit", "search")):

        def quantize(i: int, rule: str = rule, scales: str = scales) -> Tensor:
            return fake_quantize_activation(xs[i], r, sensitivity, threshold, rule, scales)[0]

        facts = {"kind": "quantize", "shape": [k], "batch": batch, "rule": rule, "scales": scales}
        cases.append(Case(facts, nbytes, quantize, copies))
    return cases


def copy_case() -> Case:
    """A device-to-device copy of 1 GB."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return Case({"kind": "copy"}, 2 * source.nbytes, lambda _: target.copy_(source), 1)


def captured(case: Case) -> torch.cuda.CUDAGraph:
    """CUDA graph of one call on each set of operands, compiled and warmed up."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            case.call(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(case.copies):
            case.call(i)
    return graph


def medians(cases: list[Case], repeats: int) -> list[float]:
    """Microseconds per call, with the cases in turn in every repeat."""
    graphs = [captured(case) for case in cases]
    times: list[list[float]] = [[] for _ in cases]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for repeat in range(repeats + 1):
        for case, graph, microseconds in zip(cases, graphs, times, strict=True):
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if repeat:  # the first turn warms up
                microseconds.append(start.elapsed_time(end) * 1e3 / case.copies)
    return [statistics.median(microseconds) for microseconds in times]


def rows_of(cases: list[Case], repeats: int) -> list[dict[str, Any]]:
    """Time cases that are compared with each other in the same turns."""
    copy = copy_case()
    us = medians([*cases, copy], repeats)
    copy_gbps = copy.nbytes / us[-1] / 1e3
    by_kind = {case.facts["kind"]: t for case, t in zip(cases, us, strict=False)}
    rows = []
    for case, t in zip(cases, us, strict=False):
        row = {**case.facts, "us": t, "copy_gbps": copy_gbps}
        row["copy_share"] = case.nbytes / t / 1e3 / copy_gbps
        if case.facts["kind"] in ("decode", "prefill"):
            row["over_bf16"] = by_kind["bf16"] / t
            row["over_fp8"] = by_kind["fp8"] / t
        rows.append(row)
    return rows


def machine() -> dict[str, str]:
    """Device, driver, versions and date."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return {
        "device": torch.cuda.get_device_name(0),
        "driver": driver,
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "date": datetime.date.today().isoformat(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py needs a CUDA device, and PyTorch sees none here.")

    generator = torch.Generator("cuda").manual_seed(0)
    rows = []
    for n, k in args.shape or SHAPES:
        for batch in BATCHES:
            rows += rows_of(linear_cases(n, k, batch, generator), args.repeats)
            torch.cuda.empty_cache()
    for k in sorted({k for _, k in args.shape or SHAPES}):
        for batch in BATCHES:
            rows += rows_of(quantizer_cases(k, batch, generator), args.repeats)
    facts = {**machine(), "repeats": args.repeats, "rows": rows}
    if args.json:
        print(json.dumps(facts))
        return
    print(" · ".join(f"{k} {facts[k]}" for k in ("device", "driver", "torch", "cuda", "date")))
    for row in rows:
        ratios = [f"{name} {row[name]:.2f}x" for name in ("over_bf16", "over_fp8") if name in row]
        label = " ".join(str(row[name]) for name in ("rule", "scales", "fp8_share") if name in row)
        shape = "x".join(map(str, row["shape"]))
        print(
            f"{row['kind']:<9}{shape:<12}{row['batch']:>5}  {label:<18}{row['us']:>10.1f} us"
            f"{row['copy_share']:>7.0%} of copy  {'  '.join(ratios)}"
        )


if __name__ == "__main__":
    main()
