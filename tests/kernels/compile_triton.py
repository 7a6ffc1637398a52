"""Compile everything that the launch functions launch, for GPUs that are not there.

    python tests/kernels/compile_triton.py CAPABILITY     80, 90, 100 or 120

Not a test itself: a process compiles or interprets, never both. Calls the public functions on CPU
tensors with a driver that only names its target, and prints a JSON object a kernel: its name, its
mode or rule, and its PTX.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget

from fgmp.formats.activation import RULES, SCALES
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels.triton import linear, quantize, unpack
from fgmp.kernels.triton.launch import launch
from fgmp.pack.planes import pack


class Target:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _):
        return 0


def compile_only(kernel, grid, on, **arguments):
    """Stands in for ``launch``: the same arguments, specialized and compiled as they would be."""
    compiled = kernel.warmup(grid=grid, enable_fp_fusion=False, **arguments)
    facts = {"kernel": kernel.fn.__name__, "ptx": compiled.asm["ptx"]}
    facts["variant"] = arguments.get("MODE") or arguments.get("RULE") or ""
    print(json.dumps(facts))


def unpack_only(x, weight, start, stop):
    """Stands in for the slice's GEMM, which is not ours to compile."""
    unpack.unpack_rows(weight, start, torch.empty(stop - start, x.shape[1], dtype=torch.bfloat16))
    return torch.empty(x.shape[0], stop - start)


def main():
    triton.runtime.driver.set_active(Target(int(sys.argv[1])))
    for module in (quantize, unpack, linear):
        assert module.launch is launch
        module.launch = compile_only
    linear._multiply = unpack_only
    k = 1024
    site = torch.tensor(3.5), torch.full((k,), 56, dtype=torch.uint8), torch.tensor(2**40)
    for rule, scales in zip(RULES, ["max", "max", "search"], strict=True):
        assert scales in SCALES
        for rows in (1, 100) if rule == "difference" else (100,):
            x = torch.ones(rows, k, dtype=torch.bfloat16)
            quantize.quantize_activation(x, *site, rule, scales)
            quantize.fake_quantize_activation(x, *site, rule, scales)
    weight = torch.randn(64, k, generator=torch.Generator().manual_seed(0))
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    for share in (0.0, 0.3, 1.0):
        is_fp8 = torch.rand(codes.scale.shape, generator=torch.Generator().manual_seed(1)) < share
        packed = pack(codes, is_fp8)
        planes = packed.low, packed.scale, packed.overflow, packed.row_ptr, packed.fp8
        unpack.unpack_weight(*planes, k, torch.float32)
        for batch, dtype in ((1, torch.bfloat16), (16, torch.bfloat16), (17, torch.float32)):
            units = torch.ones(batch, k, dtype=dtype)
            linear.packed_linear(units, *planes, packed.t, packed.t, weight[:, 0], dtype)


if __name__ == "__main__":
    main()
