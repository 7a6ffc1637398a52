"""From a budget to shares of FP4 blocks, without calibrating anew.

``assign.budget.Frontier`` knows the best shares for every mean of bits. The other budgets ask how
far along it one may go:

    max_bytes       the most bits whose checkpoint has no more bytes, by counting them
    max_energy      the most bits whose matrix products take no more energy: the formats of all
                    pairs of blocks are counted on held-out text, ``hardware.budget`` weighs them
    max_increase    the least bits at which perplexity on held-out text exceeds all-FP8's by no
                    more: the model is packed and measured at each of a few points
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from fgmp.assign.activations import assign_activations
from fgmp.assign.budget import RELIEF, Frontier, furthest
from fgmp.assign.policy import weight_masks
from fgmp.errors import InputError
from fgmp.formats.activation import Site
from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.model.linear import ActivationSite
from fgmp.model.store import bytes_to_save
from fgmp.pack.planes import packed_bytes
from fgmp.recipe import Recipe
from fgmp.sensitivity.fisher import frozen
from fgmp.task import Scored, Task

_FINE_STEPS = 20
_ENERGY_STEPS = 8
_INCREASE_STEPS = 6
"""Halvings of the 3.5 bits between all FP4 and all FP8: to a millionth, 0.014 and 0.055 bits."""

_SITE_BYTES = 4 + 4 + 8
"""r, gamma and threshold (docs/format.md, section 3)."""


@dataclass(frozen=True)
class Point:
    """Shares of weights and activations in FP4; under a budget also the bits, and facts of it."""

    shares: tuple[float, float]
    facts: dict[str, float] = field(default_factory=dict)


def solve(
    task: Task,
    scored: Scored,
    increase: Callable[[tuple[float, float]], float],
) -> Point:
    """The shares that a recipe asks for, or that its budget comes to.

    Args:
        task: its recipe gives the budget, its held-out sequences count energies.
        scored: see there.
        increase: of perplexity over all-FP8's in percent, of the model at some shares.

    Raises:
        InputError: the budget is less than all FP4 takes.
    """
    recipe = task.recipe
    if scored.policy.fraction is not None:
        return Point((scored.policy.fraction, scored.policy.fraction))
    if recipe.budget is None:
        return Point((recipe.fp4, recipe.activation_fraction))
    frontier = Frontier(
        scored.variants[-1].scores.values(),
        scored.histograms.values(),
        scored.predictions,
        relief=RELIEF if recipe.compensate else 1.0,
    )
    facts: dict[str, float] = {}
    if recipe.max_bytes is not None:
        bits = _bits_of_bytes(recipe.max_bytes, task, scored, frontier)
    elif recipe.max_energy is not None:
        bits, facts["energy_percent"] = _bits_of_energy(recipe.max_energy, task, scored, frontier)
    elif recipe.max_increase is not None:
        bound = recipe.max_increase
        bits = furthest(
            lambda b: increase(frontier.shares(b)) <= bound, FP8_BITS, FP4_BITS, _INCREASE_STEPS
        )
    else:
        assert recipe.bits is not None
        bits = recipe.bits
    return Point(frontier.shares(bits), {"bits": bits, **facts})


# Bytes.


def require_bytes(
    max_bytes: int, model: nn.Module, linears: dict[str, nn.Linear], records: Mapping[str, Site]
) -> None:
    """Refuse fewer bytes than all FP4 needs.

    Without ``records``, sites are not known yet: there are at most as many as linears.
    """
    ends = [tensor_bytes(model, linears, records, dict.fromkeys(linears, n)) for n in (0, None)]
    if max_bytes >= ends[0]:
        return
    if records:
        bound, most = f"at least {ends[0]:,}", ends[1]
    else:
        sites = sum(_SITE_BYTES + linear.in_features for linear in linears.values())
        bound, most = f"more than {ends[0]:,}, and {ends[0] + sites:,} is enough", ends[1] + sites
    raise InputError(
        f"max_bytes must be {bound}, for the tensors of the model with every quantized weight in "
        f"FP4 (all in FP8: {most:,}), got {max_bytes:,}"
    )


def tensor_bytes(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    records: Mapping[str, Site],
    fp8_blocks: Mapping[str, int | None],
) -> int:
    """Bytes of all tensors of the checkpoint to come; ``fp8_blocks`` by linear, None for all."""
    replaced = {f"{name}.weight" for name in linears}
    total = sum(size for name, size in bytes_to_save(model).items() if name not in replaced)
    total += sum(_SITE_BYTES + len(record.sensitivity) for record in records.values())
    for name, linear in linears.items():
        n, k = linear.weight.shape
        total += packed_bytes(n, k, fp8_blocks[name])
    return total


def _bits_of_bytes(limit: int, task: Task, scored: Scored, frontier: Frontier) -> float:
    require_bytes(limit, task.model, task.linears, scored.records)

    def fits(bits: float) -> bool:
        share = frontier.shares(bits)[0]
        for variant in scored.variants:
            masks, _ = weight_masks(scored.policy, variant.scores, share)
            blocks = {name: int(mask.sum()) for name, mask in masks.items()}
            if tensor_bytes(task.model, task.linears, scored.records, blocks) > limit:
                return False
        return True

    return furthest(fits, FP4_BITS, FP8_BITS, _FINE_STEPS)


# Energy.


def require_known_energy(recipe: Recipe) -> None:
    """Refuse a rule, scales and sensitivities whose quantizer was never measured."""
    from fgmp.hardware.budget import machine

    machine("mixed", _quantizer(recipe))


def _quantizer(recipe: Recipe) -> str:
    """As ``hardware.budget`` calls it."""
    return f"{recipe.rule}, {recipe.scales}, {recipe.sensitivities}"


def _bits_of_energy(
    limit: float, task: Task, scored: Scored, frontier: Frontier
) -> tuple[float, float]:
    """The bits, and what they take in percent of all FP8."""
    found: dict[float, float] = {}

    def energy(bits: float) -> float:
        found[bits] = _energy_percent(task, scored, frontier.shares(bits))
        return found[bits]

    least = energy(FP4_BITS)
    if limit < least:
        raise InputError(
            f"max_energy must be at least {least:.1f}%, what all FP4 takes of all-FP8's energy "
            f"on this model (all FP8 on the mixed machine: {energy(FP8_BITS):.1f}%), got {limit:g}%"
        )
    bits = furthest(lambda b: energy(b) <= limit, FP4_BITS, FP8_BITS, _ENERGY_STEPS)
    return bits, found[bits]


@torch.no_grad()
def _energy_percent(task: Task, scored: Scored, shares: tuple[float, float]) -> float:
    """Energy at some shares: how often formats meet is counted on the original's activations."""
    from fgmp.hardware.budget import percent_of_fp8
    from fgmp.hardware.inference import Work

    masks, _ = weight_masks(scored.policy, scored.variants[-1].scores, shares[0])
    assigned = assign_activations(scored.records, scored.histograms, scored.policy, shares[1])
    counts = {owner: _Counts() for owner in scored.records}
    handles = [
        task.linears[owner].register_forward_pre_hook(
            partial(
                _count_formats,
                counts[owner],
                ActivationSite(record).to(task.linears[owner].weight.device),
            )
        )
        for owner, record in assigned.records.items()
    ]
    try:
        with frozen(task.model):
            for sample in task.held_out:
                task.loss(task.model, sample)
    finally:
        for handle in handles:
            handle.remove()
    work = []
    most = max(count.tokens for count in counts.values())
    for owner, names in scored.linears_of.items():
        activation = counts[owner].fp8_share(masks[owner].shape[1])
        for name in names:
            weight = masks[name].double().mean(0).cpu()
            both = (activation * weight).mean().item()
            a, w = activation.mean().item(), weight.mean().item()
            mix = {
                (False, False): 1 - a - w + both,
                (False, True): w - both,
                (True, False): a - both,
                (True, True): both,
            }
            n, k = task.linears[name].weight.shape
            work.append(Work(name, owner, n, k, mix, counts[owner].tokens / most))
    return percent_of_fp8(work, _quantizer(task.recipe))


@dataclass
class _Counts:
    """FP8 blocks by their place along K, int64 (G,), and tokens."""

    fp8: Tensor | None = None
    tokens: int = 0

    def fp8_share(self, groups: int) -> Tensor:
        """float64 (G,); a site that no token reached counts as FP4."""
        if self.fp8 is None:
            return torch.zeros(groups, dtype=torch.float64)
        return self.fp8.double().cpu() / self.tokens


def _count_formats(
    counts: _Counts, site: ActivationSite, _: nn.Module, args: tuple[Tensor, ...]
) -> None:
    if args[0].numel() == 0:
        return
    flat = site.scores(args[0]).flatten(0, -2) > site.record.threshold
    counts.fp8 = flat.sum(0) + (0 if counts.fp8 is None else counts.fp8)
    counts.tokens += len(flat)
