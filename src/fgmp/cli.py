"""The command line: parse, call, print. Progress goes to stderr, results to stdout."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from fgmp.console import Json, print_facts, show, stderr
from fgmp.errors import FGMPError, InputError
from fgmp.hardware.cli import app as hardware


class _Commands(TyperGroup):
    """Runs a command; an error of ours is one line, an interruption a short one.

    Here and not around ``app()``, because Typer turns an interruption into an exit of its own.
    """

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except FGMPError as error:
            text = f"[bold red]error:[/] {escape(str(error))}"
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
        "Fisher-weighted impact decides which: one threshold for all weights, one for all "
        "activations. MODEL is a folder or a hub name of a Hugging Face causal LM; DIR is a "
        "folder that `quantize` wrote. TEXT is a text file, JSON lines with a `text` field, or "
        "the name of a Hugging Face dataset."
    ),
    epilog="Start with `fgmp quickstart`: it needs no network and takes a few minutes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

app.add_typer(hardware, name="hw")

Text = Annotated[str, typer.Option("--data", help="Evaluation text: file, JSON lines or dataset.")]
SeqLen = Annotated[
    int | None,
    typer.Option(help="Tokens in a window. [default: the model's context, at most 2048]"),
]

KvCache = Annotated[
    str | None,
    typer.Option(help="Keep keys and values packed: fp8, nvfp4 or mixed, 70% of it in FP4."),
]


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hugging Face causal LM: folder or hub name.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")],
    fp4: Annotated[
        float | None, typer.Option(help="Share of blocks kept in FP4, 0 to 1. [default: 0.7]")
    ] = None,
    fp4_activations: Annotated[
        float | None, typer.Option(help="The same for activations. [default: as --fp4]")
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="A budget instead of shares: mean of the formats' bits of a weight and of an "
            "activation value, 4.5 (all FP4) to 8 (all FP8)."
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(help="A budget: bytes of the checkpoint's tensors, such as 3.5M or 4G."),
    ] = None,
    max_increase: Annotated[
        str | None,
        typer.Option(
            help="A budget: perplexity on held-out text over all-FP8's, such as 1%. Packs and "
            "measures about eight times."
        ),
    ] = None,
    max_energy: Annotated[
        str | None,
        typer.Option(
            help="A budget: energy of matrix products over all-FP8's on hardware as in "
            "docs/energy.md, such as 75%."
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with any recipe keys; options override it.")
    ] = None,
    calib: Annotated[
        str | None,
        typer.Option(help="Calibration TEXT. [default: docstrings of the Python library]"),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File that keeps the calibration: made if missing, else used again, which saves "
            "most of the time under another recipe. Must be of this model and text."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration sequences. [default: 512]")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens in a calibration sequence. [default: 512]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the sequences. [default: 0]")] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="fisher, fisher-per-layer, error, random, fp8 or nvfp4."),
    ] = None,
    clip: Annotated[
        str | None, typer.Option(help="Search FP4 block scales: auto, on or off. [default: auto]")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(help="Passes that tune norms, embeddings and biases. [default: 0]"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize MODEL and write a packed checkpoint.

    Calibrates (one forward and backward pass over the calibration text), chooses the format of
    every block, and packs. Interrupt it with Ctrl-C and run the same command again: it goes on
    where it stopped.
    """
    from fgmp.recipe import Recipe

    given: dict[str, Any] = {
        "fp4": fp4,
        "fp4_activations": fp4_activations,
        "bits": bits,
        "max_bytes": max_bytes,
        "max_increase": max_increase,
        "max_energy": max_energy,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "policy": policy,
        "clip": clip,
        "tune": tune,
    }
    chosen = Recipe.from_yaml(recipe) if recipe else Recipe()
    chosen = chosen.with_options({k: v for k, v in given.items() if v is not None})
    from fgmp.workflow import quantize_to

    summary = quantize_to(model, output, chosen, calib, _reporter(), calibration)
    show(summary, as_json, _print_summary)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_DIR", help="Any causal LM.")],
    data: Text,
    seq_len: SeqLen = None,
    kv_cache: KvCache = None,
    as_json: Json = False,
) -> None:
    """Perplexity of a model on TEXT.

    Windows do not overlap; the mean is over all predicted tokens. With --kv-cache every token
    attends to packed keys and values.
    """
    from fgmp.workflow import evaluate_model

    facts = evaluate_model(model, data, seq_len, _reporter(), kv_cache)
    show(facts, as_json, _print_evaluation)


@app.command()
def compare(
    model: Annotated[str, typer.Argument(help="The original model.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Its fgmp checkpoint.")],
    data: Text,
    seq_len: SeqLen = None,
    as_json: Json = False,
) -> None:
    """Original, all-FP8, all-NVFP4 and FGMP side by side on TEXT.

    The gap is all-NVFP4 minus all-FP8, in perplexity and in KL from the original; "recovered" is
    how much of it FGMP closes.
    """
    from fgmp.workflow import compare_models

    found = compare_models(model, directory, data, seq_len, _reporter())
    facts = {**vars(found), "rows": [row.to_dict() for row in found.rows]}

    def show_rows(_: dict[str, Any]) -> None:
        _print_rows(found.rows)
        print_facts({"quantized": _coverage(facts)})

    show(facts, as_json, show_rows)


@app.command()
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="An fgmp checkpoint.")],
    as_json: Json = False,
) -> None:
    """Check a checkpoint byte by byte and show where its FP8 blocks are."""
    from fgmp.evaluation.inspect import inspect_checkpoint

    show(inspect_checkpoint(directory), as_json, _print_inspection)


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An fgmp checkpoint or a model.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to make.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    kv_cache: KvCache = None,
    as_json: Json = False,
) -> None:
    """Continue PROMPT, token by token as they come."""
    from fgmp.workflow import generate_text

    stream = None if as_json else _write
    found = generate_text(directory, prompt, max_new_tokens, temperature, seed, stream, kv_cache)
    show(found, as_json, lambda facts: _write("\n"))


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder to write.")] = Path(
        "fgmp-quickstart"
    ),
    as_json: Json = False,
) -> None:
    """The whole job on the model that ships with the package, offline.

    Quantizes it at 70% FP4, compares it with FP8 and NVFP4 on the interpreter's own language
    reference, and writes a checkpoint and a one-page report.
    """
    from fgmp.demo.quickstart import run

    found = run(output, _reporter())
    rows = found.pop("comparison")
    facts = {**found, "rows": [row.to_dict() for row in rows]}

    def show_rows(_: dict[str, Any]) -> None:
        _print_rows(rows)
        _print_summary(found["summary"])
        print_facts({"report": found["report"], "whole run": f"{found['seconds']:.0f} s"})

    show(facts, as_json, show_rows)


Liberty = Annotated[
    Path | None,
    typer.Option(help="Cell library, plain or gzip. [default: the embedded one, ratios only]"),
]


@hardware.command("synth")
def synthesize(liberty: Liberty = None, as_json: Json = False) -> None:
    """Area, cells and depth of every unit, by Yosys and abc."""
    from fgmp.accelerator import synthesize_units

    show(synthesize_units(liberty, _reporter()), as_json, _print_units)


@hardware.command("energy")
def energy(
    directory: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="An fgmp checkpoint.")],
    liberty: Liberty = None,
    data: Annotated[
        str | None,
        typer.Option(help="TEXT for the activations. [default: docstrings of the Python library]"),
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="SVG file to draw the figures in.")] = None,
    as_json: Json = False,
) -> None:
    """Energy of the lanes on the model's own operands, and of serving it.

    Synthesizes the recommended lane, the best FP8-only lane, an FP4-only lane and the quantizer,
    runs the model's operands through their gates with and without delays, and counts what a prefill
    and a decode take.
    """
    from fgmp.accelerator import energy as measure

    if plot and not plot.parent.is_dir():
        raise InputError(f"--plot {plot}: there is no folder {plot.parent}")
    facts = measure(directory, liberty, data, _reporter())
    show(facts, as_json, _print_energy)
    if plot:
        from fgmp.hardware.plot import figures

        try:
            plot.write_text(figures(facts), encoding="utf-8")
        except OSError as error:
            raise InputError(f"--plot {plot}: could not be written: {error.strerror}") from error


def main() -> None:
    """Run a command and exit: 0 done, 1 refused, 2 wrong usage, 130 interrupted or terminated."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as batch systems end what runs
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    app()


def _reporter() -> Any:
    from transformers.utils import logging

    from fgmp.progress import bars
    from fgmp.workflow import Reporter

    logging.disable_progress_bar()

    def line(text: str) -> None:
        stderr.print(escape(text), highlight=False, soft_wrap=True)

    return Reporter(stages=bars(stderr), line=line)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _print_units(facts: dict[str, Any]) -> None:
    shown = Table("unit", f"area, {facts['area_unit']}", "cells", "depth", box=SIMPLE_HEAD)
    for name, unit in facts["units"].items():
        shown.add_row(name, f"{unit['area_um2']:,.0f}", f"{unit['cells']:,}", str(unit["depth"]))
    Console().print(shown)


def _print_energy(facts: dict[str, Any]) -> None:
    unit = facts["unit"]
    shown = Table("lane", "area", "zero delay", "with glitches", box=SIMPLE_HEAD)
    for name, lane in facts["lanes"].items():
        energies = (f"{lane[key]:.3g}" for key in ("zero_delay", "inertial"))
        shown.add_row(name, f"{lane['area_um2']:,.0f}", *energies)
    Console().print(shown)
    parts = ", ".join(f"{name} {value:.3g}" for name, value in facts["fj_per_op"].items())
    served = {
        f"{model}, {phase}": ", ".join(
            f"{what.replace('_', ' ')} {value:.1f}%"
            for what, value in found["saving_vs_fp8_percent"].items()
        )
        for model, phases in facts["inference"].items()
        for phase, found in phases.items()
    }
    print_facts(
        {
            f"parts, {unit}": parts,
            "saving against FP8": f"{facts['saving_vs_fp8_percent']:.1f}% of a lane, "
            f"{facts['saving_zero_delay_percent']:.1f}% without glitches",
            "quantizer": f"{facts['ppu_percent']:.2f}% of dot-product energy, "
            f"{facts['ppu_stall_percent']:.2f}% of cycles",
            **{f"saving, {name}": value for name, value in served.items()},
            "assumptions": "; ".join(facts["assumptions"]),
        }
    )


def _coverage(facts: dict[str, Any]) -> str:
    share, rest = facts["quantized_share"], ", ".join(facts["unquantized"]) or "none"
    if share is None:
        return "the checkpoint does not say"
    return f"{share:.1%} of matmul parameters; not: {rest}"


def _budget(facts: dict[str, float]) -> dict[str, str]:
    shown = {}
    if "bits" in facts:
        shown["budget"] = f"{facts['bits']:.3f} bits, weights' and activations' formats together"
    if "energy_percent" in facts:
        shown["energy"] = f"{facts['energy_percent']:.1f}% of all-FP8's"
    if "increase_percent" in facts:
        shown["increase"] = (
            f"{facts['increase_percent']:+.2f}% of all-FP8's perplexity on held-out text "
            f"({facts['increase_low']:+.2f}% to {facts['increase_high']:+.2f}%)"
        )
    return shown


def _tuning(facts: dict[str, Any]) -> dict[str, str]:
    """What tuning did, for a person."""
    if not facts:
        return {}
    kl = facts["held_out_kl"]
    moved = f"KL on held-out text {kl['without']:.5f} without, {kl['with']:.5f} with"
    return {"tuning": moved if facts["used"] else f"left out: {moved}"}


def _print_summary(summary: dict[str, Any]) -> None:
    fractions = summary["fp4_fraction"]
    print_facts(
        {
            "checkpoint": summary["output"],
            "FP4 blocks": f"{fractions['weights']:.1%} of weights, "
            f"{fractions['activations']:.1%} of activations",
            "bits per weight": f"{summary['bits_per_weight']:.3f}",
            "size": f"{summary['bytes']:,} bytes, tensors {summary['tensor_bytes']:,}",
            "quantized": _coverage(summary),
            **_budget(summary["budget"]),
            "clipping": "on" if summary["clip"]["used"] else "off",
            **_tuning(summary["tune"]),
            "time": f"{summary['seconds']:.1f} s",
            "peak memory": f"{summary['peak_bytes'] / 1e9:.2f} GB",
        }
    )


def _print_evaluation(facts: dict[str, Any]) -> None:
    shown = {**facts, "tokens": f"{facts['tokens']:,}"}
    if "drift" in facts:
        drift = shown.pop("drift")
        site = max(drift, key=lambda name: abs(drift[name]), default=None)
        del shown["quantized_share"], shown["unquantized"]
        shown |= {
            "fp4_activations": f"{facts['fp4_activations']:.1%} of blocks",
            "furthest from calibration": site and f"{site}, {100 * drift[site]:+.1f} points of FP4",
            "quantized": _coverage(facts),
        }
    overlap = facts.get("calibration_overlap")
    shown["calibration_overlap"] = None if overlap is None else f"{overlap:.1%} of windows"
    print_facts(shown)


def _print_rows(rows: list[Any]) -> None:
    from fgmp.evaluation.compare import table

    console = Console()
    header, *lines = table(rows)
    wide = console.width >= 110
    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    kept = [i for i, name in enumerate(header) if wide or name not in _WIDE_COLUMNS]
    for i in kept:
        shown.add_column(header[i], justify="right" if i else "left")
    for line in lines:
        shown.add_row(*(line[i] for i in kept))
    console.print(shown)


_WIDE_COLUMNS = ("95% interval", "compression", "FP4 act")
"""Columns that only a wide terminal shows; ``--json`` and the report have all."""


def _print_inspection(facts: dict[str, Any]) -> None:
    bits, size = facts["bits_per_weight"], facts["bytes"]
    print_facts(
        {
            "checkpoint": facts["path"],
            "integrity": f"{facts['tensors']} tensors intact",
            "linears": f"{facts['linears']}, {facts['quantized_weights']:,} weights",
            "planes": f"{bits['planes']:.3f} bits a weight, {size['planes']:,} bytes",
            "streamed image": f"{bits['streamed_image']:.3f} bits a weight, "
            f"{size['streamed_image']:,} bytes",
            "quantized": _coverage(facts),
        }
    )
    shares = facts["fp8_share"]
    for title, by in (("layer", shares["by_layer"]), ("kind of layer", shares["by_kind"])):
        shown = Table(title, "FP8 blocks", "")
        for name, share in by.items():
            shown.add_row(escape(name), f"{share:.1%}", "█" * round(40 * share))
        Console().print(shown)


if __name__ == "__main__":
    main()
