"""Registers and instructions of the GPU kernels, counted without a GPU.

    python benchmarks/gpu_compiled.py [--capability 80|90|100|120] [--json] [--ptx]

Calls the launch functions on CPU tensors with a driver that only names its target. What they launch
is specialized and compiled as on a GPU. Prints for each kernel the registers per thread, bytes
spilled, and instructions of its main loop per value that a thread handles there. A kernel with few
instructions per value is limited by memory. ``--ptx`` adds the PTX to the JSON, for the tests.
"""

import argparse
import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from fgmp.formats.spec import BLOCK
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels.triton import linear, quantize, unpack
from fgmp.pack.planes import pack

RULES = [("difference", "max"), ("random", "max"), ("benefit", "search")]
K = 1024


class Target:
    """The part of a driver that compiling needs."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0


def tool(name: str, option: str, cubin: bytes) -> str:
    """Output of a CUDA tool that comes with Triton."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(triton.knobs.nvidia, name).path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def longest_loop(cubin: bytes) -> int:
    """Instructions of the longest loop, from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    instructions = longest = 0
    for line in tool("nvdisasm", "-c", cubin).splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = instructions
        elif re.search(r"/\*[0-9a-f]{4,}\*/\s.*;", line):
            instructions += 1
            branch = re.search(r"BRA\S*\s.*`\((\.L\w+)\)", line)
            if branch and branch[1] in labels:
                longest = max(longest, instructions - labels[branch[1]])
    return longest


def compiled_rows(capability: int) -> list[dict[str, Any]]:
    """One row per kernel that the launch functions launch, and per specialization."""
    rows: list[dict[str, Any]] = []

    def compile_only(kernel: Any, grid: Any, on: Tensor, **arguments: Any) -> None:
        built = kernel.warmup(grid=grid, enable_fp_fusion=False, **arguments)
        usage = tool("cuobjdump", "-res-usage", built.asm["cubin"])
        loop = longest_loop(built.asm["cubin"])
        values = arguments.get("GROUPS", 0) * BLOCK / (32 * built.metadata.num_warps)
        if "MODE" in arguments:
            values *= arguments["ROWS"]
        rows.append(
            {
                "kernel": kernel.fn.__name__.strip("_"),
                "variant": arguments.get("MODE") or arguments.get("RULE") or "",
                "tile": {n: arguments[n] for n in ("ROWS", "GROUPS", "BATCH") if n in arguments},
                "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
                "stack": int(re.findall(r"STACK:(\d+)", usage)[0]),
                # A kernel without loop ends in a branch to itself, of one instruction.
                "instructions_per_value": loop / values if loop > 1 and values else None,
                "ptx": built.asm["ptx"],
            }
        )

    def unpack_only(x: Tensor, weight: Any, start: int, stop: int) -> Tensor:
        scratch = torch.empty(stop - start, x.shape[1], dtype=torch.bfloat16)
        unpack.unpack_rows(weight, start, scratch)
        return torch.empty(x.shape[0], stop - start)

    triton.runtime.driver.set_active(Target(capability))
    for module in (quantize, unpack, linear):
        module.launch = compile_only  # type: ignore[attr-defined]
    linear._multiply = unpack_only  # the GEMM of a slice is not ours to compile
    launch_quantizers()
    launch_linears()
    return rows


def launch_quantizers() -> None:
    """Launch the quantizers under every rule."""
    site = torch.tensor(3.5), torch.full((K,), 56, dtype=torch.uint8), torch.tensor(2**40)
    for rule, scales in RULES:
        for rows in (1, 100) if rule == "difference" else (100,):
            x = torch.ones(rows, K, dtype=torch.bfloat16)
            quantize.quantize_activation(x, *site, rule, scales)
            quantize.fake_quantize_activation(x, *site, rule, scales)


def launch_linears() -> None:
    """Launch the packed linear on weights of every mode."""
    for n in (64, 8192):
        weight = torch.randn(n, K, generator=torch.Generator().manual_seed(0))
        codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
        for share in (0.0, 0.3, 1.0):
            generator = torch.Generator().manual_seed(1)
            packed = pack(codes, torch.rand(codes.scale.shape, generator=generator) < share)
            planes = packed.low, packed.scale, packed.overflow, packed.row_ptr, packed.fp8
            batches = [(1, torch.bfloat16), (16, torch.bfloat16), (17, torch.float32)]
            for batch, dtype in batches if n == 64 else batches[:1]:
                units = torch.ones(batch, K, dtype=dtype)
                linear.packed_linear(units, *planes, packed.t, packed.t, weight[:, 0], dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ptx", action="store_true")
    args = parser.parse_args()
    if triton.knobs.runtime.interpret:
        raise SystemExit("benchmarks/gpu_compiled.py compiles: unset TRITON_INTERPRET.")
    rows = compiled_rows(args.capability)
    if args.json or args.ptx:
        if not args.ptx:
            rows = [{k: v for k, v in row.items() if k != "ptx"} for row in rows]
        facts = {"capability": args.capability, "triton": triton.__version__, "rows": rows}
        print(json.dumps(facts))
        return
    for row in rows:
        tile = " ".join(f"{name.lower()} {value}" for name, value in row["tile"].items())
        cost = row["instructions_per_value"]
        print(
            f"{row['kernel']:<14}{row['variant']:<12}{tile:<30}{row['registers']:>4} registers"
            f"{row['stack']:>4} spilled {'' if cost is None else f'{cost:8.2f} per value'}"
        )


if __name__ == "__main__":
    main()
