"""The whole job, offline, in minutes: what ``fgmp quickstart`` runs.

Quantizes the model in this package at 70% FP4, compares it with FP8 and NVFP4 on the
interpreter's own language reference, checks the checkpoint, and writes a one-page report.
"""

import tempfile
import time
from dataclasses import replace
from pathlib import Path

import fgmp.demo
from fgmp.app.commands import SILENT, Reporter, compare_models, quantize_to
from fgmp.app.records import Quickstart
from fgmp.app.report import Measuring, finish, passages_of, rows_of
from fgmp.demo.text import docstrings, standard_library, topics
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.pack import checkpoint
from fgmp.recipe import Recipe
from fgmp.report.blocks import tile_for, total_blocks, window_for
from fgmp.report.gather import gather, weight_shapes

MODEL = Path(fgmp.demo.__file__).parent / "model"
RECIPE = Recipe(fp4=0.7, samples=48, clip="on")
_EVALUATION_CHARACTERS = 160_000
_CALIBRATION_CHARACTERS = 600_000


def run(output: Path, reporter: Reporter = SILENT, command: str | None = None) -> Quickstart:
    """Quantize, compare, inspect, report: writes ``checkpoint/`` and ``report.html``.

    ``command`` is the command line, stored with the checkpoint.
    """
    started = time.perf_counter()
    target, report = output / "checkpoint", output / "report.html"
    checkpoint.require_free(target)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        calibration, evaluation = Path(folder) / "docstrings.txt", Path(folder) / "topics.txt"
        text = "\n\n".join(docstrings(standard_library()))
        calibration.write_text(text[:_CALIBRATION_CHARACTERS])
        evaluation.write_text(topics()[:_EVALUATION_CHARACTERS])
        summary = quantize_to(
            str(MODEL), target, RECIPE, str(calibration), reporter, command=command
        )
        comparison = compare_models(str(MODEL), target, str(evaluation), None, reporter)
        measuring = Measuring(str(MODEL), str(evaluation))
        passages, source = passages_of(target, measuring, reporter)
    inspect_checkpoint(target)
    shapes = weight_shapes(target)
    page = replace(
        gather(target, tile_for(total_blocks(shapes)), window_for(len(shapes))),
        comparison=rows_of(comparison, evaluation.name),
        passages=passages,
        passages_source=source,
    )
    finish(report, "fgmp quickstart", [page])
    return Quickstart(output, target, report, time.perf_counter() - started, summary, comparison)
