"""Candidates: packed variants of the model, measured on held-out text, and the choice among them.

Candidates are the mixed model with and without scale search, and the uniform models that take no
more bits. A uniform model that is closer to the original on held-out text replaces the mixed one.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import Tensor

from fgmp.assign.activations import assign_activations
from fgmp.assign.frontier import Fractions
from fgmp.assign.policy import weight_masks
from fgmp.assign.weights import ScoredWeights, pack_weights
from fgmp.formats.spec import FP8_BITS
from fgmp.pack.planes import packed_bytes
from fgmp.quantization.held_out import HeldOutMetrics, held_out_metrics
from fgmp.quantization.install import Assignment
from fgmp.quantization.sequential import pack_in_turn, stages
from fgmp.quantization.sharing import readers, weights_by_readers
from fgmp.quantization.task import BudgetResult, OperatingPoint, Scores, Task
from fgmp.quantization.uniform import UNIFORM, uniform_assignment

_SEARCHED, _ABSMAX = "on", "off"
"""Names of the candidates with and without searched scales."""

_INCREASE = "increase"


@dataclass(frozen=True)
class Decision:
    """A choice between candidates, with their held-out metrics.

    Attributes:
        used: for scale search, whether it is on; for uniform models, the name of the chosen one, or
            None if the mixed model was chosen.
        held_out_nll: mean loss by candidate, in nats per prediction.
        held_out_kl: mean KL divergence from the original by candidate, in nats per prediction;
            empty if the model is not a causal language model.
    """

    used: bool | str | None
    held_out_nll: dict[str, float] = field(default_factory=dict)
    held_out_kl: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuning:
    """Whether tuned parameters were used, and held-out KL ``without`` and ``with`` them."""

    used: bool
    held_out_kl: dict[str, float | None]


@dataclass(frozen=True)
class Choice:
    """The chosen assignment, and the decisions that led to it."""

    assignment: Assignment
    clip: Decision
    uniform: Decision
    budget: BudgetResult
    tune: Tuning | None = None

    def to_dict(self) -> dict[str, Any]:
        """The decisions as the checkpoint's configuration stores them; plain JSON types."""
        decisions = {
            "clip": dict(vars(self.clip)),
            "uniform": dict(vars(self.uniform)),
            "budget": self.budget.to_dict(),
        }
        return decisions if self.tune is None else {**decisions, "tune": dict(vars(self.tune))}


def pack_candidates(
    task: Task,
    scores: Scores,
    fisher: Mapping[str, Tensor],
    fractions: Fractions,
    variants: Sequence[ScoredWeights],
    *,
    resumable: bool = True,
) -> dict[str, Assignment]:
    """Pack the mixed model once per variant, at the given fractions of FP4 blocks.

    Args:
        task, scores: the run and its block scores.
        fisher: F_w by linear.
        fractions: fractions of FP4 blocks, of weights and of activations.
        variants: the entries of ``scores.variants`` to pack.
        resumable: whether finished stages of compensation are stored, so that it can be resumed.

    Returns:
        Assignments by candidate name, ``on`` and ``off``.
    """
    fp4 = fractions.activations
    activations = assign_activations(scores.sites, scores.histograms, scores.policy, fp4)
    packers, inputs = {}, []
    for variant in variants:
        masks, _ = weight_masks(scores.policy, variant.scores, fractions.weights)
        inputs += [masks, variant.scales, variant.t]
        packers[_SEARCHED if variant.clipped else _ABSMAX] = partial(
            pack_weights,
            task.weights,
            fisher,
            policy=scores.policy,
            scored=variant,
            masks=masks,
            methods=task.methods,
        )
    if task.recipe.compensate:
        inputs += [scores.linears_of, activations.records]
        results = task.partial_results(*inputs) if resumable else None
        together = readers(scores.linears_of, task.shared).values()
        steps = len(stages(task.model, list(scores.sites), together)) * len(task.samples)
        with task.progress("compensating", steps) as advance:
            packed = pack_in_turn(
                task.model,
                scores.linears_of,
                activations.records,
                task.samples,
                task.loss,
                packers,
                advance,
                results,
                shared=task.shared,
            )
    else:
        groups = weights_by_readers(scores.linears_of, task.shared)
        with task.progress("packing", len(packers) * len(task.weights)) as advance:
            packed = {name: pack(groups, advance=advance) for name, pack in packers.items()}
    return {
        name: Assignment(weights, activations, scores.linears_of, shared=task.shared)
        for name, weights in packed.items()
    }


def measure(task: Task, candidates: Mapping[str, Assignment]) -> dict[str, HeldOutMetrics]:
    """Measure each candidate on the held-out sequences."""
    replacements = {name: a.replacement(task.model) for name, a in candidates.items()}
    with task.progress("checking on held-out text", len(task.held_out)) as advance:
        return held_out_metrics(task.model, replacements, task.held_out, task.loss, advance)


def measure_fp8(task: Task, scores: Scores) -> HeldOutMetrics:
    """Measure the all-FP8 model on the held-out sequences."""
    fp8 = _uniform(task, scores, "fp8")
    return measure(task, {"fp8": fp8})["fp8"]


def choose(
    task: Task,
    scores: Scores,
    point: OperatingPoint,
    candidates: dict[str, Assignment],
    fp8: HeldOutMetrics | None,
) -> Choice:
    """Choose among the mixed candidates and the uniform models that take no more bits.

    Args:
        task, scores: the run and its block scores.
        point: operating point (fractions of FP4 blocks) of the candidates.
        candidates: from :func:`pack_candidates`.
        fp8: held-out metrics of the all-FP8 model if the budget is ``max_increase``, else None.
    """
    mixed = list(candidates)[::-1]  # with scale search first: kept unless clearly worse
    baselines = _uniform_baselines(task, scores, point, candidates[mixed[0]])
    all_candidates = {**candidates, **baselines}
    measured = measure(task, all_candidates) if len(all_candidates) > 1 else {}
    bound = task.recipe.max_increase
    best_mixed = best_of(measured, mixed, fp8, bound)
    best = best_of(measured, [best_mixed, *baselines], fp8, bound)
    if best != best_mixed:
        task.report(
            f"all {best.upper()} was closer to the original on held-out text at no more bits "
            f"({measured[best].selection_metric:.5f} nats against "
            f"{measured[best_mixed].selection_metric:.5f}); using all {best.upper()}"
        )
    budget = point.budget
    if fp8 is not None:
        budget = with_increase(task, budget, measured[best], fp8)
    return Choice(
        all_candidates[best],
        _decision(best_mixed == _SEARCHED, measured, mixed if len(mixed) > 1 else []),
        _decision(best if best in UNIFORM else None, measured, [best_mixed, *UNIFORM]),
        budget,
    )


def best_of(
    measured: Mapping[str, HeldOutMetrics],
    names: list[str],
    fp8: HeldOutMetrics | None,
    bound: float | None,
) -> str:
    """Name of the best candidate; a later one replaces an earlier one only if clearly better.

    ``bound`` is the percentage by which held-out perplexity may exceed that of ``fp8``. If any
    candidate is within it, only such candidates are considered.
    """
    if bound is not None and fp8 is not None:
        within = [n for n in names if measured[n].increase_percent(fp8) <= bound]
        names = within or names
    best = names[0]
    for name in names[1:]:
        if measured[name].clearly_better(measured[best]):
            best = name
    return best


def with_increase(
    task: Task, budget: BudgetResult, metrics: HeldOutMetrics, fp8: HeldOutMetrics
) -> BudgetResult:
    """Report the increase of held-out perplexity over all-FP8; return ``budget`` with it."""
    increase = metrics.increase_percent(fp8)
    low, high = metrics.increase_interval(fp8)
    task.report(
        f"held-out perplexity is {increase:+.2f}% ({low:+.2f}% to {high:+.2f}%) relative to all-FP8"
    )
    return replace(budget, increase_percent=increase, increase_low=low, increase_high=high)


def perplexity_increase(
    task: Task,
    scores: Scores,
    fisher: Mapping[str, Tensor],
    fractions: Fractions,
    fp8: HeldOutMetrics,
) -> float:
    """Percent by which held-out perplexity at these fractions exceeds that of ``fp8``.

    A resumed run loads the values measured before the interruption; packed models are not stored.
    """
    variant = scores.variants[-1]
    inputs = (scores.linears_of, scores.sites, variant.scales, variant.t, list(task.held_out))
    results = task.partial_results(_INCREASE, fractions, *inputs)
    state = results.load(_INCREASE) if results else None
    if state is not None:
        return float(state.facts["percent"])
    candidates = pack_candidates(task, scores, fisher, fractions, [variant], resumable=False)
    (metrics,) = measure(task, candidates).values()
    percent = metrics.increase_percent(fp8)
    if results:
        results.store(_INCREASE, {}, {"percent": percent})
    return percent


def _uniform_baselines(
    task: Task, scores: Scores, point: OperatingPoint, mixed: Assignment
) -> dict[str, Assignment]:
    """The uniform models that take no more bits than ``mixed``."""
    if scores.policy.sensitivity != "fisher":
        return {}
    names = ["nvfp4"]
    if point.fractions == (0, 0) or _fp8_takes_no_more(task, mixed):
        names.append("fp8")
    return {name: _uniform(task, scores, name) for name in names}


def _uniform(task: Task, scores: Scores, name: str) -> Assignment:
    fp8 = () if UNIFORM[name] else scores.sites
    return uniform_assignment(task.weights, scores.sites, scores.linears_of, task.shared, fp8)


def _fp8_takes_no_more(task: Task, mixed: Assignment) -> bool:
    """Whether all-FP8 takes no more bits than ``mixed``, counting every stored byte.

    A mixed model with very little FP4 takes more, because its FP8 blocks have scale bytes too. With
    ``max_bytes`` and ``max_energy`` the answer is no: the budget already gives all-FP8 if it fits,
    and otherwise all-FP8 would exceed it.
    """
    if task.recipe.budget in ("max_bytes", "max_energy"):
        return False
    shapes = [weight.shape for weight in task.weights.values()]
    weight_bits = 8 * sum(packed_bytes(n, k) for n, k in shapes) / sum(n * k for n, k in shapes)
    return (weight_bits + FP8_BITS) / 2 <= mixed.bits


def _decision(
    used: bool | str | None, measured: Mapping[str, HeldOutMetrics], names: Iterable[str]
) -> Decision:
    metrics = {name: measured[name] for name in names if name in measured}
    return Decision(
        used,
        {name: m.nll for name, m in metrics.items()},
        {name: m.kl for name, m in metrics.items() if m.kl is not None},
    )
