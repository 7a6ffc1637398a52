"""What room above the largest calibrated activation buys at contexts longer than calibration's.

    python runs/headroom.py MODEL --data TEXT [--calib TEXT] [--calibrated 64] [--json]

Calibrates on windows of ``--calibrated`` tokens, quantizes with the default recipe once for each
``headroom``, and evaluates the same text in windows of that length and of the model's context.
For each it prints JSON: elements that saturated, in a million; the mean token KL from the original;
and how much that is above ``headroom: 1``'s on the same windows, with a 95% bootstrap interval.
``largest_over_calibrated`` is the headroom that the original's activations ask for. If no other
text is given to calibrate on, that takes the first half of the windows and evaluation the second.
"""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import torch
from accuracy import Measured, Setting, measure
from bootstrap import Draws, interval
from provenance import provenance
from rich.console import Console
from torch import Tensor, nn

from fgmp import calibration_text, evaluation_windows
from fgmp.data import choose_windows
from fgmp.evaluation.compare import saturated_elements
from fgmp.evaluation.perplexity import batches, logits_of
from fgmp.formats.spec import E4M3
from fgmp.model.linear import sites
from fgmp.model.select import linearize
from fgmp.model.source import context_length, load_tokenizer

HEADROOMS = (1.0, 1.25, 1.5, 2.0)


def largest_over_calibrated(setting: Setting, windows: Tensor) -> float:
    """Of the original's activations, over all sites."""
    limits = {owner: E4M3.max / site.record.r for owner, site in sites(setting.base).items()}
    largest = dict.fromkeys(limits, 0.0)
    model = setting.load()
    linearize(model)

    def see(owner: str, _: nn.Module, args: tuple[Tensor]) -> None:
        largest[owner] = max(largest[owner], args[0].to(torch.bfloat16).abs().max().item())

    for owner in limits:
        model.get_submodule(owner).register_forward_pre_hook(partial(see, owner))
    with torch.no_grad():
        for batch in batches(windows):
            logits_of(model.eval(), batch)
    return max(largest[owner] / limits[owner] for owner in limits)


def rows_of(
    setting: Setting, windows: Tensor, headrooms: tuple[float, ...] = HEADROOMS
) -> list[dict[str, object]]:
    """One row a headroom and window length; ``windows`` (B, L) are those of the longer one."""
    original = setting.load().eval()
    models = {headroom: setting.quantized(headroom=headroom) for headroom in headrooms}
    rows: list[dict[str, object]] = []
    for length in sorted({setting.seq_len, windows.shape[1]}):
        cut = windows.flatten().unfold(0, length, length)
        reference = [logits_of(original, batch) for batch in batches(cut)]
        needed = largest_over_calibrated(setting, cut)
        plain: Measured | None = None
        for headroom, model in models.items():
            found = measure(model, reference, cut)
            plain = plain or found
            values = sum(16 * site.counts[1] for site in sites(model).values())
            more = (found.kl - plain.kl) / (length - 1)
            rows.append(
                {
                    "length": length,
                    "headroom": headroom,
                    "largest_over_calibrated": needed,
                    "saturated_per_million": 1e6 * saturated_elements(model) / values,
                    "kl": found.kl.mean().item() / (length - 1),
                    "kl_over_plain": more.mean().item(),
                    "kl_over_plain_ci95": interval(Draws(len(cut), 1).means([more])),
                    "fp4_activations": found.fp4_activations,
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--calib", help="default: DATA, halved")
    parser.add_argument("--calibrated", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--windows", type=int, help="evaluate on the first so many only")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    console, tokenizer = Console(stderr=True), load_tokenizer(args.model)
    setting = Setting(args.model, None, args.calibrated, 0, Path(), console)  # type: ignore[arg-type]
    context = context_length(setting.load())
    if context % args.calibrated:
        parser.error(f"--calibrated must divide the context, {context}")
    windows = evaluation_windows(args.data, tokenizer, context)
    chosen = {"samples": args.samples, "seq_len": args.calibrated, "seed": 0}
    if args.calib in (None, args.data):
        half = len(windows) // 2
        first, windows = windows[:half], windows[half:]
        setting.text = choose_windows(first.flatten(), **chosen, source=args.data)
    else:
        setting.text = calibration_text(args.calib, tokenizer, **chosen)
    setting.state = args.cache / f"{setting.text.fingerprint[:8]}.headroom.safetensors"
    rows = rows_of(setting, windows[: args.windows])
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(setting.text.samples),
        "calibrated_length": args.calibrated,
        **provenance(),
        "rows": rows,
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    print("| length | headroom | saturated a million | KL | over headroom 1 | FP4 act |")
    print("|---" * 6 + "|")
    for row in rows:
        low, high = row["kl_over_plain_ci95"]
        print(
            f"| {row['length']} | {row['headroom']} | {row['saturated_per_million']:.2f} "
            f"| {row['kl']:.5f} | {row['kl_over_plain']:+.5f} ({low:+.5f} to {high:+.5f}) "
            f"| {row['fp4_activations']:.1%} |"
        )


if __name__ == "__main__":
    sys.exit(main())
