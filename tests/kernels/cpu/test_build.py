"""The compiled library: how it is made, and that it reads nothing that is not its own."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fgmp.formats import rules, spec
from fgmp.kernels import ops
from fgmp.kernels.cpu import build, library

from ..cases import calls

ROOT = Path(__file__).parents[3]


def copied(to: Path) -> Path:
    """The package without its library, where an interpreter finds it first: (its directory)."""
    package = to / "fgmp"
    shutil.copytree(ROOT / "src" / "fgmp", package, ignore=shutil.ignore_patterns("*.so"))
    return package


def run(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(directory), str(ROOT)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": paths} | environment,
    )  # fmt: skip


def test_under_sanitizers(tmp_path: Path) -> None:
    """Golden vectors, ragged shapes and noise for planes: a byte beyond a tensor ends it."""
    cxx = build.compiler()
    assert cxx is not None, "the tests need a C++ compiler"
    flags = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1")
    build.build(copied(tmp_path) / "kernels" / "cpu" / "_kernels.so", flags)
    runtimes = [
        subprocess.run([cxx, f"-print-file-name={name}"], capture_output=True, text=True).stdout
        for name in ("libasan.so", "libubsan.so")
    ]
    chosen = "golden or corrupt or elsewhere or panels or unpack or nan or alone"
    done = run(
        tmp_path,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen),
        "tests/kernels/cpu/test_library.py",
        LD_PRELOAD=" ".join(path.strip() for path in runtimes),
        ASAN_OPTIONS="detect_leaks=0",  # Python's own
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert " passed" in done.stdout


SLOW = """
import fgmp, torch
from fgmp.kernels import ops
from fgmp.kernels.cpu import library
from tests.kernels.cases import calls
assert library.kernels() is None and "src" not in fgmp.__file__
arguments = calls()
results = {name: getattr(ops, name)(*arguments[name]) for name in arguments}
ops.packed_linear(*arguments["packed_linear"])
print(results["packed_linear"].double().sum().item())
"""


def test_without_a_library_it_runs_and_says_once_that_it_is_slow(tmp_path: Path) -> None:
    copied(tmp_path)
    done = run(tmp_path, "-c", SLOW)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the C++ kernels are not compiled here") == 1
    fast = ops.packed_linear(*calls()["packed_linear"]).double().sum().item()
    assert float(done.stdout) == pytest.approx(fast, rel=1e-2)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(FileNotFoundError, match=r"no C\+\+ compiler"):
        build.build(tmp_path / "_kernels.so")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing_and_breaks_nothing(tmp_path: Path) -> None:
    target = tmp_path / "_kernels.so"
    target.write_text("the one before")
    with pytest.raises(subprocess.CalledProcessError):
        build.build(target, ["-fno-such-option"])
    assert target.read_text() == "the one before" and len(list(tmp_path.iterdir())) == 1


def test_records_have_the_sizes_that_the_sources_assert() -> None:
    source = (build.SOURCES / "abi.h").read_text()
    for name in ("Weight", "Matrix", "Site", "Team"):
        size = ctypes.sizeof(getattr(library, f"_{name}"))
        assert f"static_assert(sizeof({name}) == {size}," in source


def test_sources_state_the_facts_of_the_format_records() -> None:
    """C++ cannot import formats/spec.py: its constants stand there again, and must agree."""
    text = "".join(path.read_text() for path in sorted(build.SOURCES.glob("*.h")))

    def constants(name: str) -> list[float]:
        found = re.search(rf"\b{name}(?:\[\d+\])? = ({{[^}}]+}}|[^;,]+)[;,]", text)
        assert found, name
        return [float(v.strip(" f")) if "x" not in v else float(int(v, 16))
                for v in found[1].strip("{}").split(",")]  # fmt: skip

    assert constants("kBlock") == [spec.BLOCK]
    assert constants("kHalf") == [spec.BLOCK * spec.E2M1.bits / 8]
    assert constants("kFp8Flag") == [spec.FP8_BLOCK]
    assert constants("kFp8Factor") == [spec.FP8_FACTOR]
    assert constants("kScaleMax") == [spec.E4M3.max]
    assert constants("kScaleMaxCode") == [spec.SCALE_MAX_CODE]
    assert constants("kScaleMinCode") == [spec.SCALE_MIN_CODE]
    assert constants("kUnit") == [2**spec.UNIT_BITS]
    assert constants("kUnitMax") == [spec.UNIT_MAX]
    assert constants("kSensitivityUnit") == [2**spec.SENSITIVITY_BITS]
    assert constants("kSearchOffsets") == list(rules.SCALES["search"])
    assert constants("kAllFp8") == [spec.THRESHOLD_ALL_FP8]
    assert constants("kE2M1")[:8] == list(spec.E2M1.magnitudes)
