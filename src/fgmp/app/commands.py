"""What the commands do, from names of models and texts to typed results.

Each public function is one command without its parsing and printing.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import TextStreamer

from fgmp.app.provenance import provenance
from fgmp.app.records import (
    CacheUse,
    CompareSummary,
    Comparison,
    Coverage,
    EvalSummary,
    Evaluation,
    ExportSummary,
    Generation,
    Online,
    Plan,
    QuantizeSummary,
    TaskComparison,
    TaskRow,
    TaskScores,
)
from fgmp.assign.frontier import Fractions
from fgmp.data import (
    CalibrationText,
    beginning,
    calibration_stream,
    choose_windows,
    digest,
    evaluation_windows,
    held_out_count,
    overlap_with,
    tokenize,
)
from fgmp.demo.text import docstrings, standard_library
from fgmp.documents import read_documents
from fgmp.errors import CheckpointError, FGMPError, InputError
from fgmp.evaluation import compare as comparison
from fgmp.evaluation.perplexity import batches, next_token_log_probabilities, vocabulary_size
from fgmp.evaluation.perplexity import evaluate as evaluate_windows
from fgmp.evaluation.tasks import Score, TaskChoice, Tasks, cut_prompts, difference, load_tasks
from fgmp.evaluation.tasks import score as score_tasks
from fgmp.export.export import export
from fgmp.export.plan import require_options
from fgmp.model.cache import PackedCache, packed_cache, require_kind
from fgmp.model.convert import sharing_copy
from fgmp.model.linear import sites
from fgmp.model.precision import round_to_stored
from fgmp.model.select import linearize
from fgmp.model.source import Source, context_length
from fgmp.model.store import config_of, save
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import QUANT_METHOD
from fgmp.pack.folder import weight_files
from fgmp.progress import Progress, silent
from fgmp.quantization.budget import least_bytes
from fgmp.quantization.pipeline import prepare, require_valid_token_ids, run
from fgmp.quantization.plan import (
    Prediction,
    first_fit,
    parsed_size,
    parsed_time,
    predict,
    profile_of,
)
from fgmp.quantization.twin import allocate, reason_against, twin
from fgmp.quantization.uniform import Template, require_same_shapes, uniform
from fgmp.recipe import Recipe
from fgmp.report.card import model_card, source_metadata, update_card
from fgmp.storage.resume import forget, require_own

_LONGEST_WINDOW = 2048
_VERIFIED_TOKENS = 64
"""Tokens of the sequence on which a written checkpoint is compared with the model."""
_DRIFT_WARNING = 0.03
"""Difference between the FP4 fraction of a site and its calibrated one that is worth a warning.
Chosen, not measured: sites move by less on text of the calibration's kind (docs/ablations.md)."""
_CACHE_SAMPLES, _CACHE_SEQ_LEN = 8, 256
"""Calibration of a KV cache, which needs only largest magnitudes and one quantile."""


@dataclass(frozen=True)
class Reporter:
    """Receivers of progress and messages; the defaults discard them."""

    progress: Progress = silent
    message: Callable[[str], None] = lambda text: None


SILENT = Reporter()


def coverage(model: nn.Module) -> Coverage:
    """Fraction of matmul parameters that are quantized, and the matrices that are not."""
    result = config_of(model).result
    return Coverage(result.get("quantized_share"), result.get("unquantized", []))


def quantize_to(
    model_name: str,
    output: Path,
    recipe: Recipe,
    calibration_text: str | None = None,
    reporter: Reporter = SILENT,
    calibration: Path | None = None,
    bos: bool | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    command: str | None = None,
) -> QuantizeSummary:
    """Quantize a model by name and write the checkpoint.

    Args:
        model_name: folder or hub name.
        output: folder to write.
        recipe: quantization settings.
        calibration_text: file or data set; default: docstrings of the Python library.
        reporter: receives progress and messages.
        calibration: file for the Fisher information, so that other recipes on the same model and
            text can reuse it.
        bos: whether every calibration window starts with the beginning-of-sequence token; None: if
            the tokenizer puts it before a text.
        trust_remote_code, dtype: as for :class:`fgmp.model.source.Source`.
        command: command line, stored in ``fgmp_run.json``.
    """
    started = time.perf_counter()
    _require_targets(output, calibration)
    source = _source(model_name, trust_remote_code, dtype, reporter)
    if source.is_packed:
        raise InputError(f"model {model_name}: already quantized, by {QUANT_METHOD!r}")
    tokenizer = source.tokenizer()
    bos_id = beginning(tokenizer, bos)
    # The text comes before the model, whose loading may take minutes.
    stream = _calibration_stream(calibration_text, tokenizer, recipe)
    model = source.load()
    source.require_every_tensor(model)
    text = _calibration_windows(stream, bos_id, model, recipe, calibration_text, reporter)
    resume = output.absolute().parent / f".{output.absolute().name}.unfinished"
    require_own(resume)
    with _resumable(resume, reporter):
        prepared = prepare(
            model,
            text.samples,
            recipe,
            held_out=text.held_out,
            resume=resume,
            dtype=dtype,
            progress=reporter.progress,
            report=reporter.message,
        )
        checkpoint.require_space(output, least_bytes(model, prepared.task.linears))
        run(prepared, calibration=calibration)
        _record_text(model, text, tokenizer, calibration_text, bos=bos_id is not None)
        config_of(model).run.update(provenance(model_name, command))
        card = model_card(config_of(model), model_name, source_metadata(source.card()))
        save(model, output, tokenizer, extra_files=source.processor_files(), card=card)
        _verify_written(model, output, dtype, text.held_out[0])
    forget(resume)
    return _summary(model, output, time.perf_counter() - started)


def plan_run(
    model_name: str,
    recipe: Recipe,
    memory: str | None = None,
    time_limit: str | None = None,
    output: Path | None = None,
    reporter: Reporter = SILENT,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Plan:
    """Predict what :func:`quantize_to` will take, from the model's configuration alone.

    Args:
        model_name: folder or hub name; a folder needs no file but ``config.json``.
        recipe: quantization settings.
        memory: limit on peak memory, such as ``8G``, if any.
        time_limit: limit on the duration, such as ``3h``, if any.
        output: folder that the run would write, whose free disk space is reported.
        reporter: receives messages.
        trust_remote_code, dtype: as for :class:`fgmp.model.source.Source`.

    Raises:
        InputError: the model cannot be built or followed without weights, or a limit is malformed.
    """
    limit = None if memory is None else parsed_size(memory)
    seconds = None if time_limit is None else parsed_time(time_limit)
    source = _source(model_name, trust_remote_code, dtype, reporter)
    with FakeTensorMode():
        model = source.skeleton(dtype, limit)
        context = context_length(model)
        profile = profile_of(model, recipe)

        def predicted(recipe: Recipe) -> Prediction:
            return predict(profile, recipe, context, held_out_count(recipe.samples))

        changes: dict[str, Any] | None = None
        asked, changed = predicted(recipe), None
        if asked.fits(limit, seconds):
            changes = {}
        elif fit := first_fit(predicted, asked.recipe, limit, seconds):
            changes, changed = fit
    return Plan(
        model=model_name,
        parameters=profile.parameters,
        quantized_parameters=profile.quantized_parameters,
        quantized_share=profile.quantized_share,
        asked=asked,
        memory_limit=limit,
        time_limit=seconds,
        disk_free=None if output is None else checkpoint.free_space(output),
        changes=changes,
        changed=changed,
    )


def _record_text(
    model: nn.Module, text: CalibrationText, tokenizer: Any, name: str | None, *, bos: bool
) -> None:
    """Store in a quantized model's configuration which text it was calibrated on."""
    config_of(model).calibration.update(
        text=_utf8(Path(name).name) if name else "docstrings",
        fingerprint=text.fingerprint,
        seq_len=text.samples.shape[1],
        bos=bos,
        # The held-out slice decided too, so a figure on it would be flattered as well.
        digest=digest(torch.cat([text.samples, text.held_out]), tokenizer),
    )


def _source(name: str, trust_remote_code: bool, dtype: str, reporter: Reporter) -> Source:
    """The model of this name; says loudly that code which comes with it will run."""
    if trust_remote_code:
        reporter.message(f"warning: Python files that come with {name} are run")
    return Source(name, trust_remote_code=trust_remote_code, dtype=dtype)


def _require_targets(output: Path, calibration: Path | None) -> None:
    """Refuse targets that cannot be written, before any work."""
    for path in (output, calibration):
        _require_unicode(f"{path}: the path", str(path))
    checkpoint.require_free(output)
    if calibration is not None and not calibration.exists():
        checkpoint.require_writable(calibration)
        if output.absolute() in (calibration.absolute(), *calibration.absolute().parents):
            raise InputError(f"{calibration}: lies in {output}, which must be empty until the end")


def _require_unicode(name: str, text: str) -> None:
    """Refuse text with lone surrogates, by which Python stands for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{name} is not valid UTF-8 at character {error.start}") from error


def _utf8(text: str) -> str:
    """Text with its lone surrogates replaced by question marks."""
    return text.encode(errors="replace").decode()


def _calibration_stream(name: str | None, tokenizer: Any, recipe: Recipe) -> torch.Tensor:
    if not name:
        return tokenize(docstrings(standard_library()), tokenizer)
    options = {"samples": recipe.samples, "seq_len": recipe.seq_len, "seed": recipe.seed}
    return calibration_stream(name, tokenizer, **options)


def _calibration_windows(
    stream: torch.Tensor,
    bos_id: int | None,
    model: nn.Module,
    recipe: Recipe,
    name: str | None,
    reporter: Reporter,
) -> CalibrationText:
    seq_len = min(recipe.seq_len, context_length(model))
    text = choose_windows(
        stream,
        samples=recipe.samples,
        seq_len=seq_len,
        seed=recipe.seed,
        bos_id=bos_id,
        source=name or "docstrings of the Python library",
    )
    if len(text.samples) < text.asked:
        reporter.message(
            f"the calibration text gives {len(text.samples)} sequences of {seq_len} tokens, "
            f"fewer than the {text.asked} requested"
        )
    return text


@contextmanager
def _resumable(folder: Path, reporter: Reporter) -> Iterator[None]:
    """After an interruption or error, say that partial results are kept."""
    try:
        yield
    except (KeyboardInterrupt, FGMPError):
        if folder.exists():
            reporter.message(f"partial results are kept in {folder}: the same command resumes")
        raise


def _verify_written(model: nn.Module, output: Path, dtype: str, tokens: torch.Tensor) -> None:
    """Read the checkpoint back and compare its logits with the model's on one sequence.

    Raises:
        CheckpointError: they differ.
    """
    round_to_stored(model)
    tokens = tokens[:_VERIFIED_TOKENS].unsqueeze(0)
    with torch.no_grad():
        expected = next_token_log_probabilities(model.eval(), tokens)
        actual = next_token_log_probabilities(
            Source(str(output), dtype=dtype).load().eval(), tokens
        )
    difference = (actual - expected).abs().max().item()
    if difference != 0:
        raise CheckpointError(
            f"{output}: read back, the checkpoint must give the logits of the model in memory, but "
            f"log-probabilities differ by up to {difference:.3g}: do not use it, and report this"
        )


def _summary(model: nn.Module, output: Path, seconds: float) -> QuantizeSummary:
    config = config_of(model)
    result = config.result
    return QuantizeSummary(
        output=str(output),
        fp4_fraction=Fractions(result["fp4_weights"], result["fp4_activations"]),
        coverage=coverage(model),
        bits_per_weight=result["bits_per_weight"],
        bytes=sum(f.stat().st_size for f in weight_files(output)),
        tensor_bytes=result["tensor_bytes"],
        budget=result["budget"],
        clip=result["clip"],
        uniform=result["uniform"],
        tune=result.get("tune", {}),
        seconds=seconds,
        peak_bytes=config.run["peak_bytes"],
    )


def evaluate(
    name: str,
    data: str | None,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    kv_cache: str | None = None,
    bos: bool | None = None,
    *,
    tasks: TaskChoice | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> EvalSummary:
    """Evaluate a model or checkpoint by name on a text, on tasks, or on one after the other.

    Arguments as :func:`evaluate_model`.
    """
    if data is None and kv_cache:
        raise InputError("--kv-cache is for --data: tasks run without a packed KV cache")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype}
    loaded = None if tasks is None else load_tasks(tasks, trust_remote_code=trust_remote_code)
    text = None
    if data is not None:
        text = evaluate_model(name, data, seq_len, reporter, kv_cache, bos, **options)
    if loaded is None:
        return EvalSummary(text, None)
    source = _source(name, trust_remote_code, dtype, reporter)
    scores = _scores(source.load(), source.tokenizer(), loaded, reporter, bos)
    return EvalSummary(text, TaskScores(scores, loaded.choice.limit))


def _scores(
    model: nn.Module, tokenizer: Any, tasks: Tasks, reporter: Reporter, bos: bool | None
) -> list[Score]:
    """Scores of one model; warns of prompts that do not fit its context."""
    scores = score_tasks(model, tokenizer, tasks, bos)
    if cut := cut_prompts(model, tokenizer, tasks):
        reporter.message(
            f"warning: {cut:,} prompts of tasks are longer than the model's context of "
            f"{context_length(model):,} tokens and were cut at their beginning"
        )
    return scores


def evaluate_model(
    name: str,
    data: str,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    kv_cache: str | None = None,
    bos: bool | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Evaluation:
    """Perplexity of a model or checkpoint by name, with a packed KV cache if one is named.

    ``bos`` is as for :func:`fgmp.evaluation_windows`.
    """
    if kv_cache:
        require_kind(kv_cache)
    documents = read_documents(data)  # before the model, whose loading may take minutes
    source = _source(name, trust_remote_code, dtype, reporter)
    tokenizer, model = source.tokenizer(), source.load()
    length, bos_id = _window_length(model, seq_len), beginning(tokenizer, bos)
    windows = evaluation_windows(data, tokenizer, length, documents, bos=bos_id is not None)
    del documents
    require_valid_token_ids(f"text {data}", windows, model)
    cache = _packed_cache(model, tokenizer, kv_cache, bos) if kv_cache else None
    stored = 0

    comparison.start_counting(model)
    parts = batches(windows, vocabulary_size(model))
    with reporter.progress("evaluating", len(parts)) as advance:

        def count() -> None:
            nonlocal stored
            stored += cache.nbytes if cache else 0
            advance()

        losses = evaluate_windows(model, windows, count, cache)
    quantized = bool(sites(model))
    return Evaluation(
        perplexity=losses.perplexity,
        nll=losses.nll,
        tokens=losses.predicted_tokens,
        fp4_activations=comparison.activation_fraction(model) if quantized else None,
        bos=bos_id is not None,
        cache=_cache_use(kv_cache, stored / windows.numel(), cache),
        online=_online(model, windows, tokenizer, reporter) if quantized else None,
    )


def _online(model: nn.Module, windows: torch.Tensor, tokenizer: Any, reporter: Reporter) -> Online:
    """Activation statistics since counting started; warns of drift and of overlapping text."""
    _warn_of_drift(model, reporter)
    return Online(
        saturated=comparison.saturated_elements(model),
        drift=comparison.drift(model, _calibrated_fractions(model)),
        calibration_overlap=_warn_of_overlap(model, windows, tokenizer, reporter),
        coverage=coverage(model),
    )


@dataclass(frozen=True, eq=False)
class ComparisonInputs:
    """Models and text of a comparison.

    Attributes:
        source, packed: load the original and the checkpoint.
        mixed: the checkpoint, loaded.
        tokenizer: the original's.
        windows: evaluation windows, int64 (B, L).
        bos: whether every window starts with the beginning-of-sequence token.
    """

    source: Source
    packed: Source
    mixed: nn.Module
    tokenizer: Any
    windows: torch.Tensor
    bos: bool


def comparison_inputs(
    model_name: str,
    directory: Path,
    data: str,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    bos: bool | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> ComparisonInputs:
    """Load all of a comparison but the original; arguments as of :func:`compare_models`."""
    source = _original(model_name, directory, trust_remote_code, dtype, reporter)
    packed = Source(str(directory), dtype=dtype)
    documents = read_documents(data)
    tokenizer = source.tokenizer()
    mixed = packed.load()
    length = _window_length(mixed, seq_len)
    bos_id = beginning(tokenizer, _calibrated_bos(mixed) if bos is None else bos)
    windows = evaluation_windows(data, tokenizer, length, documents, bos=bos_id is not None)
    require_valid_token_ids(f"text {data}", windows, mixed)
    return ComparisonInputs(source, packed, mixed, tokenizer, windows, bos=bos_id is not None)


def compare(
    model_name: str,
    directory: Path,
    data: str | None,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    bos: bool | None = None,
    *,
    tasks: TaskChoice | None = None,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> CompareSummary:
    """Compare the original, baselines and a checkpoint on a text, on tasks, or on both in turn.

    Arguments as :func:`compare_models`.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "dtype": dtype}
    loaded = None if tasks is None else load_tasks(tasks, trust_remote_code=trust_remote_code)
    text = scores = None
    if data is not None:
        text = compare_models(model_name, directory, data, seq_len, reporter, bos, **options)
    if loaded is not None:
        scores = _compare_tasks(model_name, directory, loaded, reporter, bos, **options)
    return CompareSummary(text, scores)


def _compare_tasks(
    model_name: str,
    directory: Path,
    tasks: Tasks,
    reporter: Reporter,
    bos: bool | None,
    *,
    trust_remote_code: bool,
    dtype: str,
) -> TaskComparison:
    source = _original(model_name, directory, trust_remote_code, dtype, reporter)
    packed = Source(str(directory), dtype=dtype)
    tokenizer, template = source.tokenizer(), Template.of(packed.load())
    loaders: dict[str, Callable[[], nn.Module]] = {
        "original": source.load,
        "fp8": lambda: uniform(source.load(), template, "fp8"),
        "nvfp4": lambda: uniform(source.load(), template, "nvfp4"),
        "fgmp": packed.load,
    }
    scores = {}
    for name, load in loaders.items():  # one after the other, so that one is in memory
        reporter.message(f"tasks: {name}")
        scores[name] = _scores(load(), tokenizer, tasks, reporter, bos)
    rows = []
    for first, *others in zip(*scores.values(), strict=True):
        differences = [difference(score, first) for score in others]
        rows.append(
            TaskRow(
                dict(zip(scores, (first, *others), strict=True)),
                dict(zip(list(scores)[1:], differences, strict=True)),
            )
        )
    return TaskComparison(rows, tasks.choice.limit)


def _original(
    name: str, directory: Path, trust_remote_code: bool, dtype: str, reporter: Reporter
) -> Source:
    """The unquantized model of this name, beside a checkpoint.

    Raises:
        InputError: the folder is no checkpoint, or the model is one.
    """
    checkpoint.read_config(directory)
    source = _source(name, trust_remote_code, dtype, reporter)
    if source.is_packed:
        raise InputError(f"model {name}: the original must not be quantized")
    return source


def compare_models(
    model_name: str,
    directory: Path,
    data: str,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    bos: bool | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
) -> Comparison:
    """Original, all-FP8, all-NVFP4 and the checkpoint in ``directory``, on the same windows.

    ``bos`` is as for :func:`fgmp.evaluation_windows`; None: as in the checkpoint's calibration.
    """
    inputs = comparison_inputs(
        model_name,
        directory,
        data,
        seq_len,
        reporter,
        bos,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    source, packed, windows, with_bos = inputs.source, inputs.packed, inputs.windows, inputs.bos
    repeated = _warn_of_overlap(inputs.mixed, windows, inputs.tokenizer, reporter)
    template, covered = Template.of(inputs.mixed), coverage(inputs.mixed)
    del inputs  # models are loaded one after the other
    reason = reason_against(template)
    models = _compared_models(source, packed, template, windows, reporter)
    rows = comparison.compare(models, windows, reporter.progress)
    result = Comparison(
        rows, covered, calibration_overlap=repeated, bos=with_bos, uniform_absent=reason
    )
    _record_results(directory, result, data, windows, reporter)
    return result


def _compared_models(
    source: Source, packed: Source, template: Template, windows: torch.Tensor, reporter: Reporter
) -> Iterator[tuple[str, nn.Module]]:
    """Models of the comparison by name, each loaded when asked for, so that one is in memory."""
    original = source.load()
    linear = sharing_copy(original)
    linearize(linear)
    require_same_shapes(linear, template)
    del linear
    yield "original", original
    fp8: frozenset[str] | None = None
    if reason_against(template) is None:
        linears = sum(len(names) for names in template.linears_of.values())
        with reporter.progress("choosing uniform formats", linears) as advance:
            fp8 = allocate(original, template, windows, advance)
    del original
    for name in ("fp8", "nvfp4"):
        yield name, uniform(source.load(), template, name)
    if fp8 is not None:
        yield "uniform", twin(source.load(), template, fp8)
    mixed = packed.load()
    yield "fgmp", mixed
    _warn_of_drift(mixed, reporter)


def _record_results(
    directory: Path, result: Comparison, data: str, windows: torch.Tensor, reporter: Reporter
) -> None:
    """Put the results into the checkpoint's model card, where it has one of ours."""
    about = (
        f"On {windows.shape[0]:,} windows of {windows.shape[1]} tokens of {Path(data).name}, "
        f"by `fgmp compare` of fgmp {version('fgmp')}."
    )
    refusal = update_card(directory, [row.to_dict() for row in result.rows], about)
    if refusal is not None:
        reporter.message(refusal)


def _calibrated_bos(model: nn.Module) -> bool | None:
    """Whether calibration windows started with a beginning-of-sequence token; None if unknown."""
    bos = config_of(model).calibration.get("bos")
    return bos if isinstance(bos, bool) else None


def export_to(
    directory: Path,
    output: Path,
    to: str,
    mixed: str | None = None,
    data: str | None = None,
    seq_len: int | None = None,
    reporter: Reporter = SILENT,
    bos: bool | None = None,
    *,
    dtype: str = "auto",
) -> ExportSummary:
    """Write a checkpoint in the format of another program.

    Args:
        directory: the checkpoint.
        output: folder to write.
        to, mixed: as for :func:`fgmp.export.export.export`.
        data: text on which the loss is measured; None: only the error of weights is.
        seq_len: tokens per window of the text.
        reporter: receives progress and messages.
        bos: as for :func:`fgmp.evaluation_windows`; None: as in the checkpoint's calibration.
        dtype: as for :class:`fgmp.model.source.Source`.
    """
    require_options(to, mixed)
    _require_targets(output, None)
    checkpoint.read_config(directory)
    source = Source(str(directory), dtype=dtype)
    if not source.is_packed:
        raise InputError(f"{directory}: not an fgmp checkpoint")
    documents = None if data is None else read_documents(data)
    model, windows = source.load(), None
    if data is not None:
        tokenizer = source.tokenizer()
        bos_id = beginning(tokenizer, _calibrated_bos(model) if bos is None else bos)
        length = _window_length(model, seq_len)
        windows = evaluation_windows(data, tokenizer, length, documents, bos=bos_id is not None)
        require_valid_token_ids(f"text {data}", windows, model)
    parts = () if windows is None else batches(windows, vocabulary_size(model))
    with reporter.progress("measuring", len(parts)) as advance:
        result = export(
            directory,
            output,
            to,
            mixed=mixed,
            model=model,
            windows=windows,
            advance=advance,
        )
    return ExportSummary(str(output), sum(f.stat().st_size for f in weight_files(output)), result)


def generate_text(
    name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
    kv_cache: str | None = None,
    *,
    trust_remote_code: bool = False,
    dtype: str = "auto",
    reporter: Reporter = SILENT,
) -> Generation:
    """Continue a prompt; ``stream`` gets the text as it comes.

    The KV cache keeps the model's precision unless ``kv_cache`` names a packed one.
    """
    if kv_cache:
        require_kind(kv_cache)
    _require_unicode("the prompt", prompt)
    source = _source(name, trust_remote_code, dtype, reporter)
    tokenizer, model = source.tokenizer(), source.load()
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    room = context_length(model) - length
    if length == 0 or room < 1:
        raise InputError(f"the prompt has {length} tokens; it must have 1 to {length + room - 1}")
    require_valid_token_ids("the prompt", inputs["input_ids"], model)
    cache = _packed_cache(model, tokenizer, kv_cache) if kv_cache else None
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    started = time.perf_counter()
    ids = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=min(max_new_tokens, room),
        streamer=_Streamer(tokenizer, stream) if stream else None,
        pad_token_id=tokenizer.eos_token_id,
        **({"past_key_values": cache} if cache else {}),
        **(sampling or {"do_sample": False}),
    )
    seconds = time.perf_counter() - started
    new = ids[0, length:]
    return Generation(
        text=tokenizer.decode(new, skip_special_tokens=True),
        tokens=len(new),
        tokens_per_second=len(new) / seconds,
        cache=_cache_use(kv_cache, cache.bytes_per_token if cache else 0.0, cache),
    )


def _packed_cache(
    model: nn.Module, tokenizer: Any, kind: str, bos: bool | None = None
) -> PackedCache:
    """An empty packed KV cache, calibrated on docstrings of the Python library."""
    stream = tokenize(docstrings(standard_library()), tokenizer)
    text = choose_windows(
        stream,
        samples=_CACHE_SAMPLES,
        seq_len=min(_CACHE_SEQ_LEN, context_length(model)),
        seed=0,
        bos_id=beginning(tokenizer, bos),
        source="docstrings",
    )
    require_valid_token_ids("docstrings", text.samples, model)
    return packed_cache(model, text.samples, kind)


def _cache_use(
    kind: str | None, bytes_per_token: float, cache: PackedCache | None
) -> CacheUse | None:
    if kind is None or cache is None:
        return None
    return CacheUse(kind, bytes_per_token, cache.values_per_token * torch.bfloat16.itemsize)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Passes finished words to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def _window_length(model: nn.Module, asked: int | None) -> int:
    if asked is not None and asked < 2:
        raise InputError(f"seq-len must be at least 2, got {asked}")
    context = context_length(model)
    if asked is not None and asked > context:
        raise InputError(f"seq-len must fit the model's context of {context}, got {asked}")
    return asked or min(context, _LONGEST_WINDOW)


def _calibrated_fractions(model: nn.Module) -> dict[str, float]:
    return {owner: site.fp4_fraction for owner, site in config_of(model).sites.items()}


def _warn_of_drift(model: nn.Module, reporter: Reporter) -> None:
    """Warn of sites whose fraction of FP4 blocks is far from its value at calibration."""
    drift = comparison.drift(model, _calibrated_fractions(model))
    moved = {n: by for n, by in drift.items() if abs(by) > _DRIFT_WARNING and math.isfinite(by)}
    if moved:
        worst = max(moved, key=lambda name: abs(moved[name]))
        reporter.message(
            f"warning: the FP4 fraction of {len(moved)} sites is more than 3 points off its value "
            f"at calibration; {worst} is furthest, {100 * moved[worst]:+.1f} points"
        )


def _warn_of_overlap(
    model: nn.Module, windows: torch.Tensor, tokenizer: Any, reporter: Reporter
) -> float | None:
    """Fraction of windows that repeat calibration text, with a warning; None if unknown."""
    known = config_of(model).calibration.get("digest")
    if not isinstance(known, str):
        return None
    share = overlap_with(known, windows, tokenizer)
    if share:
        reporter.message(
            f"warning: at least {share:.1%} of the evaluation windows repeat calibration text; "
            "their perplexity is biased downwards"
        )
    return share
