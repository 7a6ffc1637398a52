"""A tiny model, a tokenizer of bytes and a text, which the commands' tests share."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

TEXT = "The quick brown fox jumps over the lazy dog, again and again.\n" * 60

SMALL = ["--samples", "6", "--seq-len", "32"]
"""Options of a calibration that takes a second."""


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: one token per byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def a_model(layers: int = 1, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    return model


@dataclass
class Place:
    """A folder with a model, its checkpoint and a text."""

    model: str
    checkpoint: str
    text: str


@dataclass
class Done:
    """A command's exit code and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("}\n")
        result: dict[str, Any] = json.loads(self.out)
        return result

    @property
    def words(self) -> str:
        """Both streams as one line, however the terminal wrapped it."""
        return " ".join((self.out + self.err).split())


Run = Callable[..., Done]


def stored_bytes(checkpoint: Path) -> int:
    """Bytes of a checkpoint's tensors."""
    return sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())


def same_tensors(folder: Path, expected: Path) -> bool:
    """Whether two checkpoints hold the same tensors, bit for bit."""
    a, b = (load_file(path / "model.safetensors") for path in (folder, expected))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)
