"""Kernels for other processors than this one: the definition's bits, and those of AVX2.

Those for ARM are cross-compiled and run by qemu. Those for x86 with VNNI are compiled with a C++
function in place of the one instruction that they add to AVX2.
"""

import shutil
import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fgmp.formats.activation import quantize
from fgmp.formats.linear import error_bound, exact_linear
from fgmp.formats.rules import RULES
from fgmp.kernels.cpu import build, library
from fgmp.pack.planes import PackedWeight, unpack_units

from ..cases import packed, site, tokens
from .test_library import hard_tokens, same_bits

HERE = Path(__file__).parent
ARM_COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
EMULATED_VNNI = "emulated VNNI"

needs_avx2 = pytest.mark.skipif(
    "avx2" not in library.Kernels(instruction_set="portable").supported, reason="needs AVX2"
)
needs_arm = pytest.mark.skipif(
    not (shutil.which(ARM_COMPILER) and shutil.which(QEMU)), reason="needs an ARM compiler and qemu"
)
ARM = [pytest.param(name, marks=needs_arm) for name in build.instruction_sets("aarch64")]
VNNI = [pytest.param(EMULATED_VNNI, marks=needs_avx2)]


@pytest.fixture(scope="module", params=[*ARM, *VNNI])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Command that runs the kernels of one instruction set."""
    return compiled(request.param, tmp_path_factory.mktemp("processor"))


def compiled(instruction_set: str, folder: Path) -> list[str]:
    """Command that runs the kernels of an instruction set, see runner.cpp."""
    program = str(folder / "runner")
    sources = ["-DFGMP_ISA=runner", "-I", str(build.SOURCES), str(HERE / "runner.cpp")]
    if instruction_set == EMULATED_VNNI:
        flags = [*build.instruction_sets("x86_64")["avx2"], "-include", str(HERE / "vnni.h")]
        compiler, command = build.compiler(), [program]
    else:
        flags = [*build.instruction_sets("aarch64")[instruction_set], "-static"]
        compiler, command = ARM_COMPILER, [QEMU, "-cpu", "max", program]
    compilation = [compiler, *build._FLAGS, *flags, *sources, "-o", program]
    subprocess.run([str(part) for part in compilation], check=True)
    return command


def run(
    command: list[str], weight: PackedWeight, units: Tensor, x: Tensor, rule: str, scales: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Linear of ``units``, and units and flags of ``x``."""
    n, k, m = weight.n, weight.k, len(units)
    record = site(k, rule, scales)
    code = RULES[rule].cpu
    assert code is not None and weight.low is not None and weight.scale is not None
    mixed = weight.overflow is not None
    n_fp8 = len(weight.overflow) if weight.overflow is not None else -1
    flags = code | library.SCALES[scales]
    parts = [struct.pack("<6qf", n, k, m, n_fp8, record.threshold, flags, record.r)]
    planes = [weight.low, weight.scale, *((weight.row_ptr, weight.overflow) if mixed else ())]
    operands = [*planes, units.view(torch.int16), x, record.sensitivity]
    parts += [t.contiguous().numpy().tobytes() for t in operands if t is not None]
    done = subprocess.run(command, input=b"".join(parts), capture_output=True, check=True)
    out = np.frombuffer(done.stdout, np.uint8).copy()
    y, rest = np.split(out, [4 * m * n])
    quantized, decided = np.split(rest, [2 * m * k])
    return (
        torch.from_numpy(y.view(np.float32)).view(m, n),
        torch.from_numpy(quantized.view(np.int16)).view(torch.bfloat16).view(m, k),
        torch.from_numpy(decided).view(m, -1).bool(),
    )


@pytest.mark.parametrize("share", [0.0, 0.3], ids=["fp4", "mixed"])
@pytest.mark.parametrize(("n", "k"), [(1, 16), (37, 40), (70, 496)])
@pytest.mark.parametrize("m", [1, 4, 8, 11])
def test_linear_and_quantizer(runner: list[str], share: float, n: int, k: int, m: int) -> None:
    weight, x = packed(n, k, share), tokens(m, k)
    rule, scales = ("benefit", "search") if m % 2 else ("difference", "max")
    expected = quantize(x, site(k, rule, scales))
    units = expected.units(k)
    y, quantized, flags = run(runner, weight, units.bfloat16(), x, rule, scales)
    assert torch.equal(flags, expected.is_fp8)
    assert torch.equal(quantized.float(), units)
    values = unpack_units(weight)
    error = (y.double() - exact_linear(units, values, 1.0, 1.0).double()).abs()
    assert (error <= error_bound(units, values, 1.0, 1.0)).all()


def test_hard_tokens(runner: list[str]) -> None:
    weight, k = packed(37, 496, 0.3), 496
    units, x = hard_tokens(k), tokens(8, k)
    batch, _, _ = run(runner, weight, units, x, "benefit", "search")
    for m in range(8):
        alone, _, _ = run(runner, weight, units[m : m + 1], x[:1], "benefit", "search")
        assert same_bits(alone[0], batch[m])
        if m != 6:
            exact = units[m].double() @ unpack_units(weight).double().T
            bound = error_bound(units[m : m + 1].float(), unpack_units(weight), 1.0, 1.0)[0]
            assert ((alone[0].double() - exact).abs() <= bound).all()


@needs_avx2
@pytest.mark.parametrize("name", [pytest.param("dotprod", marks=needs_arm), EMULATED_VNNI])
def test_the_bits_are_those_of_avx2(name: str, tmp_path: Path) -> None:
    """Integer products leave no freedom but the order of blocks, which is the same."""
    runner = compiled(name, tmp_path)
    weight, k = packed(37, 496, 0.0), 496
    units = quantize(tokens(8, k), site(k)).units(k).bfloat16()
    y, _, _ = run(runner, weight, units, tokens(8, k), "benefit", "search")
    planes = (weight.low, weight.scale, None, None, None)
    avx2, _ = library.Kernels(instruction_set="avx2").linear(
        units, planes, 1.0, None, torch.float32
    )
    assert torch.equal(y, avx2)
