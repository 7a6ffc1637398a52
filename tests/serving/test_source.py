"""A checkpoint folder as a server opens it: what is checked when, and that copies work."""

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from fgmp.errors import CheckpointError
from fgmp.pack.checkpoint import CheckpointConfig
from fgmp.serving.linears import Linears
from fgmp.serving.source import Source

from .checkpoints import write_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("serving") / "llama", "llama")


def damage(folder: Path, copy_to: Path, tensor: str) -> Source:
    """Change the last byte of a tensor in a copy of the checkpoint."""
    shutil.copytree(folder, copy_to)
    file = copy_to / "model.safetensors"
    content = bytearray(file.read_bytes())
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    content[8 + length + header[tensor]["data_offsets"][1] - 1] ^= 1
    file.write_bytes(content)
    return Source(copy_to)


def test_weights_of_a_joined_layer(folder: Path) -> None:
    source = Source(folder)
    source.verify(planes=True)
    linears = Linears(source.config, source.reader.names)
    names = ["q_proj", "k_proj", "v_proj"]
    parts = linears.take("model.layers.0.self_attn.qkv", {"qkv": names})
    assert parts is not None
    source.close()
    for reopened in (source, pickle.loads(pickle.dumps(source)), copy.deepcopy(source)):
        site, weights = reopened.weights(parts)
        assert [weight.n for weight in weights] == [128, 32, 32]
        assert len({weight.t.item() for weight in weights}) == 1
        assert torch.equal(site.sensitivity, source.weights(parts)[0].sensitivity)


def test_what_vllm_reads_itself_is_checked_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model.norm.weight: its bytes must have CRC-32"):
        damage(folder, tmp_path / "a", "model.norm.weight").verify(planes=False)
    packed = damage(folder, tmp_path / "b", "model.layers.1.mlp.up_proj.weight_low")
    packed.verify(planes=False)
    with pytest.raises(CheckpointError, match=r"up_proj.weight_low: its bytes must have CRC-32"):
        packed.verify(planes=True)


def test_a_linear_without_planes_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "a")
    source = Source(tmp_path / "a")
    values = source.config.to_dict()
    owner = "model.layers.0.mlp.down_proj"
    values["sites"][owner]["linears"].append("model.layers.9.mlp.down_proj")
    source.config = CheckpointConfig.from_dict(values)
    with pytest.raises(CheckpointError, match=r"layers.9.mlp.down_proj.weight_shape is missing"):
        source.verify(planes=False)
