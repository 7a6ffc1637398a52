"""The method: calibrate, score, assign, pack.

:func:`quantize` reads from top to bottom as the paper does; each step is one function of another
chapter. :func:`uniform` makes the baselines that a mixed model is compared with, on the same
activation sites.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.clip import search_scale_codes
from fgmp.assign.policy import POLICIES, Policy, site_record, weight_masks, weight_scores
from fgmp.errors import InputError
from fgmp.formats.activation import Site, sensitivity_codes, site_threshold
from fgmp.formats.spec import E4M3
from fgmp.formats.weight import check_finite, nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.model.convert import install
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.select import linearize, matrices, quantizable
from fgmp.model.store import CONFIG_ATTRIBUTE, config_of
from fgmp.model.transformers import mark_quantized
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.pack.planes import PackedWeight, pack
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity import memory
from fgmp.sensitivity.fisher import Calibration, Loss, calibrate, causal_lm_loss, frozen
from fgmp.sensitivity.histogram import (
    ScoreHistogram,
    achieved_fraction,
    add_scores,
    global_threshold,
    new_histogram,
)


@dataclass
class Assignment:
    """What quantizing decided, before it is put into the model."""

    weights: dict[str, PackedWeight]
    records: dict[str, Site]
    linears_of: dict[str, list[str]]
    fp4_fractions: dict[str, float]
    fp4_activations: float

    def install(self, model: nn.Module) -> None:
        """Put it into the model, in place."""
        install(model, self.weights, self.records, self.linears_of)


def quantize(
    model: nn.Module,
    samples: Sequence[Any] | Tensor,
    recipe: Recipe | None = None,
    *,
    loss: Loss = causal_lm_loss,
    held_out: Sequence[Any] | Tensor | None = None,
    groups: dict[str, list[str]] | None = None,
    state: Path | None = None,
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
    linearize(model)
    linears = quantizable(model, recipe.include, recipe.exclude)
    if not linears:
        raise InputError(
            f"no linear layer to quantize: include {list(recipe.include)} and exclude "
            f"{list(recipe.exclude)} leave none of {type(model).__name__}'s"
        )
    total = matrices(model)
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    device = next(model.parameters()).device
    needed = _memory_estimate(model, linears, samples[0], loss, recipe, len(samples))
    memory.require(needed, device)
    report(f"peak memory will be about {needed.peak / 1e9:.2f} GB")
    memory.reset_peak(device)

    with progress("calibrating", len(samples)) as advance:
        calibration = calibrate(
            model, linears, samples, loss, groups=groups, state=state, advance=advance
        )
    calibrated = time.perf_counter()
    _report_unreached(calibration, report)
    histograms = _histograms(model, linears, calibration, policy, recipe, samples, loss, progress)
    records, fractions, fp4_activations = _activation_thresholds(
        histograms, _records(calibration, policy, recipe), policy, recipe.activation_fraction
    )
    linears_of = {_owner(site.linears): site.linears for site in calibration.sites.values()}
    renamed = {name: _owner(site.linears) for name, site in calibration.sites.items()}
    variants = {}
    for clipped in {"on": (True,), "off": (False,), "auto": (False, True)}[recipe.clip]:
        weights = _pack_weights(linears, calibration, policy, recipe, clipped, progress)
        variants[clipped] = Assignment(
            weights,
            {renamed[n]: r for n, r in records.items()},
            linears_of,
            {renamed[n]: f for n, f in fractions.items()},
            fp4_activations,
        )
    calibration.weights.clear()
    clipped, losses = _choose(model, variants, held_out, loss, progress)
    assignment = variants[clipped]
    seconds = time.perf_counter() - started
    _finish(model, assignment, recipe, total)
    config = config_of(model)
    config.result["clip"] = {"used": clipped, "held_out_nll": losses}
    config.result["seconds"] = {"total": seconds, "calibration": calibrated - started}
    config.result["sensitivities_floored"] = _floored_share(calibration)
    config.result["peak_bytes"] = memory.peak_bytes(device)
    config.result["peak_bytes_predicted"] = needed.peak
    config.calibration.update(sequences=len(samples), predictions=calibration.predictions)
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
        owner: replace(site.record, threshold=site_threshold(limit, 1.0, 1.0), rule="difference")
        for owner, site in sites(quantized).items()
    }
    weights = {}
    for names in linears_of.values():
        t = _group_scale([original.get_submodule(n).weight for n in names])  # type: ignore[misc]
        for name in names:
            codes = quantize_weight(original.get_submodule(name).weight, t)  # type: ignore[arg-type]
            weights[name] = pack(codes, torch.full_like(codes.scale, weight_fp4 == 0).bool())
    assignment = Assignment(
        weights, records, linears_of, dict.fromkeys(records, weight_fp4), weight_fp4
    )
    _finish(original, assignment, Recipe(policy=policy_name, fp4=weight_fp4, clip="off"), total)
    return original


def _split(samples: Sequence[Any] | Tensor) -> tuple[Any, Any]:
    held = max(1, len(samples) // 8)
    if len(samples) <= held:
        raise InputError(f"clip=auto needs at least 2 sequences, got {len(samples)}")
    return samples[:-held], samples[-held:]


def _memory_estimate(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    sample: Any,
    loss: Loss,
    recipe: Recipe,
    count: int,
) -> memory.MemoryEstimate:
    # A mixed weight takes 4.5 bits plus 4 an FP8 element; auto holds two variants of it.
    variants = 2 if recipe.clip == "auto" else 1
    packed = variants * (4.5 + 4 * (1 - recipe.fp4)) / 8
    return memory.estimate(model, linears, sample, loss, packed)


def _report_unreached(calibration: Calibration, report: Callable[[str], None]) -> None:
    unreached = [s.linears[0] for s in calibration.sites.values() if s.tokens == 0]
    if unreached:
        report(
            f"{len(unreached)} sites were reached by no calibration token and keep default "
            f"scales: {', '.join(unreached)}"
        )


def _floored_share(calibration: Calibration) -> float:
    """Share of channels whose sensitivity lies below the smallest code and is raised to it."""
    floored, channels = 0, 0
    for site in calibration.sites.values():
        _, gamma = sensitivity_codes(site.g2)
        floored += int((site.g2 < gamma * E4M3.smallest / 2).sum())
        channels += len(site.g2)
    return floored / channels


def _owner(linears: list[str]) -> str:
    return linears[0]


def _records(calibration: Calibration, policy: Policy, recipe: Recipe) -> dict[str, Site]:
    return {
        name: site_record(policy, site.g2, site.amax, recipe.headroom)
        for name, site in calibration.sites.items()
    }


def _histograms(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    policy: Policy,
    recipe: Recipe,
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    progress: Stages,
) -> dict[str, ScoreHistogram]:
    """Run the samples forward once more and count the scores of every activation block."""
    records = _records(calibration, policy, recipe)
    histograms = {name: new_histogram(record) for name, record in records.items()}
    if policy.fraction is not None:
        return histograms
    with ExitStack() as stack, torch.no_grad(), progress("scoring activations", len(samples)) as go:
        stack.enter_context(frozen(model))
        for name, site in calibration.sites.items():
            record, histogram = records[name], histograms[name]

            def count(
                _: nn.Module,
                args: tuple[Tensor, ...],
                record: Site = record,
                histogram: ScoreHistogram = histogram,
            ) -> None:
                add_scores(histogram, args[0], record)

            # All linears of a site read the same tensor, so its first one sees everything.
            stack.enter_context(_hook(linears[site.linears[0]], count))
        for sample in samples:
            loss(model, sample)
            go()
    return histograms


@contextmanager
def _hook(module: nn.Module, function: Callable[..., None]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(function)
    try:
        yield
    finally:
        handle.remove()


def _activation_thresholds(
    histograms: dict[str, ScoreHistogram],
    records: dict[str, Site],
    policy: Policy,
    fp4_fraction: float,
) -> tuple[dict[str, Site], dict[str, float], float]:
    """Sites with their T_site, and the share of FP4 blocks on the samples: of each, and of all."""
    wanted = fp4_fraction if policy.fraction is None else policy.fraction
    shared = global_threshold(list(histograms.values()), wanted)
    done, fractions = {}, {}
    for name, record in records.items():
        threshold = global_threshold([histograms[name]], wanted) if policy.per_layer else shared
        done[name] = replace(record, threshold=site_threshold(threshold, record.r, record.gamma))
        exact = {-torch.inf: 0.0, torch.inf: 1.0}.get(threshold)
        reached = achieved_fraction(histograms[name], done[name].threshold)
        fractions[name] = reached if exact is None else exact
    blocks = {name: histogram.total for name, histogram in histograms.items()}
    overall = sum(fractions[n] * blocks[n] for n in done) / max(1, sum(blocks.values()))
    return done, fractions, overall if any(blocks.values()) else wanted


def _group_scale(weights: list[Tensor]) -> float:
    return tensor_scale(max(w.abs().max().item() for w in weights))


def _pack_weights(
    linears: dict[str, nn.Linear],
    calibration: Calibration,
    policy: Policy,
    recipe: Recipe,
    clipped: bool,
    progress: Stages,
) -> dict[str, PackedWeight]:
    """Choose block scales, score the blocks with them, assign, and pack."""
    generator = torch.Generator().manual_seed(recipe.seed)
    scales, scores, ts = {}, {}, {}
    title = "scoring weights, clipped" if clipped else "scoring weights"
    with progress(title, len(linears)) as advance:
        for site in calibration.sites.values():
            t = _group_scale([linears[n].weight for n in site.linears])
            for name in site.linears:
                weight, fisher = linears[name].weight.detach(), calibration.weights[name]
                if not fisher.any():
                    fisher = torch.ones_like(fisher)  # an expert that no token reached
                weighted = fisher if policy.sensitivity == "fisher" else torch.ones_like(fisher)
                nearest = nearest_scale_codes(weight.float(), t)
                scales[name] = search_scale_codes(weight, weighted, t) if clipped else nearest
                codes = quantize_weight(weight, t, scales[name])
                scores[name] = weight_scores(policy, codes, calibration.weights[name], generator)
                ts[name] = t
                advance()
    fraction = recipe.fp4 if policy.fraction is None else policy.fraction
    masks, _ = weight_masks(policy, scores, fraction)
    return {
        name: pack(quantize_weight(linear.weight.detach(), ts[name], scales[name]), masks[name])
        for name, linear in linears.items()
    }


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
    packed = mixed_linears(model)
    elements = sum(m.packed.n * m.packed.k for m in packed.values())
    fp8 = sum(int(m.packed.is_fp8().sum()) for m in packed.values())
    blocks = sum(m.packed.is_fp8().numel() for m in packed.values())
    config = CheckpointConfig(
        sites={
            owner: SiteConfig(
                names, assignment.records[owner].rule, assignment.fp4_fractions[owner]
            )
            for owner, names in assignment.linears_of.items()
        },
        recipe=recipe.to_dict(),
        result={
            "fp4_weights": 1 - fp8 / blocks,
            "fp4_activations": assignment.fp4_activations,
            "bits_per_weight": 8 * sum(m.packed.nbytes for m in packed.values()) / elements,
            "quantized_share": elements / sum(total.values()),
            "unquantized": sorted(n for n in total if n.removesuffix(".weight") not in packed),
        },
    )
    setattr(model, CONFIG_ATTRIBUTE, config)
    mark_quantized(model, config)
