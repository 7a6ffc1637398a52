"""Gradients through packed linears, used by calibration, tuning and adapters.

The gradient of a packed linear is that of its dequantized weight. The activation quantizer counts
as the identity (straight-through). Packed weights are constants and get no gradient.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fgmp.model.linear import MixedLinear


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, linear: MixedLinear) -> Tensor:
        ctx.linear = linear
        return MixedLinear.forward(linear, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        input_needed, bias_needed, _ = ctx.needs_input_grad
        x = bias = None
        if input_needed:
            x = (gradient.float() @ ctx.linear.weight).to(gradient.dtype)
        if bias_needed:
            bias = gradient.float().flatten(0, -2).sum(0).to(ctx.linear.bias.dtype)
        return x, bias, None


@contextmanager
def differentiable(linears: Iterable[MixedLinear]) -> Iterator[None]:
    """Within this context, packed linears pass gradients to their inputs and biases."""
    linears = list(linears)
    differentiate(linears)
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward


def differentiate(linears: Iterable[MixedLinear]) -> None:
    """Make packed linears pass gradients to their inputs and biases from now on."""
    for linear in linears:
        linear.forward = partial(_apply, linear)  # type: ignore[method-assign]


def _apply(linear: MixedLinear, x: Tensor) -> Tensor:
    y: Tensor = _StraightThrough.apply(x, linear.bias, linear)  # type: ignore[no-untyped-call]
    return y
