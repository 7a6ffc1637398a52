"""Stages of an interrupted run: what was packed comes back, what is damaged is told."""

from pathlib import Path

import pytest
import torch

from fgmp.errors import InputError
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack
from fgmp.pack.unfinished import Unfinished, forget


def a_weight(share: float, seed: int) -> PackedWeight:
    source = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 40, generator=source)
    fp8 = torch.rand(8, 3, generator=source) < share
    return pack(quantize_weight(weight, tensor_scale(weight.abs().max().item())), fp8)


def test_weights_of_every_mode_come_back(tmp_path: Path) -> None:
    kept = Unfinished(tmp_path / "a" / "b", "0123456789abcdef0")
    weights = {f"layers.{i}.up": a_weight(share, i) for i, share in enumerate((0.0, 0.4, 1.0))}
    assert kept.load(2, list(weights)) is None
    kept.store(2, weights)
    found = kept.load(2, list(weights))
    assert found is not None and found.keys() == weights.keys()
    for name, packed in weights.items():
        own, wanted = found[name].tensors(), packed.tensors()
        assert own.keys() == wanted.keys()
        assert all(own[k].dtype == t.dtype and torch.equal(own[k], t) for k, t in wanted.items())
    assert [p.name for p in kept.folder.iterdir()] == ["0123456789abcdef-00002.safetensors"]
    assert kept.load(1, list(weights)) is None
    assert Unfinished(kept.folder, "1" * 16).load(2, list(weights)) is None
    forget(kept.folder)
    forget(kept.folder)
    assert not kept.folder.exists()


@pytest.mark.parametrize("damage", ["cut", "other names", "a plane is missing"])
def test_what_is_damaged_is_told(damage: str, tmp_path: Path) -> None:
    kept = Unfinished(tmp_path, "0" * 16)
    kept.store(0, {"a": a_weight(0.4, 0)})
    file = tmp_path / "0000000000000000-00000.safetensors"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    names = {"other names": ["b"], "a plane is missing": ["a", "b"]}.get(damage, ["a"])
    with pytest.raises(InputError, match=rf"^{file}: not the packed weights of .*; delete it$"):
        kept.load(0, names)


def test_where_nothing_can_be_written_the_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kept = Unfinished(tmp_path / "file", "0" * 16)
    with pytest.warns(UserWarning, match="could not be written .* this stage could not be resumed"):
        kept.store(0, {"a": a_weight(0.4, 0)})
    assert kept.load(0, ["a"]) is None
