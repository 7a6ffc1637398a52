"""Which few FP4 block scales to try online: the choice behind ``scales: search``.

    python runs/leaves.py MODEL --calib TEXT [--samples 128]

Runs held-out windows through the model and measures, over the blocks of all sites, the
Fisher-weighted squared error of FP4. Scale codes range from 4 below to 8 above that of the largest
value. Prints, for sets of two to five candidates, the share of the gain of all codes that the best
set of that size has.
"""

import argparse
import json
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp import calibration_text
from fgmp.errors import FGMPError
from fgmp.formats.activation import multiplier
from fgmp.formats.codec import decode_e4m3, encode_e4m3, round_e2m1, to_blocks
from fgmp.formats.spec import FP8_FACTOR, SCALE_MAX_CODE, SCALE_MIN_CODE, UNIT_MAX
from fgmp.model.losses import causal_lm_loss
from fgmp.model.observe import observed_inputs, run_all
from fgmp.model.select import linearize, quantizable
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.sensitivity.fisher import SiteStatistics, calibrate

OFFSETS = range(-4, 9)
"""Scale codes, as offsets from the code of the largest value."""

HELD_OUT = 8
"""Sequences to measure on."""

LARGEST_SET = 5
"""Candidates in the largest set; the code of the largest value is in every set."""


def errors(x: Tensor, site: SiteStatistics, weighted: bool) -> Tensor:
    """sum w (q - 6u)^2 of every block under every offset, float64 (blocks, offsets)."""
    r = multiplier(site.amax)
    u = to_blocks(x.bfloat16().float()) * r
    nearest = encode_e4m3(u.abs().amax(-1)).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).int()
    target = (FP8_FACTOR * u).clamp(-UNIT_MAX, UNIT_MAX)
    weights = to_blocks(site.g2 if weighted else torch.ones_like(site.g2))
    by_offset = []
    for offset in OFFSETS:
        step = decode_e4m3((nearest + offset).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)).unsqueeze(-1)
        q = round_e2m1(FP8_FACTOR * u / step) * step
        squares = (q - target).square() * weights
        by_offset.append(squares.sum(-1).double() / (FP8_FACTOR * r) ** 2)
    return torch.stack(by_offset, -1).flatten(0, -2)


def site_inputs(
    model: nn.Module, sites: list[SiteStatistics], samples: Tensor
) -> dict[str, Tensor]:
    """Inputs of all sites on these sequences, (T, K), by the site's first linear."""
    inputs: dict[str, list[Tensor]] = {site.linears[0]: [] for site in sites}

    def keep(name: str, x: Tensor) -> None:
        inputs[name].append(x.flatten(0, -2))

    with observed_inputs(model, inputs, keep):
        run_all(model, samples, causal_lm_loss)
    return {name: torch.cat(parts) for name, parts in inputs.items()}


def gain(offsets: tuple[int, ...], chosen_by: Tensor, errors: Tensor) -> float:
    """Fraction of the gain of all offsets that a set of them has.

    Args:
        offsets: the set; zero is in it.
        chosen_by: errors by which each block chooses among them, (blocks, offsets).
        errors: errors that are compared, likewise.
    """
    column = {offset: i for i, offset in enumerate(OFFSETS)}
    base, least = errors[:, column[0]].sum(), errors.min(-1).values.sum()
    columns = [column[offset] for offset in offsets]
    chosen = chosen_by[:, columns].argmin(-1, keepdim=True)
    reached = errors[:, columns].gather(-1, chosen).sum()
    return float((base - reached) / (base - least))


def best_sets(weighted: Tensor, plain: Tensor) -> list[dict[str, Any]]:
    """The best set of each size, and its gain by either choice."""
    rows = []
    for size in range(1, LARGEST_SET):
        sets = [(0, *more) for more in combinations([o for o in OFFSETS if o], size)]
        best = max(sets, key=lambda offsets: gain(offsets, weighted, weighted))
        rows.append(
            {
                "candidates": sorted(best),
                "gain_percent": 100 * gain(best, weighted, weighted),
                "gain_percent_unweighted_choice": 100 * gain(best, plain, weighted),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    seq_len = min(256, context_length(model))
    text = calibration_text(
        args.calib, tokenizer, samples=args.samples, seq_len=seq_len, seed=0, bos=False
    )
    linearize(model)
    sites = list(calibrate(model, quantizable(model), text.samples).sites.values())
    inputs = site_inputs(model, sites, text.held_out[:HELD_OUT])
    weighted, plain = (
        torch.cat([errors(inputs[site.linears[0]], site, w) for site in sites])
        for w in (True, False)
    )
    base, least = weighted[:, OFFSETS.index(0)].sum(), weighted.min(-1).values.sum()
    facts = {
        "model": Path(args.model).name,
        "blocks": len(weighted),
        "error_left_by_all_percent": 100 * float(least / base),
        "rows": best_sets(weighted, plain),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    try:
        main()
    except FGMPError as error:
        sys.exit(f"error: {error}")
