"""Other estimates of the sensitivities, each a calibration that ``fgmp.quantize`` takes.

factored                (sum over tokens g^2) (sum over tokens x^2) / tokens: the recipe's
                        ``fisher: factored``
by token                (g^2)^T (x^2): squares of each token's gradient, not of a sequence's sum
nearest rank one        row sums times column sums of the exact F_w over its sum
at the quantized point  exact, for activations too, at the model quantized at 70%; gradients pass
                        straight through rounding
of the text's labels    exact, for activations too, with the text's next tokens as labels: the
                        empirical Fisher information, the recipe's ``labels: text``

Labels of all others are sampled from the model's predictions, the default.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from setting import Setting
from torch import Tensor, nn

from fgmp.formats.activation import Site, fake_quantize
from fgmp.model.linear import mixed_linears
from fgmp.model.losses import sampled_label_loss
from fgmp.model.observe import differentiable_inputs, frozen
from fgmp.sensitivity.fisher import Calibration, calibrate

PerSequence = Callable[[Tensor, Tensor], Tensor]
"""(inputs (T, K) of a linear, gradients (T, N) of its outputs) to a part of F_w, (N, K)."""


def summed(setting: Setting, per_sequence: PerSequence) -> Calibration:
    """Calibration whose F_w sums ``per_sequence`` over sequences; sites are the exact ones."""
    model, linears = setting.linearized()
    sums: dict[str, Tensor] = {}

    def after(name: str, _: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        x = args[0].detach().flatten(0, -2).float()

        def add(gradient: Tensor) -> None:
            part = per_sequence(x, gradient.flatten(0, -2).float())
            sums[name] = part + sums.get(name, 0)

        out.register_hook(add)

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(differentiable_inputs(linears.values()))
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(after, name)).remove)
        for sample in setting.text.samples:
            sampled_label_loss(model, sample)[0].backward()
    exact = setting.calibrated()
    means = {name: total / exact.predictions for name, total in sums.items()}
    return replace(exact, weights={**exact.weights, **means})  # no gradient reaches idle experts


def squares_by_token(x: Tensor, gradient: Tensor) -> Tensor:
    """Sum over tokens of each token's squared weight gradient."""
    return gradient.square().T @ x.square()


def square_by_sequence(x: Tensor, gradient: Tensor) -> Tensor:
    """Squared weight gradient of a sequence: the exact F_w."""
    return (gradient.T @ x).square()


def factored(setting: Setting) -> Calibration:
    """F_w as a product of two factors."""
    return setting.calibrated(fisher="factored")


def by_token(setting: Setting) -> Calibration:
    """F_w of tokens that count alone."""
    return summed(setting, squares_by_token)


def nearest_rank_one(setting: Setting) -> Calibration:
    """Matrix of rank one nearest to the exact F_w in generalized Kullback-Leibler divergence."""
    exact = summed(setting, square_by_sequence)
    nearest = {n: torch.outer(f.sum(1), f.sum(0)) / f.sum() for n, f in exact.weights.items()}
    return replace(exact, weights=nearest)


def text_labels(setting: Setting) -> Calibration:
    """Empirical Fisher information."""
    return setting.calibrated(labels="text")


def quantized_point(setting: Setting) -> Calibration:
    """Fisher information of the quantized model; ranges and tokens are those of the original."""
    packed = mixed_linears(setting.quantized(fp4=0.7))
    sites = {name: linear.input_site.record for name, linear in packed.items()}
    model, linears = setting.linearized()
    for name, linear in packed.items():
        linears[name].weight.data.copy_(linear.weight)

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        with quantized_inputs(model, sites):
            return sampled_label_loss(model, tokens)

    point, exact = calibrate(model, linears, setting.text.samples, loss), setting.calibrated()
    statistics = {n: replace(site, g2=point.sites[n].g2) for n, site in exact.sites.items()}
    return Calibration(point.weights, statistics, exact.predictions)


@contextmanager
def quantized_inputs(model: nn.Module, sites: dict[str, Site]) -> Iterator[None]:
    """Within this context linears read quantized activations, gradients pass straight through.

    Hooks set before, such as those of calibration, see the activations before rounding.
    """

    def quantize(site: Site, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        return (x + (fake_quantize(x.detach(), site)[0] * site.t - x.detach()),)

    with ExitStack() as stack:
        for name, site in sites.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(quantize, site)).remove)
        yield


ESTIMATES: dict[str, Callable[[Setting], Calibration]] = {
    "factored": factored,
    "by token": by_token,
    "nearest rank one": nearest_rank_one,
    "at the quantized point": quantized_point,
    "of the text's labels": text_labels,
}
"""Estimates by the names that results give them."""
