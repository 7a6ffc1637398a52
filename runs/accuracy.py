"""Accuracy per bit: this package, the paper's method and the baselines side by side.

    python runs/accuracy.py MODEL --calib TEXT --data TEXT [--seeds 3] [--rows-of FILE] [--json]

All rows see the same model, calibration text and evaluation windows. Bits are counted from the
bytes of packed planes. ``kl`` is the mean token KL divergence from the original. A model's *gap* is
the KL of all-NVFP4 less that of all-FP8, and ``kl_gap_recovered_percent`` is the share of it that a
row closes. The 95% interval is a bootstrap over windows and calibrations, paired across all rows,
of the mean over ``--seeds`` calibrations. A row is better or worse than one it is compared with
(``rows.VERSUS``) if the interval of their difference excludes zero.

Losses by window are cached in a folder, so an interrupted run resumes and a known row costs
nothing; each row says which code measured it. If both texts are the same file, calibration takes
windows of its first half and evaluation those of its second.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measuring import Measured, Original, measure
from provenance import provenance
from rich.console import Console
from rows import ABLATIONS, ROWS, VERSUS
from setting import Setting
from summary import UNIFORM, summarize
from torch import Tensor, nn
from transformers.utils import logging

from fgmp import calibration_text, evaluation_windows
from fgmp.data import CalibrationText, choose_windows, overlap
from fgmp.errors import FGMPError, InputError
from fgmp.model.source import context_length, load_model, load_tokenizer


@dataclass(frozen=True, eq=False)
class Texts:
    """Calibration and evaluation text of a run.

    Attributes:
        tokenizer: the model's.
        seq_len: tokens per window.
        windows: evaluation windows, int64 (B, L).
        calib: name of the calibration text.
        calib_windows: its windows, where it is a part of the evaluation text; None: read ``calib``.
    """

    tokenizer: Any
    seq_len: int
    windows: Tensor
    calib: str
    calib_windows: Tensor | None

    def calibration(self, samples: int, seed: int) -> CalibrationText:
        """Calibration text of a seed."""
        options = {"samples": samples, "seq_len": self.seq_len, "seed": seed}
        if self.calib_windows is None:
            return calibration_text(self.calib, self.tokenizer, **options, bos=False)
        return choose_windows(self.calib_windows.flatten(), **options, source=self.calib)


def read_texts(args: argparse.Namespace, original: nn.Module) -> Texts:
    """Read the evaluation text; halve it where it is the calibration text, too."""
    tokenizer = load_tokenizer(args.model)
    seq_len = args.seq_len or min(512, context_length(original))
    windows, first = evaluation_windows(args.data, tokenizer, seq_len, bos=False), None
    calib = args.calib or args.data
    if calib == args.data:
        half = len(windows) // 2
        first, windows = windows[:half], windows[half:]
    return Texts(tokenizer, seq_len, windows[: args.windows], calib, first)


def names_of(args: argparse.Namespace) -> list[str]:
    """Names of the rows to measure, in the order of the table; the two uniform rows always.

    Raises:
        InputError: an unknown name, or a file that does not list rows.
    """
    rows = ROWS | ABLATIONS
    names = args.only.split(";") if args.only else list(rows)
    if args.rows_of:
        try:
            names = [row["name"] for row in json.loads(args.rows_of.read_text())["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--rows-of {args.rows_of}: no JSON of this script: {error!r}"
            ) from error
    if unknown := set(names) - set(rows):
        raise InputError(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    return [name for name in rows if name in names or name in UNIFORM]


def cache_key(original: nn.Module, text: CalibrationText, windows: Tensor) -> str:
    """Digest of the weights, the calibration text and the evaluation windows."""
    weights = hashlib.sha256(repr([p.sum().item() for p in original.parameters()]).encode())
    evaluated = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    return f"{weights.hexdigest()[:8]}-{text.fingerprint[:8]}-{evaluated[:8]}"


def measured_rows(
    names: Sequence[str], setting: Setting, reference: Original, windows: Tensor
) -> dict[str, Measured]:
    """Measure rows on one calibration, or read what the cache has of them."""
    rows, measured = ROWS | ABLATIONS, {}
    for name in names:
        file = row_file(setting, name)
        if not file.exists():
            setting.console.rule(f"{name}, seed {setting.seed}")
            torch.save(vars(measure(rows[name](setting), reference, windows)), file)
        measured[name] = Measured(**torch.load(file))
    return measured


def row_file(setting: Setting, name: str) -> Path:
    """File that caches a row."""
    label = name.replace(" ", "_").replace("%", "")
    return setting.stem.with_name(f"{setting.stem.name}-{label}.pt")


def run(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """Measure rows over all calibrations and summarize them."""
    console = Console(stderr=True)
    args.cache.mkdir(parents=True, exist_ok=True)
    original = load_model(args.model)
    texts = read_texts(args, original)
    windows, reference = texts.windows, Original(original, texts.windows)
    measured: dict[str, list[Measured]] = {name: [] for name in names}
    for seed in range(args.seeds):
        text = texts.calibration(args.samples, seed)
        if share := overlap(text.samples, windows):
            console.print(f"warning: {share:.1%} of the evaluation windows repeat calibration text")
        stem = args.cache / cache_key(original, text, windows)
        setting = Setting(args.model, text, texts.seq_len, seed, stem, console)
        for name, row in measured_rows(names, setting, reference, windows).items():
            measured[name].append(row)
    predictions = windows.shape[1] - 1
    return {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "seq_len": texts.seq_len,
        "seeds": args.seeds,
        "evaluation_tokens": windows.shape[0] * predictions,
        **provenance(),
        "rows": summarize(measured, reference.losses, predictions, VERSUS),
    }


def table(facts: dict[str, Any]) -> str:
    """The rows as a Markdown table."""
    columns = "| row | seeds | bits/w | FP4 act | perplexity | KL | KL gap recovered | interval |"
    lines = [columns, "|---" * 8 + "|"]
    for row in facts["rows"]:
        low, high = row["kl_gap_recovered_ci95"]
        lines.append(
            f"| {row['name']} | {row['seeds']} | {row['bits_per_weight']:.2f} "
            f"| {row['fp4_activations']:.1%} | {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {row['kl_gap_recovered_percent']:.1f}% | {low:.1f} - {high:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", help="default: DATA, halved")
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--seeds", type=int, default=1, help="calibrations to average over")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--only", help="names of rows, separated by semicolons")
    which.add_argument("--rows-of", type=Path, help="JSON of this script; measures its rows")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    for name in ("windows", "seeds"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name} must be 1 or more, got {value}")
    try:
        names = names_of(args)
    except InputError as error:
        parser.error(str(error))
    logging.disable_progress_bar()
    facts = run(args, names)
    print(json.dumps(facts, indent=1) if args.json else table(facts))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
