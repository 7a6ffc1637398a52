"""Results of the commands: typed records, each with its JSON form and its labelled lines.

``to_dict`` is what ``--json`` prints; its keys are stable. ``lines`` is what the terminal and the
report show: label to text, in order. A label is written here and nowhere else.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fgmp.assign.frontier import Fractions
from fgmp.evaluation.compare import Row
from fgmp.evaluation.inspect import Inspection
from fgmp.evaluation.tasks import Difference, Score
from fgmp.export.export import Export
from fgmp.quantization.duration import spoken
from fgmp.quantization.plan import Prediction

Lines = dict[str, str]
"""Label to text, in order."""


@dataclass(frozen=True)
class Coverage:
    """Fraction of matmul parameters that are quantized, and the matrices that are not.

    The fraction is None if a checkpoint does not record it.
    """

    quantized_share: float | None
    unquantized: list[str]

    def __str__(self) -> str:
        if self.quantized_share is None:
            return "the checkpoint does not say"
        rest = ", ".join(self.unquantized) or "none"
        return f"{self.quantized_share:.1%} of matmul parameters; not: {rest}"


@dataclass(frozen=True)
class QuantizeSummary:
    """Result of ``fgmp quantize``.

    Attributes:
        output: the checkpoint folder.
        fp4_fraction: fractions of blocks in FP4.
        coverage: which matrices are quantized.
        bits_per_weight: bits per packed weight, counting every stored byte.
        bytes, tensor_bytes: size of the safetensors files, and of their tensors.
        budget, clip, uniform, tune: the run's decisions, as the checkpoint stores them.
        seconds: time of the whole command.
        peak_bytes: peak memory.
    """

    output: str
    fp4_fraction: Fractions
    coverage: Coverage
    bits_per_weight: float
    bytes: int
    tensor_bytes: int
    budget: dict[str, float]
    clip: dict[str, Any]
    uniform: dict[str, Any]
    tune: dict[str, Any]
    seconds: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dict(vars(self))
        del values["coverage"]
        return {**values, "fp4_fraction": self.fp4_fraction._asdict(), **asdict(self.coverage)}

    def lines(self) -> Lines:
        """Labelled lines."""
        return {
            "checkpoint": self.output,
            "FP4 blocks": f"{self.fp4_fraction.weights:.1%} of weights, "
            f"{self.fp4_fraction.activations:.1%} of activations",
            "bits per weight": f"{self.bits_per_weight:.3f}",
            "size": f"{self.bytes:,} bytes, tensors {self.tensor_bytes:,}",
            "quantized": str(self.coverage),
            **_budget_lines(self.budget),
            "clipping": "on" if self.clip["used"] else "off",
            **_tuning_lines(self.tune),
            "time": f"{self.seconds:.1f} s",
            "peak memory": f"{self.peak_bytes / 1e9:.2f} GB",
        }


def _budget_lines(budget: Mapping[str, float]) -> Lines:
    lines = {}
    if "bits" in budget:
        lines["budget"] = f"{budget['bits']:.3f} bits, mean of weights and activations"
    if "energy_percent" in budget:
        lines["energy"] = f"{budget['energy_percent']:.1f}% of all-FP8's"
    if "increase_percent" in budget:
        lines["increase"] = (
            f"{budget['increase_percent']:+.2f}% perplexity on held-out text relative to all-FP8 "
            f"({budget['increase_low']:+.2f}% to {budget['increase_high']:+.2f}%)"
        )
    return lines


def _tuning_lines(tune: Mapping[str, Any]) -> Lines:
    if not tune:
        return {}
    kl = tune["held_out_kl"]
    effect = f"KL on held-out text {kl['without']:.5f} without, {kl['with']:.5f} with"
    return {"tuning": effect if tune["used"] else f"not used: {effect}"}


@dataclass(frozen=True)
class Plan:
    """Result of ``fgmp plan``.

    Attributes:
        model: folder or hub name.
        parameters, quantized_parameters: numbers of parameters, each shared one once.
        quantized_share: fraction of matmul parameters that are quantized.
        asked: prediction of the run that was asked for.
        memory_limit: limit in bytes, if any.
        time_limit: limit in seconds, if any.
        disk_free: free bytes where the checkpoint will be written; None if no folder was named.
        changes: with limits, the changed options with which the run fits, in the recipe's names;
            empty if it fits as asked; None if no change suffices. Without limits empty.
        changed: prediction with these changes; None if there are none.
    """

    model: str
    parameters: int
    quantized_parameters: int
    quantized_share: float
    asked: Prediction
    memory_limit: int | None = None
    time_limit: float | None = None
    disk_free: int | None = None
    changes: dict[str, Any] | None = field(default_factory=dict)
    changed: Prediction | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "model": self.model,
            "parameters": self.parameters,
            "quantized_parameters": self.quantized_parameters,
            "quantized_share": self.quantized_share,
            "asked": _prediction(self.asked),
            "memory_limit": self.memory_limit,
            "time_limit": self.time_limit,
            "disk_free": self.disk_free,
            "fits": self._fits,
            "changes": self.changes,
            "changed": None if self.changed is None else _prediction(self.changed),
        }

    @property
    def _fits(self) -> bool | None:
        """Whether the run as asked fits; None without limits."""
        if self.memory_limit is None and self.time_limit is None:
            return None
        return self.asked.fits(self.memory_limit, self.time_limit)

    def lines(self) -> Lines:
        """Labelled lines."""
        lines = {
            "model": f"{self.model}, {self.parameters:,} parameters",
            "quantized": f"{self.quantized_parameters:,} weights, "
            f"{self.quantized_share:.1%} of matmul parameters",
            **_prediction_lines(self.asked),
        }
        if self.disk_free is not None:
            lines["free disk"] = f"{self.disk_free / 1e9:.1f} GB"
        limits = []
        if self.memory_limit is not None:
            limits.append(f"{self.memory_limit / 1e9:.1f} GB")
        if self.time_limit is not None:
            limits.append(spoken(self.time_limit))
        if not limits:
            return lines
        lines["limits"] = ", ".join(limits)
        if self._fits:
            return {**lines, "fits": "yes, as asked"}
        if self.changes is None or self.changed is None:
            return {**lines, "fits": "no, and with no change of options that is tried"}
        changes = ", ".join(f"{key}: {_yaml(value)}" for key, value in self.changes.items())
        with_changes = _prediction_lines(self.changed)
        return {
            **lines,
            "fits": f"not as asked, but with {changes}",
            **{f"{label}, then": text for label, text in with_changes.items()},
        }


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _prediction(prediction: Prediction) -> dict[str, Any]:
    """A prediction as plain JSON types."""
    return {
        "samples": prediction.recipe.samples,
        "seq_len": prediction.recipe.seq_len,
        "dtype": prediction.dtype,
        "memory_bytes": prediction.memory.peak,
        "memory": asdict(prediction.memory),
        "seconds": prediction.duration.total,
        "seconds_calibration": prediction.duration.calibration,
        "checkpoint_bytes": prediction.checkpoint_bytes,
        "resume_bytes": prediction.resume_bytes,
        "bits_per_weight": prediction.bits_per_weight,
    }


def _prediction_lines(prediction: Prediction) -> Lines:
    bits = prediction.bits_per_weight
    return {
        "calibration": f"{prediction.recipe.samples} sequences of {prediction.recipe.seq_len} "
        f"tokens, passes in {prediction.dtype}",
        "peak memory": f"about {prediction.memory.peak / 1e9:.2f} GB",
        "time": str(prediction.duration),
        "checkpoint": f"{'at most' if bits is None else 'about'} "
        f"{prediction.checkpoint_bytes / 1e9:.3f} GB",
        "partial results": f"about {prediction.resume_bytes / 1e9:.3f} GB, removed at the end",
        "bits per weight": "known after calibration" if bits is None else f"{bits:.3f}",
    }


@dataclass(frozen=True)
class CacheUse:
    """A packed KV cache: its kind, and bytes per token in it and in bf16."""

    kv_cache: str
    kv_bytes_per_token: float
    kv_bytes_per_token_bf16: int

    def lines(self) -> Lines:
        """Labelled lines."""
        return {
            "kv cache": self.kv_cache,
            "kv bytes per token": f"{self.kv_bytes_per_token:.6g}",
            "kv bytes per token bf16": f"{self.kv_bytes_per_token_bf16}",
        }


@dataclass(frozen=True)
class Online:
    """Statistics of a quantized model's activation sites during an evaluation.

    Attributes:
        saturated: elements beyond the largest FP8 value.
        drift: by site, the fraction of FP4 blocks less its value at calibration.
        calibration_overlap: fraction of windows that repeat calibration text; None if unknown.
        coverage: which matrices are quantized.
    """

    saturated: int
    drift: dict[str, float]
    calibration_overlap: float | None
    coverage: Coverage

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dict(vars(self))
        del values["coverage"]
        return {**values, **asdict(self.coverage)}

    def lines(self) -> Lines:
        """Labelled lines."""
        lines = {"saturated": f"{self.saturated:,}"}
        if self.calibration_overlap is not None:
            lines["calibration overlap"] = f"{self.calibration_overlap:.1%} of windows"
        site = max(self.drift, key=lambda name: abs(self.drift[name]), default=None)
        if site is not None:
            points = 100 * self.drift[site]
            lines["furthest from calibration"] = f"{site}, {points:+.1f} points of FP4"
        return {**lines, "quantized": str(self.coverage)}


@dataclass(frozen=True)
class Evaluation:
    """Result of ``fgmp eval`` on a text.

    Attributes:
        perplexity, nll: exp of the mean loss, and the mean loss in nats per token.
        tokens: predicted tokens.
        fp4_activations: fraction of activation blocks that ran in FP4; None if not quantized.
        cache: use of a packed KV cache, if any.
        online: activation statistics, if the model is quantized.
        bos: whether every window started with the beginning-of-sequence token.
    """

    perplexity: float
    nll: float
    tokens: int
    fp4_activations: float | None
    cache: CacheUse | None = None
    online: Online | None = None
    bos: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dict(vars(self))
        del values["cache"], values["online"]
        cache = asdict(self.cache) if self.cache else {}
        return {**values, **cache, **(self.online.to_dict() if self.online else {})}

    def lines(self) -> Lines:
        """Labelled lines."""
        lines = {
            "perplexity": f"{self.perplexity:.6g}",
            "nll": f"{self.nll:.6g}",
            "tokens": f"{self.tokens:,}",
            **_bos_line(self.bos),
        }
        if self.fp4_activations is not None:
            lines["fp4 activations"] = f"{self.fp4_activations:.1%} of blocks"
        lines |= self.cache.lines() if self.cache else {}
        return lines | (self.online.lines() if self.online else {})


@dataclass(frozen=True)
class Comparison:
    """Result of ``fgmp compare`` on a text.

    Attributes:
        rows: one per model.
        coverage: which matrices are quantized.
        calibration_overlap: fraction of windows that repeat calibration text; None if unknown.
        bos: whether every window started with the beginning-of-sequence token.
        uniform_absent: a sentence why there is no row ``uniform``; None if there is one.
    """

    rows: list[Row]
    coverage: Coverage
    calibration_overlap: float | None = None
    bos: bool = False
    uniform_absent: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "rows": [row.to_dict() for row in self.rows],
            **asdict(self.coverage),
            "calibration_overlap": self.calibration_overlap,
            "bos": self.bos,
            "uniform_absent": self.uniform_absent,
        }

    def lines(self) -> Lines:
        """Labelled lines, in addition to the table of rows."""
        absent = {} if self.uniform_absent is None else {"row uniform": self.uniform_absent}
        return {**_bos_line(self.bos), **absent, "quantized": str(self.coverage)}


def _bos_line(bos: bool) -> Lines:
    return {"windows": "each starts with the beginning-of-sequence token"} if bos else {}


@dataclass(frozen=True)
class TaskScores:
    """Scores of one model on tasks.

    Attributes:
        scores: one per task and metric.
        limit: largest number of documents per task; None: all.
    """

    scores: list[Score]
    limit: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"tasks": [score.to_dict() for score in self.scores], "limit": self.limit}


@dataclass(frozen=True)
class TaskRow:
    """One metric of one task, of all models.

    Attributes:
        scores: by model, ``original`` first.
        differences: from the original, by each other model.
    """

    scores: dict[str, Score]
    differences: dict[str, Difference]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        common = {
            key: getattr(self.scores["original"], key)
            for key in ("task", "metric", "filter", "documents", "higher_is_better")
        }
        models = {
            name: {
                "value": score.value,
                "stderr": score.stderr,
                "difference": asdict(self.differences[name]) if name in self.differences else None,
            }
            for name, score in self.scores.items()
        }
        return {**common, "models": models}


@dataclass(frozen=True)
class TaskComparison:
    """Scores of several models on tasks.

    Attributes:
        rows: one per task and metric.
        limit: largest number of documents per task; None: all.
    """

    rows: list[TaskRow]
    limit: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"tasks": [row.to_dict() for row in self.rows], "limit": self.limit}


@dataclass(frozen=True)
class EvalSummary:
    """Result of ``fgmp eval``: on a text, on tasks, or on both."""

    text: Evaluation | None
    tasks: TaskScores | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the keys of the parts that there are."""
        return _merged(self.text, self.tasks)


@dataclass(frozen=True)
class CompareSummary:
    """Result of ``fgmp compare``: on a text, on tasks, or on both."""

    text: Comparison | None
    tasks: TaskComparison | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: the keys of the parts that there are."""
        return _merged(self.text, self.tasks)


def _merged(*parts: Evaluation | Comparison | TaskScores | TaskComparison | None) -> dict[str, Any]:
    return {key: v for part in parts if part is not None for key, v in part.to_dict().items()}


def score_table(result: TaskScores) -> list[list[str]]:
    """Scores as text, by line and column, with a header first."""
    lines = [["task", "metric", "documents", "score", "standard error"]]
    for score in result.scores:
        values = [f"{score.value:.4f}", _error(score.stderr)]
        lines.append([score.task, _metric(score), f"{score.documents:,}", *values])
    return lines


def task_table(result: TaskComparison) -> list[list[str]]:
    """Scores of several models as text, by line and column, with a header first.

    Differences are from the original, with the standard error by paired documents.
    """
    lines = [["task", "metric", "model", "score", "standard error", "difference", "paired error"]]
    for row in result.rows:
        for name, score in row.scores.items():
            difference = row.differences.get(name)
            values = [f"{score.value:.4f}", _error(score.stderr)]
            values += (
                ["-", "-"]
                if difference is None
                else [f"{difference.value:+.4f}", _error(difference.stderr)]
            )
            lines.append([score.task, _metric(score), name, *values])
    return lines


def _metric(score: Score) -> str:
    return score.metric if score.filter == "none" else f"{score.metric}, {score.filter}"


def _error(stderr: float | None) -> str:
    return "-" if stderr is None else f"{stderr:.4f}"


@dataclass(frozen=True)
class Generation:
    """Result of ``fgmp generate``: text, its tokens, speed, and a packed KV cache's size."""

    text: str
    tokens: int
    tokens_per_second: float
    cache: CacheUse | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = dict(vars(self))
        del values["cache"]
        return {**values, **(asdict(self.cache) if self.cache else {})}


@dataclass(frozen=True)
class ExportSummary:
    """Result of ``fgmp export``.

    Attributes:
        output: the folder that was written.
        bytes: size of its safetensors files.
        export: what it contains and what it loses.
    """

    output: str
    bytes: int
    export: Export

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"output": self.output, "bytes": self.bytes, **self.export.to_dict()}

    def lines(self) -> Lines:
        """Labelled lines."""
        export = self.export
        counts = [f"{count} {name}" for name, count in export.linears.items() if count]
        worst = max(export.weight_error, key=lambda name: export.weight_error[name])
        lines = {
            "export": f"{self.output}, {export.to}",
            "size": f"{self.bytes:,} bytes",
            "linears": ", ".join(counts),
            "weight error": f"at most {export.weight_error[worst]:.3%} of the norm, in {worst}"
            if export.weight_error[worst]
            else "none",
        }
        if export.max_relative_error is not None:
            lines["largest error"] = f"{export.max_relative_error:.3%} of a weight"
        lines["activations"] = _activation_losses(export)
        kl = "not measured; --data TEXT measures it" if export.kl is None else f"{export.kl:.5f}"
        return {**lines, "KL from checkpoint": kl}


def _activation_losses(export: Export) -> str:
    """What activations lose, in words."""
    losses = {
        "no longer quantized": export.unquantized_sites,
        "lose their searched scales": export.searched_sites,
        "lose their mix of formats": export.mixed_sites,
    }
    return ", ".join(f"{n} sites {what}" for what, n in losses.items() if n) or "as before"


@dataclass(frozen=True)
class Quickstart:
    """Result of ``fgmp quickstart``."""

    output: Path
    checkpoint: Path
    report: Path
    seconds: float
    summary: QuantizeSummary
    comparison: Comparison

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output": str(self.output),
            "checkpoint": str(self.checkpoint),
            "report": str(self.report),
            "seconds": self.seconds,
            "summary": self.summary.to_dict(),
            "rows": [row.to_dict() for row in self.comparison.rows],
        }

    def lines(self) -> Lines:
        """Labelled lines, in addition to the table of rows."""
        return {
            **self.summary.lines(),
            "report": str(self.report),
            "whole run": f"{self.seconds:.0f} s",
        }


@dataclass(frozen=True)
class PassSpeed:
    """Milliseconds of one matrix product, by PyTorch in two dtypes and packed."""

    name: str
    float32: float
    bfloat16: float
    packed: float


@dataclass(frozen=True)
class Diagnosis:
    """Result of ``fgmp doctor``.

    Attributes:
        versions: of packages; None if one is not installed.
        processor, threads, cores: of the CPU; threads are those that PyTorch uses.
        torch_instruction_set, kernel_instruction_set: what PyTorch and the C++ kernels run on; None
            if these are not compiled.
        gpus: their names.
        memory_bytes, memory_free_bytes: of the machine.
        bfloat16_runs_in: the dtype in which passes of bf16 models run on this CPU.
        products: times of matrix products.
        advice: what is missing and how to get it.
    """

    versions: dict[str, str | None]
    processor: str
    threads: int
    cores: int
    torch_instruction_set: str
    kernel_instruction_set: str | None
    gpus: list[str]
    memory_bytes: int
    memory_free_bytes: int
    bfloat16_runs_in: str
    products: list[PassSpeed]
    advice: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def lines(self) -> Lines:
        """Labelled lines."""
        installed = [f"{name} {v}" for name, v in self.versions.items() if v is not None]
        missing = [name for name, v in self.versions.items() if v is None]
        return {
            "installed": ", ".join(installed),
            "not installed": ", ".join(missing) or "-",
            "processor": f"{self.processor}, {self.cores} cores, {self.threads} threads in use",
            "instruction sets": f"PyTorch {self.torch_instruction_set}, kernels "
            f"{self.kernel_instruction_set or 'not compiled'}",
            "GPUs": ", ".join(self.gpus) or "none",
            "memory": f"{self.memory_bytes / 1e9:.1f} GB, "
            f"{self.memory_free_bytes / 1e9:.1f} GB free",
            "bf16 models": f"passes run in {self.bfloat16_runs_in}",
            **{
                f"product, {p.name}": f"float32 {p.float32:.2f} ms, bfloat16 {p.bfloat16:.2f} ms, "
                f"packed {p.packed:.2f} ms"
                for p in self.products
            },
            **{f"advice {i}": text for i, text in enumerate(self.advice, 1)},
        }


def inspection_lines(inspection: Inspection) -> Lines:
    """Labelled lines of ``fgmp inspect``."""
    bits, size = inspection.bits_per_weight, inspection.bytes
    coverage = Coverage(inspection.quantized_share, inspection.unquantized)
    return {
        "checkpoint": inspection.path,
        "integrity": f"{inspection.tensors} tensors, {inspection.file_bytes:,} bytes verified",
        "linears": f"{inspection.linears}, {inspection.quantized_weights:,} weights",
        "planes": f"{bits.planes:.3f} bits per weight, {size.planes:,.0f} bytes",
        "streamed image": f"{bits.streamed_image:.3f} bits per weight, "
        f"{size.streamed_image:,.0f} bytes",
        "quantized": str(coverage),
    }
