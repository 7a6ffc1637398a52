"""One page that shows a quantized model: the comparison, where the bits went, what was done.

A self-contained HTML file, figures as inline SVG, light and dark. It renders numbers that others
computed and computes none.
"""

import json
from html import escape
from pathlib import Path
from typing import Any

from fgmp.app.records import QuantizeSummary, inspection_lines
from fgmp.evaluation.compare import Row, table
from fgmp.evaluation.inspect import Inspection

_STYLE = """
:root { --ink: #1a1c20; --soft: #6b7280; --line: #e3e5e9; --page: #fff; --four: #8fb8de;
        --eight: #d9603b; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --soft: #9aa0a8; --line: #33373d; --page: #16181b; --four: #3f6b94;
          --eight: #e8794f; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
       max-width: 62rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem }
p.lead { color: var(--soft); margin-top: 0 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line);
         white-space: nowrap }
th { color: var(--soft); font-weight: 500 } th:first-child, td:first-child { text-align: left }
tr.ours td { font-weight: 650 }
svg text { fill: var(--ink); font-size: 12px } .soft { fill: var(--soft) }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem }
dt { color: var(--soft) } dd { margin: 0 }
.key span { display: inline-block; width: .8em; height: .8em; margin: 0 .35em 0 1em }
"""


def write_report(
    path: Path,
    title: str,
    rows: list[Row],
    summary: QuantizeSummary,
    inspection: Inspection,
) -> None:
    """Write the page.

    Args:
        path: HTML file to write.
        title: heading.
        rows: from ``fgmp.evaluation.compare``.
        summary: summary of the quantizing run.
        inspection: inspection of its checkpoint.
    """
    ours = next(row for row in rows if row.name == "fgmp")
    shares = inspection.fp8_share
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="lead">{escape(_headline(ours))}</p>
<h2>Side by side</h2>
<div class="scroll">{_table(rows)}</div>
<p class="lead">KL is the mean token divergence from the original model; the gap is all-NVFP4
minus all-FP8. Intervals are paired bootstraps over evaluation windows.</p>
<h2>Fraction of FP8 blocks</h2>
<p class="key soft"><span style="background:var(--eight)"></span>FP8
<span style="background:var(--four)"></span>NVFP4</p>
<div class="scroll">{_bars("weights, by kind of layer", shares.by_kind)}
{_bars("weights, by layer", shares.by_layer)}
{_bars("activations, by site", shares.activations_by_site)}</div>
<h2>What was done</h2>
{_facts(summary, inspection)}
<script type="application/json" id="rows">{_json([row.to_dict() for row in rows])}</script>
</body></html>
"""
    path.write_text(page, encoding="utf-8")


def _headline(ours: Row) -> str:
    parts = [
        f"{ours.bits_per_weight:.2f} bits per weight, {ours.bits_per_activation:.2f} bits per "
        f"activation, perplexity {ours.vs_fp8_percent:+.2f}% relative to all-FP8"
    ]
    if ours.kl_gap_recovered_percent is not None:
        parts.append(f"{ours.kl_gap_recovered_percent:.0f}% of the KL gap to NVFP4 recovered")
    return "; ".join(parts) + "."


def _table(rows: list[Row]) -> str:
    header, *lines = table(rows)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        f'<tr class="{"ours" if line[0] == "fgmp" else ""}">'
        + "".join(f"<td>{escape(cell)}</td>" for cell in line)
        + "</tr>"
        for line in lines
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _bars(title: str, shares: dict[str, float]) -> str:
    """Horizontal bars, one per name: the FP8 fraction, then NVFP4."""
    label, width, step = 300, 420, 20
    height = step * (len(shares) + 1) + 12
    drawn = [f'<text x="0" y="14" class="soft">{escape(title)}</text>']
    for i, (name, share) in enumerate(shares.items(), start=1):
        y = i * step
        drawn.append(
            f'<text x="{label - 10}" y="{y + 14}" text-anchor="end">{escape(name)}</text>'
            f'<rect x="{label}" y="{y + 3}" width="{width}" height="14" fill="var(--four)"/>'
            f'<rect x="{label}" y="{y + 3}" width="{width * share:.1f}" height="14" '
            'fill="var(--eight)"/>'
            f'<text x="{label + width + 8}" y="{y + 14}" class="soft">{share:.1%}</text>'
        )
    return (
        f'<svg viewBox="0 0 {label + width + 70} {height}" width="{label + width + 70}" '
        f'height="{height}" role="img" aria-label="{escape(title)}">{"".join(drawn)}</svg>'
    )


def _facts(summary: QuantizeSummary, inspection: Inspection) -> str:
    """Labelled lines of the run and of the checkpoint, with the recipe's policy and calibration."""
    calibration = inspection.calibration
    lines = {
        **summary.lines(),
        **inspection_lines(inspection),
        "policy": str(inspection.recipe.get("policy")),
        "calibration": f"{calibration.get('sequences')} sequences of "
        f"{calibration.get('seq_len')} tokens",
    }
    items = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in lines.items())
    return f"<dl>{items}</dl>"


def _json(value: Any) -> str:
    return json.dumps(value).replace("</", "<\\/")
