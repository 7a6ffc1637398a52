"""Logits of a model that is gone are those that it gave, bit for bit."""

import gc
import weakref
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config

from fgmp import InputError
from fgmp.evaluation import reference as module
from fgmp.evaluation.perplexity import logits_of
from fgmp.evaluation.reference import Reference

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma() -> nn.Module:
    """A Gemma whose logits are capped at 0.2, so that the cap matters to random weights."""
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


def cohere() -> nn.Module:
    """A model that multiplies its logits after the head."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CohereConfig(**SMALL, logit_scale=0.3)).eval()


def recorded(model: nn.Module, parts: tuple[Tensor, ...], folder: Path) -> Reference:
    reference = Reference(model, folder, len(parts))
    for part in parts:
        assert torch.equal(reference.record(model, part), logits_of(model, part))
    return reference


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "gemma"])
def test_the_head_is_run_again(family: str, tokens: Tensor, tmp_path: Path) -> None:
    model = gemma() if family == "gemma" else make_model(family)
    parts = tokens.split(3)
    expected = [logits_of(model, part) for part in parts]
    reference = recorded(model, parts, tmp_path)
    assert reference.in_files is False and not [*tmp_path.iterdir()]
    embeddings = weakref.ref(model.get_submodule(next(n for n, _ in model.named_children())))
    del model
    gc.collect()
    assert embeddings() is None  # the reference keeps the head alone
    for index, logits in enumerate(expected):
        assert torch.equal(reference.logits(index), logits)


def test_the_cap_is_not_skipped(tokens: Tensor, tmp_path: Path) -> None:
    model = gemma()
    logits = recorded(model, (tokens,), tmp_path).logits(0)
    assert logits.abs().max() < 0.2
    model.config.final_logit_softcapping = None
    assert not torch.equal(logits_of(model, tokens), logits)


def test_other_logits_go_to_files(tokens: Tensor, tmp_path: Path) -> None:
    model, parts = cohere(), tokens.split(3)
    reference = recorded(model, parts, tmp_path)
    assert reference.in_files is True and len([*tmp_path.iterdir()]) == len(parts)
    for index, part in enumerate(parts):
        assert torch.equal(reference.logits(index), logits_of(model, part))


def test_a_full_disk_is_refused_first(
    tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = cohere()
    needed = 3 * logits_of(model, tokens).nbytes
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    with pytest.raises(InputError, match=r"GB of disk in .* are free; set TMPDIR"):
        Reference(model, tmp_path, 3).record(model, tokens)
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage(0, 0, needed))
    Reference(model, tmp_path, 3).record(model, tokens)
