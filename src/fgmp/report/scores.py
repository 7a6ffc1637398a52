"""Read ``fgmp_scores.json``: histograms of block scores (docs/format.md, section 1).

The file may be missing, and comes from whoever made the checkpoint: every value that the page
computes with is checked.
"""

import base64
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fgmp.errors import CheckpointError
from fgmp.pack.checkpoint import SCORES
from fgmp.pack.folder import read_json

_BINS = 20_000
"""Largest number of bins, and of the index of one: float64 has 8,400 quarter octaves."""


def read_scores(directory: Path) -> dict[str, Any] | None:
    """Content of the file, or None if there is none.

    Raises:
        CheckpointError: a value is missing or not of its kind.
    """
    path = directory / SCORES
    if not path.exists():
        return None
    raw = read_json(path)

    def require(holds: bool, what: str, value: object) -> None:
        if not holds:
            raise CheckpointError(f"{path}: {what}, got {value!r:.80}")

    require(isinstance(raw, dict), "must be a mapping", raw)
    require(raw.get("version") == 1, "version must be 1", raw.get("version"))
    require(
        raw.get("bins_per_octave") == 4, "bins_per_octave must be 4", raw.get("bins_per_octave")
    )
    require(_is_count(raw.get("tokens")), "tokens must be a number", raw.get("tokens"))
    window = raw.get("window")
    require(
        isinstance(window, list) and len(window) == 2 and all(_is_count(v) for v in window),
        "window must be two numbers",
        window,
    )
    parsed: dict[str, Any] = {"tokens": raw["tokens"], "window": window}
    for side in ("weights", "activations"):
        entries = raw.get(side)
        require(isinstance(entries, dict), f"{side} must be a mapping", entries)
        parsed[side] = {
            str(name): _entry(f"{side}.{name}", entry, require) for name, entry in entries.items()
        }
    return parsed


def _entry(where: str, entry: Any, require: Callable[[bool, str, object], None]) -> dict[str, Any]:
    require(isinstance(entry, dict), f"{where} must be a mapping", entry)
    first, counts, sums = (entry.get(key) for key in ("first", "counts", "sums"))
    threshold = entry.get("threshold")
    require(
        isinstance(first, int) and abs(first) <= _BINS, f"{where}.first must be an index", first
    )
    for name, values in (("counts", counts), ("sums", sums)):
        good = isinstance(values, list) and len(values) <= _BINS
        good = good and all(_is_number(v) and v >= 0 for v in values)
        require(good, f"{where}.{name} must be a list of numbers, 0 or more", values)
    require(len(counts) == len(sums), f"{where} needs as many sums as counts", len(sums))
    require(_is_count(entry.get("zeros")), f"{where}.zeros must be a number", entry.get("zeros"))
    require(
        threshold is None or _is_number(threshold), f"{where}.threshold must be a number", threshold
    )
    result = {"zeros": entry["zeros"], "first": first, "counts": counts, "sums": sums}
    result["threshold"] = threshold
    if "scores" in entry:
        text = entry["scores"]
        try:
            base64.b64decode(text, validate=True)
        except (TypeError, ValueError):
            require(False, f"{where}.scores must be base64", text)
        result["scores"] = text
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
