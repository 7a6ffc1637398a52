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

CAPABILITY = 90
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu_compiled.py"
EXPECTED = {
    *product(["codes_kernel", "units_kernel"], ["difference", "random", "benefit"]),
    *product(["unpack_kernel", "decode_kernel"], ["mixed", "fp4", "fp8"]),
    ("finish_kernel", ""),
}


def test_compiles_to_ieee_arithmetic(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(SCRIPT), "--ptx", "--capability", str(CAPABILITY)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)["rows"]
    assert {(kernel["kernel"], kernel["variant"]) for kernel in kernels} == EXPECTED
    for kernel in kernels:
        ptx = kernel["ptx"]
        assert f".target sm_{CAPABILITY}" in ptx
        for forbidden in (".ftz", "fma.rn.f32", "div.full", "div.approx", "rcp.", "e4m3", "e2m1"):
            assert forbidden not in ptx, f"{kernel['kernel']}: {forbidden}"
        assert kernel["stack"] <= 32, f"{kernel['kernel']} spills registers"
        assert ("mma.sync" in ptx) == (kernel["kernel"] == "decode_kernel")
