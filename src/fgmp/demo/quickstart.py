"""The whole job, offline, in minutes: what ``fgmp quickstart`` runs.

Quantizes the model in this package at 70% FP4, compares it with FP8 and NVFP4 on the
interpreter's own language reference, checks the checkpoint, and writes a one-page report.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

from fgmp.demo.text import docstrings, standard_library, topics
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.pack import checkpoint
from fgmp.recipe import Recipe
from fgmp.report import write_report
from fgmp.workflow import Reporter, compare_models, quantize_to

MODEL = Path(__file__).parent / "model"
RECIPE = Recipe(fp4=0.7, samples=48, clip="on")
_EVALUATION_CHARACTERS = 160_000
_CALIBRATION_CHARACTERS = 600_000


def run(output: Path, reporter: Reporter | None = None) -> dict[str, Any]:
    """Do it; ``output`` gets ``checkpoint/`` and ``report.html``.

    Returns:
        ``output``, ``report``, ``checkpoint``, ``summary`` of quantizing, ``seconds``, and
        ``comparison``, the rows.
    """
    reporter = reporter or Reporter()
    started = time.perf_counter()
    target, report = output / "checkpoint", output / "report.html"
    checkpoint.require_free(target)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        calibration, evaluation = Path(folder) / "docstrings.txt", Path(folder) / "topics.txt"
        text = "\n\n".join(docstrings(standard_library()))
        calibration.write_text(text[:_CALIBRATION_CHARACTERS])
        evaluation.write_text(topics()[:_EVALUATION_CHARACTERS])
        summary = quantize_to(str(MODEL), target, RECIPE, str(calibration), reporter)
        rows = compare_models(str(MODEL), target, str(evaluation), None, reporter).rows
    write_report(report, "fgmp quickstart", rows, summary, inspect_checkpoint(target))
    return {
        "output": str(output),
        "checkpoint": str(target),
        "report": str(report),
        "seconds": time.perf_counter() - started,
        "summary": summary,
        "comparison": rows,
    }
