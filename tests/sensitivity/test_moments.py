"""Second moments are sums over tokens, and tell how far any other weight is from the original."""

import pytest
import torch
from torch import Tensor

from fgmp.sensitivity.moments import MOMENT_BYTES, Moments, Source, add_moments, new_moments

K = 44


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Correlated activations (300, K), and the same with noise in place of rounding."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 12, generator=g) @ torch.randn(12, K, generator=g)
    return x, x + 0.05 * torch.randn(300, K, generator=g)


def moments_of(x: Tensor, q: Tensor) -> Moments:
    moments = new_moments(K, x.device)
    for part, quantized in zip(x.split(70), q.split(70), strict=True):
        add_moments(moments, part.unsqueeze(0), quantized.unsqueeze(0))
    return moments


def test_moments_are_sums_over_tokens(tokens: tuple[Tensor, Tensor]) -> None:
    x, q = tokens
    moments = moments_of(x, q)
    assert (moments.h.dtype, moments.d.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(moments.h.double(), q.double().T @ q.double(), rtol=1e-5, atol=1e-3)
    difference = x.double() - q.double()
    torch.testing.assert_close(moments.d.double(), difference.T @ q.double(), rtol=1e-5, atol=1e-3)
    assert moments.h.nbytes + moments.d.nbytes == MOMENT_BYTES * K**2


def test_no_token_adds_nothing() -> None:
    moments = new_moments(K, torch.device("cpu"))
    add_moments(moments, torch.zeros(2, 0, K), torch.zeros(2, 0, K))
    assert not moments.h.any() and not moments.d.any()


def test_bf16_is_summed_in_fp32() -> None:
    """A sum of 4,096 ones: in bf16 it would stop at 256."""
    moments = new_moments(1, torch.device("cpu"))
    ones = torch.ones(64, 1, dtype=torch.bfloat16)
    for _ in range(64):
        add_moments(moments, 2 * ones, ones)
    assert moments.h.item() == moments.d.item() == 4096


def test_the_output_error_of_any_weight_is_a_quadratic_form(tokens: tuple[Tensor, Tensor]) -> None:
    """sum |W x - V q|^2 = sum |W x|^2 - 2 <V, W C> + <V, V H>, without running the layer."""
    x, q = tokens
    g = torch.Generator().manual_seed(1)
    w, moments = torch.randn(8, K, generator=g).double(), moments_of(x, q)
    v = w + 0.1 * torch.randn(8, K, generator=g)
    error = (x.double() @ w.T - q.double() @ v.T).square().sum()
    h = moments.h.double()
    c = moments.d.double() + h
    form = (x.double() @ w.T).square().sum() - 2 * (v * (w @ c)).sum() + (v * (v @ h)).sum()
    # A difference of sums some hundred times as large, of fp32 terms.
    torch.testing.assert_close(form, error, rtol=1e-3, atol=0)


@pytest.mark.parametrize("rows", [8, 40])
def test_narrow_weights_enter_their_product_with_c(
    rows: int, tokens: tuple[Tensor, Tensor]
) -> None:
    x, q = tokens
    g = torch.Generator().manual_seed(1)
    weights = {name: torch.randn(n, K, generator=g) for name, n in (("a", rows), ("b", 12))}
    source = Source(weights)
    assert bool(source.rows) == (rows == 8)
    moments = new_moments(K, x.device, source)
    variant = moments.variant()
    for part, quantized in zip(x.split(70), q.split(70), strict=True):
        add_moments(moments, part.unsqueeze(0), quantized.unsqueeze(0), source)
        add_moments(variant, part.unsqueeze(0), part.unsqueeze(0), source, to_h=False)
    assert moments.d.shape == (20 if source.rows else K, K)
    for name, weight in weights.items():
        expected = weight.double() @ (x - q).double().T @ q.double()
        torch.testing.assert_close(
            moments.drift(name, weight).double(), expected, rtol=1e-4, atol=1e-3
        )
    assert torch.equal(moments.h, moments_of(x, q).h)
    assert variant.h is moments.h and not variant.d.any()


def test_panels_of_h_do_not_matter(
    tokens: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = moments_of(*tokens)
    monkeypatch.setattr("fgmp.sensitivity.moments._PANEL", 16)
    parts = moments_of(*tokens)
    torch.testing.assert_close(parts.h, whole.h)
    assert torch.equal(parts.h, parts.h.T) and torch.equal(parts.d, whole.d)
