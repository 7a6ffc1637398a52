"""The context length of a model, however its configuration names it."""

import types
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn
from transformers import (
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    PretrainedConfig,
    Qwen2VLConfig,
)

from fgmp.model.source import context_length


def model_with(config: Any) -> nn.Module:
    model = nn.Module()
    model.config = config
    return model


@pytest.mark.parametrize(
    "config",
    [
        lambda: LlamaConfig(max_position_embeddings=300),
        lambda: GPT2Config(n_positions=300),
        lambda: MptConfig(max_seq_len=300),
        lambda: BloomConfig(seq_length=300),
        lambda: Qwen2VLConfig(text_config={"max_position_embeddings": 300}),
        *(
            lambda key=key: PretrainedConfig(**{key: 300})  # type: ignore[misc]
            for key in ("max_sequence_length", "seq_length", "n_ctx", "context_length")
        ),
    ],
)
def test_the_context_length_has_many_names(config: Callable[[], Any]) -> None:
    assert context_length(model_with(config())) == 300


def test_attribute_maps_are_respected() -> None:
    class Mapped(PretrainedConfig):  # type: ignore[misc]
        attribute_map = {"max_position_embeddings": "longest"}  # noqa: RUF012 - as all have it

    assert context_length(model_with(Mapped(longest=300))) == 300


def test_the_text_model_comes_first() -> None:
    text = types.SimpleNamespace(n_ctx=300)
    config = types.SimpleNamespace(max_position_embeddings=77, text_config=text)
    assert context_length(model_with(config)) == 300

    def ambiguous() -> None:
        raise ValueError("Multiple valid text configs were found")

    config.get_text_config = ambiguous
    assert context_length(model_with(config)) == 300
    del config.text_config
    assert context_length(model_with(config)) == 77


def test_a_model_without_a_limit_has_the_default() -> None:
    config = types.SimpleNamespace(max_position_embeddings=None, n_ctx=-1)
    for model in (nn.Module(), model_with(config), model_with(MambaConfig())):
        assert context_length(model) == 2048
        assert context_length(model, 100) == 100
