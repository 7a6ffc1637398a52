"""Candidates: packed variants of the model, measured on held-out text, and the choice among them.

Candidates are the mixed model under each way of choosing FP4 scales, and the uniform models that
take no more bits. The chosen one is never worse on held-out text than a uniform model of its size.
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
from fgmp.quantization.held_out import Trial, trials
from fgmp.quantization.install import Assignment
from fgmp.quantization.sequential import pack_in_turn, stages
from fgmp.quantization.sharing import readers, weights_by_readers
from fgmp.quantization.task import BudgetResult, OperatingPoint, Scores, Task
from fgmp.quantization.uniform import UNIFORM, uniform_assignment

_SEARCHED, _NEAREST = "on", "off"
"""Names of the candidates with and without searched scales."""

_INCREASE = "increase"


@dataclass(frozen=True)
class Decision:
    """Candidates compared on held-out text, and which was used.

    Attributes:
        used: for scale search whether it is on; for uniform models the one chosen, or None.
        held_out_nll: mean loss by candidate, in nats per prediction.
        held_out_kl: mean KL divergence from the original, likewise, of a language model.
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
    """Pack the mixed model at these fractions of FP4 blocks, once for each variant.

    Args:
        task, scores: the run and its block scores.
        fisher: F_w by linear.
        fractions: of FP4 blocks.
        variants: some of ``scores.variants``.
        resumable: whether an interrupted compensation stores its finished stages.
    """
    fp4 = fractions.activations
    activations = assign_activations(scores.sites, scores.histograms, scores.policy, fp4)
    candidates = {}
    for variant in variants:
        masks, _ = weight_masks(scores.policy, variant.scores, fractions.weights)
        make = partial(
            pack_weights,
            task.weights,
            fisher,
            policy=scores.policy,
            scored=variant,
            masks=masks,
            methods=task.methods,
        )
        if task.recipe.compensate:
            shared_sites = readers(scores.linears_of, task.shared).values()
            inputs = (scores.linears_of, activations.records, masks, variant.scales, variant.t)
            results = task.partial_results(*inputs) if resumable else None
            todo = stages(task.model, list(scores.sites), shared_sites)
            steps = len(todo) * len(task.samples)
            with task.progress("compensating", steps) as advance:
                weights = pack_in_turn(
                    task.model,
                    scores.linears_of,
                    activations.records,
                    task.samples,
                    task.loss,
                    make,
                    advance,
                    results,
                    shared=task.shared,
                )
        else:
            groups = weights_by_readers(scores.linears_of, task.shared)
            with task.progress("packing", len(task.weights)) as advance:
                weights = make(groups, advance=advance)
        name = _SEARCHED if variant.clipped else _NEAREST
        candidates[name] = Assignment(weights, activations, scores.linears_of, shared=task.shared)
    return candidates


def measure(task: Task, candidates: Mapping[str, Assignment]) -> dict[str, Trial]:
    """Measure each candidate on the held-out sequences."""
    replacements = {name: a.replacement(task.model) for name, a in candidates.items()}
    with task.progress("checking on held-out text", len(task.held_out)) as advance:
        return trials(task.model, replacements, task.held_out, task.loss, advance)


def measure_fp8(task: Task, scores: Scores) -> Trial:
    """Measure the all-FP8 model on the held-out sequences."""
    fp8 = _uniform(task, scores, "fp8")
    return measure(task, {"fp8": fp8})["fp8"]


def choose(
    task: Task,
    scores: Scores,
    point: OperatingPoint,
    candidates: dict[str, Assignment],
    fp8: Trial | None,
) -> Choice:
    """Choose among the mixed candidates and the uniform models that take no more bits.

    Args:
        task, scores: the run and its block scores.
        point: where the candidates were packed.
        candidates: from :func:`pack_candidates`.
        fp8: the all-FP8 model on held-out text, where the budget is ``max_increase``.
    """
    mixed = list(candidates)[::-1]  # searched scales first: they stay unless others are better
    rivals = _uniform_rivals(task, scores, point, candidates[mixed[0]])
    everything = {**candidates, **rivals}
    measured = measure(task, everything) if len(everything) > 1 else {}
    bound = task.recipe.max_increase
    best_mixed = best_of(measured, mixed, fp8, bound)
    best = best_of(measured, [best_mixed, *rivals], fp8, bound)
    if best != best_mixed:
        task.report(
            f"all {best.upper()} was closer to the original on held-out text at no more bits "
            f"({measured[best].harm:.5f} nats against {measured[best_mixed].harm:.5f}); "
            f"using all {best.upper()}"
        )
    budget = point.budget
    if fp8 is not None:
        budget = with_increase(task, budget, measured[best], fp8)
    return Choice(
        everything[best],
        _decision(best_mixed == _SEARCHED, measured, mixed if len(mixed) > 1 else []),
        _decision(best if best in UNIFORM else None, measured, [best_mixed, *UNIFORM]),
        budget,
    )


def best_of(
    measured: Mapping[str, Trial], names: list[str], fp8: Trial | None, bound: float | None
) -> str:
    """The first of ``names``, unless a later one is clearly better.

    Under ``bound``, the candidates within it come before all others: percent by which held-out
    perplexity may exceed that of ``fp8``.
    """
    if bound is not None and fp8 is not None:
        within = [n for n in names if measured[n].increase_percent(fp8) <= bound]
        names = within or names
    best = names[0]
    for name in names[1:]:
        if measured[name].clearly_better(measured[best]):
            best = name
    return best


def with_increase(task: Task, budget: BudgetResult, trial: Trial, fp8: Trial) -> BudgetResult:
    """Report the increase of held-out perplexity over all-FP8's, and add it to ``budget``."""
    increase = trial.increase_percent(fp8)
    low, high = trial.increase_interval(fp8)
    task.report(
        f"held-out perplexity is {increase:+.2f}% ({low:+.2f}% to {high:+.2f}%) from all-FP8's"
    )
    return replace(budget, increase_percent=increase, increase_low=low, increase_high=high)


def perplexity_increase(
    task: Task, scores: Scores, fisher: Mapping[str, Tensor], fractions: Fractions, fp8: Trial
) -> float:
    """Percent by which held-out perplexity at these fractions exceeds that of ``fp8``.

    A resumed run reads what it has measured already: one number per point, not a model.
    """
    variant = scores.variants[-1]
    inputs = (scores.linears_of, scores.sites, variant.scales, variant.t, list(task.held_out))
    results = task.partial_results(_INCREASE, fractions, *inputs)
    state = results.load(_INCREASE) if results else None
    if state is not None:
        return float(state.facts["percent"])
    candidates = pack_candidates(task, scores, fisher, fractions, [variant], resumable=False)
    (trial,) = measure(task, candidates).values()
    percent = trial.increase_percent(fp8)
    if results:
        results.store(_INCREASE, {}, {"percent": percent})
    return percent


def _uniform_rivals(
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
    weights, fp4 = task.weights, UNIFORM[name]
    return uniform_assignment(weights, scores.sites, scores.linears_of, task.shared, fp4)


def _fp8_takes_no_more(task: Task, mixed: Assignment) -> bool:
    """Whether all FP8 takes no more bits than ``mixed``, every byte counted.

    A mix with hardly any FP4 takes more, since its FP8 blocks have scale bytes, too. A budget of
    bytes or energy reaches all FP8 by itself where it allows that; elsewhere it must not get it.
    """
    if task.recipe.budget in ("max_bytes", "max_energy"):
        return False
    shapes = [weight.shape for weight in task.weights.values()]
    weight_bits = 8 * sum(packed_bytes(n, k) for n, k in shapes) / sum(n * k for n, k in shapes)
    return (weight_bits + FP8_BITS) / 2 <= mixed.bits


def _decision(
    used: bool | str | None, measured: Mapping[str, Trial], names: Iterable[str]
) -> Decision:
    trials = {name: measured[name] for name in names if name in measured}
    return Decision(
        used,
        {name: trial.nll for name, trial in trials.items()},
        {name: trial.kl for name, trial in trials.items() if trial.kl is not None},
    )
