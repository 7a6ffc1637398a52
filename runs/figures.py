"""Tables and plots of docs/results.md, from what ``runs/accuracy.py --json`` wrote.

    python runs/figures.py

Fills what stands between ``<!-- NAME -->`` and ``<!-- end -->`` in docs/results.md with the table
of that name, made of ``docs/results/accuracy-MODEL.json`` and of what ``runs/encoder.py``,
``runs/kv_cache.py`` and ``runs/budgets.py`` wrote beside it, and draws ``accuracy-MODEL.svg`` for
each model: KL gap recovered over the mean of the bits of a weight and of an activation value, with
95% intervals. It computes no result.
"""

import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import kv_cache
from accuracy import ABLATIONS, ROWS, whole

from fgmp.formats.spec import FLAG_BITS, stream_bits

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 60, 48, 16, 16
KINDS = {
    "ours": "#0b6e4f",
    "paper": "#c46210",
    "autoquantize": "#7b2d8b",
    "nvfp4": "#1f4e9c",
    "fp8": "#1f4e9c",
    "by channel": "#777777",
}


DOCS = Path(__file__).parents[1] / "docs"
MODELS = {
    "wiki5m": "wiki5m",
    "babyllama105": "babyllama105",
    "stories260K": "stories260K",
    "demo": "demonstration model",
    "gpt-neox": "GPT-NeoX",
    "smollm2": "SmolLM2",
    "smollm2-192": "SmolLM2, 192 sequences",
}
"""What the tables call the model of ``accuracy-MODEL.json``, in their order."""

GOALS = {
    "70% FP4": ("90%, then 94%", ["ours 70%", "ours, mean of 70%"]),
    "90% FP4": ("76%, then 84%", ["ours 90%", "ours, mean of 90%"]),
    "100% FP4": ("45%, then 55%", ["ours 100%"]),
}
"""Goals in KL gap recovered, and the rows of which the better one counts."""

Facts = dict[str, Any]


def kind_of(name: str) -> str:
    return next((kind for kind in KINDS if kind in name), "ours")


def mean_bits(row: Facts) -> float:
    """Of a weight and of an activation value; with its flag where formats are chosen online."""
    activations = stream_bits(row["fp4_activations"])
    if kind_of(row["name"]) not in ("ours", "paper") or row["fp4_activations"] == 1:
        activations -= FLAG_BITS
    return (row["bits_per_weight"] + activations) / 2


def results() -> dict[str, Facts]:
    """What there is, by model, in the order of the tables."""
    files = {model: DOCS / "results" / f"accuracy-{model}.json" for model in MODELS}
    return {model: json.loads(f.read_text()) for model, f in files.items() if f.exists()}


def results_beside() -> dict[str, Facts]:
    """What other scripts found, by file."""
    names = ("encoder", "budgets-babyllama105", "kv-wiki5m", "kv-babyllama105")
    return {name: json.loads((DOCS / "results" / f"{name}.json").read_text()) for name in names}


def table(facts: Facts) -> list[str]:
    """What a user would choose from, of one model, and what it was made with."""
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


def goals(found: dict[str, Facts], encoder: Facts) -> list[str]:
    """What was reached of the project's goals, by model; of the encoder, in drift.

    A cell is empty where a model lacks the rows.
    """
    rows = [{row["name"]: row for row in facts["rows"]} for facts in found.values()]

    def recovered(row: Facts, names: Iterable[str]) -> list[float]:
        return [row[name]["kl_gap_recovered_percent"] for name in names if name in row]

    header = ["", "goal", *(MODELS[model] for model in found), "encoder"]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    drift = {row["name"]: row["gap_recovered_percent"] for row in encoder["rows"]}
    for share, (goal, names) in GOALS.items():
        cells = [_best(recovered(row, names)) for row in rows]
        cells.append(_best(drift[name] for name in names if name in drift))
        lines.append(f"| {share} | {goal} | {' | '.join(cells)} |")
        cells = [_best(recovered(row, [f"{name}, tuned" for name in names])) for row in rows]
        if any(cells):
            lines.append(f"| {share}, tuned | {goal} | {' | '.join(cells)} | |")
    for bits in ("5.4", "6.0"):
        rivals = [f"ours at {bits} bits", f"autoquantize {bits} bits"]
        left = [[100 - share for share in recovered(row, rivals)] for row in rows]
        label = f"gap left at {bits} bits over that of AutoQuantize's rule"
        cells = [f"{pair[0] / pair[1]:.2f}" if len(pair) == 2 else "" for pair in left]
        lines.append(f"| {label} | 0.5, then 0.25 | {' | '.join(cells)} | |")
    points = [recovered(row, ["ours 100%", "nvfp4, four over six"]) for row in rows]
    cells = [f"{pair[0] - pair[1]:+.1f}" if len(pair) == 2 else "" for pair in points]
    lines.append(f"| all FP4, points over Four Over Six | 0, then more | {' | '.join(cells)} | |")
    return lines


def _best(shares: Iterable[float]) -> str:
    best = max(shares, default=None)
    return "" if best is None else f"{best:.1f}%"


def ablations(found: dict[str, Facts]) -> list[str]:
    """KL gap recovered by row and model, and the points over the row that it changes."""
    found = {
        model: facts
        for model, facts in found.items()
        if any(row["name"] in ABLATIONS for row in facts["rows"])
    }
    rows = [{row["name"]: row for row in facts["rows"]} for facts in found.values()]
    lines = _header("row", found)
    seeds = [{str(row["seeds"]) for name, row in r.items() if name in ABLATIONS} for r in rows]
    lines.append(f"| calibrations | {' | '.join(' or '.join(sorted(s)) for s in seeds)} |")
    for name in ABLATIONS:
        cells = [_with_points(r[name], whole(name)) if name in r else "" for r in rows]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _with_points(row: Facts, whole: str) -> str:
    share = f"{row['kl_gap_recovered_percent']:.1f}%"
    over = row["kl_gap_recovered_points_over"].get(whole)
    return f"{share}, {_points(over)}" if over else share


def _points(over: Facts) -> str:
    low, high = over["ci95"]
    return f"{over['points']:+.1f} ({low:+.1f} to {high:+.1f})"


def versus(found: dict[str, Facts]) -> list[str]:
    """Points of KL gap by which rows lie over others, with paired intervals."""
    over: dict[tuple[str, str], list[str]] = {}
    for index, facts in enumerate(found.values()):
        for row in facts["rows"]:
            for other, by in row["kl_gap_recovered_points_over"].items():
                if row["name"] in ROWS:
                    cells = over.setdefault((row["name"], other), [""] * len(found))
                    cells[index] = _points(by)
    lines = _header("row, and over which", found)
    for (name, other), cells in over.items():
        lines.append(f"| {name}, over {other} | " + " | ".join(cells) + " |")
    return lines


def _header(first: str, found: dict[str, Facts]) -> list[str]:
    columns = [first, *(MODELS[model] for model in found)]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def encoder(facts: Facts) -> list[str]:
    """Drift of the encoder's embeddings, as ``runs/encoder.py`` has it."""
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
    """What each budget comes to, as ``runs/budgets.py`` has it."""
    lines = [
        "| option | bits of the formats | FP4 weights | FP4 activations | bytes of tensors | KL "
        "| KL of all NVFP4 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        name, _, value = row["budget"].partition("=")
        result = row["result"]
        kl = result["uniform"]["held_out_kl"]
        nvfp4, (own,) = kl["nvfp4"], [kl[name] for name in kl if name != "nvfp4"]
        lines.append(
            f"| `--{name.replace('_', '-')} {value}` | {result['budget']['bits']:.3f} "
            f"| {result['fp4_weights']:.1%} | {result['fp4_activations']:.1%} "
            f"| {result['tensor_bytes']:,} | {own:.4f} | {nvfp4:.3f} |"
        )
    return lines


def filled(text: str, found: dict[str, Facts], others: dict[str, Facts]) -> str:
    """``text`` with every marked table as the results have it.

    Args:
        text: the page.
        found: accuracy by model, of :func:`results`.
        others: what other scripts found, of :func:`results_beside`.

    Raises:
        KeyError: no table is called so.
    """
    tables = {
        "goals": goals(found, others["encoder"]),
        **{f"accuracy-{model}": table(facts) for model, facts in found.items()},
        "versus": versus(found),
        "ablations": ablations(found),
        "encoder": encoder(others["encoder"]),
        "budgets": budgets(others["budgets-babyllama105"]),
        **{name: kv_cache.table(others[name]) for name in ("kv-wiki5m", "kv-babyllama105")},
    }

    def fill(place: re.Match[str]) -> str:
        return "\n".join([f"<!-- {place[1]} -->", *tables[place[1]], "<!-- end -->"])

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def plot(model: str, facts: Facts) -> str:
    """An SVG of what a user would choose from."""
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
        f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 10}" text-anchor="middle">mean of the bits '
        f"of a weight and of an activation value ({MODELS[model]})</text>"
        f'<text x="14" y="{HEIGHT / 2}" transform="rotate(-90 14 {HEIGHT / 2})" '
        'text-anchor="middle">KL gap recovered</text>'
    )
    for row in rows:
        colour, at = KINDS[kind_of(row["name"])], (x(mean_bits(row)), row)
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
    found = results()
    for model, facts in found.items():
        (DOCS / "results" / f"accuracy-{model}.svg").write_text(plot(model, facts))
    page = DOCS / "results.md"
    page.write_text(filled(page.read_text(), found, results_beside()))


if __name__ == "__main__":
    sys.exit(main())
