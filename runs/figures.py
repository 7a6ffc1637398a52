"""Tables and plots of the documents, from the JSON files in docs/results.

    python runs/figures.py

Fills the pages of results and docs/families.md between ``<!-- NAME -->`` and ``<!-- end -->`` with
the table of that name. Tables come from ``accuracy-MODEL.json`` (written by ``runs/accuracy.py
--json``) and from the files of ``runs/encoder.py``, ``runs/kv_cache.py``, ``runs/budgets.py`` and
``runs/families.py``. Draws ``accuracy-MODEL.svg`` for each model: KL gap recovered over the mean of
bits per weight and bits per activation value, with 95% intervals. It computes no result.
"""

import argparse
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import families
import kv_cache
from rows import ABLATIONS, ROWS, ablated

from fgmp.formats.spec import FLAG_BITS, stream_bits

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 60, 48, 16, 16
COLOURS = {
    "ours": "#0b6e4f",
    "paper": "#c46210",
    "autoquantize": "#7b2d8b",
    "nvfp4": "#1f4e9c",
    "fp8": "#1f4e9c",
    "by channel": "#777777",
}
"""Colours of a plot, by a part of the row's name; ours where none matches."""

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [
    DOCS / f"{page}.md" for page in ("results", "accuracy", "ablations", "measurements", "families")
]
MODELS = {
    "wiki5m": "wiki5m",
    "babyllama105": "babyllama105",
    "stories260K": "stories260K",
    "demo": "demonstration model",
    "gpt-neox": "GPT-NeoX",
    "smollm2": "SmolLM2",
    "smollm2-192": "SmolLM2, 192 sequences",
}
"""Names of the models in tables, by MODEL of ``accuracy-MODEL.json``, in the order of tables."""

GOALS = {
    "70% FP4": ("90%, then 94%", ["ours 70%", "ours, mean of 70%"]),
    "90% FP4": ("76%, then 84%", ["ours 90%", "ours, mean of 90%"]),
    "100% FP4": ("45%, then 55%", ["ours 100%"]),
}
"""Goals in KL gap recovered, and rows; the better row counts."""

Facts = dict[str, Any]
"""Content of a result file, or one row of it."""


def kind_of(name: str) -> str:
    """Key of ``COLOURS`` for a row."""
    return next((kind for kind in COLOURS if kind in name), "ours")


def mean_bits(row: Facts) -> float:
    """Mean of bits per weight and per activation value, with flags where formats mix online."""
    activations = stream_bits(row["fp4_activations"])
    if kind_of(row["name"]) not in ("ours", "paper") or row["fp4_activations"] == 1:
        activations -= FLAG_BITS
    return (row["bits_per_weight"] + activations) / 2


def results() -> dict[str, Facts]:
    """Accuracy results by model, in the order of the tables."""
    files = {model: DOCS / "results" / f"accuracy-{model}.json" for model in MODELS}
    return {model: json.loads(f.read_text()) for model, f in files.items() if f.exists()}


def other_results() -> dict[str, Facts]:
    """Results of the other scripts, by file."""
    names = ("encoder", "budgets-babyllama105", "kv-wiki5m", "kv-babyllama105", "families")
    return {name: json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in names}


def table(facts: Facts) -> list[str]:
    """Rows of one model, ablations left out, and the setting that they were measured in."""
    lines = [
        "| row | bits/w | FP4 act | perplexity | KL | KL gap recovered | by seed | 95% interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    shown = [row for row in facts["rows"] if row["name"] in ROWS]
    for row in shown:
        low, high = row["kl_gap_recovered_ci95"]
        seeds = row["kl_gap_recovered_by_seed"]
        lines.append(
            f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['fp4_activations']:.1%} "
            f"| {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {row['kl_gap_recovered_percent']:.1f}% | {min(seeds):.1f} - {max(seeds):.1f} "
            f"| {low:.1f} - {high:.1f} |"
        )
    calibrations = facts["seeds"]
    revisions = sorted({revision for row in shown for revision in row["revisions"]})
    return [
        *lines,
        "",
        f"{facts['calibration_sequences']} calibration sequences of {facts['seq_len']} tokens, "
        f"{facts['evaluation_tokens']:,} evaluation tokens, "
        f"{calibrations} calibration{'s' * (calibrations > 1)}, torch {facts['torch']}, "
        f"revision {' and '.join(revisions)}.",
    ]


def goals(models: dict[str, Facts], encoder: Facts) -> list[str]:
    """Results compared with the project's goals, by model; for the encoder, in drift.

    A cell is empty where a model lacks the rows.
    """
    rows = [{row["name"]: row for row in facts["rows"]} for facts in models.values()]

    def recovered(row: Facts, names: Iterable[str]) -> list[float]:
        return [row[name]["kl_gap_recovered_percent"] for name in names if name in row]

    header = ["", "goal", *(MODELS[model] for model in models), "encoder"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    drift = {row["name"]: row["gap_recovered_percent"] for row in encoder["rows"]}
    for fraction, (goal, names) in GOALS.items():
        cells = [_best(recovered(row, names)) for row in rows]
        cells.append(_best(drift[name] for name in names if name in drift))
        lines.append(f"| {fraction} | {goal} | {' | '.join(cells)} |")
        cells = [_best(recovered(row, [f"{name}, tuned" for name in names])) for row in rows]
        if any(cells):
            lines.append(f"| {fraction}, tuned | {goal} | {' | '.join(cells)} | |")
    for bits in ("5.4", "6.0"):
        rows_compared = [f"ours at {bits} bits", f"autoquantize {bits} bits"]
        left = [[100 - percent for percent in recovered(row, rows_compared)] for row in rows]
        label = f"gap left at {bits} bits, divided by that of AutoQuantize's rule"
        cells = [f"{pair[0] / pair[1]:.2f}" if len(pair) == 2 else "" for pair in left]
        lines.append(f"| {label} | 0.5, then 0.25 | {' | '.join(cells)} | |")
    points = [recovered(row, ["ours 100%", "nvfp4, four over six"]) for row in rows]
    cells = [f"{pair[0] - pair[1]:+.1f}" if len(pair) == 2 else "" for pair in points]
    lines.append(f"| 100% FP4, points over Four Over Six | 0, then more | {' | '.join(cells)} | |")
    return lines


def _best(percents: Iterable[float]) -> str:
    best = max(percents, default=None)
    return "" if best is None else f"{best:.1f}%"


def ablations(models: dict[str, Facts]) -> list[str]:
    """KL gap recovered by ablation and model, and the points over the row that it changes."""
    models = {
        model: facts
        for model, facts in models.items()
        if any(row["name"] in ABLATIONS for row in facts["rows"])
    }
    rows = [{row["name"]: row for row in facts["rows"]} for facts in models.values()]
    lines = _header("row", models)
    seeds = [{str(row["seeds"]) for name, row in r.items() if name in ABLATIONS} for r in rows]
    lines.append(f"| calibrations | {' | '.join(' or '.join(sorted(s)) for s in seeds)} |")
    for name in ABLATIONS:
        cells = [_with_points(r[name], ablated(name)) if name in r else "" for r in rows]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _with_points(row: Facts, other: str) -> str:
    percent = f"{row['kl_gap_recovered_percent']:.1f}%"
    over = row["kl_gap_recovered_points_over"].get(other)
    return f"{percent}, {_points(over)}" if over else percent


def _points(over: Facts) -> str:
    low, high = over["ci95"]
    return f"{over['points']:+.1f} ({low:+.1f} to {high:+.1f})"


def versus(models: dict[str, Facts]) -> list[str]:
    """Points of KL gap by which rows lie over others, with paired intervals."""
    over: dict[tuple[str, str], list[str]] = {}
    for index, facts in enumerate(models.values()):
        for row in facts["rows"]:
            for other, by in row["kl_gap_recovered_points_over"].items():
                if row["name"] in ROWS:
                    cells = over.setdefault((row["name"], other), [""] * len(models))
                    cells[index] = _points(by)
    lines = _header("row, over another row", models)
    for (name, other), cells in over.items():
        lines.append(f"| {name}, over {other} | " + " | ".join(cells) + " |")
    return lines


def _header(first: str, models: dict[str, Facts]) -> list[str]:
    columns = [first, *(MODELS[model] for model in models)]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def encoder(facts: Facts) -> list[str]:
    """Drift of the encoder's embeddings, from ``runs/encoder.py``."""
    lines = [
        "| row | drift | gap recovered | by seed | 95% interval |",
        "|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        (low, high), seeds = row["gap_recovered_ci95"], row["gap_recovered_by_seed"]
        lines.append(
            f"| {row['name']} | {row['drift']:.5f} | {row['gap_recovered_percent']:.1f}% "
            f"| {min(seeds):.1f} - {max(seeds):.1f} | {low:.1f} - {high:.1f} |"
        )
    return [
        *lines,
        "",
        f"{facts['sentences']} calibration sentences, {facts['evaluated']} evaluated, "
        f"{facts['seeds']} calibrations, torch {facts['torch']}, revision {facts['revision']}.",
    ]


def budgets(facts: Facts) -> list[str]:
    """Results of each budget, from ``runs/budgets.py``."""
    lines = [
        "| option | bits per value, formats | FP4 weights | FP4 activations | bytes of tensors "
        "| KL | KL of all-NVFP4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        name, _, value = row["budget"].partition("=")
        result = row["result"]
        kl = result["uniform"]["held_out_kl"]
        (mixed,) = (kl[name] for name in kl if name != "nvfp4")
        lines.append(
            f"| `--{name.replace('_', '-')} {value}` | {result['budget']['bits']:.3f} "
            f"| {result['fp4_weights']:.1%} | {result['fp4_activations']:.1%} "
            f"| {result['tensor_bytes']:,} | {mixed:.4f} | {kl['nvfp4']:.3f} |"
        )
    return lines


def filled(page: str, models: dict[str, Facts], others: dict[str, Facts]) -> str:
    """The page with every marked table written anew.

    Args:
        page: content of a document.
        models: from :func:`results`.
        others: from :func:`other_results`.

    Raises:
        KeyError: the page names a table that does not exist.
    """
    tables = {
        "goals": goals(models, others["encoder"]),
        **{f"accuracy-{model}": table(facts) for model, facts in models.items()},
        "versus": versus(models),
        "ablations": ablations(models),
        "encoder": encoder(others["encoder"]),
        "budgets": budgets(others["budgets-babyllama105"]),
        **{name: kv_cache.table(others[name]) for name in ("kv-wiki5m", "kv-babyllama105")},
        "families": families.table(others["families"]),
    }

    def fill(place: re.Match[str]) -> str:
        return "\n".join([f"<!-- {place[1]} -->", *tables[place[1]], "<!-- end -->"])

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", fill, page, flags=re.DOTALL)


def plot(model: str, facts: Facts) -> str:
    """SVG of the rows of one model, ablations left out."""
    rows = [row for row in facts["rows"] if row["name"] in ROWS]

    def x(bits: float) -> float:
        return LEFT + (bits - 4.4) / (8.2 - 4.4) * (WIDTH - LEFT - RIGHT)

    def y(percent: float) -> float:
        return TOP + (105 - percent) / 110 * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
    ]
    for percent in range(0, 101, 20):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(percent):.1f}" y2="{y(percent):.1f}" '
            f'stroke="#dddddd"/><text x="{LEFT - 8}" y="{y(percent) + 4:.1f}" '
            f'text-anchor="end">{percent}%</text>'
        )
    for bits in (4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8):
        parts.append(
            f'<text x="{x(bits):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{bits:g}'
            "</text>"
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">mean of bits '
        f"per weight and bits per activation value ({MODELS[model]})</text>"
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" '
        'text-anchor="middle">KL gap recovered</text>'
    )
    for row in rows:
        colour, at = COLOURS[kind_of(row["name"])], (x(mean_bits(row)), row)
        low, high = row["kl_gap_recovered_ci95"]
        centre = y(row["kl_gap_recovered_percent"])
        parts.append(
            f'<line x1="{at[0]:.1f}" x2="{at[0]:.1f}" y1="{y(low):.1f}" y2="{y(high):.1f}" '
            f'stroke="{colour}"/><circle cx="{at[0]:.1f}" cy="{centre:.1f}" r="3.5" '
            f'fill="{colour}"><title>{row["name"]}</title></circle>'
            f'<text x="{at[0] + 6:.1f}" y="{centre + 4:.1f}" fill="{colour}" font-size="9">'
            f"{row['name']}</text>"
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    models = results()
    for model, facts in models.items():
        (DOCS / "results" / f"accuracy-{model}.svg").write_text(plot(model, facts))
    for page in PAGES:
        page.write_text(filled(page.read_text(), models, other_results()))


if __name__ == "__main__":
    main()
