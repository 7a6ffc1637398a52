"""``fgmp doctor``: what the machine has, measured products, and advice for what is missing."""

import pytest

from fgmp.app import doctor
from fgmp.app.records import Diagnosis
from fgmp.kernels.cpu import library

from .cases import Run


def test_doctor(run: Run) -> None:
    facts = run("doctor", "--json").json
    assert facts.keys() == Diagnosis.__annotations__.keys()
    assert facts["versions"]["torch"] and "vllm" in facts["versions"]
    kernels = library.kernels()
    assert kernels is not None and facts["kernel_instruction_set"] == kernels.instruction_set
    assert 0 < facts["memory_free_bytes"] < facts["memory_bytes"]
    assert [p["name"] for p in facts["products"]] == ["one token", "64 tokens"]
    assert all(min(p["float32"], p["bfloat16"], p["packed"]) > 0 for p in facts["products"])
    shown = run("doctor").out
    assert "instruction sets" in shown and "passes run in" in shown


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "kernels", lambda: None)
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "datasets" else "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    result = doctor.diagnose()
    assert result.kernel_instruction_set is None and "kernels not compiled" in str(result.lines())
    compiler, datasets, spinning = result.advice
    assert "install a C++ compiler" in compiler and "fgmp[datasets]" in datasets
    assert "OMP_WAIT_POLICY=ACTIVE" in spinning
