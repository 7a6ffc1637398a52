"""The packed linear against torch's, on weights that no cache holds.

    python benchmarks/linear.py [--json] [--threads 1 2] [--repeats R] [--shapes NxK ...]
                                [--batches M ...] [--sets SET ...]

A row is one shape, batch, thread count, share of FP8 blocks and instruction set. It gives ``us`` of
the packed linear, with activations of which 70% of the blocks are FP4 and a bf16 result, how many
times faster it is than torch's linear in bf16 and fp32, and the rate at which its planes are read,
as a share of the read bandwidth. The widest instruction set is timed through the operator, as
models call it, the others by their kernels. ``read_gbps`` is the median over all rounds of summing
a buffer of a packed weight's size.
"""

import argparse
import json
import statistics
import sys
from typing import Any

import torch
import torch.nn.functional as F
from interleaved import Case, copies, machine, medians, random_weight, reading, site

from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.kernels.cpu.library import INSTRUCTION_SETS, Kernels, kernels
from fgmp.pack.planes import PackedWeight

SHARES = (0.0, 0.1, 0.3)


def packed_case(weights: list[PackedWeight], x: torch.Tensor, instruction_set: str) -> Case:
    """Case of one packed linear per turn, each on the next weight."""
    planes = [tuple(getattr(w, name) for name in PLANES) for w in weights]
    widest = kernels()
    assert widest is not None
    if instruction_set == widest.instruction_set:
        r, t = torch.tensor(1.0), weights[0].t
        return lambda i: ops.packed_linear(x, *planes[i % len(planes)], r, t, None, x.dtype)
    run = Kernels(instruction_set=instruction_set)
    return lambda i: run.linear(x, planes[i % len(planes)], 2.0**-20, None, x.dtype)


def activations(batch: int, k: int) -> torch.Tensor:
    """Quantized activations in units of t, bf16 (batch, k), 70% of their blocks FP4."""
    x = torch.randn(max(batch, 8), k, generator=torch.Generator().manual_seed(0))
    constants = site(x, "benefit", "search")
    r, threshold = torch.tensor(constants.r), torch.tensor(constants.threshold)
    arguments = (r, constants.sensitivity, threshold, constants.rule, constants.scales)
    units: torch.Tensor = ops.fake_quantize_activation(x[:batch], *arguments)[0]
    return units


def measure(
    n: int, k: int, batch: int, threads: int, sets: list[str], repeats: int
) -> tuple[float, list[dict[str, Any]]]:
    """Read bandwidth in GB/s, and the rows of one shape and batch."""
    torch.set_num_threads(threads)
    x = activations(batch, k)
    wide = x.float()
    bf16 = [torch.randn(n, k).to(torch.bfloat16) for _ in range(copies(2 * n * k))]
    fp32 = [weight.float() for weight in bf16]
    packed = {
        share: [random_weight(n, k, share, seed) for seed in range(copies(n * k // 2))]
        for share in SHARES
    }
    nbytes = {share: weights[0].nbytes for share, weights in packed.items()}
    cases: dict[str, Case] = {
        "read": reading(nbytes[0.1]),
        "bf16": lambda i: F.linear(x, bf16[i % len(bf16)]),
        "fp32": lambda i: F.linear(wide, fp32[i % len(fp32)]),
    }
    rows = [(share, name) for name in sets for share in SHARES]
    cases |= {f"{name} {share}": packed_case(packed[share], x, name) for share, name in rows}
    seconds = medians(cases, repeats)
    gbps = nbytes[0.1] / seconds["read"] / 1e9
    return gbps, [
        {
            "shape": f"{n}x{k}",
            "batch": batch,
            "threads": threads,
            "fp8_share": share,
            "isa": name,
            "us": seconds[f"{name} {share}"] * 1e6,
            "over_bf16": seconds["bf16"] / seconds[f"{name} {share}"],
            "over_fp32": seconds["fp32"] / seconds[f"{name} {share}"],
            "bandwidth_share": nbytes[share] / seconds[f"{name} {share}"] / 1e9 / gbps,
        }
        for share, name in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, torch.get_num_threads()])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--shapes", nargs="+", default=["4096x4096", "11008x4096", "4096x11008"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16, 512])
    parser.add_argument("--sets", nargs="+", choices=INSTRUCTION_SETS)
    args = parser.parse_args()
    widest = kernels()
    if widest is None:
        sys.exit("the C++ kernels are not compiled here: install a C++ compiler, reinstall fgmp")
    sets = args.sets or widest.supported[1:] or widest.supported

    bandwidths, rows = [], []
    for threads in dict.fromkeys(args.threads):
        for shape in args.shapes:
            n, k = map(int, shape.split("x"))
            for batch in args.batches:
                repeats = args.repeats if batch < 100 else max(3, args.repeats // 5)
                gbps, measured = measure(n, k, batch, threads, sets, repeats)
                bandwidths.append(gbps)
                rows += measured
                if not args.json:
                    show(gbps, measured)
    facts = {**machine(), "read_gbps": statistics.median(bandwidths), "rows": rows}
    if args.json:
        print(json.dumps(facts, indent=1))


def show(gbps: float, rows: list[dict[str, Any]]) -> None:
    """Print the rows of one shape and batch."""
    first = rows[0]
    print(f"{first['shape']} batch {first['batch']}, {first['threads']} threads, {gbps:.1f} GB/s")
    for row in rows:
        print(
            f"  {row['isa']:<8} {row['fp8_share']:4.0%} FP8 {row['us']:9.0f} us"
            f"  {row['over_bf16']:5.2f} x bf16 {row['over_fp32']:5.2f} x fp32"
            f"  {row['bandwidth_share']:4.0%} of the bandwidth",
            flush=True,
        )


if __name__ == "__main__":
    main()
