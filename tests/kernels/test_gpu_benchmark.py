"""The GPU benchmark on a machine without one."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PATH = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


def test_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json"])
    spec = importlib.util.spec_from_file_location("gpu_benchmark", PATH)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", script)
    spec.loader.exec_module(script)
    with pytest.raises(SystemExit, match="needs a CUDA device, and PyTorch sees none here"):
        script.main()
    assert capsys.readouterr().out == ""
