"""Render records as one HTML file that needs no other, and no network.

The templates in ``page/`` escape every name. Data travel as JSON and base64 in script elements that
do not run; the page's own script and Plotly's are named by their SHA-256 in a content security
policy, so a browser runs nothing else and fetches nothing.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fgmp.evaluation.passages import Passage
from fgmp.formats.spec import BLOCK, E2M1, E4M3, FP4_BITS, FP8_BITS, FP8_BLOCK, FP8_FACTOR
from fgmp.report import records
from fgmp.report.comparison import MODELS, cell, columns_of
from fgmp.report.records import Checkpoint
from fgmp.storage.atomic import replacing

_PAGE = Path(__file__).parent / "page"
_SCRIPTS = ("data", "theme", "table", "layers", "blocks", "scores", "tradeoff", "main")
"""Files of ``page/``, in order; together they are one module script."""


def write_page(path: Path, title: str, checkpoints: Sequence[Checkpoint]) -> None:
    """Write the page; it appears whole or not at all.

    Args:
        path: HTML file to write.
        title: heading.
        checkpoints: one or several, side by side.
    """
    with replacing(path) as draft:
        draft.write_text(render(title, checkpoints), encoding="utf-8")


def render(title: str, checkpoints: Sequence[Checkpoint]) -> str:
    """The page as text."""
    environment = Environment(
        loader=FileSystemLoader(_PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"grouped": "{:,}".format, "size": size, "shown": _shown}
    script, plotly = _script(), _plotly()
    return environment.get_template("page.html").render(
        title=title,
        version=version("fgmp"),
        policy=_policy(script, plotly),
        style=Markup((_PAGE / "style.css").read_text(encoding="utf-8")),  # our own file
        script=Markup(script),
        plotly=_deflated(plotly.encode()),
        checkpoints=checkpoints,
        panels=records,
        table=_table(checkpoints),
        data=embedded(_data(checkpoints)),
        rows=embedded(_rows(checkpoints)),
        encoded=lambda raw: base64.b64encode(raw).decode(),
        heat=_heat,
    )


def embedded(value: Any) -> Markup:
    """JSON that can stand in a script element: no character in it starts or ends markup."""
    text = json.dumps(_finite(value), separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _script() -> str:
    return "\n".join((_PAGE / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)


@cache
def _plotly() -> str:
    """Plotly's script, from the package ``plotly``."""
    return (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")


def _deflated(raw: bytes) -> str:
    return base64.b64encode(zlib.compress(raw, 9)).decode()


def _policy(*scripts: str) -> str:
    """Content security policy under which only these scripts run and nothing is fetched."""
    hashes = (base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts)
    allowed = " ".join(f"'sha256-{text}'" for text in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; "
        "img-src data: blob:; base-uri 'none'; form-action 'none'"
    )


def size(count: float) -> str:
    """Bytes in the unit that suits them."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _shown(token: str) -> str:
    """A token's text with its line ends and other control characters visible."""
    return "".join(
        "\u23ce" if c == "\n" else c if c.isprintable() else c.encode("unicode_escape").decode()
        for c in token
    )


def _heat(kl: float | None, passage: Passage) -> int:
    """Shade of a token, 0 to 9, by the square root of its share of the largest divergence."""
    if not kl or kl < 0:
        return 0
    return min(9, round(9 * math.sqrt(kl / max(passage.peak_kl, 1e-12))))


def _table(checkpoints: Sequence[Checkpoint]) -> dict[str, Any] | None:
    """The comparison as text: columns, and lines of cells; None without any rows."""
    compared = [(c.name, c.comparison) for c in checkpoints if c.comparison]
    if not compared:
        return None
    columns = columns_of([row for _, rows in compared for row in rows.rows])
    return {
        "columns": list(columns.values()),
        "several": len(checkpoints) > 1,
        "lines": [
            {
                "checkpoint": name,
                "ours": row["name"] == "fgmp",
                "about": MODELS.get(row["name"], ""),
                "cells": [cell(row.get(key), column) for key, column in columns.items()],
            }
            for name, rows in compared
            for row in rows.rows
        ],
        "sources": [(name, rows.source) for name, rows in compared],
    }


def _rows(checkpoints: Sequence[Checkpoint]) -> list[dict[str, Any]]:
    """Rows of all comparisons, each with the name of its checkpoint where there are several."""
    several = len(checkpoints) > 1
    return [
        {"checkpoint": c.name, **row} if several else row
        for c in checkpoints
        if c.comparison
        for row in c.comparison.rows
    ]


def _data(checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """What the page's script reads, but for the maps and windows."""
    return {
        "formats": {
            "block": BLOCK,
            "fp4": [sign * m for sign in (1, -1) for m in E2M1.magnitudes],
            "fp8": [sign * m for sign in (1, -1) for m in (*E4M3.magnitudes, math.nan)],
            "fp8Factor": FP8_FACTOR,
            "fp8Block": FP8_BLOCK,
            "bits": [FP4_BITS, FP8_BITS],
        },
        "checkpoints": [
            {
                "name": c.name,
                "matrices": [
                    {
                        "name": m.facts.name,
                        "layer": m.layer,
                        "kind": m.kind,
                        "n": m.facts.n,
                        "k": m.facts.k,
                        "groups": m.facts.blocks // m.facts.n,
                        "fp8": m.facts.fp8_blocks,
                        "bytes": m.facts.plane_bytes,
                        "t": m.t,
                        "tile": m.blocks.tile,
                        "window": [m.window.rows, m.window.blocks],
                    }
                    for m in c.matrices
                ],
                "sites": [
                    {"layer": s.layer, "kind": s.kind, "k": s.k, "fp8": s.fp8_share}
                    for s in c.sites
                ],
                "scores": c.scores,
                "energy": None
                if c.energy is None
                else {
                    "percent": c.energy.percent,
                    "allFp4": c.energy.all_fp4_percent,
                    "layers": c.energy.by_layer,
                },
                "rows": c.comparison.rows if c.comparison else None,
            }
            for c in checkpoints
        ],
    }
