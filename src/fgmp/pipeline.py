"""The method: calibrate, score, assign, pack.

:func:`quantize` reads from top to bottom as the paper does; each step is one function of another
chapter. :func:`uniform` makes the baselines that a mixed model is compared with, on the same
activation sites.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment, assign_activations
from fgmp.assign.policy import POLICIES, site_record, weight_masks
from fgmp.assign.weights import ScoredWeights, group_scale, pack_weights, score_weights
from fgmp.errors import InputError
from fgmp.formats.activation import Site, sensitivity_codes, site_threshold
from fgmp.formats.spec import E2M1, E4M3, FP4_BITS, FP8_BITS, stream_bits
from fgmp.formats.weight import check_finite, quantize_weight
from fgmp.heldout import Trial, trials
from fgmp.model.convert import install, packed_linears
from fgmp.model.linear import ActivationSite, MixedLinear, mixed_linears, sites
from fgmp.model.select import linearize, matrices, quantizable
from fgmp.model.store import CONFIG_ATTRIBUTE, config_of, tensors_to_save
from fgmp.model.transformers import mark_quantized
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.pack.planes import PackedWeight, pack
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity import memory
from fgmp.sensitivity.fisher import Loss, SiteStatistics, calibrate, causal_lm_loss, frozen
from fgmp.sensitivity.histogram import ScoreHistogram, new_histogram
from fgmp.sequential import bytes_needed, pack_in_turn, stages
from fgmp.solve import Scored, require_bytes, solve

UNIFORM = {"nvfp4": 1.0, "fp8": 0.0}
"""Share of FP4 blocks by the name of a uniform format."""


@dataclass(frozen=True)
class Assignment:
    """What quantizing decided, before it is put into the model; sites go by their owner."""

    weights: dict[str, PackedWeight]
    activations: ActivationAssignment
    linears_of: dict[str, list[str]]

    def linears(self, model: nn.Module) -> dict[str, MixedLinear]:
        """The packed linears by name, not yet in the model."""
        return packed_linears(model, self.weights, self.activations.records, self.linears_of)

    def install(self, model: nn.Module) -> None:
        """Put it into the model, in place."""
        install(model, self.weights, self.activations.records, self.linears_of)

    @property
    def bits(self) -> float:
        """Mean of the bits of a weight, every byte counted, and of an activation, with its flag."""
        packed = self.weights.values()
        weights = 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)
        return (weights + stream_bits(self.activations.fp4_fraction)) / 2


def quantize(
    model: nn.Module,
    samples: Sequence[Any] | Tensor,
    recipe: Recipe | None = None,
    *,
    loss: Loss = causal_lm_loss,
    held_out: Sequence[Any] | Tensor | None = None,
    groups: dict[str, list[str]] | None = None,
    state: Path | None = None,
    reuse: bool = False,
    progress: Stages = silent,
    report: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Quantize a model in place, weights and activations.

    Args:
        model: a causal LM of Transformers, or any module if ``loss`` is given.
        samples: calibration sequences; int64 (B, L) token windows for a causal LM, else whatever
            ``loss`` takes, one at a time.
        recipe: what the result shall be; ``samples`` overrides its number and length.
        loss: (model, sample) to (summed loss in nats, number of predictions).
        held_out: sequences that tell which of several results is nearest to the original. Default:
            the last eighth of ``samples``; under ``clip="auto"`` or ``max_increase`` they then take
            no part in calibration.
        groups: activation sites that override those found by tensor identity.
        state: file that keeps an interrupted calibration, from which a later call goes on.
        reuse: ``state`` is a calibration to be used again: refuse one of another model, of other
            sequences or sites instead of starting anew over it.
        progress: reports on long stages; see ``fgmp.progress``.
        report: gets a line for a person now and then.

    Returns:
        ``model``, its linears replaced by packed ones; by those of a uniform format if that takes
        no more bits and is nearer to the original on held-out text.
        ``fgmp.model.store.config_of(model)`` tells what was reached.

    Raises:
        InputError: no linear to quantize, a weight or activation that is not finite, too few
            samples, a budget that cannot be met.
        MemoryLimitError: the run would not fit.
    """
    recipe = recipe or Recipe()
    policy = POLICIES[recipe.policy]
    started = time.perf_counter()
    if held_out is None and (recipe.clip == "auto" or recipe.max_increase is not None):
        samples, held_out = _split(
            samples, "clip=auto" if recipe.clip == "auto" else "max_increase"
        )
    if len(samples) == 0:
        raise InputError("quantize needs at least one calibration sequence, got none")
    checked = samples[-_held_out_length(samples) :] if held_out is None else held_out
    linears = _select(model, recipe)
    if recipe.max_bytes is not None:  # what is hopeless is said before hours of calibration
        require_bytes(recipe.max_bytes, model, linears, {})
    total = matrices(model)
    device = next(model.parameters()).device
    needed = memory.estimate(
        model,
        linears,
        samples[0],
        loss,
        _packed_bytes(recipe),
        fisher=recipe.fisher,
        compensation=bytes_needed(model, linears, samples, loss) if recipe.compensate else 0,
    )
    memory.require(needed, device)
    report(f"peak memory will be about {needed.peak / 1e9:.2f} GB")
    memory.reset_peak(device)

    if reuse and state is not None and state.exists():
        report(
            f"gradients are taken from {state}; what depends on the recipe, the scores of "
            "activations and the moments of inputs, takes passes forward"
        )
    with progress("calibrating", len(samples)) as advance:
        calibration = calibrate(
            model,
            linears,
            samples,
            loss,
            fisher=recipe.fisher,
            groups=groups,
            state=state,
            reuse=reuse,
            advance=advance,
        )
    calibrated = time.perf_counter()
    statistics = {site.linears[0]: site for site in calibration.sites.values()}
    linears_of = {owner: site.linears for owner, site in statistics.items()}
    _report_unreached(statistics, report)

    records = {
        owner: site_record(
            policy,
            recipe.rule,
            recipe.scales,
            site.g2,
            site.amax,
            recipe.headroom,
            powers=recipe.sensitivities == "powers",
        )
        for owner, site in statistics.items()
    }
    histograms = {owner: new_histogram(record) for owner, record in records.items()}
    if policy.fraction is None and (recipe.budget or 0 < recipe.activation_fraction < 1):
        with progress("scoring activations", len(samples)) as advance:
            count = {
                owner: partial(_count_input, histograms[owner], ActivationSite(record).to(device))
                for owner, record in records.items()
            }
            _observe(model, linears, count, samples, loss, advance)
    tensors = {name: linear.weight.detach() for name, linear in linears.items()}
    scored = []
    for clipped in {"on": (True,), "off": (False,), "auto": (False, True)}[recipe.clip]:
        with progress("scoring weights", len(linears)) as advance:
            scored.append(
                score_weights(
                    tensors,
                    calibration.weights,
                    linears_of.values(),
                    policy,
                    rule=recipe.rule,
                    clipped=clipped,
                    seed=recipe.seed,
                    advance=advance,
                )
            )

    def build(shares: tuple[float, float], variants: list[ScoredWeights]) -> dict[str, Assignment]:
        """The model at these shares of weights and activations, with each choice of scales."""
        activations = assign_activations(records, histograms, policy, shares[1])
        made = {}
        for variant in variants:
            masks, _ = weight_masks(policy, variant.scores, shares[0])
            make = partial(
                pack_weights,
                tensors,
                calibration.weights,
                policy=policy,
                scored=variant,
                masks=masks,
            )
            if recipe.compensate:
                steps = len(stages(model, list(records))) * len(samples)
                with progress("compensating", steps) as advance:
                    weights = pack_in_turn(
                        model, linears_of, activations.records, samples, loss, make, advance
                    )
            else:
                with progress("packing", len(linears)) as advance:
                    weights = make(linears_of.values(), advance=advance)
            name = _ON if variant.clipped else _OFF
            made[name] = Assignment(weights, activations, linears_of)
        return made

    def uniformly(fp4: float) -> Assignment:
        return _uniform(tensors, records, linears_of, fp4)

    def measure(candidates: dict[str, Assignment]) -> dict[str, Trial]:
        packed = {name: assignment.linears(model) for name, assignment in candidates.items()}
        with progress("checking on held-out text", len(checked)) as advance:
            return trials(model, linears, packed, checked, loss, advance)

    base = measure({"fp8": uniformly(0.0)}) if recipe.max_increase is not None else {}

    def increase(shares: tuple[float, float]) -> float:
        (trial,) = measure(build(shares, scored[-1:])).values()
        return trial.increase_percent(base["fp8"])

    everything = Scored(
        model, linears, linears_of, records, histograms, scored, policy, calibration.predictions
    )
    point = solve(recipe, everything, checked, loss, increase)
    if recipe.budget:
        report(
            f"{recipe.budget} comes to {point.facts['bits']:.3f} bits: {point.shares[0]:.1%} of "
            f"weight blocks and {point.shares[1]:.1%} of activation blocks in FP4"
        )
    candidates = build(point.shares, scored)
    calibration.weights = {}
    ours = list(candidates)[::-1]  # searched scales first: they stay unless the others are better
    if policy.sensitivity == "fisher":
        mixed = candidates[ours[0]]
        candidates["nvfp4"] = uniformly(UNIFORM["nvfp4"])
        if point.shares == (0, 0) or (recipe.budget is None and mixed.bits >= FP8_BITS):
            candidates["fp8"] = uniformly(UNIFORM["fp8"])
    measured = measure(candidates) if len(candidates) > 1 else {}
    own = _best(measured, ours, base, recipe.max_increase)
    best = _best(
        measured, [own, *(n for n in candidates if n in UNIFORM)], base, recipe.max_increase
    )
    if best != own:
        report(
            f"all {best.upper()} does better on held-out text ({measured[best].harm:.5f} nats "
            f"against {measured[own].harm:.5f}) at no more bits: that is what you get"
        )
    facts = dict(point.facts)
    if base:
        facts["increase_percent"] = measured[best].increase_percent(base["fp8"])
        low, high = measured[best].increase_interval(base["fp8"])
        facts |= {"increase_low": low, "increase_high": high}
        report(
            f"perplexity on held-out text is {facts['increase_percent']:+.2f}% "
            f"({low:+.2f}% to {high:+.2f}%) from all-FP8's"
        )
    _finish(model, candidates[best], recipe, total)

    config = config_of(model)
    config.calibration.update(sequences=len(samples), predictions=calibration.predictions)
    config.result.update(
        clip={"used": own == _ON, **_figures(measured, ours if len(ours) > 1 else [])},
        uniform={"used": best if best in UNIFORM else None, **_figures(measured, [own, *UNIFORM])},
        budget=facts,
        sensitivities_floored=_floored_share(statistics),
        seconds={
            "total": time.perf_counter() - started,
            "calibration": calibrated - started,
        },
        peak_bytes=memory.peak_bytes(device),
        peak_bytes_predicted=needed.peak,
    )
    return model


def uniform(
    original: nn.Module, quantized: nn.Module, policy_name: str, weight_fp4: float
) -> nn.Module:
    """Turn ``original``, in place, into an all-FP8 or all-NVFP4 model on ``quantized``'s sites.

    Args:
        original: the unquantized model.
        quantized: gives the linears, the sites and their activation scales.
        policy_name: stored as the recipe's policy, ``fp8`` or ``nvfp4``.
        weight_fp4: share of FP4 blocks, 0 or 1, of weights and activations; scales are
            nearest-rounding ones.
    """
    linearize(original)
    config = config_of(quantized)
    total = matrices(original)
    linears_of = {owner: site.linears for owner, site in config.sites.items()}
    tensors = {
        name: original.get_submodule(name).weight.detach()  # type: ignore[operator]
        for names in linears_of.values()
        for name in names
    }
    records = {owner: site.record for owner, site in sites(quantized).items()}
    assignment = _uniform(tensors, records, linears_of, weight_fp4)
    _finish(original, assignment, Recipe(policy=policy_name, fp4=weight_fp4, clip="off"), total)
    return original


def _uniform(
    weights: Mapping[str, Tensor],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    fp4: float,
) -> Assignment:
    """Everything FP4, or FP8, all rounded to nearest."""
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


def least_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Least size of the checkpoint to come: all quantized weights in FP4, the rest as it is."""
    linearize(model)
    chosen = {id(m.weight) for m in quantizable(model, recipe.include, recipe.exclude).values()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in chosen)
    weights = sum(p.numel() for p in model.parameters() if id(p) in chosen)
    return rest + int(weights * FP4_BITS / 8)


def _split(samples: Sequence[Any] | Tensor, why: str) -> tuple[Any, Any]:
    held = _held_out_length(samples)
    if len(samples) <= held:
        raise InputError(f"{why} needs at least 2 sequences, got {len(samples)}")
    return samples[:-held], samples[-held:]


def _held_out_length(samples: Sequence[Any] | Tensor) -> int:
    return max(1, len(samples) // 8)


def _select(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Linearize the model and choose; weights must be finite."""
    linearize(model)
    linears = quantizable(model, recipe.include, recipe.exclude)
    if not linears:
        raise InputError(
            f"no linear layer to quantize: include {list(recipe.include)} and exclude "
            f"{list(recipe.exclude)} leave none of {type(model).__name__}'s"
        )
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    return linears


def _packed_bytes(recipe: Recipe) -> float:
    """Bytes a parameter of the planes held at once: clip=auto makes two variants, and all NVFP4
    is compared with them."""
    variants = 2 if recipe.clip == "auto" else 1
    fp8_share = 1.0 if recipe.budget else 1 - recipe.fp4
    return (FP4_BITS + variants * (FP4_BITS + E2M1.bits * fp8_share)) / 8


def _report_unreached(statistics: dict[str, SiteStatistics], report: Callable[[str], None]) -> None:
    unreached = [owner for owner, site in statistics.items() if site.tokens == 0]
    if unreached:
        report(
            f"{len(unreached)} sites were reached by no calibration token and keep default "
            f"scales: {', '.join(unreached)}"
        )


def _floored_share(statistics: dict[str, SiteStatistics]) -> float:
    """Share of channels whose sensitivity lies below the smallest code and is raised to it."""
    floored, channels = 0, 0
    for site in statistics.values():
        _, gamma = sensitivity_codes(site.g2)
        floored += int((site.g2 < gamma * E4M3.smallest / 2).sum())
        channels += len(site.g2)
    return floored / channels


@torch.no_grad()
def _observe(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    hooks: Mapping[str, Callable[[nn.Module, tuple[Tensor, ...]], None]],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    advance: Callable[[], None],
) -> None:
    """Run the samples forward once more; hooks of sites' owners see every input of the site."""
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for owner, hook in hooks.items():
            # All linears of a site read the same tensor, so its owner sees everything.
            stack.callback(linears[owner].register_forward_pre_hook(hook).remove)
        for sample in samples:
            loss(model, sample)
            advance()


def _count_input(
    histogram: ScoreHistogram, site: ActivationSite, _: nn.Module, args: tuple[Tensor, ...]
) -> None:
    if args[0].numel():
        histogram.add(site.scores(args[0]))


_ON, _OFF = "on", "off"
"""Candidates with and without searched scales."""


def _best(
    measured: dict[str, Trial], names: list[str], base: dict[str, Trial], bound: float | None
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


def _figures(measured: dict[str, Trial], names: Iterable[str]) -> dict[str, dict[str, float]]:
    """Held-out loss, and KL where there is one, by candidate, in nats a prediction."""
    shown = {name: measured[name] for name in names if name in measured}
    return {
        "held_out_nll": {name: trial.nll for name, trial in shown.items()},
        "held_out_kl": {n: trial.kl for n, trial in shown.items() if trial.kl is not None},
    }


def _finish(
    model: nn.Module, assignment: Assignment, recipe: Recipe, total: dict[str, int]
) -> None:
    """Install, and write down what the checkpoint's configuration will say."""
    assignment.install(model)
    activations = assignment.activations
    packed = mixed_linears(model)
    elements = sum(m.packed.n * m.packed.k for m in packed.values())
    fp8 = sum(int(m.packed.is_fp8().sum()) for m in packed.values())
    blocks = sum(m.packed.is_fp8().numel() for m in packed.values())
    config = CheckpointConfig(
        sites={
            owner: SiteConfig(
                names,
                activations.records[owner].rule,
                activations.fp4_fractions[owner],
                activations.records[owner].scales,
            )
            for owner, names in assignment.linears_of.items()
        },
        recipe=recipe.to_dict(),
        result={
            "fp4_weights": 1 - fp8 / blocks,
            "fp4_activations": activations.fp4_fraction,
            "bits_per_weight": 8 * sum(m.packed.nbytes for m in packed.values()) / elements,
            "tensor_bytes": sum(t.nbytes for t in tensors_to_save(model).values()),
            "quantized_share": elements / sum(total.values()),
            "unquantized": sorted(n for n in total if n.removesuffix(".weight") not in packed),
        },
    )
    setattr(model, CONFIG_ATTRIBUTE, config)
    mark_quantized(model, config)
