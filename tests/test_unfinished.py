"""Parts of an interrupted run: what was kept comes back, what is damaged is told."""

from pathlib import Path

import pytest
import torch

from fgmp.errors import InputError
from fgmp.unfinished import Unfinished, forget


def test_tensors_come_back(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "a" / "b", "0123456789abcdef0")
    tensors = {
        "a": torch.arange(24, dtype=torch.uint8).view(4, 6).T,
        "b": torch.tensor(3),
        "c": torch.randn(5).bfloat16(),
    }
    assert kept.load("stage 2") is None
    kept.store("stage 2", tensors)
    found = kept.load("stage 2")
    assert found is not None and found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert [p.name for p in kept.folder.iterdir()] == ["0123456789abcdef-stage-2.safetensors"]
    assert kept.load("stage 1") is None
    assert Unfinished(kept.folder, "1" * 16).load("stage 2") is None
    forget(kept.folder)
    forget(kept.folder)
    assert not kept.folder.exists()


def test_what_is_damaged_is_told(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, "0" * 16)
    kept.store("tuning", {"a": torch.ones(3)})
    file = tmp_path / "0000000000000000-tuning.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InputError, match=rf"^{file}: not tuning of this run .*; delete it$"):
        kept.load("tuning")


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Unfinished(tmp_path / "file", "0" * 16)
    with pytest.warns(UserWarning, match="could not be written .* this part could not be resumed"):
        kept.store("tuning", {"a": torch.ones(3)})
    assert kept.load("tuning") is None
