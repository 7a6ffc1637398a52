"""The method: calibrate, score, assign, pack.

:func:`quantize` reads from top to bottom as the paper does; each step is one function of another
chapter. :func:`uniform` makes the baselines that a mixed model is compared with, on the same
activation sites.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.policy import POLICIES, site_record
from fgmp.assign.weights import score_weights
from fgmp.candidates import UNIFORM, Assignment, choose, increase_at, measure, mixed, uniformly
from fgmp.errors import InputError
from fgmp.formats.activation import Site, sensitivity_codes
from fgmp.formats.spec import E2M1, E4M3, FP4_BITS
from fgmp.formats.weight import check_finite
from fgmp.model.linear import ActivationSite, mixed_linears, sites
from fgmp.model.select import linearize, matrices, output_head, quantizable
from fgmp.model.store import CONFIG_ATTRIBUTE, bytes_to_save, config_of
from fgmp.model.transformers import mark_quantized
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.sensitivity import memory
from fgmp.sensitivity.fisher import (
    Calibration,
    Loss,
    SiteStatistics,
    calibrate,
    causal_lm_loss,
    frozen,
)
from fgmp.sensitivity.histogram import ScoreHistogram, new_histogram
from fgmp.sensitivity.memory import MemoryEstimate
from fgmp.sequential import bytes_needed
from fgmp.solve import require_bytes, require_known_energy, solve
from fgmp.task import Scored, Task
from fgmp.tune import tune


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
    unfinished: Path | None = None,
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
            the last eighth of ``samples``; under ``clip="auto"``, ``max_increase`` or ``tune`` they
            then take no part in calibration.
        groups: activation sites that override those found by tensor identity.
        state: file that keeps an interrupted calibration, from which a later call goes on. The
            caller removes it.
        reuse: ``state`` is a calibration to be used again: refuse one of another model, of other
            sequences or sites instead of starting anew over it.
        unfinished: folder that keeps what compensation has packed and how far tuning came, from
            which a later call goes on. The caller removes it, once the result is safe.
        progress: reports on long stages; see ``fgmp.progress``.
        report: gets a line for a person now and then.

    Returns:
        ``model``, its linears replaced by packed ones; by those of a uniform format if that takes
        no more bits and is nearer to the original on held-out text.
        ``fgmp.model.store.config_of(model)`` tells what was reached.

    Raises:
        InputError: no linear to quantize, a weight or activation that is not finite, too few
            samples, a budget that cannot be met, ``tune`` with another loss.
        MemoryLimitError: the run would not fit.
    """
    recipe = recipe or Recipe()
    started = time.perf_counter()
    if loss is causal_lm_loss:
        _require_tokens("samples", samples)
        _require_tokens("held_out", () if held_out is None else held_out)
    elif recipe.tune:
        raise InputError(
            f"tune needs the predictions of a causal language model, got another loss and tune "
            f"{recipe.tune}"
        )
    samples, checked = _texts(samples, held_out, recipe)
    linears = _select(model, recipe)
    if recipe.max_bytes is not None:  # what is hopeless is said before hours of calibration
        require_bytes(recipe.max_bytes, model, linears, {})
    if recipe.max_energy is not None:
        require_known_energy(recipe)
    total = matrices(model)
    task = Task(model, linears, samples, checked, loss, recipe, progress, report, unfinished)
    needed = _require_memory(task)

    calibration = _calibrate(task, groups, state, reuse)
    calibrated = time.perf_counter()
    scored = _score(task, calibration)
    base = {}
    if recipe.max_increase is not None:
        fp8 = uniformly(task.tensors, scored.records, scored.linears_of, UNIFORM["fp8"])
        base = measure(task, {"fp8": fp8})

    def increase(shares: tuple[float, float]) -> float:
        """Of perplexity over all-FP8's, in percent."""
        return increase_at(task, scored, calibration.weights, shares, base["fp8"])

    point = solve(task, scored, increase)
    if recipe.budget:
        report(
            f"{recipe.budget} comes to {point.facts['bits']:.3f} bits: {point.shares[0]:.1%} of "
            f"weight blocks and {point.shares[1]:.1%} of activation blocks in FP4"
        )
    candidates = mixed(task, scored, calibration.weights, point.shares, scored.variants)
    calibration.weights = {}
    choice = choose(task, scored, point, candidates, base)
    if recipe.tune:
        choice = tune(task, choice, base)
    _finish(model, choice.assignment, recipe, total)

    config = config_of(model)
    config.calibration.update(sequences=len(samples), predictions=calibration.predictions)
    config.result.update(
        choice.facts,
        sensitivities_floored=_floored_share(calibration.sites.values()),
        seconds={
            "total": time.perf_counter() - started,
            "calibration": calibrated - started,
        },
        peak_bytes=memory.peak_bytes(next(model.parameters()).device),
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

    Raises:
        InputError: the two are not of one model, as far as names and shapes of parameters tell.
    """
    linearize(original)
    _require_same_shapes(original, quantized)
    config = config_of(quantized)
    total = matrices(original)
    linears_of = {owner: site.linears for owner, site in config.sites.items()}
    tensors = {
        name: original.get_submodule(name).weight.detach()  # type: ignore[operator]
        for names in linears_of.values()
        for name in names
    }
    records = {owner: site.record for owner, site in sites(quantized).items()}
    assignment = uniformly(tensors, records, linears_of, weight_fp4)
    _finish(original, assignment, Recipe(policy=policy_name, fp4=weight_fp4, clip="off"), total)
    return original


def _require_same_shapes(original: nn.Module, quantized: nn.Module) -> None:
    found = {name: [*p.shape] for name, p in original.named_parameters()}
    wanted = {name: [*p.shape] for name, p in quantized.named_parameters()}
    for name, linear in mixed_linears(quantized).items():
        wanted[f"{name}.weight"] = [linear.out_features, linear.in_features]
    for name in wanted | found:
        if wanted.get(name) != found.get(name):
            first, second = (
                getattr(model, "name_or_path", "") or type(model).__name__
                for model in (quantized, original)
            )
            raise InputError(
                f"{first}: not a quantized {second}: {name} must have the same shape in both, got "
                f"{wanted.get(name, 'none')} and {found.get(name, 'none')}"
            )


def least_bytes(model: nn.Module, recipe: Recipe) -> int:
    """Least size of the checkpoint to come: all quantized weights in FP4, the rest as it is."""
    linearize(model)
    chosen = quantizable(model, recipe.include, recipe.exclude)
    replaced = {f"{name}.weight" for name in chosen}
    rest = sum(size for name, size in bytes_to_save(model).items() if name not in replaced)
    return rest + int(sum(m.weight.numel() for m in chosen.values()) * FP4_BITS / 8)


def _require_tokens(name: str, sequences: Sequence[Any] | Tensor) -> None:
    """Refuse what is no sequence of token ids, before hours of calibration."""
    for index, tokens in enumerate(sequences):
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            found = f"{tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        elif tokens.ndim != 1 or len(tokens) < 2:
            found = f"shape {[*tokens.shape]}"
        else:
            continue
        raise InputError(
            f"{name} must be token ids, int64 (B, L) with L 2 or more, where no other loss is "
            f"given; got {found} as sequence {index}"
        )


def _texts(
    samples: Sequence[Any] | Tensor, held_out: Sequence[Any] | Tensor | None, recipe: Recipe
) -> tuple[Any, Any]:
    """Sequences to calibrate on and sequences to compare candidates on."""
    if len(samples) == 0:
        raise InputError("quantize needs at least one calibration sequence, got none")
    least = 1 if recipe.max_increase is None else 2  # to tell an increase from noise
    if held_out is not None:
        if len(held_out) == 0:
            raise InputError("held_out needs at least one sequence, got none")
        if len(held_out) < least:
            raise InputError(
                f"max_increase needs at least {least} held-out sequences, an eighth of "
                f"{8 * least} samples, got {len(held_out)}"
            )
        return samples, held_out
    held = max(least, len(samples) // 8)
    if recipe.clip != "auto" and recipe.max_increase is None and not recipe.tune:
        return samples, samples[-held:]
    if len(samples) <= held:
        asked = {
            "max_increase": recipe.max_increase is not None,
            "clip=auto": recipe.clip == "auto",
            "tune": recipe.tune,
        }
        why = next(name for name, given in asked.items() if given)
        raise InputError(f"{why} needs at least {least + 1} sequences, got {len(samples)}")
    return samples[:-held], samples[-held:]


def _select(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Linearize the model and choose; weights must be finite."""
    linearize(model)
    if mixed_linears(model):
        raise InputError(f"{type(model).__name__} is quantized already; quantize its original")
    linears = quantizable(model, recipe.include, recipe.exclude)
    if not linears:
        raise InputError(
            f"no linear layer to quantize: include {list(recipe.include)} and exclude "
            f"{list(recipe.exclude)} leave none of {type(model).__name__}'s"
        )
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    return linears


def _variants(recipe: Recipe) -> int:
    """How many choices of scales are scored and packed."""
    return 2 if recipe.clip == "auto" else 1


def _packed_bytes(recipe: Recipe) -> float:
    """Bytes a parameter of the planes held at once: of each variant, and of all NVFP4, which is
    compared with them."""
    fp8_share = 1.0 if recipe.budget else 1 - recipe.fp4
    return (FP4_BITS + _variants(recipe) * (FP4_BITS + E2M1.bits * fp8_share)) / 8


def _require_memory(task: Task) -> MemoryEstimate:
    """What the peak will be; what has no room is refused."""
    device = next(task.model.parameters()).device
    compensation = 0
    if task.recipe.compensate:
        compensation = bytes_needed(task.model, task.linears, task.samples, task.loss)
    needed = memory.estimate(
        task.model,
        task.linears,
        task.samples[0],
        task.fisher_loss,
        _packed_bytes(task.recipe),
        variants=_variants(task.recipe),
        ranked=task.recipe.budget is not None,
        fisher=task.recipe.fisher,
        compensation=compensation,
        tuned=bool(task.recipe.tune),
        vocabulary=_vocabulary(task),
    )
    memory.require(needed, device)
    task.report(f"peak memory will be about {needed.peak / 1e9:.2f} GB")
    memory.reset_peak(device)
    return needed


def _vocabulary(task: Task) -> int:
    """Words that a causal language model tells apart, as far as it names its output head."""
    head = output_head(task.model)
    weight = None if head is None else head.weight
    return len(weight) if task.loss is causal_lm_loss and isinstance(weight, Tensor) else 0


def _calibrate(
    task: Task, groups: dict[str, list[str]] | None, state: Path | None, reuse: bool
) -> Calibration:
    """Gradients and ranges; says what may surprise."""
    kept = reuse and state is not None and state.exists()
    with task.progress("calibrating", len(task.samples)) as advance:
        calibration = calibrate(
            task.model,
            task.linears,
            task.samples,
            task.fisher_loss,
            fisher=task.recipe.fisher,
            groups=groups,
            state=state,
            reuse=reuse,
            advance=advance,
        )
    if kept:
        task.report(
            f"gradients are taken from {state}; what depends on the recipe, the scores of "
            "activations and the moments of inputs, takes passes forward"
        )
    unreached = [site.linears[0] for site in calibration.sites.values() if site.tokens == 0]
    if unreached:
        task.report(
            f"{len(unreached)} sites were reached by no calibration token: default scales, and "
            f"nothing to say which blocks need FP8, so all in FP4: {', '.join(unreached)}"
        )
    return calibration


def _score(task: Task, calibration: Calibration) -> Scored:
    """All blocks' scores, weights' and activations'; sites go by their first linear."""
    recipe, policy = task.recipe, POLICIES[task.recipe.policy]
    statistics = {site.linears[0]: site for site in calibration.sites.values()}
    linears_of = {owner: site.linears for owner, site in statistics.items()}
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
        _count_scores(task, records, histograms)
    variants = []
    for clipped in {"on": (True,), "off": (False,), "auto": (False, True)}[recipe.clip]:
        with task.progress("scoring weights", len(task.linears)) as advance:
            variants.append(
                score_weights(
                    task.tensors,
                    calibration.weights,
                    linears_of.values(),
                    policy,
                    rule=recipe.rule,
                    clipped=clipped,
                    seed=recipe.seed,
                    advance=advance,
                )
            )
    return Scored(
        linears_of,
        records,
        histograms,
        variants,
        policy,
        calibration.predictions,
    )


def _floored_share(statistics: Iterable[SiteStatistics]) -> float:
    """Share of channels whose sensitivity lies below the smallest code and is raised to it."""
    floored, channels = 0, 0
    for site in statistics:
        _, gamma = sensitivity_codes(site.g2)
        floored += int((site.g2 < gamma * E4M3.smallest / 2).sum())
        channels += len(site.g2)
    return floored / channels


@torch.no_grad()
def _count_scores(
    task: Task, records: Mapping[str, Site], histograms: Mapping[str, ScoreHistogram]
) -> None:
    """Run the samples forward once more and count scores of all activation blocks."""
    with ExitStack() as stack, task.progress("scoring activations", len(task.samples)) as advance:
        stack.enter_context(frozen(task.model))
        for owner, record in records.items():
            # All linears of a site read the same tensor, so its owner sees everything.
            linear = task.linears[owner]
            site = ActivationSite(record).to(linear.weight.device)
            hook = partial(_count_input, histograms[owner], site)
            stack.callback(linear.register_forward_pre_hook(hook).remove)
        for sample in task.samples:
            task.loss(task.model, sample)
            advance()


def _count_input(
    histogram: ScoreHistogram, site: ActivationSite, _: nn.Module, args: tuple[Tensor, ...]
) -> None:
    if args[0].numel():
        histogram.add(site.scores(args[0]))


def _finish(
    model: nn.Module, assignment: Assignment, recipe: Recipe, total: dict[str, int]
) -> None:
    """Install, and write down what the checkpoint's configuration will say."""
    assignment.replacement(model).put(model)
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
            "tensor_bytes": sum(bytes_to_save(model).values()),
            "quantized_share": elements / sum(total.values()),
            "unquantized": sorted(n for n in total if n.removesuffix(".weight") not in packed),
        },
    )
    setattr(model, CONFIG_ATTRIBUTE, config)
    mark_quantized(model, config)
