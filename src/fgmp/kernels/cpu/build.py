"""Compile the kernels: ``python src/fgmp/kernels/cpu/build.py``, or at install by hatch_build.py.

The library holds one object per instruction set and is linked once. The object is chosen at run
time, so a wheel works on other processors than its builder's. There is no -march=native and no
-ffast-math. Multiply-adds are fused only where the source says so, since quantizers must give the
definition's bits.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).parent
LIBRARY = SOURCES / "_kernels.so"

_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=default"),
    # Comparisons become masks only where they may not trap; results are IEEE's either way.
    *("-ffp-contract=off", "-fno-trapping-math", "-fno-math-errno"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Wno-ignored-attributes", "-Wno-unknown-pragmas"),
    # GCC's own headers leave the unused operand of a masked intrinsic undefined.
    "-Wno-maybe-uninitialized",
)

_AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mpopcnt")
_AVX512 = (
    *_AVX2,
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
    *("-mavx512vbmi", "-mavx512vbmi2", "-mavx512bf16"),
)


def instruction_sets(machine: str) -> dict[str, tuple[str, ...]]:
    """Compiler flags by instruction set, for a machine as ``platform.machine()`` names it."""
    flags: dict[str, tuple[str, ...]] = {"portable": ()}
    if machine in ("x86_64", "AMD64"):
        flags |= {
            "avx2": _AVX2,
            "avxvnni": (*_AVX2, "-mavxvnni"),
            "avx512vnni": (*_AVX2, "-mavx512vnni", "-mavx512vl"),
            "avx512": _AVX512,
        }
    if machine in ("aarch64", "arm64"):
        flags |= {"dotprod": ("-march=armv8.2-a+dotprod",)}
    return flags


def compiler() -> str | None:
    """Name of the first C++ compiler on the path; None without one."""
    return next((name for name in ("g++", "clang++", "c++") if shutil.which(name)), None)


def build(target: Path = LIBRARY, extra: Sequence[str] = ()) -> Path:
    """Compile and link the library.

    Args:
        target: path of the library; replaced in one step, so that nobody loads half a library.
        extra: more flags for every step, such as sanitizers.

    Returns:
        ``target``.

    Raises:
        FileNotFoundError: there is no compiler.
        subprocess.CalledProcessError: the compiler failed; its message is on standard error.
    """
    cxx = compiler()
    if cxx is None:
        raise FileNotFoundError("no C++ compiler (g++, clang++ or c++) on the path")
    with tempfile.TemporaryDirectory(dir=target.parent) as directory:
        scratch = Path(directory)
        objects = [scratch / "dispatch.o"]
        commands = [[cxx, *_FLAGS, *extra, "-c", SOURCES / "dispatch.cpp", "-o", objects[0]]]
        for name, flags in instruction_sets(platform.machine()).items():
            objects.append(scratch / f"{name}.o")
            source = [f"-DFGMP_ISA={name}", "-c", SOURCES / "kernels.cpp"]
            commands.append([cxx, *_FLAGS, *flags, *extra, *source, "-o", objects[-1]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        linked = scratch / target.name
        _run([cxx, "-shared", *extra, *objects, "-o", linked])
        linked.replace(target)
    return target


def _run(command: Sequence[object]) -> None:
    subprocess.run([str(part) for part in command], check=True)


if __name__ == "__main__":
    print(build(), file=sys.stderr)
