"""Run a model and observe the inputs of its layers.

Calibration, scores, moments and energy estimates run sequences through a model that must stay
unchanged. :func:`frozen` guarantees that; :func:`observed_inputs` passes the inputs of layers to a
function.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import torch
from torch import Tensor, nn


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context, no parameter requires a gradient and dropout is off."""
    training = [module for module in model.modules() if module.training]
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def observed_inputs(
    model: nn.Module, names: Iterable[str], observe: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Within this context, ``observe(name, x)`` is called before each named module runs.

    Args:
        model: contains the modules.
        names: dotted names; hooks are registered in this order.
        observe: gets a module's name and its first positional argument, (..., K).
    """

    def hook(name: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        observe(name, args[0])

    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(hook, name)).remove)
        yield


class PassEnded(Exception):
    """Raised in a hook, and caught by what runs the pass: nothing later is of interest."""


@contextmanager
def ends_after(module: nn.Module) -> Iterator[None]:
    """Within this context, a pass through the model ends without a result once ``module`` ran."""

    def end(*_: object) -> None:
        raise PassEnded

    handle = module.register_forward_hook(end)
    try:
        with suppress(PassEnded):
            yield
    finally:
        handle.remove()


@contextmanager
def differentiable_inputs(
    modules: Iterable[nn.Module], seen: Callable[[Tensor], Tensor] = lambda x: x
) -> Iterator[None]:
    """Within this context, the first argument of each module carries a gradient.

    Gradients then reach the outputs of frozen layers.

    Args:
        modules: layers whose input is the first positional argument.
        seen: gets that input, detached if it required no gradient, and returns the tensor that
            the layer reads instead.
    """

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_()
        return (seen(x), *args[1:])

    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@torch.no_grad()
def run_all(
    model: nn.Module,
    samples: Iterable[object],
    loss: Callable[[nn.Module, object], object],
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Run sequences forward through a frozen model; observers see the activations.

    Args:
        model: any module.
        samples: sequences; each is passed to ``loss``.
        loss: runs the model on one sequence; its result is not used.
        advance: called after each sequence.
    """
    with frozen(model):
        for sample in samples:
            loss(model, sample)
            advance()
