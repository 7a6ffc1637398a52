"""Which few FP4 block scales are worth trying online: the choice behind ``scales: search``.

    python runs/leaves.py MODEL --calib TEXT [--samples 128]

Runs held-out windows through the model and measures, over the blocks of all sites, the
Fisher-weighted squared error of FP4 under scale codes from 4 below to 8 above that of the largest
value. Reports what share of the gain of all of them each set of candidates has.
"""

import argparse
import json
from functools import partial
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from fgmp import calibration_text
from fgmp.formats.activation import multiplier
from fgmp.formats.codec import decode_e4m3, encode_e4m3, round_e2m1, to_blocks
from fgmp.formats.spec import FP8_FACTOR, SCALE_MAX_CODE, SCALE_MIN_CODE, UNIT_MAX
from fgmp.model.select import linearize, quantizable
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.sensitivity.fisher import SiteStatistics, calibrate, causal_lm_loss, frozen

OFFSETS = range(-4, 9)
HELD_OUT = 8


def errors(x: Tensor, site: SiteStatistics, weighted: bool) -> Tensor:
    """sum w (q - 6u)^2 of every block under every offset, float64 (blocks, offsets)."""
    r = multiplier(site.amax)
    u = to_blocks(x.bfloat16().float()) * r
    nearest = encode_e4m3(u.abs().amax(-1)).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).int()
    target = (FP8_FACTOR * u).clamp(-UNIT_MAX, UNIT_MAX)
    counts = to_blocks(site.g2 if weighted else torch.ones_like(site.g2))
    found = []
    for offset in OFFSETS:
        step = decode_e4m3((nearest + offset).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)).unsqueeze(-1)
        q = round_e2m1(FP8_FACTOR * u / step) * step
        found.append(((q - target).square() * counts).sum(-1).double() / (FP8_FACTOR * r) ** 2)
    return torch.stack(found, -1).flatten(0, -2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--calib", required=True)
    parser.add_argument("--samples", type=int, default=128)
    args = parser.parse_args()
    tokenizer, model = load_tokenizer(args.model), load_model(args.model)
    seq_len = min(256, context_length(model))
    text = calibration_text(args.calib, tokenizer, samples=args.samples, seq_len=seq_len, seed=0)
    linearize(model)
    linears = quantizable(model)
    sites = list(calibrate(model, linears, text.samples).sites.values())
    seen: dict[int, list[Tensor]] = {i: [] for i in range(len(sites))}

    def keep(index: int, _: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen[index].append(arguments[0].flatten(0, -2))

    for index, site in enumerate(sites):
        linears[site.linears[0]].register_forward_pre_hook(partial(keep, index))
    with torch.no_grad(), frozen(model):
        for sample in text.held_out[:HELD_OUT]:
            causal_lm_loss(model, sample)
    weighted, plain = (
        torch.cat([errors(torch.cat(seen[i]), site, w) for i, site in enumerate(sites)])
        for w in (True, False)
    )
    column = {offset: i for i, offset in enumerate(OFFSETS)}
    base, least = weighted[:, column[0]].sum(), weighted.min(-1).values.sum()

    def gain(offsets: tuple[int, ...], by: Tensor) -> float:
        chosen = [column[o] for o in offsets]
        picked = by[:, chosen].argmin(-1, keepdim=True)
        return float((base - weighted[:, chosen].gather(-1, picked).sum()) / (base - least))

    rows = []
    for size in range(1, 5):
        sets = [(0, *more) for more in combinations([o for o in OFFSETS if o], size)]
        best = max(sets, key=lambda offsets: gain(offsets, weighted))
        rows.append(
            {
                "candidates": sorted(best),
                "gain_percent": 100 * gain(best, weighted),
                "gain_percent_unweighted_choice": 100 * gain(best, plain),
            }
        )
    facts = {
        "model": Path(args.model).name,
        "blocks": len(weighted),
        "error_left_by_all_percent": 100 * float(least / base),
        "rows": rows,
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    main()
