"""Convert a budget to fractions of FP4 blocks, without a second calibration.

``assign.frontier.Frontier`` gives the best fractions for any mean number of bits. The other budgets
are conditions on a point of that frontier:

    max_bytes       most bits at which the checkpoint has no more bytes, by counting them
    max_energy      most bits at which matmuls take no more energy; held-out text gives the number
                    of operations per pair of formats, ``hardware.relative_energy`` their energy
    max_increase    fewest bits at which held-out perplexity exceeds all-FP8's by no more; the model
                    is packed and measured at a few points
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fgmp.assign.activations import assign_activations
from fgmp.assign.frontier import Fractions, Frontier, furthest
from fgmp.assign.policy import weight_masks
from fgmp.errors import InputError
from fgmp.formats.activation import Site
from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.model.linear import ActivationSite
from fgmp.model.observe import observed_inputs, run_all
from fgmp.model.select import shared_weights
from fgmp.model.store import bytes_to_save
from fgmp.pack.planes import packed_bytes
from fgmp.quantization.candidates import perplexity_increase
from fgmp.quantization.held_out import HeldOutMetrics
from fgmp.quantization.task import BudgetResult, OperatingPoint, Scores, Task
from fgmp.recipe import Recipe

_FINE_STEPS = 20
_ENERGY_STEPS = 8
_INCREASE_STEPS = 6
"""Bisection steps over the 3.5 bits between all FP4 and all FP8; they resolve a millionth, 0.014
and 0.055 bits."""

SITE_BYTES = 4 + 4 + 8
"""r, gamma and threshold (docs/format.md, section 3)."""


def solve(
    task: Task, scores: Scores, fisher: Mapping[str, Tensor], fp8: HeldOutMetrics | None
) -> OperatingPoint:
    """The fractions that the recipe requests, or that its budget results in.

    Args:
        task: the run; its recipe has the budget.
        scores: block scores.
        fisher: F_w by linear.
        fp8: held-out metrics of the all-FP8 model if the budget is ``max_increase``, else None.

    Raises:
        InputError: the budget is below that of all-FP4.
    """
    recipe = task.recipe
    if scores.policy.fraction is not None:
        return OperatingPoint(Fractions(scores.policy.fraction, scores.policy.fraction))
    if recipe.budget is None:
        return OperatingPoint(Fractions(recipe.fp4, recipe.activation_fraction))
    frontier = Frontier(
        scores.variants[-1].scores.values(),
        scores.histograms.values(),
        scores.predictions,
        relief=task.methods.relief if recipe.compensate else 1.0,
    )
    energy = None
    if recipe.max_bytes is not None:
        bits = _bits_of_bytes(recipe.max_bytes, task, scores, frontier)
    elif recipe.max_energy is not None:
        bits, energy = _bits_of_energy(recipe.max_energy, task, scores, frontier)
    elif recipe.max_increase is not None:
        assert fp8 is not None
        bits = _bits_of_increase(recipe.max_increase, task, scores, fisher, fp8, frontier)
    else:
        assert recipe.bits is not None
        bits = recipe.bits
    return OperatingPoint(frontier.fractions(bits), BudgetResult(bits, energy))


def require_possible(recipe: Recipe, model: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Refuse a budget that cannot be met, before hours of calibration.

    Raises:
        InputError: fewer bytes than all-FP4 takes, or a quantizer of unknown energy.
    """
    if recipe.max_bytes is not None:
        require_bytes(recipe.max_bytes, model, linears, {})
    if recipe.max_energy is not None:
        from fgmp.hardware.relative_energy import machine

        machine("mixed", recipe.quantizer)


# Bytes.


def require_bytes(
    max_bytes: int, model: nn.Module, linears: dict[str, nn.Linear], sites: Mapping[str, Site]
) -> None:
    """Refuse fewer bytes than all-FP4 takes.

    Without ``sites``, which are unknown before calibration, every linear may have its own.
    """
    smallest, largest = (
        tensor_bytes(model, linears, sites, dict.fromkeys(linears, n)) for n in (0, None)
    )
    if max_bytes >= smallest:
        return
    if sites:
        bound = f"at least {smallest:,}"
    else:
        possible = sum(SITE_BYTES + linear.in_features for linear in linears.values())
        bound = f"more than {smallest:,}, and {smallest + possible:,} is enough"
        largest += possible
    raise InputError(
        f"max_bytes must be {bound}, for the tensors of the model with every quantized weight in "
        f"FP4 (all in FP8: {largest:,}), got {max_bytes:,}"
    )


def least_bytes(model: nn.Module, linears: Mapping[str, nn.Linear]) -> int:
    """Smallest size of the checkpoint to come, for a check of the disk: every block in FP4."""
    return tensor_bytes(model, linears, {}, dict.fromkeys(linears, 0))


def tensor_bytes(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    sites: Mapping[str, Site],
    fp8_blocks: Mapping[str, int | None],
) -> int:
    """Bytes of all tensors of the checkpoint to come.

    Args:
        model: the linearized model, not quantized yet.
        linears: the linears to quantize.
        sites: constants of the sites.
        fp8_blocks: number of FP8 blocks by linear; None for all.
    """
    replaced = {f"{name}.weight" for name in linears}
    total = sum(size for name, size in bytes_to_save(model).items() if name not in replaced)
    total += sum(SITE_BYTES + len(site.sensitivity) for site in sites.values())
    shared = shared_weights(linears)
    for name, linear in linears.items():
        if name in shared:
            continue
        n, k = linear.weight.shape
        total += packed_bytes(n, k, fp8_blocks[name])
    return total


def _bits_of_bytes(limit: int, task: Task, scores: Scores, frontier: Frontier) -> float:
    require_bytes(limit, task.model, task.linears, scores.sites)

    def fits(bits: float) -> bool:
        fraction = frontier.fractions(bits).weights
        for variant in scores.variants:
            masks, _ = weight_masks(scores.policy, variant.scores, fraction)
            blocks = {name: int(mask.sum()) for name, mask in masks.items()}
            if tensor_bytes(task.model, task.linears, scores.sites, blocks) > limit:
                return False
        return True

    return furthest(fits, FP4_BITS, FP8_BITS, _FINE_STEPS)


# Perplexity.


def _bits_of_increase(
    limit: float,
    task: Task,
    scores: Scores,
    fisher: Mapping[str, Tensor],
    fp8: HeldOutMetrics,
    frontier: Frontier,
) -> float:
    def within(bits: float) -> bool:
        return perplexity_increase(task, scores, fisher, frontier.fractions(bits), fp8) <= limit

    return furthest(within, FP8_BITS, FP4_BITS, _INCREASE_STEPS)


# Energy.


def _bits_of_energy(
    limit: float, task: Task, scores: Scores, frontier: Frontier
) -> tuple[float, float]:
    """The bits, and the energy they take in percent of all-FP8's."""
    percent_at: dict[float, float] = {}

    def energy(bits: float) -> float:
        percent_at[bits] = _energy_percent(task, scores, frontier.fractions(bits))
        return percent_at[bits]

    least = energy(FP4_BITS)
    if limit < least:
        raise InputError(
            f"max_energy must be at least {least:.1f}%, what all FP4 takes of all-FP8's energy "
            f"on this model (all FP8 on the mixed accelerator: {energy(FP8_BITS):.1f}%), got "
            f"{limit:g}%"
        )
    bits = furthest(lambda b: energy(b) <= limit, FP4_BITS, FP8_BITS, _ENERGY_STEPS)
    return bits, percent_at[bits]


def _energy_percent(task: Task, scores: Scores, fractions: Fractions) -> float:
    """Energy at these fractions, in percent of all-FP8's.

    Pairs of formats are counted on the original's activations.
    """
    from fgmp.hardware.inference import Work
    from fgmp.hardware.relative_energy import percent_of_fp8

    masks, _ = weight_masks(scores.policy, scores.variants[-1].scores, fractions.weights)
    counts = _count_formats(task, scores, fractions.activations)
    most = max(count.tokens for count in counts.values())
    work = []
    for owner, names in scores.linears_of.items():
        activation = counts[owner].fp8_fraction(masks[task.shared.get(owner, owner)].shape[1])
        for name in names:
            mask = masks[task.shared.get(name, name)]
            mix = _pair_mix(activation, mask.double().mean(0).cpu())
            n, k = task.linears[name].weight.shape
            work.append(Work(name, owner, n, k, mix, counts[owner].tokens / most))
    return percent_of_fp8(work, task.recipe.quantizer)


def _pair_mix(activation: Tensor, weight: Tensor) -> dict[tuple[bool, bool], float]:
    """Fractions of (activation is FP8, weight is FP8) over block pairs, from FP8 fractions (G,)."""
    both = (activation * weight).mean().item()
    a, w = activation.mean().item(), weight.mean().item()
    return {
        (False, False): 1 - a - w + both,
        (False, True): w - both,
        (True, False): a - both,
        (True, True): both,
    }


@dataclass
class _Counts:
    """Number of FP8 blocks per block position along K, int64 (G,), and of tokens."""

    fp8: Tensor | None = None
    tokens: int = 0

    def fp8_fraction(self, groups: int) -> Tensor:
        """Fraction of FP8 blocks, float64 (G,); a site that no token reached counts as FP4."""
        if self.fp8 is None:
            return torch.zeros(groups, dtype=torch.float64)
        return self.fp8.double().cpu() / self.tokens


def _count_formats(task: Task, scores: Scores, fp4: float) -> dict[str, _Counts]:
    """FP8 activation blocks on held-out text at a fraction of FP4 blocks, by site."""
    assigned = assign_activations(scores.sites, scores.histograms, scores.policy, fp4)
    counts = {owner: _Counts() for owner in assigned.records}
    modules = {
        owner: ActivationSite(site).to(task.linears[owner].weight.device)
        for owner, site in assigned.records.items()
    }

    def count(owner: str, x: Tensor) -> None:
        if x.numel() == 0:
            return
        module, own = modules[owner], counts[owner]
        flags = module.scores(x).flatten(0, -2) > module.record.threshold
        own.fp8 = flags.sum(0) + (0 if own.fp8 is None else own.fp8)
        own.tokens += len(flags)

    with observed_inputs(task.model, modules, count):
        run_all(task.model, task.held_out, task.loss)
    return counts
