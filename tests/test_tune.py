"""Tuning what is not quantized: predictions come back, codes stay, and the model with them."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import InputError, Recipe
from fgmp.demo.text import docstrings, standard_library
from fgmp.model.convert import with_parameters
from fgmp.model.gradients import differentiable
from fgmp.model.linear import mixed_linears
from fgmp.model.select import linearize
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.progress import Stages
from fgmp.sensitivity.memory import MemoryEstimate, estimate

DEMO = str(Path(fgmp.__file__).parent / "demo" / "model")
ALL_FP4 = {"fp4": 1.0, "clip": "off", "compensate": False}


def quantized(tokens: Tensor, family: str = "llama", **recipe: object) -> nn.Module:
    return fgmp.quantize(make_model(family), tokens, Recipe(**{**ALL_FP4, **recipe}))


def test_predictions_come_back_on_text_that_was_held_out() -> None:
    text = next(d for d in docstrings(standard_library()) if len(d) > 6000)
    tokens = torch.tensor(load_tokenizer(DEMO)(text).input_ids)[: 12 * 64].view(12, 64)
    model = load_model(DEMO)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    fgmp.quantize(model, tokens[:8], Recipe(**ALL_FP4, tune=12), held_out=tokens[8:])
    found = config_of(model).result["tune"]
    assert found["used"]
    assert found["held_out_kl"]["with"] < 0.95 * found["held_out_kl"]["without"]
    untuned = fgmp.quantize(load_model(DEMO), tokens[:8], Recipe(**ALL_FP4), held_out=tokens[8:])
    for name, linear in mixed_linears(model).items():
        assert torch.equal(linear.weight, untuned.get_submodule(name).weight)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_ties_biases_and_files_hold(
    family: str, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgmp.heldout.Trial.clearly_better", lambda self, other: True)
    model = quantized(tokens, family, tune=2)
    assert config_of(model).result["tune"]["used"]
    plain = quantized(tokens[:7], family)  # the eighth sequence was held out
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == (family != "gpt_neox")
    changed = {n for n, p in model.named_parameters() if not p.equal(plain.get_parameter(n))}
    zero = {n for n, p in plain.named_parameters() if not p.any()}
    assert changed == {n for n, _ in plain.named_parameters()} - zero
    fgmp.save(model, tmp_path / "out")
    again = fgmp.load(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_what_does_not_help_is_left_out(tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgmp.heldout.Trial.clearly_better", lambda self, other: False)
    model, plain = quantized(tokens, tune=1), quantized(tokens[:7])
    assert not config_of(model).result["tune"]["used"]
    for name, parameter in plain.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_gradients_are_those_of_the_dequantized_linear(tokens: Tensor) -> None:
    linears = mixed_linears(quantized(tokens, "gpt2"))
    linear = linears["transformer.h.0.mlp.c_fc"]
    x = torch.randn(3, 5, linear.in_features, requires_grad=True)
    weight = torch.randn(3, 5, linear.out_features)
    linear.bias.requires_grad_(True)
    with differentiable([linear]):
        y = linear(x)
        assert torch.equal(y, type(linear).forward(linear, x))
        (y * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight @ linear.weight)
    torch.testing.assert_close(linear.bias.grad, weight.sum((0, 1)))
    assert "forward" not in vars(linear)


def test_the_original_is_back_after_an_interruption(tokens: Tensor) -> None:
    model = make_model("gpt2")
    linearize(model)
    before = dict(model.named_modules())
    state = {n: p.detach().clone() for n, p in model.named_parameters()}

    class Stopped(Exception):
        pass

    class Progress:
        def __call__(self, title: str, total: int) -> "Progress":
            self.title = title
            return self

        def __enter__(self) -> "Stages":
            def advance() -> None:
                if self.title == "tuning":
                    raise Stopped

            return advance  # type: ignore[return-value]

        def __exit__(self, *_: object) -> None:
            pass

    with pytest.raises(Stopped):
        fgmp.quantize(model, tokens, Recipe(**ALL_FP4, tune=1), progress=Progress())  # type: ignore[arg-type]
    assert dict(model.named_modules()) == before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name]) and parameter.grad is None


def test_copies_share_what_modules_share() -> None:
    model = make_model("llama")
    name = "model.embed_tokens.weight"
    new = torch.zeros_like(model.get_parameter(name))
    made = with_parameters(model, {}, {name: new})
    assert set(made) == {"model.embed_tokens", "lm_head"}
    assert made["model.embed_tokens"].weight is made["lm_head"].weight
    assert model.get_parameter(name).any()


def test_another_loss_and_too_few_sequences_are_refused(tokens: Tensor) -> None:
    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        return model(input_ids=sample[None]).logits.sum(), 1

    with pytest.raises(InputError, match=r"^tune needs the predictions of a causal .* tune 3$"):
        fgmp.quantize(make_model("llama"), tokens, Recipe(**ALL_FP4, tune=3), loss=loss)
    with pytest.raises(InputError, match=r"^tune needs at least 2 sequences, got 1$"):
        quantized(tokens[:1], tune=1)


def test_memory_counts_what_is_tuned() -> None:
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4))
    linears = {"0": model[0], "1": model[1]}

    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        return model(sample).square().sum(), len(sample)

    plain, tuned = (
        estimate(model, linears, torch.zeros(10, 8), loss, 0.6, tuned=t) for t in (False, True)
    )
    assert (plain.tuning, tuned.tuning) == (0, 4 * (16 + 3 * 4))
    assert MemoryEstimate(held=9, fisher=5, packed=7, working=3, tuning=20).peak == 39
