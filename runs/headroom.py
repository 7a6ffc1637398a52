"""Headroom above the largest calibrated activation, at contexts longer than calibration's.

    python runs/headroom.py MODEL --data TEXT [--calib TEXT] [--calibrated 64] [--json]

Calibrates on windows of ``--calibrated`` tokens, quantizes by the default recipe once per
``headroom``, and evaluates the same text in windows of that length and of the model's context.
Prints for each of them

* the elements that saturate, per million;
* the mean token KL from the original;
* that KL less the KL of ``headroom: 1`` on the same windows, with a 95% bootstrap interval.

``largest_over_calibrated`` is the headroom that the original's activations need. Without another
text to calibrate on, calibration takes the first half of the windows and evaluation the second.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from bootstrap import Draws, interval
from measuring import Measured, measure
from provenance import provenance
from rich.console import Console
from setting import Setting
from torch import Tensor

from fgmp import calibration_text, evaluation_windows
from fgmp.data import choose_windows
from fgmp.errors import FGMPError, InputError
from fgmp.evaluation.compare import saturated_elements
from fgmp.evaluation.perplexity import batches, next_token_log_probabilities
from fgmp.formats.spec import BLOCK, E4M3
from fgmp.model.linear import sites
from fgmp.model.observe import observed_inputs
from fgmp.model.select import linearize
from fgmp.model.source import context_length, load_model, load_tokenizer

HEADROOMS = (1.0, 1.25, 1.5, 2.0)


def largest_over_calibrated(setting: Setting, windows: Tensor) -> float:
    """Largest activation of the original over the largest calibrated one, over all sites."""
    limits = {owner: E4M3.max / site.record.r for owner, site in sites(setting.base).items()}
    largest = dict.fromkeys(limits, 0.0)
    model = setting.load()
    linearize(model)

    def observe(owner: str, x: Tensor) -> None:
        largest[owner] = max(largest[owner], x.to(torch.bfloat16).abs().max().item())

    with observed_inputs(model, limits, observe):
        for batch in batches(windows):
            next_token_log_probabilities(model.eval(), batch)
    return max(largest[owner] / limits[owner] for owner in limits)


def rows_of(
    setting: Setting, windows: Tensor, headrooms: tuple[float, ...] = HEADROOMS
) -> list[dict[str, Any]]:
    """Measure every headroom at both window lengths.

    Args:
        setting: its ``seq_len`` is the shorter length.
        windows: int64 (B, L), of the longer length.
        headrooms: 1 first.
    """
    original = setting.load().eval()
    models = {headroom: setting.quantized(headroom=headroom) for headroom in headrooms}
    rows: list[dict[str, Any]] = []
    for length in sorted({setting.seq_len, windows.shape[1]}):
        cut = windows.flatten().unfold(0, length, length)
        reference = [next_token_log_probabilities(original, batch) for batch in batches(cut)]
        needed = largest_over_calibrated(setting, cut)
        plain: Measured | None = None
        for headroom, model in models.items():
            measured = measure(model, reference, cut)
            plain = plain or measured
            values = sum(BLOCK * site.counts[1] for site in sites(model).values())
            more = (measured.kl - plain.kl) / (length - 1)
            rows.append(
                {
                    "length": length,
                    "headroom": headroom,
                    "largest_over_calibrated": needed,
                    "saturated_per_million": 1e6 * saturated_elements(model) / values,
                    "kl": measured.kl.mean().item() / (length - 1),
                    "kl_over_plain": more.mean().item(),
                    "kl_over_plain_ci95": interval(Draws(len(cut), 1).means([more])),
                    "fp4_activations": measured.fp4_activations,
                }
            )
    return rows


def setting_and_windows(args: argparse.Namespace) -> tuple[Setting, Tensor]:
    """Calibration on short windows, and evaluation windows of the model's context, int64 (B, L).

    Raises:
        InputError: the context is no multiple of the calibrated length.
    """
    context = context_length(load_model(args.model))
    if context % args.calibrated:
        raise InputError(f"--calibrated must divide the context, {context}")
    tokenizer = load_tokenizer(args.model)
    windows = evaluation_windows(args.data, tokenizer, context, bos=False)
    options = {"samples": args.samples, "seq_len": args.calibrated, "seed": 0}
    if args.calib in (None, args.data):
        half = len(windows) // 2
        first, windows = windows[:half], windows[half:]
        text = choose_windows(first.flatten(), **options, source=args.data)
    else:
        text = calibration_text(args.calib, tokenizer, **options, bos=False)
    stem = args.cache / f"{text.fingerprint[:8]}-{Path(args.model).name}-headroom"
    console = Console(stderr=True)
    setting = Setting(args.model, text, args.calibrated, 0, stem, console)
    return setting, windows[: args.windows]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| length | headroom | saturated per million | KL | over headroom 1 | FP4 act |"]
    lines.append("|---" * 6 + "|")
    for row in rows:
        low, high = row["kl_over_plain_ci95"]
        lines.append(
            f"| {row['length']} | {row['headroom']} | {row['saturated_per_million']:.2f} "
            f"| {row['kl']:.5f} | {row['kl_over_plain']:+.5f} ({low:+.5f} to {high:+.5f}) "
            f"| {row['fp4_activations']:.1%} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", help="default: DATA, halved")
    parser.add_argument("--calibrated", type=int, default=64, help="tokens per sequence")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    setting, windows = setting_and_windows(args)
    rows = rows_of(setting, windows)
    if not args.json:
        print(table(rows))
        return
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(setting.text.samples),
        "calibrated_length": args.calibrated,
        **provenance(),
        "rows": rows,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
