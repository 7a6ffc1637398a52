"""Passages: the tokens at which two models differ most, found by a direct computation."""

import copy
from collections.abc import Sequence

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

from fgmp.evaluation.passages import changed_passages


def decode(ids: Sequence[int]) -> str:
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def models() -> tuple[nn.Module, nn.Module]:
    original = make_model("llama")
    changed = copy.deepcopy(original)
    generator = torch.Generator().manual_seed(5)
    for parameter in changed.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return original, changed


@torch.no_grad()
def divergences(original: nn.Module, changed: nn.Module, windows: Tensor) -> Tensor:
    """KL at every token but the first of each window, float64 (B, L - 1)."""
    p, q = (
        m(input_ids=windows).logits[:, :-1].double().log_softmax(-1) for m in (original, changed)
    )
    return (p.exp() * (p - q)).sum(-1)


def test_the_largest_divergences_come_first(
    models: tuple[nn.Module, nn.Module], tokens: Tensor
) -> None:
    kl = divergences(*models, tokens)
    passages = changed_passages(*models, tokens, decode, count=5)
    window = int(kl.max(1).values.argmax())
    peaks = kl.max(1).values.sort(descending=True).values[:5]  # windows are shorter than a passage
    torch.testing.assert_close(torch.tensor([p.peak_kl for p in passages]), peaks.float(),
                               rtol=1e-3, atol=1e-5)  # fmt: skip
    first = passages[0]
    assert first.peak == int(kl[window].argmax()) + 1
    assert "".join(first.tokens) == decode(tokens[window].tolist())
    assert first.kl[0] is None
    torch.testing.assert_close(torch.tensor(first.kl[1:]), kl[window].float(), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_alternatives_are_the_models_own(
    models: tuple[nn.Module, nn.Module], tokens: Tensor
) -> None:
    kl = divergences(*models, tokens)
    window, position = divmod(int(kl.argmax()), kl.shape[1])
    first = changed_passages(*models, tokens, decode, count=1)[0]
    for model, likely, actual in zip(
        models, (first.original, first.quantized), first.actual, strict=True
    ):
        p = model(input_ids=tokens).logits[window, position].softmax(-1)
        top = p.topk(3)
        assert [text.strip() for text, _ in likely] == [str(i) for i in top.indices.tolist()]
        torch.testing.assert_close(torch.tensor([s for _, s in likely]), top.values)
        assert actual == pytest.approx(p[tokens[window, position + 1]].item(), rel=1e-4)


def test_passages_do_not_overlap(models: tuple[nn.Module, nn.Module]) -> None:
    windows = torch.randint(128, (1, 64), generator=torch.Generator().manual_seed(2))
    passages = changed_passages(*models, windows, decode, count=8)
    assert 1 <= len(passages) <= 2  # 63 predictions hold at most two peaks 49 apart
    assert all(len(p.tokens) == len(p.kl) <= 49 for p in passages)


def test_an_equal_model_has_changed_nowhere(
    models: tuple[nn.Module, nn.Module], tokens: Tensor
) -> None:
    assert changed_passages(models[0], models[0], tokens, decode, count=1)[0].peak_kl == 0


def test_a_character_of_several_tokens_is_whole(
    models: tuple[nn.Module, nn.Module], tokens: Tensor
) -> None:
    """Bytes decoded one by one would all be replacement characters."""
    euro = "a€b€".encode()
    windows = torch.tensor([list(euro)]) % 128

    def of_bytes(ids: Sequence[int]) -> str:
        return euro[: len(ids)].decode(errors="replace")

    (passage,) = changed_passages(*models, windows, of_bytes, count=1)
    assert passage.tokens == ["a", "", "", "€", "b", "", "", "€"]
