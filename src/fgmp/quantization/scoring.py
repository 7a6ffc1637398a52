"""Scores of all blocks, weights' and activations': what assignment ranks.

Weights are scored under each way of choosing FP4 scales that the recipe compares. Activations are
scored online, in one more pass of the calibration text forward, into a histogram per site; the pass
ends with the last block that has a site, before the output head. Both
store what they have done now and then and on an interruption, and a later run resumes from it.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fgmp.assign.policy import POLICIES, Policy, site_constants
from fgmp.assign.weights import ScoredWeights, score_weights
from fgmp.formats.activation import Site
from fgmp.model.linear import ActivationSite
from fgmp.model.observe import ends_after, frozen, observed_inputs
from fgmp.quantization.sequential import block_of
from fgmp.quantization.sharing import weights_by_scale
from fgmp.quantization.task import Scores, Task
from fgmp.sensitivity.fisher import Calibration
from fgmp.sensitivity.histogram import ScoreHistogram, new_histogram
from fgmp.storage.resume import PartialResults, Periodic, State, uninterrupted

_ACTIVATIONS = "activation scores"


def score(task: Task, calibration: Calibration) -> Scores:
    """Score every block; sites are named by their first linear, their owner."""
    policy = POLICIES[task.recipe.policy]
    statistics = {site.linears[0]: site for site in calibration.sites.values()}
    linears_of = {owner: site.linears for owner, site in statistics.items()}
    quantizer, headroom = task.recipe.quantizer, task.recipe.headroom
    sites = {
        owner: site_constants(policy, quantizer, site.g2, site.amax, headroom)
        for owner, site in statistics.items()
    }
    histograms = {owner: new_histogram(site) for owner, site in sites.items()}
    if _activation_scores_matter(task, policy):
        _count_activation_scores(task, sites, histograms)
    searched = {"on": (True,), "off": (False,), "auto": (False, True)}[task.recipe.clip]
    variants = [_score_weights(task, calibration, linears_of, policy, clip) for clip in searched]
    return Scores(linears_of, sites, histograms, variants, policy, calibration.predictions)


def _activation_scores_matter(task: Task, policy: Policy) -> bool:
    """Whether any threshold follows from them; all FP4 and all FP8 need none."""
    mixed = task.recipe.budget is not None or 0 < task.recipe.activation_fraction < 1
    return policy.fraction is None and mixed


@torch.no_grad()
def _count_activation_scores(
    task: Task, sites: Mapping[str, Site], histograms: Mapping[str, ScoreHistogram]
) -> None:
    """Run the calibration text forward and count the scores of all activation blocks."""
    results = task.partial_results(_ACTIVATIONS, dict(sites))
    done = _restore_histograms(results, histograms)
    # All linears of a site read the same tensor, so its owner sees everything.
    modules = {
        owner: ActivationSite(site).to(task.linears[owner].weight.device)
        for owner, site in sites.items()
    }

    order: list[str] = []  # of sites on one sample

    def count(owner: str, x: Tensor) -> None:
        order.append(owner)
        if x.numel():
            histograms[owner].add(modules[owner].scores(x))

    end = None  # of a pass; known once the first sample ran whole
    periodic, whole, start = Periodic(), True, done
    with task.progress("scoring activations", len(task.samples)) as advance:
        for _ in range(done):
            advance()
        try:
            with frozen(task.model), observed_inputs(task.model, modules, count):
                for index in range(start, len(task.samples)):
                    with uninterrupted():
                        whole = False
                        order.clear()
                        with ends_after(end) if end else nullcontext():
                            task.loss(task.model, task.samples[index])
                        end = end or _end(task.model, order)
                        whole, done = True, index + 1
                    advance()
                    if results and periodic.due():
                        _store_histograms(results, histograms, done)
        finally:
            if results and whole and done > start:
                _store_histograms(results, histograms, done)


def _end(model: nn.Module, order: Sequence[str]) -> nn.Module | None:
    """The block after which no site reads anything, from the sites of a pass in order.

    None if the last site lies in no block, or ran more than once.
    """
    last = order[-1] if order else ""
    block = block_of(model, last)
    return model.get_submodule(block) if block and order.count(last) == 1 else None


def _store_histograms(
    results: PartialResults, histograms: Mapping[str, ScoreHistogram], done: int
) -> None:
    counts = {owner: histogram.counts for owner, histogram in histograms.items()}
    results.store(_ACTIVATIONS, counts, {"done": done})


def _restore_histograms(
    results: PartialResults | None, histograms: Mapping[str, ScoreHistogram]
) -> int:
    """Fill the histograms from a stored state; returns the number of samples counted."""
    state = results.load(_ACTIVATIONS) if results else None
    if state is None:
        return 0
    for owner, histogram in histograms.items():
        histogram.counts.copy_(state.tensors[owner])
    return int(state.facts["done"])


def _score_weights(
    task: Task,
    calibration: Calibration,
    linears_of: Mapping[str, list[str]],
    policy: Policy,
    clipped: bool,
) -> ScoredWeights:
    """Score all weights under one way of choosing FP4 scales, site by site."""
    part = f"weight scores {'searched' if clipped else 'nearest'}"
    # Of F_w the partial sums are too large to hash again; its sources are in the run's digest,
    # and site statistics stand for the calibration itself.
    statistics = [(s.linears, s.g2, s.amax, s.tokens) for s in calibration.sites.values()]
    results = task.partial_results(part, statistics)
    state = results.load(part) if results else None
    scored = ScoredWeights({}, {}, {}, clipped)
    generator = torch.Generator().manual_seed(task.recipe.seed)
    if state is not None:
        scored = _restored(task, state, clipped)
        generator.set_state(state.tensors["generator"])
    # Whole sites, and the generator after them: one name, so that a second Ctrl-C cannot part them.
    finished = scored, generator.get_state()
    periodic, resumed = Periodic(), len(scored.t)
    weights = task.weights
    with task.progress("scoring weights", len(weights)) as advance:
        for _ in scored.t:
            advance()
        try:
            for names in weights_by_scale(linears_of, task.shared):
                if names[0] in finished[0].t:
                    continue
                with uninterrupted():
                    more = score_weights(
                        weights,
                        calibration.weights,
                        [names],
                        policy,
                        rule=task.recipe.rule,
                        clipped=clipped,
                        generator=generator,
                        methods=task.methods,
                        advance=advance,
                    )
                    finished = _joined(finished[0], more), generator.get_state()
                if results and periodic.due():
                    _store_scored(results, part, *finished)
        finally:
            if results and len(finished[0].t) > resumed:
                _store_scored(results, part, *finished)
    return finished[0]


def _joined(one: ScoredWeights, other: ScoredWeights) -> ScoredWeights:
    """Scored weights of both."""
    scales, scores = one.scales | other.scales, one.scores | other.scores
    return ScoredWeights(scales, scores, one.t | other.t, one.clipped)


def _store_scored(
    results: PartialResults, part: str, scored: ScoredWeights, generator_state: Tensor
) -> None:
    tensors = {f"scale.{name}": scale for name, scale in scored.scales.items()}
    tensors |= {f"score.{name}": scores for name, scores in scored.scores.items()}
    tensors["generator"] = generator_state
    results.store(part, tensors, {"t": scored.t})


def _restored(task: Task, state: State, clipped: bool) -> ScoredWeights:
    """Scored weights from a stored state, on the devices of the weights."""
    scored = ScoredWeights({}, {}, {}, clipped)
    for name, t in state.facts["t"].items():
        device = task.linears[name].weight.device
        scored.scales[name] = state.tensors[f"scale.{name}"].to(device)
        scored.scores[name] = state.tensors[f"score.{name}"].to(device)
        scored.t[name] = t
    return scored
