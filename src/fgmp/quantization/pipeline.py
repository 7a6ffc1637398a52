"""The quantization pipeline: calibrate, score, assign, pack, choose, tune.

:func:`quantize` calls :func:`prepare`, then :func:`run`. :func:`prepare` is cheap: it checks the
arguments, selects the linears and predicts peak memory. :func:`run` has one function call per step.
A caller that needs the size of the result before hours of work calls the two itself.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.errors import InputError
from fgmp.formats.activation import sensitivity_codes
from fgmp.formats.spec import E2M1, E4M3, FP4_BITS
from fgmp.formats.weight import check_finite
from fgmp.model.linear import mixed_linears
from fgmp.model.losses import Loss, causal_lm_loss
from fgmp.model.precision import run_in, stored_dtype
from fgmp.model.select import (
    linearize,
    matches,
    matrices,
    other_linears,
    output_head,
    quantizable,
)
from fgmp.progress import Progress, silent
from fgmp.quantization import memory
from fgmp.quantization.budget import require_possible, solve
from fgmp.quantization.candidates import choose, measure_fp8, pack_candidates
from fgmp.quantization.duration import DurationEstimate
from fgmp.quantization.duration import estimate as estimate_duration
from fgmp.quantization.install import install
from fgmp.quantization.memory import MemoryEstimate
from fgmp.quantization.score_summary import score_summaries
from fgmp.quantization.scoring import score
from fgmp.quantization.sequential import bytes_needed, stage_kind
from fgmp.quantization.task import OperatingPoint, Task
from fgmp.quantization.tune import tune
from fgmp.recipe import Recipe
from fgmp.sensitivity.fisher import Calibration, SiteStatistics, calibrate


def quantize(
    model: nn.Module,
    samples: Sequence[Any] | Tensor,
    recipe: Recipe | None = None,
    *,
    loss: Loss = causal_lm_loss,
    held_out: Sequence[Any] | Tensor | None = None,
    groups: dict[str, list[str]] | None = None,
    calibration: Path | Calibration | None = None,
    resume: Path | None = None,
    methods: Methods = DEFAULT_METHODS,
    dtype: str = "auto",
    progress: Progress = silent,
    report: Callable[[str], None] = lambda line: None,
) -> nn.Module:
    """Quantize a model in place, weights and activations.

    Args:
        model: a causal LM of Transformers, or any module if ``loss`` is given.
        samples: calibration sequences: int64 (B, L) token windows for a causal LM, else whatever
            ``loss`` takes, one at a time.
        recipe: quantization settings. Its ``samples`` and ``seq_len`` are ignored: the argument
            ``samples`` sets both.
        loss: maps (model, sequence) to (summed loss in nats, number of predictions).
        held_out: sequences on which candidates are compared with the original. Default: the last
            eighth of ``samples``. With ``clip="auto"``, ``max_increase`` or ``tune`` that eighth is
            excluded from calibration.
        groups: linears of each activation site, by site name; overrides detection by tensor
            identity.
        calibration: file for the Fisher information, so that other recipes can reuse it. It is
            written if it does not exist; otherwise it is read, and refused if it belongs to another
            model, text or sites. Or a :class:`Calibration`; then no partial results are stored.
        resume: folder for partial results, from which the same call resumes after an interruption.
            The caller deletes it once the result is safe.
        methods: replacements for steps of weight quantization, for research.
        dtype: dtype of forward and backward passes, one of :data:`fgmp.model.precision.CHOICES`.
        progress: progress reporter for long stages; see ``fgmp.progress``.
        report: called with each one-line message to the user.

    Returns:
        ``model``, with its linears replaced by packed linears. Its other parameters now have the
        dtype of the passes; they are saved in their original dtype. All blocks have one format if a
        uniform model takes no more bits and is closer to the original on held-out text.
        ``fgmp.model.store.config_of(model)`` has the recipe and the results.

    Raises:
        InputError: no linear to quantize, a weight or activation that is not finite, too few
            samples, a budget that cannot be met, ``tune`` with another loss.
        MemoryLimitError: the run would not fit.
    """
    prepared = prepare(
        model,
        samples,
        recipe or Recipe(),
        loss=loss,
        held_out=held_out,
        resume=resume,
        methods=methods,
        dtype=dtype,
        progress=progress,
        report=report,
    )
    return run(prepared, groups=groups, calibration=calibration)


@dataclass(frozen=True, eq=False)
class Prepared:
    """Checked arguments of a run.

    Attributes:
        task: the run.
        matrices: number of elements of every matmul parameter, by name.
        memory: predicted peak memory.
        duration: predicted seconds.
    """

    task: Task
    matrices: dict[str, int]
    memory: MemoryEstimate
    duration: DurationEstimate


def prepare(
    model: nn.Module,
    samples: Sequence[Any] | Tensor,
    recipe: Recipe,
    *,
    loss: Loss = causal_lm_loss,
    held_out: Sequence[Any] | Tensor | None = None,
    resume: Path | None = None,
    methods: Methods = DEFAULT_METHODS,
    dtype: str = "auto",
    progress: Progress = silent,
    report: Callable[[str], None] = lambda line: None,
) -> Prepared:
    """Check everything that can be checked without calibration; arguments as for :func:`quantize`.

    The model is linearized and converted to the dtype of its passes, in place.
    """
    run_in(model, dtype)
    report(_passes(model))
    if loss is causal_lm_loss:
        _require_tokens("samples", samples, model)
        _require_tokens("held_out", () if held_out is None else held_out, model)
    elif recipe.tune:
        raise InputError(
            f"tune supports only causal language models with the default loss, got tune "
            f"{recipe.tune} and a custom loss"
        )
    samples, held_out = _split(samples, held_out, recipe)
    linears = select(model, recipe)
    for name, linear in linears.items():
        check_finite(f"{name}.weight", linear.weight)
    require_possible(recipe, model, linears)
    task = Task(model, linears, samples, held_out, loss, recipe, methods, progress, report, resume)
    needed = _require_memory(task)
    duration = estimate_duration(task, variants(recipe))
    report(f"the run will take {duration}")
    return Prepared(task, matrices(model), needed, duration)


def run(
    prepared: Prepared,
    *,
    groups: dict[str, list[str]] | None = None,
    calibration: Path | Calibration | None = None,
) -> nn.Module:
    """Quantize a prepared model in place; arguments and result as for :func:`quantize`."""
    task, recipe = prepared.task, prepared.task.recipe
    started = time.perf_counter()
    if isinstance(calibration, Calibration):  # no fingerprint: partial results cannot be matched
        task = replace(task, resume=None)
    else:
        calibration = _calibrate(task, groups, calibration)
    task, calibration = _exclude_unreached(task, calibration)
    calibrated = time.perf_counter()
    scores = score(task, calibration)
    fp8 = None if recipe.max_increase is None else measure_fp8(task, scores)
    point = solve(task, scores, calibration.weights, fp8)
    _report_point(task, point)
    candidates = pack_candidates(
        task, scores, calibration.weights, point.fractions, scores.variants
    )
    predictions, floored = calibration.predictions, _floored_fraction(calibration.sites.values())
    del calibration  # frees F_w, as large as the model in fp32, before tuning
    choice = choose(task, scores, point, candidates, fp8)
    del candidates
    if recipe.tune:
        choice = tune(task, choice, fp8)
    config = install(task.model, choice.assignment, recipe, prepared.matrices)
    config.scores.update(score_summaries(scores, point.fractions, clipped=bool(choice.clip.used)))
    dtype = str(next(task.model.parameters()).dtype).removeprefix("torch.")
    config.calibration.update(sequences=len(task.samples), predictions=predictions, dtype=dtype)
    config.result.update(
        choice.to_dict(),
        sensitivities_floored=floored,
    )
    config.run.update(
        seconds={
            "total": time.perf_counter() - started,
            "calibration": calibrated - started,
        },
        seconds_predicted={
            "total": prepared.duration.total,
            "calibration": prepared.duration.calibration,
        },
        peak_bytes=memory.peak_bytes(next(task.model.parameters()).device),
        peak_bytes_predicted=prepared.memory.peak,
    )
    return task.model


def _passes(model: nn.Module) -> str:
    """A message: dtype and device of the model's passes and, on a CPU, threads and capability."""
    parameter = next(model.parameters())
    ran, stored = (str(d).removeprefix("torch.") for d in (parameter.dtype, stored_dtype(model)))
    line = f"passes run in {ran}" + (f" (stored: {stored})" if ran != stored else "")
    if parameter.device.type != "cpu":
        return f"{line} on {parameter.device}"
    threads = torch.get_num_threads()
    return f"{line}, CPU threads: {threads}, {torch.backends.cpu.get_cpu_capability()}"


def _require_tokens(name: str, sequences: Sequence[Any] | Tensor, model: nn.Module) -> None:
    """Refuse sequences that are not the model's token ids, before hours of calibration."""
    for index, tokens in enumerate(sequences):
        if not isinstance(tokens, Tensor) or tokens.is_floating_point():
            got = f"{tokens.dtype}" if isinstance(tokens, Tensor) else type(tokens).__name__
        elif tokens.ndim != 1 or len(tokens) < 2:
            got = f"shape {[*tokens.shape]}"
        else:
            continue
        raise InputError(
            f"{name} must be token ids, int64 (B, L) with L 2 or more, unless a loss is given; "
            f"got {got} as sequence {index}"
        )
    require_valid_token_ids(name, sequences, model)


def require_valid_token_ids(
    name: str, sequences: Sequence[Tensor] | Tensor, model: nn.Module
) -> None:
    """Refuse token ids, int64 (L,) per sequence, that are outside the model's vocabulary.

    Raises:
        InputError: a token id has no row in the input embedding; names the first and its position.
    """
    try:
        rows = len(model.get_input_embeddings().weight)  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):  # no accessible input embedding
        return
    for index, tokens in enumerate(sequences):
        outside = (tokens < 0) | (tokens >= rows)
        if outside.any():
            position = int(outside.int().argmax())
            raise InputError(
                f"{name}: token id {int(tokens[position])} in sequence {index}, token {position}, "
                f"but the model's embedding has {rows} rows"
            )


def _split(
    samples: Sequence[Any] | Tensor, held_out: Sequence[Any] | Tensor | None, recipe: Recipe
) -> tuple[Any, Any]:
    """Calibration sequences and held-out sequences."""
    if len(samples) == 0:
        raise InputError("quantize needs at least one calibration sequence, got none")
    min_held_out = 1 if recipe.max_increase is None else 2  # one sequence gives no standard error
    if held_out is not None:
        if len(held_out) == 0:
            raise InputError("held_out needs at least one sequence, got none")
        if len(held_out) < min_held_out:
            raise InputError(
                f"max_increase needs at least {min_held_out} held-out sequences, got "
                f"{len(held_out)} (by default an eighth of the samples is held out)"
            )
        return samples, held_out
    count = max(min_held_out, len(samples) // 8)
    needed_by = {
        "max_increase": recipe.max_increase is not None,
        "clip=auto": recipe.clip == "auto",
        "tune": bool(recipe.tune),
    }
    if not any(needed_by.values()):
        return samples, samples[-count:]
    if len(samples) <= count:
        option = next(name for name, needed in needed_by.items() if needed)
        raise InputError(
            f"{option} needs at least {min_held_out + 1} sequences, got {len(samples)}"
        )
    return samples[:-count], samples[-count:]


def select(model: nn.Module, recipe: Recipe) -> dict[str, nn.Linear]:
    """Linearize the model, in place, and return the linears to quantize, by name.

    Raises:
        InputError: the model is quantized already, or has no linear to quantize.
    """
    linearize(model)
    if mixed_linears(model):
        raise InputError(f"{type(model).__name__} is already quantized; pass the unquantized model")
    linears = quantizable(model, recipe.include, recipe.exclude)
    if not linears:
        others = sorted(set(other_linears(model).values()))
        hint = f"; unsupported linear types: {', '.join(others)}" if others else ""
        raise InputError(
            f"no linear layer to quantize: include {list(recipe.include)} and exclude "
            f"{list(recipe.exclude)} select none of {type(model).__name__}'s linears{hint}"
        )
    return linears


def variants(recipe: Recipe) -> int:
    """Number of variants of the weights (with and without scale search) that are packed."""
    return 2 if recipe.clip == "auto" else 1


def _packed_bytes_per_parameter(recipe: Recipe) -> float:
    """Bytes per weight of all packed models held at once: every variant, and all-NVFP4."""
    fp8_fraction = 1.0 if recipe.budget else 1 - recipe.fp4
    return (FP4_BITS + variants(recipe) * (FP4_BITS + E2M1.bits * fp8_fraction)) / 8


def _require_memory(task: Task) -> MemoryEstimate:
    """Predict the peak, report it, and refuse a run that does not fit."""
    device = next(task.model.parameters()).device
    needed = predict_memory(task)
    memory.require(needed, device)
    task.report(f"peak memory will be about {needed.peak / 1e9:.2f} GB")
    memory.reset_peak(device)
    return needed


def predict_memory(
    task: Task,
    held: int | None = None,
    saved: int | None = None,
    compensation: int | None = None,
) -> MemoryEstimate:
    """Predict the peak of a run; what is None is measured on the first sample.

    Args:
        task: what will run; if nothing is measured, no weight is read.
        held, saved: as for :func:`fgmp.quantization.memory.estimate`.
        compensation: bytes of :func:`fgmp.quantization.sequential.bytes_needed`.
    """
    recipe = task.recipe
    if not recipe.compensate:
        compensation = 0
    elif compensation is None:
        compensation = bytes_needed(
            task.model, task.linears, task.samples, task.loss, variants(recipe)
        )
    return memory.estimate(
        task.model,
        task.linears,
        task.samples[0],
        task.fisher_loss,
        _packed_bytes_per_parameter(recipe),
        variants=variants(recipe),
        ranked=recipe.budget is not None,
        fisher=recipe.fisher,
        compensation=compensation,
        tuned=bool(recipe.tune),
        vocabulary=_vocabulary(task),
        held=held,
        saved=saved,
    )


def _vocabulary(task: Task) -> int:
    """Vocabulary size of a causal language model with a known output head, else 0."""
    head = output_head(task.model)
    weight = None if head is None else head.weight
    return len(weight) if task.loss is causal_lm_loss and isinstance(weight, Tensor) else 0


def _calibrate(task: Task, groups: dict[str, list[str]] | None, file: Path | None) -> Calibration:
    """Collect Fisher information and activation ranges."""
    reused = file is not None and file.exists()
    fisher = task.recipe.fisher
    resume = None
    if file is None:
        resume = task.partial_results("calibration", fisher, groups or {}, task.fisher_loss)
    with task.progress("calibrating", len(task.samples)) as advance:
        calibration = calibrate(
            task.model,
            task.linears,
            task.samples,
            task.fisher_loss,
            fisher=fisher,
            groups=groups,
            file=file,
            resume=resume,
            advance=advance,
        )
    if reused:
        task.report(
            f"using the Fisher information in {file}; activation scores and input moments depend "
            "on the recipe and still need forward passes"
        )
    return calibration


def _exclude_unreached(task: Task, calibration: Calibration) -> tuple[Task, Calibration]:
    """Exclude linears that no calibration token reached, and report them.

    Their input statistics are unknown. Some are never called, because another module reads their
    weight. Two kinds are quantized anyway, with default scales and every block in FP4: experts
    without tokens, if other experts of the layer had tokens, and linears that an ``include``
    pattern names.

    Raises:
        InputError: no token reached any linear.
    """
    sites_without_tokens = {
        site.linears[0]: site for site in calibration.sites.values() if site.tokens == 0
    }
    reached = [n for s in calibration.sites.values() if s.tokens for n in s.linears]
    kinds = {stage_kind(task.model, name) for name in reached}
    patterns = tuple(pattern for pattern in task.recipe.include if pattern != "*")
    excluded = {
        name
        for site in sites_without_tokens.values()
        for name in site.linears
        if stage_kind(task.model, name) not in kinds and not matches(name, patterns)
    }
    weights = {id(task.linears[name].weight) for name in excluded}
    excluded |= {name for name, m in task.linears.items() if id(m.weight) in weights}
    if excluded:
        task.report(
            f"not quantizing linears that received no calibration tokens: "
            f"{', '.join(sorted(excluded))}"
        )
    if len(excluded) == len(task.linears):
        raise InputError("no calibration token reached a linear: there is nothing to quantize")
    experts = [name for name in sites_without_tokens if name not in excluded]
    if experts:
        task.report(
            f"{len(experts)} sites received no calibration tokens; quantizing them with default "
            f"scales and all blocks in FP4: {', '.join(experts)}"
        )
    linears = {name: m for name, m in task.linears.items() if name not in excluded}
    sites = {n: s for n, s in calibration.sites.items() if s.linears[0] not in excluded}
    return replace(task, linears=linears), replace(calibration, sites=sites)


def _report_point(task: Task, point: OperatingPoint) -> None:
    if task.recipe.budget:
        task.report(
            f"{task.recipe.budget} allows {point.budget.bits:.3f} bits on average: "
            f"{point.fractions.weights:.1%} of weight blocks and "
            f"{point.fractions.activations:.1%} of activation blocks in FP4"
        )


def _floored_fraction(statistics: Iterable[SiteStatistics]) -> float:
    """Fraction of channels whose sensitivity underflows and is raised to the smallest code."""
    floored, channels = 0, 0
    for site in statistics:
        _, gamma = sensitivity_codes(site.g2)
        floored += int((site.g2 < gamma * E4M3.smallest / 2).sum())
        channels += len(site.g2)
    return floored / channels
