"""The method: calibrate, score, assign, pack.

:func:`quantize` reads from top to bottom as the paper does; each step is one function of another
chapter. :func:`uniform` makes the baselines that a mixed model is compared with, on the same
activation sites.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment, assign_activations
from fgmp.assign.budget import RELIEF, joint_fractions
from fgmp.assign.policy import POLICIES, Policy, site_record, weight_masks
from fgmp.assign.weights import ScoredWeights, group_scale, pack_weights, score_weights
from fgmp.errors import InputError
from fgmp.formats.activation import sensitivity_codes, site_threshold
from fgmp.formats.spec import E2M1, E4M3, FP4_BITS
from fgmp.formats.weight import check_finite, quantize_weight
from fgmp.model.convert import install
from fgmp.model.linear import ActivationSite, mixed_linears, sites
from fgmp.model.select import linearize, matrices, quantizable
from fgmp.model.store import CONFIG_ATTRIBUTE, config_of
from fgmp.model.transformers import mark_quantized
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.pack.planes import PackedWeight, pack
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity import memory
from fgmp.sensitivity.fisher import Loss, SiteStatistics, calibrate, causal_lm_loss, frozen
from fgmp.sensitivity.histogram import ScoreHistogram, new_histogram
from fgmp.sequential import bytes_needed, pack_in_turn, stages


@dataclass(frozen=True)
class Assignment:
    """What quantizing decided, before it is put into the model; sites go by their owner."""

    weights: dict[str, PackedWeight]
    activations: ActivationAssignment
    linears_of: dict[str, list[str]]

    def install(self, model: nn.Module) -> None:
        """Put it into the model, in place."""
        install(model, self.weights, self.activations.records, self.linears_of)


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
        held_out: sequences that decide ``clip="auto"``; default: the last eighth of ``samples``,
            which then take no part in calibration.
        groups: activation sites that override those found by tensor identity.
        state: file that keeps an interrupted calibration, from which a later call goes on.
        reuse: ``state`` is a calibration to be used again: refuse one of another model, of other
            sequences or sites instead of starting anew over it.
        progress: reports on long stages; see ``fgmp.progress``.
        report: gets a line for a person now and then.

    Returns:
        ``model``, its linears replaced by packed ones. ``fgmp.model.store.config_of(model)`` tells
        what was reached.

    Raises:
        InputError: no linear to quantize, a weight or activation that is not finite, too few
            samples.
        MemoryLimitError: the run would not fit.
    """
    recipe = recipe or Recipe()
    policy = POLICIES[recipe.policy]
    started = time.perf_counter()
    if held_out is None and recipe.clip == "auto":
        samples, held_out = _split(samples)
    if len(samples) == 0:
        raise InputError("quantize needs at least one calibration sequence, got none")
    linears = _select(model, recipe)
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
        owner: site_record(policy, recipe.rule, recipe.scales, site.g2, site.amax, recipe.headroom)
        for owner, site in statistics.items()
    }
    histograms = {owner: new_histogram(record) for owner, record in records.items()}
    if policy.fraction is None and (recipe.bits is not None or 0 < recipe.activation_fraction < 1):
        with progress("scoring activations", len(samples)) as advance:
            count = {
                owner: partial(_count_input, histograms[owner], ActivationSite(record).to(device))
                for owner, record in records.items()
            }
            _observe(model, linears, count, samples, loss, advance)
    tensors = {name: linear.weight.detach() for name, linear in linears.items()}
    material = (tensors, calibration.weights, linears_of.values(), policy)
    scored = []
    for clipped in {"on": (True,), "off": (False,), "auto": (False, True)}[recipe.clip]:
        with progress("scoring weights", len(linears)) as advance:
            scored.append(
                score_weights(
                    *material, rule=recipe.rule, clipped=clipped, seed=recipe.seed, advance=advance
                )
            )
    fp4_weights, fp4_activations = _fractions(
        recipe, policy, scored[-1], histograms, calibration.predictions
    )
    activations = assign_activations(records, histograms, policy, fp4_activations)
    variants = {}
    for variant in scored:
        masks, _ = weight_masks(policy, variant.scores, fp4_weights)
        make = partial(pack_weights, *material[:2], policy=policy, scored=variant, masks=masks)
        if recipe.compensate:
            steps = len(stages(model, list(records))) * len(samples)
            with progress("compensating", steps) as advance:
                weights = pack_in_turn(
                    model, linears_of, activations.records, samples, loss, make, advance
                )
        else:
            with progress("packing", len(linears)) as advance:
                weights = make(linears_of.values(), advance=advance)
        variants[variant.clipped] = Assignment(weights, activations, linears_of)
    del material
    calibration.weights = {}
    clipped, losses = _choose(model, variants, held_out, loss, progress)
    _finish(model, variants[clipped], recipe, total)

    config = config_of(model)
    config.calibration.update(sequences=len(samples), predictions=calibration.predictions)
    config.result.update(
        clip={"used": clipped, "held_out_nll": losses},
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
    limit = -torch.inf if weight_fp4 == 0 else torch.inf
    records = {
        owner: replace(
            site.record,
            threshold=site_threshold(limit, 1.0, 1.0),
            rule="difference",
            scales="max",
        )
        for owner, site in sites(quantized).items()
    }
    weights = {}
    for names in linears_of.values():
        t = group_scale(original.get_submodule(n).weight for n in names)  # type: ignore[misc]
        for name in names:
            codes = quantize_weight(original.get_submodule(name).weight, t)  # type: ignore[arg-type]
            weights[name] = pack(codes, torch.full_like(codes.scale, weight_fp4 == 0).bool())
    activations = ActivationAssignment(records, dict.fromkeys(records, weight_fp4), weight_fp4)
    _finish(
        original,
        Assignment(weights, activations, linears_of),
        Recipe(policy=policy_name, fp4=weight_fp4, clip="off"),
        total,
    )
    return original


def least_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Least size of the checkpoint to come: all quantized weights in FP4, the rest as it is."""
    linearize(model)
    chosen = {id(m.weight) for m in quantizable(model, recipe.include, recipe.exclude).values()}
    rest = sum(p.nbytes for p in model.parameters() if id(p) not in chosen)
    weights = sum(p.numel() for p in model.parameters() if id(p) in chosen)
    return rest + int(weights * FP4_BITS / 8)


def _split(samples: Sequence[Any] | Tensor) -> tuple[Any, Any]:
    held = max(1, len(samples) // 8)
    if len(samples) <= held:
        raise InputError(f"clip=auto needs at least 2 sequences, got {len(samples)}")
    return samples[:-held], samples[-held:]


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
    """Bytes a parameter of the planes held at once: clip=auto makes two variants of them."""
    variants = 2 if recipe.clip == "auto" else 1
    return variants * (FP4_BITS + E2M1.bits * (1 - recipe.fp4)) / 8


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


def _fractions(
    recipe: Recipe,
    policy: Policy,
    scored: ScoredWeights,
    histograms: dict[str, ScoreHistogram],
    tokens: int,
) -> tuple[float, float]:
    """Shares of FP4 blocks, of weights and activations: the policy's, the budget's or as asked."""
    if policy.fraction is not None:
        return policy.fraction, policy.fraction
    if recipe.bits is None:
        return recipe.fp4, recipe.activation_fraction
    return joint_fractions(
        scored.scores.values(),
        histograms.values(),
        tokens,
        recipe.bits,
        relief=RELIEF if recipe.compensate else 1.0,
    )


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


def _choose(
    model: nn.Module,
    variants: dict[bool, Assignment],
    held_out: Sequence[Any] | Tensor | None,
    loss: Loss,
    progress: Stages,
) -> tuple[bool, dict[str, float]]:
    """Install the variant with the lower held-out loss; with one variant there is no question."""
    losses: dict[str, float] = {}
    if len(variants) > 1:
        assert held_out is not None
        with progress("choosing the scales", len(variants) * len(held_out)) as advance:
            for clipped, variant in variants.items():
                variant.install(model)
                losses["on" if clipped else "off"] = _mean_loss(model, held_out, loss, advance)
    best = min(variants, key=lambda clipped: losses.get("on" if clipped else "off", 0.0))
    variants[best].install(model)
    return best, losses


@torch.no_grad()
def _mean_loss(
    model: nn.Module, samples: Sequence[Any] | Tensor, loss: Loss, advance: Callable[[], None]
) -> float:
    total, count = 0.0, 0
    with frozen(model):
        for sample in samples:
            value, predictions = loss(model, sample)
            total, count = total + value.item(), count + predictions
            advance()
    return total / count


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
            "quantized_share": elements / sum(total.values()),
            "unquantized": sorted(n for n in total if n.removesuffix(".weight") not in packed),
        },
    )
    setattr(model, CONFIG_ATTRIBUTE, config)
    mark_quantized(model, config)
