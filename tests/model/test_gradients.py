"""Gradients of packed linears, against autograd through the dequantized weight."""

import pytest
import torch
from torch import Tensor, nn

from fgmp.formats.activation import Site, multiplier, sensitivity_codes
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.model.gradients import differentiable
from fgmp.model.linear import ActivationSite, MixedLinear
from fgmp.pack.planes import pack

K, N = 40, 24


def a_linear(bias: bool = True, dtype: torch.dtype = torch.float32) -> MixedLinear:
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=g)
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    packed = pack(codes, torch.rand(codes.scale.shape, generator=g) < 0.3)
    sensitivity, gamma = sensitivity_codes(torch.rand(K, generator=g))
    site = ActivationSite(Site(multiplier(4.0), sensitivity, gamma, 2**52))
    values = torch.randn(N, generator=g).to(dtype) if bias else None
    return MixedLinear(packed, values, site, owns_site=True)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, K, generator=torch.Generator().manual_seed(1)).requires_grad_()


def test_the_forward_pass_is_the_packed_one(x: Tensor) -> None:
    linear = a_linear()
    with differentiable([linear]):
        assert torch.equal(linear(x), MixedLinear.forward(linear, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_dequantized_weight(dtype: torch.dtype, x: Tensor) -> None:
    """Straight through the quantizer of the input, whatever it rounded."""
    linear = a_linear(dtype=dtype)
    linear.bias.requires_grad_()
    x = x.detach().to(dtype).requires_grad_()
    with differentiable([linear]):
        y = linear(x)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        (y * weights).sum().backward()
    plain = x.detach().float().requires_grad_()
    bias = linear.bias.detach().float().requires_grad_()
    (nn.functional.linear(plain, linear.weight, bias) * weights.float()).sum().backward()
    assert x.grad.dtype == dtype and linear.bias.grad.dtype == dtype
    assert torch.equal(x.grad, plain.grad.to(dtype))
    assert torch.equal(linear.bias.grad, bias.grad.to(dtype))


@pytest.mark.parametrize("needed", ["input", "bias"])
def test_only_what_is_needed_is_computed(needed: str, x: Tensor) -> None:
    linear = a_linear()
    linear.bias.requires_grad_(needed == "bias")
    x = x.detach().requires_grad_(needed == "input")
    with differentiable([linear]):
        linear(x).sum().backward()
    assert (x.grad is None) == (needed == "bias")
    assert (linear.bias.grad is None) == (needed == "input")


def test_without_a_bias(x: Tensor) -> None:
    linear = a_linear(bias=False)
    with differentiable([linear]):
        linear(x).sum().backward()
    assert torch.allclose(x.grad, linear.weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-6)


def test_afterwards_no_gradient_passes(x: Tensor) -> None:
    """Also after an error."""
    linear = a_linear()
    with pytest.raises(RuntimeError, match="inside"), differentiable([linear]):
        assert linear(x).requires_grad
        raise RuntimeError("inside")
    assert "forward" not in vars(linear)
    assert torch.equal(linear(x.detach()), MixedLinear.forward(linear, x.detach()))
