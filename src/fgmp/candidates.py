"""What a model may become: made, measured on held-out text, chosen.

Candidates are the mixed model, with each choice of block scales, and the uniform ones that take no
more bits: what is handed out is never worse than those.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment, assign_activations
from fgmp.assign.policy import weight_masks
from fgmp.assign.weights import ScoredWeights, group_scale, pack_weights
from fgmp.formats.activation import Site, site_threshold
from fgmp.formats.spec import FP8_BITS, stream_bits
from fgmp.formats.weight import quantize_weight
from fgmp.heldout import Trial, trials
from fgmp.model.convert import Replacement, packed_linears
from fgmp.pack.planes import PackedWeight, pack, packed_bytes
from fgmp.sequential import pack_in_turn, stages
from fgmp.solve import Point
from fgmp.task import Scored, Task

UNIFORM = {"nvfp4": 1.0, "fp8": 0.0}
"""Share of FP4 blocks by the name of a uniform format."""

_ON, _OFF = "on", "off"
"""Candidates with and without searched scales."""

_INCREASE = "increase"


@dataclass(frozen=True)
class Assignment:
    """What quantizing decided, before it is put into the model; sites go by their owner.

    ``parameters``: new values of those that are not quantized, see :class:`Replacement`.
    """

    weights: dict[str, PackedWeight]
    activations: ActivationAssignment
    linears_of: dict[str, list[str]]
    parameters: dict[str, Tensor] = field(default_factory=dict)

    def replacement(self, model: nn.Module) -> Replacement:
        """What takes the places of the model's linears and parameters: not yet put there."""
        records = self.activations.records
        linears = packed_linears(model, self.weights, records, self.linears_of)
        return Replacement(linears, self.parameters)

    @property
    def bits(self) -> float:
        """Mean of the bits of a weight, every byte counted, and of an activation, with its flag."""
        packed = self.weights.values()
        weights = 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)
        return (weights + stream_bits(self.activations.fp4_fraction)) / 2


@dataclass(frozen=True)
class Choice:
    """The candidate that won, and what to write down about all of them."""

    assignment: Assignment
    facts: dict[str, Any] = field(default_factory=dict)


def mixed(
    task: Task,
    scored: Scored,
    fisher: Mapping[str, Tensor],
    shares: tuple[float, float],
    variants: Sequence[ScoredWeights],
    *,
    keep: bool = True,
) -> dict[str, Assignment]:
    """The model at these shares of FP4 blocks, weights' and activations', with choices of scales.

    Args:
        task, scored: see there.
        fisher: F_w by linear.
        shares: see above.
        variants: some of ``scored``'s; the result has one entry for each.
        keep: whether an interrupted compensation may be gone on from.
    """
    activations = assign_activations(scored.records, scored.histograms, scored.policy, shares[1])
    made = {}
    for variant in variants:
        masks, _ = weight_masks(scored.policy, variant.scores, shares[0])
        make = partial(
            pack_weights, task.tensors, fisher, policy=scored.policy, scored=variant, masks=masks
        )
        if task.recipe.compensate:
            steps = len(stages(task.model, list(scored.records))) * len(task.samples)
            known = (scored.linears_of, activations.records, masks, variant.scales, variant.t)
            kept = task.unfinished(*known) if keep else None
            with task.progress("compensating", steps) as advance:
                weights = pack_in_turn(
                    task.model,
                    scored.linears_of,
                    activations.records,
                    task.samples,
                    task.loss,
                    make,
                    advance,
                    kept,
                )
        else:
            with task.progress("packing", len(task.linears)) as advance:
                weights = make(scored.linears_of.values(), advance=advance)
        name = _ON if variant.clipped else _OFF
        made[name] = Assignment(weights, activations, scored.linears_of)
    return made


def uniformly(
    weights: Mapping[str, Tensor],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    fp4: float,
) -> Assignment:
    """Everything FP4 (``fp4`` 1), or FP8 (0), all rounded to nearest."""
    threshold = site_threshold(-torch.inf if fp4 == 0 else torch.inf, 1.0, 1.0)
    flat = {
        owner: replace(record, threshold=threshold, rule="difference", scales="max")
        for owner, record in records.items()
    }
    packed = {}
    for names in linears_of.values():
        t = group_scale(weights[name] for name in names)
        for name in names:
            codes = quantize_weight(weights[name], t)
            packed[name] = pack(codes, torch.full_like(codes.scale, fp4 == 0).bool())
    activations = ActivationAssignment(flat, dict.fromkeys(flat, fp4), fp4)
    return Assignment(packed, activations, dict(linears_of))


def measure(task: Task, candidates: Mapping[str, Assignment]) -> dict[str, Trial]:
    """What the held-out sequences say of each candidate."""
    made = {name: assignment.replacement(task.model) for name, assignment in candidates.items()}
    with task.progress("checking on held-out text", len(task.held_out)) as advance:
        return trials(task.model, made, task.held_out, task.loss, advance)


def choose(
    task: Task,
    scored: Scored,
    point: Point,
    candidates: dict[str, Assignment],
    base: Mapping[str, Trial],
) -> Choice:
    """The best of the mixed candidates and of the uniform ones at no more bits.

    Args:
        task, scored: see there.
        point: where on the frontier the candidates are.
        candidates: what :func:`mixed` made.
        base: under ``max_increase``, what was measured of all FP8.
    """
    bound = task.recipe.max_increase
    ours = list(candidates)[::-1]  # searched scales first: they stay unless the others are better
    everything = dict(candidates)
    if scored.policy.sensitivity == "fisher":
        rivals = ["nvfp4"]
        if point.shares == (0, 0) or _fp8_takes_no_more(task, candidates[ours[0]]):
            rivals.append("fp8")
        for name in rivals:
            everything[name] = uniformly(
                task.tensors, scored.records, scored.linears_of, UNIFORM[name]
            )
    measured = measure(task, everything) if len(everything) > 1 else {}
    own = best_of(measured, ours, base, bound)
    best = best_of(measured, [own, *(n for n in everything if n in UNIFORM)], base, bound)
    if best != own:
        task.report(
            f"all {best.upper()} is nearer to the original on held-out text "
            f"({measured[best].harm:.5f} nats against {measured[own].harm:.5f}) at no more bits: "
            "that is what you get"
        )
    budget = point.facts | (told_increase(task, measured[best], base) if base else {})
    return Choice(
        everything[best],
        {
            "clip": {"used": own == _ON, **_figures(measured, ours if len(ours) > 1 else [])},
            "uniform": {
                "used": best if best in UNIFORM else None,
                **_figures(measured, [own, *UNIFORM]),
            },
            "budget": budget,
        },
    )


def best_of(
    measured: Mapping[str, Trial], names: list[str], base: Mapping[str, Trial], bound: float | None
) -> str:
    """The first of ``names``, or one that is clearly better; first come those that keep a bound."""
    if bound is not None:
        kept = [n for n in names if measured[n].increase_percent(base["fp8"]) <= bound]
        names = kept or names
    best = names[0]
    for name in names[1:]:
        if measured[name].clearly_better(measured[best]):
            best = name
    return best


def told_increase(task: Task, trial: Trial, base: Mapping[str, Trial]) -> dict[str, float]:
    """By how much held-out perplexity exceeds all FP8's, in percent, as a budget stores it."""
    increase = trial.increase_percent(base["fp8"])
    low, high = trial.increase_interval(base["fp8"])
    task.report(
        f"perplexity on held-out text is {increase:+.2f}% ({low:+.2f}% to {high:+.2f}%) from "
        "all-FP8's"
    )
    return {"increase_percent": increase, "increase_low": low, "increase_high": high}


def increase_at(
    task: Task,
    scored: Scored,
    fisher: Mapping[str, Tensor],
    shares: tuple[float, float],
    fp8: Trial,
) -> float:
    """By how much held-out perplexity exceeds all FP8's at some shares, in percent.

    An interrupted run that goes on knows what it has measured: a number a point, not a model.
    """
    variant = scored.variants[-1]
    known = (scored.linears_of, scored.records, variant.scales, variant.t, list(task.held_out))
    kept = task.unfinished(_INCREASE, shares, *known)
    found = None if kept is None else kept.load(_INCREASE)
    if found is None:
        candidates = mixed(task, scored, fisher, shares, [variant], keep=False)
        (trial,) = measure(task, candidates).values()
        found = {"percent": torch.tensor(trial.increase_percent(fp8), dtype=torch.float64)}
        if kept is not None:
            kept.store(_INCREASE, found)
    return found["percent"].item()


def _fp8_takes_no_more(task: Task, own: Assignment) -> bool:
    """Whether all FP8 takes no more bits than ``own``, every byte counted.

    A mix with hardly any FP4 takes more, as its FP8 blocks have scale bytes, too. A budget of bytes
    or energy comes to all FP8 by itself where it holds that, and must not be given it elsewhere.
    """
    if task.recipe.budget in ("max_bytes", "max_energy"):
        return False
    shapes = [weight.shape for weight in task.tensors.values()]
    weight_bits = 8 * sum(packed_bytes(n, k) for n, k in shapes) / sum(n * k for n, k in shapes)
    return (weight_bits + FP8_BITS) / 2 <= own.bits


def _figures(measured: Mapping[str, Trial], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Held-out loss, and KL where there is one, by candidate, in nats a prediction."""
    shown = {name: measured[name] for name in names if name in measured}
    return {
        "held_out_nll": {name: trial.nll for name, trial in shown.items()},
        "held_out_kl": {n: trial.kl for n, trial in shown.items() if trial.kl is not None},
    }
