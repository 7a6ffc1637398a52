"""Rows of ``fgmp compare`` for tables: their columns, and reading them from a file.

Rows are mappings with whatever keys they bring. A key that is listed here has a label, a format and
an explanation; any other is shown under its own name.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgmp.errors import InputError
from fgmp.pack.folder import read_json
from fgmp.report.records import Rows


@dataclass(frozen=True)
class Column:
    """One column: its label, a format of numbers, and an explanation."""

    label: str
    pattern: str = "{:.4g}"
    help: str = ""


COLUMNS = {
    "name": Column("model"),
    "perplexity": Column("perplexity", "{:.3f}", "exp of the mean loss per token; lower is better"),
    "ci95": Column(
        "95% interval", "{:.3f}", "of the perplexity, from paired resampling of text windows"
    ),
    "kl": Column(
        "KL", "{:.4f}", "mean divergence of next-token predictions from the original's, in nats"
    ),
    "kl_ci95": Column("KL, 95% interval", "{:.4f}", "of the mean divergence"),
    "kl_p99": Column("KL, 99th percentile", "{:.3f}", "one token in a hundred diverges more"),
    "top1_agreement_percent": Column(
        "same top token", "{:.1f}%", "tokens at which the most likely next token is the original's"
    ),
    "bits_per_weight": Column("bits per weight", "{:.2f}", "every stored byte counted"),
    "bits_per_activation": Column("bits per activation", "{:.2f}", "flags counted"),
    "compression": Column("compression", "{:.2f}x", "of weights and 4,096 tokens of activations"),
    "fp4_activations": Column("FP4 activations", "{:.1%}", "fraction of blocks on this text"),
    "vs_fp8_percent": Column("perplexity vs FP8", "{:+.2f}%", "increase over all-FP8"),
    "gap_recovered_percent": Column(
        "perplexity gap recovered", "{:.0f}%", "100% is as good as all-FP8, 0% as all-NVFP4"
    ),
    "kl_gap_recovered_percent": Column(
        "KL gap recovered", "{:.0f}%", "100% is as good as all-FP8, 0% as all-NVFP4"
    ),
}
"""Known keys of a row, in the order of columns."""

MODELS = {
    "original": "before quantization",
    "fp8": "every block in FP8",
    "nvfp4": "every block in NVFP4",
    "fgmp": "this checkpoint",
    "uniform": "one format throughout, at the checkpoint's number of bytes",
}
"""What the rows of known names are."""


@dataclass(frozen=True)
class Cell:
    """Text of a cell, and a number to sort by."""

    text: str
    value: float | None = None


def columns_of(rows: list[dict[str, Any]]) -> dict[str, Column]:
    """Columns of the keys that any row has: known ones first, in order, then others."""
    keys = dict.fromkeys(key for row in rows for key in row)
    known = {key: column for key, column in COLUMNS.items() if key in keys}
    return known | {key: Column(key.replace("_", " ")) for key in keys if key not in known}


def cell(value: Any, column: Column) -> Cell:
    """One value of a row as text."""
    if isinstance(value, list):
        return Cell(" to ".join(cell(v, column).text for v in value), _number(value[0]))
    number = _number(value)
    if number is None or isinstance(value, bool):
        return Cell("-" if value is None else str(value))
    return Cell(column.pattern.format(number), number)


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if usable else None


def read_comparison(path: Path) -> Rows:
    """Read what ``fgmp compare --json`` printed.

    Raises:
        InputError: the file is none of that kind; names the rule and the value.
    """
    raw = read_json(path)
    rows = raw.get("rows") if isinstance(raw, dict) else None
    if not isinstance(rows, list) or not rows:
        raise InputError(
            f"{path}: must be the output of `fgmp compare --json`, an object with rows, "
            f"got {raw!r:.80}"
        )
    return Rows([_checked(row, f"{path}: rows[{i}]") for i, row in enumerate(rows)], path.name)


def _checked(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("name"), str):
        raise InputError(f"{where}: must be an object with a name, got {row!r:.80}")
    for key, value in row.items():
        values = value if isinstance(value, list) and value else [value]
        if not all(v is None or isinstance(v, str | int | float) for v in values):
            raise InputError(
                f"{where}.{key}: must be a number, a text or a list of these, got {value!r:.80}"
            )
    return row
