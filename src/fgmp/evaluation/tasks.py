"""Scores on tasks of lm-evaluation-harness: multiple choice, log-likelihood and generation.

A task is one that the harness knows by name, whose data set it downloads, or one that a YAML file
in the harness's format defines, whose data may be a local file. The harness builds the prompts,
calls the model, packed or not, and scores its answers; nothing of that is repeated here. Whatever
can be checked without a model is checked by :func:`load_tasks`.

Two models answer the same documents. The standard error of the mean difference per document is far
smaller than two separate standard errors suggest, because models mostly agree: see
:func:`difference`.

Importing the harness takes seconds, so it is imported where it is used.
"""

import difflib
import importlib
import importlib.util
import logging
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from fgmp.errors import InputError
from fgmp.model.source import context_length
from fgmp.model.store import first_line

_PACKAGES = ("lm_eval", "accelerate")
_REQUIRED = ("task", "dataset_path", "doc_to_text", "doc_to_target")
_SPLITS = ("test_split", "validation_split")
_FEWSHOT_SEED = 1234
"""Seed that chooses the examples of few-shot prompts; the harness's own default."""
_GENERATED = 256
"""Tokens that the harness reserves for an answer if the task does not say."""
_RESAMPLES = 1000
"""Bootstrap samples behind the standard error of a metric that is no mean over documents."""


@dataclass(frozen=True)
class TaskChoice:
    """Which tasks are run, and how.

    Attributes:
        names: tasks, groups or tags that the harness knows, or tasks of ``files``.
        files: task files; all of their tasks are run.
        limit: number of documents per task, the first ones; None: all.
        batch_size: documents per forward pass.

    Raises:
        InputError: no task, or a number below 1.
    """

    names: Sequence[str] = ()
    files: Sequence[Path] = ()
    limit: int | None = None
    batch_size: int = 8

    def __post_init__(self) -> None:
        if not self.names and not self.files:
            raise InputError("tasks: name at least one, or a task file")
        for key, value in (("limit", self.limit), ("batch size", self.batch_size)):
            if value is not None and value < 1:
                raise InputError(f"{key} must be at least 1, got {value}")


@dataclass(frozen=True)
class Tasks:
    """Tasks that are ready to run: their data sets are loaded and one prompt of each was built.

    Attributes:
        choice: which tasks, and how they are run.
        loaded: the harness's tasks and groups.
    """

    choice: TaskChoice
    loaded: dict[str, Any]


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: name of the task or group.
        metric: such as ``acc``.
        filter: how answers were extracted; ``none`` for most tasks.
        value: the metric over all documents.
        stderr: its standard error; None if the harness gives none.
        documents: number of documents.
        higher_is_better: None if the task does not say.
        by_document: the metric per document, if ``value`` is its mean.
    """

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None
    by_document: tuple[float, ...] | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """All fields but the documents', as plain JSON types."""
        values = dict(vars(self))
        del values["by_document"]
        return values


@dataclass(frozen=True)
class Difference:
    """A score minus a reference's, and the standard error of that by paired documents.

    ``stderr`` is None where the metric is no mean over documents.
    """

    value: float
    stderr: float | None


def load_tasks(choice: TaskChoice, *, trust_remote_code: bool = False) -> Tasks:
    """Load tasks with their data sets, and check them without a model.

    Args:
        choice: which tasks.
        trust_remote_code: allow task files to name Python functions, which are then run.

    Raises:
        InputError: a package is missing, a task is unknown, a task file lacks a field or is
            malformed, or a data set cannot be loaded.
    """
    for package in _PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise InputError(
                f"tasks need the package {package}, which is not installed: "
                "pip install 'fgmp[eval]'"
            )
    files = {_task_name(path, trust_remote_code): path for path in choice.files}
    from lm_eval.tasks import TaskManager

    others = [name for name in choice.names if name not in files]
    # The harness's own 14,000 task files take a quarter of a minute to read.
    manager = TaskManager(include_defaults=bool(others))
    for name in others:
        _require_known(name, manager.all_tasks)
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for name, spec in [*((n, n) for n in others), *((n, str(p)) for n, p in files.items())]:
        for part, entries in _load(manager, name, spec).items():
            loaded[part] |= entries
    for name, task in loaded["tasks"].items():
        _prepare(name, task)
    return Tasks(choice, loaded)


def score(model: nn.Module, tokenizer: Any, tasks: Tasks, bos: bool | None = None) -> list[Score]:
    """Run tasks on a causal LM of Transformers, packed or not.

    The harness shows its progress on stderr. It cuts the beginning of a prompt that is longer than
    the model's context; :func:`cut_prompts` counts these.

    Args:
        model: the causal LM; put into evaluation mode.
        tokenizer: its tokenizer.
        tasks: from :func:`load_tasks`; may be run on one model after the other.
        bos: whether prompts start with the beginning-of-sequence token; None: as the tokenizer
            does.

    Raises:
        InputError: a task cannot be run on this model or on one of its documents.
    """
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    # It warns of options of loading, which do not exist here, and of every prompt that it cuts.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    choice = tasks.choice
    try:
        harness = HFLM(
            pretrained=model.eval(),
            backend="causal",
            tokenizer=tokenizer,
            batch_size=choice.batch_size,
            max_length=context_length(model),
            add_bos_token=bos,
        )
        results = evaluator.evaluate(
            lm=harness,
            task_dict=tasks.loaded,
            limit=choice.limit,
            bootstrap_iters=_RESAMPLES,
            log_samples=True,
        )
    except Exception as error:  # whatever a task's templates, filters and metrics raise
        names = ", ".join(tasks.loaded["tasks"])
        raise InputError(f"tasks {names}: lm-evaluation-harness fails: {_words(error)}") from error
    return _scores(results)


def cut_prompts(model: nn.Module, tokenizer: Any, tasks: Tasks) -> int:
    """Number of requests of the last :func:`score` whose prompt lost its beginning."""
    context, cut = context_length(model), 0
    for task in tasks.loaded["tasks"].values():
        for request in task.instances:
            if request.request_type == "loglikelihood":
                # The last token is predicted and not read.
                cut += len(tokenizer("".join(request.args)).input_ids) > context + 1
            elif request.request_type == "generate_until":
                prompt, options = request.args
                room = context - options.get("max_gen_toks", _GENERATED)
                cut += len(tokenizer(prompt).input_ids) > room
    return cut


def difference(value: Score, reference: Score) -> Difference:
    """Difference of two models on one metric of one task, by document where that is possible."""
    total = value.value - reference.value
    if value.by_document is None or reference.by_document is None:
        return Difference(total, None)
    pairs = zip(value.by_document, reference.by_document, strict=True)
    by_document = [a - b for a, b in pairs]
    if len(by_document) < 2:
        return Difference(total, None)
    return Difference(total, statistics.stdev(by_document) / math.sqrt(len(by_document)))


class _Loader(yaml.SafeLoader):
    """Reads task files without running them: a function is replaced by its name."""


class _Function(str):
    """Name of a Python function in a task file."""


_Loader.add_constructor("!function", lambda loader, node: _Function(node.value))


def _task_name(path: Path, trust_remote_code: bool) -> str:
    """Name of the task that a file defines, after a check of its fields.

    Raises:
        InputError: the file cannot be read, lacks a field, or names functions that may not run.
    """
    fields = _fields(path)
    functions = [text for text in _leaves(fields) if isinstance(text, _Function)]
    if functions and not trust_remote_code:
        raise InputError(
            f"task file {path}: it names the Python function {functions[0]}; "
            "--trust-remote-code (trust_remote_code=True) runs it"
        )
    required = list(_REQUIRED)
    if fields.get("output_type") == "multiple_choice":
        required.append("doc_to_choice")
    for key in required:
        if key not in fields:
            raise InputError(f"task file {path}: it must have the field {key}")
    if not any(key in fields for key in _SPLITS):
        raise InputError(f"task file {path}: it must have the field {' or '.join(_SPLITS)}")
    name = fields["task"]
    if not isinstance(name, str):
        raise InputError(f"task file {path}: task must be one name, got {name!r:.80}")
    _require_metrics(path, fields.get("metric_list") or [])
    return name


def _fields(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Fields of a task file and of the files that it includes."""
    path = path.absolute()
    if path in above:
        raise InputError(f"task file {path}: it includes itself")
    try:
        values = yaml.load(path.read_text(), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"task file {path}: cannot be read: {error}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"task file {path}: not YAML: {_words(error)}") from error
    if not isinstance(values, dict):
        raise InputError(f"task file {path}: it must be a mapping, got {type(values).__name__}")
    included = values.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        merged |= _fields(path.parent / str(name), (*above, path))
    return {**merged, **values}


def _leaves(value: Any) -> list[Any]:
    """Values in nested mappings and lists."""
    if isinstance(value, dict | list):
        inner = value.values() if isinstance(value, dict) else value
        return [leaf for part in inner for leaf in _leaves(part)]
    return [value]


def _require_metrics(path: Path, metrics: Any) -> None:
    """Check that metrics exist: the harness leaves out one that it does not know.

    Raises:
        InputError: names the first that does not.
    """
    from lm_eval.api.registry import METRIC_REGISTRY

    importlib.import_module("lm_eval.api.metrics")  # fills the registry
    entries = metrics if isinstance(metrics, list) else [metrics]
    for entry in entries:
        name = entry.get("metric") if isinstance(entry, dict) else None
        foreign = isinstance(name, _Function) or (name and entry.get("hf_evaluate"))
        if not foreign and name not in METRIC_REGISTRY:
            raise InputError(
                f"task file {path}: metric_list must list metrics of lm-evaluation-harness as "
                f"`metric: NAME`, got {entry!r:.80}"
            )


def _require_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=3)
        hint = f"; similar: {', '.join(close)}" if close else ""
        raise InputError(
            f"task {name}: neither lm-evaluation-harness nor a task file has a task of this "
            f"name{hint}"
        )


def _load(manager: Any, name: str, spec: str) -> dict[str, Any]:
    """Tasks and groups of one name or file, with their data sets.

    Raises:
        InputError: the harness cannot load it.
    """
    try:
        loaded: dict[str, Any] = manager.load([spec])
    except OSError as error:  # what is not there, on this machine or on the hub
        raise InputError(
            f"task {name}: its data set cannot be loaded: {_words(error)}; without a network, "
            "write a task file that names a local data set (--task-file)"
        ) from error
    except Exception as error:  # many types are raised, all mean that the task is malformed
        raise InputError(f"task {name}: cannot be loaded: {_words(error)}") from error
    return loaded


def _words(error: BaseException) -> str:
    """Type and first line of an error of the harness, whose text alone often says little."""
    return f"{type(error).__name__}: {first_line(error)}"


def _prepare(name: str, task: Any) -> None:
    """Choose few-shot examples as the harness's command does, and refuse what cannot be run.

    Raises:
        InputError: the task runs code that a model wrote, or shows images or sounds.
    """
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"task {name}: it runs code that the model writes; not supported")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"task {name}: it needs images or sounds; not supported")
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=_FEWSHOT_SEED)


def _scores(results: dict[str, Any]) -> list[Score]:
    scores = []
    for name, metrics in results["results"].items():
        better = results["higher_is_better"].get(name, {})
        samples = results["samples"].get(name, [])
        for key, value in metrics.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr") or isinstance(value, str):
                continue
            scores.append(
                Score(
                    task=name,
                    metric=metric,
                    filter=kind,
                    value=float(value),
                    stderr=_number(metrics.get(f"{metric}_stderr,{kind}")),
                    documents=int(metrics["sample_len"]),
                    higher_is_better=better.get(metric),
                    by_document=_by_document(samples, metric, kind, float(value)),
                )
            )
    return scores


def _number(value: Any) -> float | None:
    """A finite number; None for ``N/A`` and NaN."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _by_document(
    samples: Sequence[dict[str, Any]], metric: str, kind: str, value: float
) -> tuple[float, ...] | None:
    """The metric per document; None unless ``value`` is the mean of one number per document."""
    values = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    numbers = [float(v) for v in values if isinstance(v, int | float)]
    if not numbers or len(numbers) != len(values):
        return None
    is_mean = math.isclose(statistics.fmean(numbers), value, rel_tol=1e-9, abs_tol=1e-12)
    return tuple(numbers) if is_mean else None
