"""The uniform twin of a mixed checkpoint: one format per site, at no more bytes.

A mix of blocks is worth its complexity only if it beats the best choice of one format per layer.
The twin is that choice, by the rule of AutoQuantize (NVIDIA Model Optimizer): a site, its
activations and the weights of all its linears, is FP8 or FP4 as a whole. The FP8 sites maximize the
sum of gains, under the bytes that the checkpoint's packed weights take. Rounding is to nearest, as
in the other uniform baselines.

The gain of a site is score(FP4) - score(FP8), and its score in a format Q is

    score(Q) = c mean over tokens of sum over linears of |Q(x) Q(W)^T - x W^T|^2
    c        = sum over channels of F_x / sum over linears of |W|^2

AutoQuantize multiplies the squared error of every output by its squared gradient. Here all outputs
of a site have the same, c: with uncorrelated dL/dy of mean square c, dL/dx = W^T dL/dy has the mean
squares whose sum is c |W|^2, and F_x, the sensitivities in the checkpoint, are these mean squares.
So no backward pass is needed. The mean is over the first tokens of the evaluation windows: the twin
is chosen on text that it is measured on, which favours it.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import group_scale
from fgmp.formats.activation import Site, fake_quantize
from fgmp.formats.codec import decode_e4m3, from_blocks
from fgmp.formats.rules import PAPER_QUANTIZER
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import quantize_weight
from fgmp.model.observe import ends_after, frozen
from fgmp.model.select import linearize
from fgmp.pack.planes import packed_bytes
from fgmp.quantization.sharing import joined, weights_by_scale
from fgmp.quantization.uniform import Template, one_format_per_site, require_same_shapes
from fgmp.recipe import Recipe

_SCORED_TOKENS = 2048
"""Tokens on which sites are scored, in whole windows."""
_MAX_CAPACITY = 2**20
"""Largest number of units of bytes in which the allocation counts."""
_NEAREST: dict[str, Any] = {"rule": PAPER_QUANTIZER.rule, "scales": PAPER_QUANTIZER.scales}


def reason_against(template: Template) -> str | None:
    """A sentence why a checkpoint has no twin; None if it has one."""
    policy = POLICIES.get(template.policy)
    if policy is None or policy.sensitivity != "fisher":
        return (
            f"absent: the checkpoint's policy is {template.policy}, so its sensitivities "
            "are no Fisher information, by which the twin chooses formats"
        )
    return None


def twin(original: nn.Module, template: Template, fp8: frozenset[str]) -> nn.Module:
    """Turn ``original``, in place, into the twin with these FP8 sites; frees its weights."""
    fp4 = 1 - len(fp8) / len(template.sites)
    return one_format_per_site(original, template, fp8, Recipe(fp4=fp4, clip="off"))


def allocate(
    original: nn.Module,
    template: Template,
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
) -> frozenset[str]:
    """Owners of the twin's FP8 sites.

    Args:
        original: the unquantized causal LM; linearized in place.
        template: the mixed checkpoint; :func:`reason_against` has returned None.
        windows: evaluation windows, int64 (B, L); the first 2,048 tokens are used.
        advance: called after each linear, each time it runs.
    """
    linearize(original)
    require_same_shapes(original, template)
    owners = {name: owner for owner, names in template.linears_of.items() for name in names}
    # Sites that share a weight have the same format.
    groups = joined(
        [owners[n] for n in template.linears_of[owner]]
        + [owners[template.shared[n]] for n in template.linears_of[owner] if n in template.shared]
        for owner in template.linears_of
    )
    gains = site_gains(original, template, windows, advance)
    shapes = {name: template.shapes[f"{name}.weight"] for name in template.holders}
    fp4 = {name: packed_bytes(n, k, 0) for name, (n, k) in shapes.items()}
    costs = dict.fromkeys(template.linears_of, 0)
    for name, (n, k) in shapes.items():
        costs[owners[name]] += packed_bytes(n, k) - fp4[name]
    chosen = best_subset(
        {group[0]: sum(gains[owner] for owner in group) for group in groups},
        {group[0]: sum(costs[owner] for owner in group) for group in groups},
        template.plane_bytes - sum(fp4.values()),
    )
    return frozenset(owner for group in groups if group[0] in chosen for owner in group)


def site_gains(
    original: nn.Module,
    template: Template,
    windows: Tensor,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Gain of every site, score(FP4) - score(FP8) as in this module's docstring, by owner.

    Arguments as for :func:`allocate`; ``original`` is linearized.
    """
    owners = {name: owner for owner, names in template.linears_of.items() for name in names}
    linears: dict[str, Any] = {name: original.get_submodule(name) for name in owners}
    tensor_scales = {
        name: group_scale(linears[n].weight.detach() for n in group)
        for group in weights_by_scale(template.linears_of, template.shared)
        for name in group
    }
    squared_error = {name: 0.0 for name in owners}
    tokens = dict.fromkeys(owners, 0)

    def score(name: str, linear: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
        x, site = args[0], template.sites[owners[name]]
        exact = y.float() if linear.bias is None else y.float() - linear.bias.float()
        t = tensor_scales[template.shared.get(name, name)]
        codes = quantize_weight(linear.weight, t)
        for units, threshold, sign in (
            (codes.fp4_units(), THRESHOLD_ALL_FP4, 1),
            (codes.fp8_units(), THRESHOLD_ALL_FP8, -1),
        ):
            weight = from_blocks(units, codes.k) * t
            q = fake_quantize(x, replace(site, threshold=threshold, **_NEAREST))[0] * site.t
            error = (q.float() @ weight.T - exact).square().sum(dtype=torch.float64)
            squared_error[name] += sign * error.item()
        tokens[name] += exact[..., 0].numel()
        advance()

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.callback(linear.register_forward_hook(partial(score, name)).remove)
        _run(original, windows, list(linears.values())[-1])
    gains = {}
    for owner, names in template.linears_of.items():
        mean = sum(squared_error[name] / max(1, tokens[name]) for name in names)
        norm = sum(linears[n].weight.detach().square().sum(dtype=torch.float64) for n in names)
        fisher = sensitivities(template.sites[owner]).sum().item()
        gains[owner] = fisher / float(norm) * mean if norm > 0 else 0.0
    return gains


@torch.no_grad()
def _run(original: nn.Module, windows: Tensor, last: nn.Module) -> None:
    """Run the model on the first windows, up to ``last``, the last module of interest."""
    count = max(1, _SCORED_TOKENS // windows.shape[1])
    device = next(original.parameters()).device
    with frozen(original), ends_after(last):
        original(input_ids=windows[:count].to(device), use_cache=False)


def sensitivities(site: Site) -> Tensor:
    """F_x by channel as a checkpoint stores it, float64 (K,)."""
    return decode_e4m3(site.sensitivity).double() * site.gamma


def best_subset(gains: Mapping[str, float], costs: Mapping[str, int], room: int) -> frozenset[str]:
    """Names with the largest sum of gains, whose costs sum to at most ``room``.

    Exact if ``room`` has at most a million of the greatest common divisor of the costs, as it has
    for layers of a few shapes. Otherwise costs are rounded up to a millionth of ``room``.

    Args:
        gains: by name; names without a positive gain are never chosen.
        costs: positive, by name.
        room: largest sum of costs.
    """
    unit = max(math.gcd(*costs.values()), -(-room // _MAX_CAPACITY))
    capacity = room // unit
    best = torch.zeros(capacity + 1, dtype=torch.float64)  # by units of cost that may be used
    steps: list[tuple[int, list[str], Tensor]] = []
    by_cost: dict[int, list[str]] = {}
    for name, gain in gains.items():
        if gain > 0:
            by_cost.setdefault(-(-costs[name] // unit), []).append(name)
    # Of equal costs the largest gains come first, so a number says which are chosen.
    for cost, names in by_cost.items():
        names.sort(key=lambda name: -gains[name])
        total, taken, gained = best.clone(), torch.zeros(capacity + 1, dtype=torch.int64), 0.0
        for number, name in enumerate(names[: capacity // cost], start=1):
            gained += gains[name]
            candidate = best[: capacity + 1 - number * cost] + gained
            better = candidate > total[number * cost :]
            total[number * cost :][better] = candidate[better]
            taken[number * cost :][better] = number
        best = total
        steps.append((cost, names, taken))
    chosen: list[str] = []
    for cost, names, taken in reversed(steps):
        number = int(taken[capacity])
        chosen += names[:number]
        capacity -= number * cost
    return frozenset(chosen)
