"""What every bit buys: this package and what a user would choose instead, in one harness.

    python runs/accuracy.py MODEL --calib TEXT --data TEXT [--seeds 3] [--rows-of FILE] [--json]

All rows see the same model, calibration text and evaluation windows. Bits are counted from the
bytes of packed planes. ``kl`` is the mean token KL from the original; a model's *gap* is that of
all-NVFP4 less that of all-FP8, and ``kl_gap_recovered_percent`` says how much of it a row closes,
with a 95% interval by a bootstrap over windows and calibrations, paired across all rows, of the
mean over calibrations, of which ``--seeds`` says how many. A row is better or worse than those it
is compared with (``VERSUS``) if the interval of the difference excludes zero. Losses by window are
cached under DIR, so an interrupted run goes on where it stopped and a row that is there already
costs nothing: each says which code made it. If both texts are the same file, calibration takes
windows of its first half and evaluation those of its second.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from unittest import mock

import baselines
import hessian
import sensitivity
import torch
import transforms
from bootstrap import Draws, interval, recovered
from provenance import provenance
from rich.console import Console
from torch import Tensor, nn
from transformers.utils import logging

from fgmp import Recipe, calibration_text, evaluation_windows, quantize
from fgmp.assign import weights
from fgmp.data import CalibrationText, choose_windows, overlap
from fgmp.errors import FGMPError, InputError
from fgmp.evaluation.compare import activation_fraction, start_counting, weight_bits
from fgmp.evaluation.perplexity import (
    batches,
    divergence_of,
    log_probabilities_of,
    logits_of,
    loss_of,
)
from fgmp.formats.spec import FP4_BITS, FP8_BITS
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.pipeline import uniform
from fgmp.progress import bars
from fgmp.recipe import PAPER

PLAIN = {**PAPER, "clip": "off"}

Row = Callable[["Setting"], nn.Module]


def recipe(**fields: object) -> Row:
    """A row that is a recipe of this package."""
    return lambda setting: setting.quantized(**fields)


def estimate(label: str, fp4: float) -> Row:
    """A row whose sensitivities are another estimate, of ``runs/sensitivity.py``."""
    return lambda setting: sensitivity.estimated(setting, label, fp4=fp4)


def by_local_hessian(fp4: float) -> Row:
    """A row whose weights take their scales by ``hessian.compensated``."""

    def made(setting: "Setting") -> nn.Module:
        with mock.patch.object(weights, "compensated", hessian.compensated):
            return setting.quantized(fp4=fp4)

    return made


def transformed(change: Callable[[nn.Module, Tensor], nn.Module], **fields: object) -> Row:
    """A row that is a recipe on a model whose weights were transformed before."""
    return lambda setting: setting.quantized(change, **fields)


def stream(fp4: float) -> float:
    """Bits a value of this share of FP4 blocks: what ``Recipe.bits`` counts."""
    return FP8_BITS - fp4 * (FP8_BITS - FP4_BITS)


def ends(policy: str, fp4: float) -> Row:
    """A uniform row, rounded to nearest."""
    return lambda setting: uniform(setting.load(), setting.base, policy, fp4)


TRANSFORMS = {
    "scales migrated": transforms.migrate,
    "channels sorted": transforms.reorder,
    "rotated": transforms.rotate,
    "blocks rotated": transforms.rotate_blocks,
}

ROWS: dict[str, Row] = {
    "fp8": ends("fp8", 0.0),
    "nvfp4": ends("nvfp4", 1.0),
    "paper 70%": recipe(fp4=0.7, **PAPER),
    "paper 90%": recipe(fp4=0.9, **PAPER),
    "ours 70%": recipe(fp4=0.7),
    "ours 90%": recipe(fp4=0.9),
    "ours 100%": recipe(fp4=1.0),
    "ours, mean of 70%": recipe(bits=stream(0.7)),
    "ours, mean of 90%": recipe(bits=stream(0.9)),
    "autoquantize 5.4 bits": lambda s: baselines.autoquantize(s, 5.4),
    "ours at 5.4 bits": lambda s: baselines.at_bits(s, 5.4),
    "autoquantize 6.0 bits": lambda s: baselines.autoquantize(s, 6.0),
    "ours at 6.0 bits": lambda s: baselines.at_bits(s, 6.0),
    "nvfp4, MSE scales": recipe(fp4=1.0, policy="error", **PAPER),
    "nvfp4, four over six": baselines.four_over_six,
    "nvfp4, GPTQ": baselines.gptq,
    "70% by channel": lambda s: baselines.by_channel(s, 0.7),
    "90% by channel": lambda s: baselines.by_channel(s, 0.9),
}
"""What a user would choose from, by name."""

PASSES = 10
TUNED: dict[str, dict[str, float]] = {
    "ours 100%": {"fp4": 1.0},
    "ours, mean of 70%": {"bits": stream(0.7)},
    "ours, mean of 90%": {"bits": stream(0.9)},
}
"""Rows that are made again with what is not quantized tuned by so many passes."""

ABLATIONS: dict[str, Row] = {
    "ours 85% weights, 55% activations": recipe(fp4=0.85, fp4_activations=0.55),
    "ours 70%, no compensation": recipe(fp4=0.7, compensate=False),
    "ours 90%, no compensation": recipe(fp4=0.9, compensate=False),
    "ours 100%, no compensation": recipe(fp4=1.0, compensate=False),
    "ours 70%, factored Fisher": recipe(fp4=0.7, fisher="factored"),
    "ours 90%, factored Fisher": recipe(fp4=0.9, fisher="factored"),
    **{
        f"ours {share:.0%}, Fisher {label}": estimate(label, share)
        for label in ("by token", "at the quantized point")
        for share in (0.7, 0.9)
    },
    "ours 70%, labels of the text": recipe(fp4=0.7, labels="text"),
    "ours 90%, labels of the text": recipe(fp4=0.9, labels="text"),
    "ours 100%, labels of the text": recipe(fp4=1.0, labels="text"),
    "ours, mean of 70%, labels of the text": recipe(bits=stream(0.7), labels="text"),
    "ours, mean of 90%, labels of the text": recipe(bits=stream(0.9), labels="text"),
    "ours 70%, rule difference": recipe(fp4=0.7, rule="difference"),
    "ours 70%, scales max": recipe(fp4=0.7, scales="max"),
    "ours 90%, scales max": recipe(fp4=0.9, scales="max"),
    "ours 70%, local Hessian": by_local_hessian(0.7),
    "ours 100%, local Hessian": by_local_hessian(1.0),
    "ours 70%, power-of-two sensitivities": recipe(fp4=0.7, sensitivities="powers"),
    "ours 70%, truncated squares": recipe(fp4=0.7, rule="truncated"),
    "ours 70%, no clipping": recipe(fp4=0.7, clip="off"),
    "ours 100% weights, FP8 activations": recipe(fp4=1.0, fp4_activations=0.0),
    "ours FP8 weights, 100% activations": recipe(fp4=0.0, fp4_activations=1.0),
    "paper 80%": recipe(fp4=0.8, **PAPER),
    **{
        f"paper {share:.0%}, {what}": recipe(fp4=share, **{**PAPER, **change})
        for what, change in {
            "no clipping": {"clip": "off"},
            "per layer": {"policy": "fisher-per-layer"},
            "no sensitivity": {"policy": "error"},
            "random": {"policy": "random"},
        }.items()
        for share in (0.7, 0.9)
    },
    "paper 70%, weights only": recipe(fp4=0.7, fp4_activations=0.0, **PAPER),
    "paper 70%, activations only": recipe(fp4=0.0, fp4_activations=0.7, **PAPER),
    "nvfp4 weights, FP8 activations": recipe(fp4=1.0, fp4_activations=0.0, **PLAIN),
    "FP8 weights, nvfp4 activations": recipe(fp4=0.0, fp4_activations=1.0, **PLAIN),
    **{
        f"ours {share:.0%}, {what}": transformed(change, fp4=share)
        for what, change in TRANSFORMS.items()
        for share in (0.7, 1.0)
    },
}
ABLATIONS |= {f"{name}, tuned": recipe(**fields, tune=PASSES) for name, fields in TUNED.items()}
"""What takes the method apart, and what tuning adds to it."""


def whole(ablation: str) -> str:
    """The row that an ablation changes, as its name says: what stands before the last comma."""
    return ablation.rpartition(",")[0]


VERSUS = {
    "ours 70%": ("paper 70%", "70% by channel"),
    "ours 90%": ("paper 90%", "90% by channel"),
    "ours 100%": ("nvfp4, four over six", "nvfp4, GPTQ", "nvfp4, MSE scales"),
    "ours, mean of 70%": ("ours 70%",),
    "ours, mean of 90%": ("ours 90%",),
    "ours at 5.4 bits": ("autoquantize 5.4 bits",),
    "ours at 6.0 bits": ("autoquantize 6.0 bits",),
    **{row: (whole(row),) for row in ABLATIONS if whole(row) in ROWS},
    "ours 100%, no compensation": ("ours 100%", "nvfp4, four over six"),
}
"""Rows that are compared window by window with others."""


@dataclass
class Setting:
    """One calibration of one model: what a row is made of.

    ``state`` names the files that keep its gradients, see :meth:`calibration`. ``reuse``: what they
    hold must be of this text and code; other is refused.
    """

    name: str
    text: CalibrationText
    seq_len: int
    seed: int
    state: Path
    console: Console
    reuse: bool = False

    def load(self) -> nn.Module:
        """The original model, anew."""
        return load_model(self.name)

    def quantized(
        self, change: Callable[[nn.Module, Tensor], nn.Module] | None = None, **fields: object
    ) -> nn.Module:
        """The model, ``change``d before if so asked, quantized by a recipe.

        Scales are searched unless ``fields`` say otherwise: rows must not differ by what a short
        held-out text happened to decide.
        """
        asked = {"clip": "on", "seq_len": self.seq_len, "seed": self.seed, **fields}
        recipe = Recipe(**asked)  # type: ignore[arg-type]
        model = self.load()
        if change is not None:
            model = change(model, self.text.samples)
        return quantize(
            model,
            self.text.samples,
            recipe,
            held_out=self.text.held_out,
            state=self.calibration(recipe, change.__name__ if change else None),
            reuse=self.reuse,
            progress=bars(self.console),
        )

    def calibration(self, recipe: Recipe, change: str | None = None) -> Path:
        """Where the gradients that this recipe asks for are kept."""
        kind = f"{change or 'plain'}-{recipe.fisher}-{recipe.labels}"
        return self.state.with_suffix(f".{kind}.safetensors")

    @cached_property
    def base(self) -> nn.Module:
        """A quantized model of which baselines take sites and activation scales; not to be run."""
        return self.quantized(**PLAIN)

    @cached_property
    def layer_scores(self) -> dict[str, dict[str, float]]:
        """What AutoQuantize's rule goes by, under any budget."""
        return baselines.layer_scores(baselines.Parts(self), self.text.samples)

    @cached_property
    def channel_harm(self) -> dict[str, Tensor]:
        """What sorts channels, for any share of them."""
        return baselines.channel_harm(baselines.Parts(self), self)


@dataclass(frozen=True)
class Measured:
    """Sums over each window, float64 (B,): loss and KL in nats; bits, FP4 share, whose code."""

    loss: Tensor
    kl: Tensor
    bits_per_weight: float
    fp4_activations: float
    revision: str


class Original:
    """The original's log-probabilities of windows, int64 (B, L), batch by batch, when asked.

    Kept are the inputs of its output head and not what comes out, which for a vocabulary of 49,152
    and a hundred thousand tokens would be 20 GB.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.head = model.get_output_embeddings()
        self.inputs: list[Tensor] = []
        keep = self.head.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
        losses = []
        for batch in batches(windows):
            log_probabilities = logits_of(model.eval(), batch)
            losses.append(loss_of(log_probabilities, batch))
            if len(losses) == 1 and not torch.equal(self._at(0), log_probabilities):
                raise InputError(f"{type(model).__name__}: logits must be what its head puts out")
        keep.remove()
        self.losses = torch.cat(losses)

    @torch.no_grad()
    def _at(self, batch: int) -> Tensor:
        logits: Tensor = self.head.forward(self.inputs[batch])  # past the hook above
        return log_probabilities_of(logits[:, :-1])

    def __iter__(self) -> Iterator[Tensor]:
        """fp32 (b, L - 1, V) of one batch after the other."""
        return (self._at(batch) for batch in range(len(self.inputs)))


@torch.no_grad()
def measure(model: nn.Module, reference: Iterable[Tensor], windows: Tensor) -> Measured:
    """Run the windows; ``reference`` gives the original's log-probabilities by batch."""
    start_counting(model)
    losses, divergences = [], []
    for batch, wanted in zip(batches(windows), reference, strict=True):
        own = logits_of(model.eval(), batch)
        losses.append(loss_of(own, batch))
        divergences.append(divergence_of(own, wanted))
    return Measured(
        torch.cat(losses),
        torch.cat(divergences),
        weight_bits(model),
        activation_fraction(model),
        provenance()["revision"],
    )


def rows_of(found: dict[str, list[Measured]], original: Tensor, predictions: int) -> list[dict]:
    """The table: means over the seeds of a row, and paired bootstrap intervals.

    A draw takes windows and, of a row with several, calibrations, both with replacement.

    Args:
        found: what each row measured, by seed; a row may have fewer seeds than another, and what
            it is compared with is then taken on its own seeds.
        original: losses of the original model, float64 (B,).
        predictions: in a window.
    """
    count = len(original)
    draws = Draws(count, max(map(len, found.values())))

    def drawn(values: list[Tensor]) -> Tensor:
        """Means (RESAMPLES,) of a value by window and calibration."""
        return draws.means(values) / predictions

    def share_of(name: str, seeds: int) -> tuple[float, Tensor]:
        rows = [[m.kl for m in found[n][:seeds]] for n in (name, "nvfp4", "fp8")]
        means = [torch.stack(row).mean() / predictions for row in rows]
        return recovered(*means).item(), recovered(*map(drawn, rows))

    def perplexity(name: str, seeds: int) -> float:
        loss = torch.stack([m.loss for m in found[name][:seeds]]).mean(0)
        return math.exp(loss.sum().item() / count / predictions)

    lines = []
    for name, measured in found.items():
        seeds = len(measured)
        base = original.sum().item() / count / predictions
        shift = drawn([m.loss - original for m in measured])
        share, shares = share_of(name, seeds)
        ppl, ppl4, ppl8 = (perplexity(n, seeds) for n in (name, "nvfp4", "fp8"))
        kls = [m.kl for m in measured]
        versus = {}
        for other in VERSUS.get(name, ()):
            if other in found:
                common = min(seeds, len(found[other]))
                a, b = share_of(name, common), share_of(other, common)
                versus[other] = {"points": a[0] - b[0], "ci95": interval(a[1] - b[1])}
        lines.append(
            {
                "name": name,
                "seeds": seeds,
                "bits_per_weight": sum(m.bits_per_weight for m in measured) / seeds,
                "fp4_activations": sum(m.fp4_activations for m in measured) / seeds,
                "perplexity": ppl,
                "ci95": [math.exp(base + d) for d in interval(shift)],
                "kl": torch.stack(kls).mean().item() / predictions,
                "kl_ci95": interval(drawn(kls)),
                "gap_recovered_percent": 100 * (ppl4 - ppl) / (ppl4 - ppl8)
                if ppl4 > 1.005 * ppl8
                else None,
                "kl_gap_recovered_percent": share,
                "kl_gap_recovered_ci95": interval(shares),
                "kl_gap_recovered_by_seed": [
                    recovered(
                        m.kl.mean(), found["nvfp4"][i].kl.mean(), found["fp8"][i].kl.mean()
                    ).item()
                    for i, m in enumerate(measured)
                ],
                "kl_gap_recovered_points_over": versus,
                "revisions": sorted({m.revision for m in measured}),
            }
        )
    return lines


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
    which.add_argument("--rows-of", type=Path, help="a JSON file that has the rows to make")
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    if args.windows is not None and args.windows < 1:
        parser.error(f"--windows must be 1 or more, got {args.windows}")
    if args.seeds < 1:
        parser.error(f"--seeds must be 1 or more, got {args.seeds}")
    logging.disable_progress_bar()
    console = Console(stderr=True)
    args.cache.mkdir(parents=True, exist_ok=True)

    tokenizer, original = load_tokenizer(args.model), load_model(args.model)
    seq_len = args.seq_len or min(512, context_length(original))
    windows = evaluation_windows(args.data, tokenizer, seq_len)
    calib = args.calib or args.data
    half = len(windows) // 2
    first, windows = (windows[:half], windows[half:]) if calib == args.data else (None, windows)
    windows = windows[: args.windows]
    reference = Original(original, windows)

    rows = ROWS | ABLATIONS
    asked = args.only.split(";") if args.only else list(rows)
    if args.rows_of:
        try:
            asked = [row["name"] for row in json.loads(args.rows_of.read_text())["rows"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"--rows-of {args.rows_of}: no JSON of this script: {error!r}")
    if unknown := set(asked) - set(rows):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(rows)}")
    wanted = [name for name in rows if name in asked or name in ("fp8", "nvfp4")]
    found: dict[str, list[Measured]] = {name: [] for name in wanted}
    for seed in range(args.seeds):
        chosen = {"samples": args.samples, "seq_len": seq_len, "seed": seed}
        if first is not None:
            text = choose_windows(first.flatten(), **chosen, source=calib)
        else:
            text = calibration_text(calib, tokenizer, **chosen)
        if share := overlap(text.samples, windows):
            console.print(f"warning: {share:.1%} of the evaluation windows repeat calibration text")
        sums = hashlib.sha256(repr([p.sum().item() for p in original.parameters()]).encode())
        seen = hashlib.sha256(windows.numpy().tobytes()).hexdigest()
        key = f"{sums.hexdigest()[:8]}-{text.fingerprint[:8]}-{seen[:8]}"
        state = args.cache / f"{key}.calibration.safetensors"
        setting = Setting(args.model, text, seq_len, seed, state, console)
        for name in wanted:
            file = args.cache / f"{key}-{name.replace(' ', '_').replace('%', '')}.pt"
            if not file.exists():
                console.rule(f"{name}, seed {seed}")
                torch.save(vars(measure(rows[name](setting), reference, windows)), file)
            found[name].append(Measured(**torch.load(file)))
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "seq_len": seq_len,
        "seeds": args.seeds,
        "evaluation_tokens": windows.shape[0] * (windows.shape[1] - 1),
        **provenance(),
        "rows": rows_of(found, reference.losses, windows.shape[1] - 1),
    }
    if args.json:
        print(json.dumps(facts, indent=1))
    else:
        _print(facts)


def _print(facts: dict) -> None:
    columns = "| row | seeds | bits/w | FP4 act | perplexity | KL | KL gap recovered | interval |"
    print(columns + "\n" + "|---" * 8 + "|")
    for row in facts["rows"]:
        low, high = row["kl_gap_recovered_ci95"]
        print(
            f"| {row['name']} | {row['seeds']} | {row['bits_per_weight']:.2f} "
            f"| {row['fp4_activations']:.1%} | {row['perplexity']:.3f} | {row['kl']:.5f} "
            f"| {row['kl_gap_recovered_percent']:.1f}% | {low:.1f} - {high:.1f} |"
        )


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
