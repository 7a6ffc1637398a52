"""Tables and plots of docs/results.md, from what ``runs/accuracy.py --json`` wrote.

    python runs/figures.py docs/results/accuracy-*.json

Prints a Markdown table for each file, one of the paired differences and one of the ablations, and
draws ``<file>.svg`` beside each: KL gap recovered over the mean of the bits of a weight and of an
activation value, with 95% intervals. It computes no result.
"""

import json
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from accuracy import ABLATIONS, ROWS

from fgmp.evaluation.compare import activation_bits

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 720, 420, 60, 48, 16, 16
KINDS = {
    "ours": "#0b6e4f",
    "paper": "#c46210",
    "autoquantize": "#7b2d8b",
    "nvfp4": "#1f4e9c",
    "fp8": "#1f4e9c",
    "by channel": "#777777",
}


def kind_of(name: str) -> str:
    return next((kind for kind in KINDS if kind in name), "ours")


def mean_bits(row: dict[str, Any]) -> float:
    """Of a weight and of an activation value."""
    return (row["bits_per_weight"] + activation_bits(row["name"], row["fp4_activations"])) / 2


def table(facts: dict[str, Any], names: Collection[str]) -> list[str]:
    """The rows of one model that every seed has."""
    lines = [
        "| row | bits/w | FP4 act | perplexity | KL | KL gap recovered | by seed | 95% interval |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in facts["rows"]:
        if row["name"] in names:
            low, high = row["kl_gap_recovered_ci95"]
            seeds = row["kl_gap_recovered_by_seed"]
            lines.append(
                f"| {row['name']} | {row['bits_per_weight']:.2f} | {row['fp4_activations']:.1%} "
                f"| {row['perplexity']:.3f} | {row['kl']:.5f} "
                f"| {row['kl_gap_recovered_percent']:.1f}% | {min(seeds):.1f} - {max(seeds):.1f} "
                f"| {low:.1f} - {high:.1f} |"
            )
    return lines


def across(found: list[dict[str, Any]], names: Iterable[str]) -> list[str]:
    """KL gap recovered by row and model."""
    rows = [{row["name"]: row for row in facts["rows"]} for facts in found]
    lines = _header("row", found)
    for name in names:
        cells = [f"{r[name]['kl_gap_recovered_percent']:.1f}%" if name in r else "" for r in rows]
        if any(cells):
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def versus(found: list[dict[str, Any]]) -> list[str]:
    """Points of KL gap by which rows lie over others, with paired intervals."""
    over: dict[tuple[str, str], list[str]] = {}
    for index, facts in enumerate(found):
        for row in facts["rows"]:
            for other, by in row.get("kl_gap_recovered_points_over", {}).items():
                cells = over.setdefault((row["name"], other), [""] * len(found))
                low, high = by["ci95"]
                cells[index] = f"{by['points']:+.1f} ({low:+.1f} to {high:+.1f})"
    lines = _header("row, and over which", found)
    for (name, other), cells in over.items():
        lines.append(f"| {name}, over {other} | " + " | ".join(cells) + " |")
    return lines


def _header(first: str, found: list[dict[str, Any]]) -> list[str]:
    columns = [first, *(facts["model"] for facts in found)]
    return ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]


def plot(facts: dict[str, Any]) -> str:
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
        f"of a weight and of an activation value ({facts['model']})</text>"
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
    found = [json.loads(Path(name).read_text()) for name in sys.argv[1:]]
    for name, facts in zip(sys.argv[1:], found, strict=True):
        Path(name).with_suffix(".svg").write_text(plot(facts))
        print(f"## {facts['model']}\n")
        print("\n".join(table(facts, ROWS)))
        print(
            f"\n{facts['calibration_sequences']} calibration sequences of {facts['seq_len']} "
            f"tokens, {facts['evaluation_tokens']:,} evaluation tokens, {facts['seeds']} "
            f"calibration seeds, torch {facts['torch']}, "
            f"revision {facts.get('revision', 'unknown')}.\n"
        )
    print("\n".join(["## Differences", "", *versus(found), ""]))
    print("\n".join(["## Ablations", "", *across(found, ABLATIONS)]))


if __name__ == "__main__":
    main()
