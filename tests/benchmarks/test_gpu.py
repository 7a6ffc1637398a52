"""The GPU benchmark on a machine without one."""

import gpu
import pytest
import torch


def test_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu.py", "--json"])
    with pytest.raises(SystemExit, match="needs a CUDA device, and PyTorch sees none here"):
        gpu.main()
    assert capsys.readouterr().out == ""
