"""The command line: parse, call, print. Progress goes to stderr, results to stdout.

``fgmp hw`` is in ``app.hw``. Imports that take seconds are in the functions that need them.
"""

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from fgmp.app.console import Json, print_lines, printable, show, stderr
from fgmp.app.hw import app as hardware
from fgmp.app.reporter import terminal_reporter
from fgmp.errors import FGMPError, InputError

if TYPE_CHECKING:
    from fgmp.app.records import CompareSummary, EvalSummary, Quickstart
    from fgmp.evaluation.compare import Row
    from fgmp.evaluation.inspect import Inspection
    from fgmp.evaluation.tasks import TaskChoice
    from fgmp.recipe import Recipe


class _Commands(TyperGroup):
    """Runs a command; an error of ours is one line, an interruption a short one.

    Here and not around ``app()``, because Typer turns an interruption into an exit of its own.
    """

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except FGMPError as error:
            text = f"[bold red]error:[/] {printable(str(error))}"
            stderr.print(text, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interruption:
            stderr.print("interrupted")
            raise typer.Exit(130) from interruption


app = typer.Typer(
    cls=_Commands,
    help=(
        "Fine-grained mixed-precision quantization of language models.\n\n"
        "Every block of 16 weights or activations along the dot product is NVFP4 or FP8. "
        "Fisher-weighted scores decide which: one threshold for all weights, one for all "
        "activations. MODEL is a folder or a hub name of a Hugging Face causal LM; DIR is a "
        "folder that `quantize` wrote. TEXT is a text file, JSON lines with a `text` field, or "
        "the name of a Hugging Face dataset."
    ),
    epilog="Start with `fgmp quickstart`: it needs no network and takes minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(hardware, name="hw")


def _use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


Text = Annotated[
    str | None, typer.Option("--data", help="Evaluation text: file, JSON lines or dataset.")
]
TaskNames = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Tasks of lm-evaluation-harness, with commas between them, such as piqa,arc_easy. "
        "Needs the extra `eval`, and the hub for their data.",
    ),
]
TaskFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--task-file",
        help="A task as a YAML file in the harness's format, such as one with a local data set. "
        "May be repeated. Its templates are code: use files that you trust.",
    ),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Documents per task, the first ones. [default: all]")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Documents per forward pass of a task.")]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens per window. [default: the model's context, at most 2048]"),
]
Bos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Start every window with the beginning-of-sequence token. [default: if the tokenizer "
        "puts it before a text]",
    ),
]
KvCache = Annotated[
    str | None,
    typer.Option(help="Pack keys and values: fp8, nvfp4 or mixed (70% of blocks in FP4)."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run Python files that come with the model. Only for models of people you trust.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the model's passes: stored (that of its files), float32, or auto (float32 "
        "for bf16 models on CPUs without bf16 arithmetic). fp16 models always run in float32."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=1024,
        callback=_use_threads,
        expose_value=False,
        help="CPU threads. [default: one per core, or OMP_NUM_THREADS]",
    ),
]
CompareBos = Annotated[
    bool | None,
    typer.Option(
        "--bos/--no-bos",
        help="Start every window with the beginning-of-sequence token. [default: as in the "
        "checkpoint's calibration]",
    ),
]

# Options of `quantize`.
Model = Annotated[str, typer.Argument(help="Hugging Face causal LM: folder or hub name.")]
Output = Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")]
Fp4 = Annotated[
    float | None, typer.Option(help="Fraction of weight blocks in FP4, 0 to 1. [default: 0.7]")
]
Fp4Activations = Annotated[
    float | None, typer.Option(help="Fraction of activation blocks in FP4. [default: as --fp4]")
]
Bits = Annotated[
    float | None,
    typer.Option(
        help="Budget instead of fractions: mean of bits per weight and bits per activation value, "
        "4.5 (all FP4) to 8 (all FP8)."
    ),
]
MaxBytes = Annotated[
    str | None,
    typer.Option(help="Budget: bytes of the checkpoint's tensors, such as 3.5M or 4G."),
]
MaxIncrease = Annotated[
    str | None,
    typer.Option(
        help="Budget: increase of perplexity on held-out text over all-FP8, such as 1%. Packs and "
        "evaluates about eight times."
    ),
]
MaxEnergy = Annotated[
    str | None,
    typer.Option(
        help="Budget: energy of matmuls in percent of an FP8-only accelerator's "
        "(docs/energy.md), such as 75%."
    ),
]
RecipeFile = Annotated[
    Path | None, typer.Option(help="YAML file with recipe fields; options override it.")
]
CalibrationText = Annotated[
    str | None,
    typer.Option(help="Calibration TEXT. [default: docstrings of the Python library]"),
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        help="File for the Fisher information: written if missing, else read, which saves most of "
        "the time of another recipe. Must be of this model and text."
    ),
]
Samples = Annotated[int | None, typer.Option(help="Calibration sequences. [default: 512]")]
CalibrationSeqLen = Annotated[
    int | None, typer.Option(help="Tokens per calibration sequence. [default: 512]")
]
Seed = Annotated[int | None, typer.Option(help="Random seed for sampling sequences. [default: 0]")]
Policy = Annotated[
    str | None, typer.Option(help="fisher, fisher-per-layer, error, random, fp8 or nvfp4.")
]
Clip = Annotated[
    str | None,
    typer.Option(help="Scale search of FP4 weight blocks: auto, on or off. [default: auto]"),
]
Tune = Annotated[
    int | None, typer.Option(help="Epochs of tuning norms, embeddings and biases. [default: 0]")
]


@app.command()
def quantize(
    context: typer.Context,
    model: Model,
    output: Output,
    fp4: Fp4 = None,
    fp4_activations: Fp4Activations = None,
    bits: Bits = None,
    max_bytes: MaxBytes = None,
    max_increase: MaxIncrease = None,
    max_energy: MaxEnergy = None,
    recipe: RecipeFile = None,
    calib: CalibrationText = None,
    calibration: CalibrationFile = None,
    samples: Samples = None,
    seq_len: CalibrationSeqLen = None,
    seed: Seed = None,
    policy: Policy = None,
    clip: Clip = None,
    tune: Tune = None,
    bos: Bos = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write a packed checkpoint.

    Calibrates (one forward and backward pass over the calibration set), chooses the format of
    every block, and packs. After an interruption (Ctrl-C) the same command resumes where it
    stopped.
    """
    from fgmp.app.commands import quantize_to
    from fgmp.app.provenance import command_line

    summary = quantize_to(
        model,
        output,
        _recipe(recipe, context),
        calib,
        terminal_reporter(),
        calibration,
        bos,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        command=command_line(sys.argv),
    )
    show(summary, as_json, lambda result: print_lines(result.lines()))


@app.command()
def plan(
    context: typer.Context,
    model: Model,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder to write; its free disk space is shown."),
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Limit on peak memory, such as 8G; options that fit it.")
    ] = None,
    time: Annotated[
        str | None, typer.Option(help="Limit on the duration, such as 45min or 3h.")
    ] = None,
    fp4: Fp4 = None,
    fp4_activations: Fp4Activations = None,
    bits: Bits = None,
    max_bytes: MaxBytes = None,
    max_increase: MaxIncrease = None,
    max_energy: MaxEnergy = None,
    recipe: RecipeFile = None,
    samples: Samples = None,
    seq_len: CalibrationSeqLen = None,
    seed: Seed = None,
    policy: Policy = None,
    clip: Clip = None,
    tune: Tune = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Predict memory, disk and time of `quantize` with the same options.

    Reads only the model's configuration, never its weights. With --memory or --time it also finds
    options with which the run fits: factored Fisher information, one scale search, no tuning, fewer
    and shorter sequences, and no compensation, tried in this order.
    """
    from fgmp.app.commands import plan_run

    result = plan_run(
        model,
        _recipe(recipe, context),
        memory,
        time,
        output,
        terminal_reporter(),
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    show(result, as_json, lambda plan: print_lines(plan.lines()))


def _recipe(file: Path | None, context: typer.Context) -> "Recipe":
    """The recipe of a file, or the default one, with the options of the command line."""
    from dataclasses import fields

    from fgmp.recipe import Recipe

    recipe = Recipe.from_yaml(file) if file else Recipe()
    options = {field.name: context.params.get(field.name) for field in fields(Recipe)}
    return recipe.with_options({k: v for k, v in options.items() if v is not None})


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="Any causal LM.")],
    data: Text = None,
    tasks: TaskNames = None,
    task_file: TaskFiles = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    seq_len: SeqLen = None,
    kv_cache: KvCache = None,
    bos: Bos = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a model on TEXT, and scores on tasks with their standard errors.

    Windows of TEXT do not overlap; the mean is over all predicted tokens. With --kv-cache every
    token attends to packed keys and values.
    """
    from fgmp.app import commands

    summary = commands.evaluate(
        model,
        data,
        seq_len,
        terminal_reporter(),
        kv_cache,
        bos,
        tasks=_task_choice(data, tasks, task_file, limit, batch_size),
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    show(summary, as_json, _print_evaluation)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="The original model.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Its fgmp checkpoint.")],
    data: Text = None,
    tasks: TaskNames = None,
    task_file: TaskFiles = None,
    limit: Limit = None,
    batch_size: BatchSize = 8,
    seq_len: SeqLen = None,
    bos: CompareBos = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Original, all-FP8, all-NVFP4, the uniform twin and FGMP side by side on TEXT and on tasks.

    The gap is all-NVFP4 minus all-FP8, in perplexity and in KL from the original; "recovered" is
    the percentage of it that FGMP closes. The uniform twin has one format per layer and no more
    bytes. Scores on tasks have their difference from the original, with the standard error by
    paired documents. Models are loaded one after the other.
    """
    from fgmp.app import commands

    summary = commands.compare(
        model,
        directory,
        data,
        seq_len,
        terminal_reporter(),
        bos,
        tasks=_task_choice(data, tasks, task_file, limit, batch_size),
        trust_remote_code=trust_remote_code,
        dtype=dtype,
    )
    show(summary, as_json, _print_comparison)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An fgmp checkpoint.")],
    as_json: Json = False,
) -> None:
    """Check a checkpoint byte by byte and show where its FP8 blocks are."""
    from fgmp.evaluation.inspect import inspect_checkpoint

    show(inspect_checkpoint(directory), as_json, _print_inspection)


@app.command()
def report(
    directories: Annotated[
        list[Path], typer.Argument(metavar="DIR...", help="fgmp checkpoints, side by side.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path(
        "report.html"
    ),
    data: Annotated[
        str | None,
        typer.Option(help="TEXT for the comparison and the passages. [default: not computed]"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The original model, which --data needs.")
    ] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output of `fgmp compare --json`; repeat it for several DIR, in their order."
        ),
    ] = None,
    seq_len: SeqLen = None,
    bos: CompareBos = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a self-contained HTML page on checkpoints: where their bits went and what they cost.

    Any browser shows it offline. What a checkpoint does not have, the page says.
    """
    from fgmp.app.report import Measuring, write_report

    if (data is None) != (model is None):
        given, lacking = ("data", "model") if model is None else ("model", "data")
        raise InputError(f"--{given} needs --{lacking}: passages compare the original on a text")
    measuring = None
    if data is not None and model is not None:
        measuring = Measuring(model, data, seq_len, bos, trust_remote_code, dtype)
    result = write_report(directories, output, compare or [], measuring, terminal_reporter())
    show(result, as_json, lambda result: print_lines(result.lines()))


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An fgmp checkpoint.")],
    output: Output,
    to: Annotated[str, typer.Option(help="compressed-tensors, modelopt or dense.")],
    mixed: Annotated[
        str | None,
        typer.Option(
            help="per-layer: round every layer of a mixed checkpoint to its better format. "
            "[default: refuse it]"
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="TEXT on which the loss is measured. [default: not measured]"),
    ] = None,
    seq_len: SeqLen = None,
    bos: CompareBos = None,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint in a format that other programs read.

    An all-FP4 or all-FP8 checkpoint keeps its weights bit for bit in compressed-tensors and
    modelopt. `dense` holds dequantized weights in the model's dtype and quantizes no activations.
    """
    from fgmp.app.commands import export_to

    summary = export_to(
        directory, output, to, mixed, data, seq_len, terminal_reporter(), bos, dtype=dtype
    )
    show(summary, as_json, lambda result: print_lines(result.lines()))


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An fgmp checkpoint or a model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    kv_cache: KvCache = None,
    trust_remote_code: TrustRemoteCode = False,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT, token by token as they come."""
    from fgmp.app.commands import generate_text

    stream = None if as_json else _write
    text = generate_text(
        directory,
        prompt,
        max_new_tokens,
        temperature,
        seed,
        stream,
        kv_cache,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        reporter=terminal_reporter(),
    )
    show(text, as_json, lambda _: _write("\n"))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An fgmp checkpoint.")],
) -> None:
    """Serve a checkpoint by vLLM's OpenAI-compatible server.

    Needs vLLM (docs/serving.md). Every other option is vLLM's: --port 8000, --host,
    --tensor-parallel-size, --max-model-len and so on. The checkpoint is checked first, and on a
    machine without a GPU, dtype, cache size and threads get defaults that suit it.
    """
    from fgmp.serving.command import server

    ready = server(directory, context.args)
    os.execve(sys.executable, ready.arguments, {**os.environ, **ready.environment})


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path(
        "fgmp-quickstart"
    ),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the whole pipeline on the model that ships with the package, offline.

    Quantizes it at 70% FP4, compares it with FP8 and NVFP4 on the interpreter's own language
    reference, and writes a checkpoint and a one-page report.
    """
    from fgmp.app.provenance import command_line
    from fgmp.app.quickstart import run

    def print_result(result: "Quickstart") -> None:
        _print_rows(result.comparison.rows)
        print_lines(result.lines())

    show(run(output, terminal_reporter(), command_line(sys.argv)), as_json, print_result)


@app.command()
def doctor(threads: Threads = None, as_json: Json = False) -> None:
    """Show what this machine can do: versions, kernels, dtypes, memory, and what is missing."""
    from fgmp.app.doctor import diagnose

    show(diagnose(), as_json, lambda result: print_lines(result.lines()))


def main() -> None:
    """Run a command and exit: 0 done, 1 refused, 2 wrong usage, 130 interrupted or terminated."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as batch systems end what runs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # Threads that wait must not spin: beside another busy process that costs up to 30 times the
    # time. PyTorch's OpenMP runtime reads this when it is loaded, which is later.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _task_choice(
    data: str | None,
    names: str | None,
    files: list[Path] | None,
    limit: int | None,
    batch_size: int,
) -> "TaskChoice | None":
    """Options of tasks as one record; None if there is a text and no task is named."""
    if names is None and not files:
        if data is None:
            raise typer.BadParameter("give --data TEXT, --tasks NAMES or --task-file FILE")
        return None
    from fgmp.evaluation.tasks import TaskChoice

    split = [name.strip() for name in (names or "").split(",")]
    return TaskChoice([name for name in split if name], files or [], limit, batch_size)


def _print_evaluation(summary: "EvalSummary") -> None:
    from fgmp.app.records import score_table

    if summary.text is not None:
        print_lines(summary.text.lines())
    if summary.tasks is not None:
        _print_table(score_table(summary.tasks), names=2)


def _print_comparison(summary: "CompareSummary") -> None:
    from fgmp.app.records import task_table

    if summary.text is not None:
        _print_rows(summary.text.rows)
        print_lines(summary.text.lines())
    if summary.tasks is not None:
        _print_table(task_table(summary.tasks), names=3)


def _print_table(table: list[list[str]], names: int) -> None:
    """Print lines with a header; the first ``names`` columns are names, the others numbers."""
    header, *lines = table
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, title in enumerate(header):
        shown.add_column(title, justify="right" if i >= names else "left")
    for line in lines:
        shown.add_row(*map(printable, line))
    Console().print(shown)


def _print_rows(rows: "list[Row]") -> None:
    from fgmp.evaluation.compare import table

    console = Console()
    header, *lines = table(rows)
    wide = console.width >= 126
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    columns = [i for i, name in enumerate(header) if wide or name not in _WIDE_COLUMNS]
    for i in columns:
        shown.add_column(header[i], justify="right" if i else "left")
    for line in lines:
        shown.add_row(*(line[i] for i in columns))
    console.print(shown)


_WIDE_COLUMNS = ("95% interval", "KL p99", "top-1", "compression", "FP4 act")
"""Columns that only a wide terminal shows; ``--json`` and the report have all."""


def _print_inspection(inspection: "Inspection") -> None:
    from fgmp.app.records import inspection_lines

    print_lines(inspection_lines(inspection))
    shares = inspection.fp8_share
    for title, by in (("layer", shares.by_layer), ("kind of layer", shares.by_kind)):
        shown = Table(title, "FP8 blocks", "")
        for name, share in by.items():
            shown.add_row(printable(name), f"{share:.1%}", "█" * round(40 * share))
        Console().print(shown)
