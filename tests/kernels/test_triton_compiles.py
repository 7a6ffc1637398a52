"""Everything that is launched compiles for GPUs, and to the arithmetic that the tests ran.

The interpreter accepts programs that the compiler refuses, and computes in IEEE whatever is asked
for. What a GPU would do otherwise shows in the PTX: flushed subnormals, contracted products and
sums, approximate divisions, and conversions to fp8 by hardware, none of which a kernel may have.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_triton.py")
EXPECTED = {
    *product(["_codes_kernel", "_units_kernel"], ["difference", "random", "benefit"]),
    *product(["_unpack_kernel", "_decode_kernel"], ["mixed", "fp4", "fp8"]),
    ("_finish_kernel", ""),
}


@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_to_ieee_arithmetic(capability, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(kernel["kernel"], kernel["variant"]) for kernel in kernels} == EXPECTED
    for kernel in kernels:
        ptx = kernel["ptx"]
        assert f".target sm_{capability}" in ptx
        for forbidden in (".ftz", "fma.rn.f32", "div.full", "div.approx", "rcp.", "e4m3", "e2m1"):
            assert forbidden not in ptx, f"{kernel['kernel']}: {forbidden}"
        assert ".local" not in ptx, f"{kernel['kernel']} keeps an array in memory"
        assert ("mma.sync" in ptx) == (kernel["kernel"] == "_decode_kernel")
