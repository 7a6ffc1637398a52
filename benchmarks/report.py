"""Size, time and memory of ``fgmp report`` on a checkpoint shaped like a model of 1B parameters.

    python benchmarks/report.py [--layers 16] [--hidden 2048] [--keep FOLDER] [--json]

The checkpoint has random planes, 30% of its blocks FP8, and random scores; it is made with fgmp's
own functions and written as ``fgmp quantize`` writes one. Random formats compress least, so a real
model's page is smaller. The report is made in a process of its own, whose seconds and peak memory
are printed; both include PyTorch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from interleaved import machine
from torch import Tensor

from fgmp.assign.frontier import Fractions
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import ScoredWeights
from fgmp.formats.activation import Site, multiplier
from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.pack.checkpoint import SCORES, CheckpointConfig, SiteConfig, write, write_json
from fgmp.pack.planes import BlockCodes, PackedWeight, pack_blocks
from fgmp.quantization.score_summary import score_summaries
from fgmp.quantization.task import Scores
from fgmp.recipe import Recipe
from fgmp.sensitivity.histogram import new_histogram

_FP8 = 0.3

_MEASURE = """
import sys, time
from pathlib import Path
started = time.perf_counter()
import torch
from fgmp.quantization.memory import peak_bytes, reset_peak
cpu = torch.device("cpu")
reset_peak(cpu)  # a new process inherits the peak of the one that started it
from fgmp.app.report import write_report
write_report([Path(sys.argv[1])], Path(sys.argv[2]))
print(time.perf_counter() - started, peak_bytes(cpu))
"""


def shapes(hidden: int) -> dict[str, dict[str, tuple[int, int]]]:
    """N and K of the linears of one layer by site, as in Llama 3.2 1B at ``hidden`` 2048."""
    narrow, wide = hidden // 4, 4 * hidden
    return {
        "self_attn": {
            "q_proj": (hidden, hidden),
            "k_proj": (narrow, hidden),
            "v_proj": (narrow, hidden),
        },
        "self_attn.out": {"o_proj": (hidden, hidden)},
        "mlp": {"gate_proj": (wide, hidden), "up_proj": (wide, hidden)},
        "mlp.out": {"down_proj": (hidden, wide)},
    }


def random_weight(n: int, k: int, generator: torch.Generator) -> PackedWeight:
    """A packed weight of random codes, 30% of the blocks FP8."""
    groups = k // BLOCK
    is_fp8 = torch.rand(n, groups, generator=generator) < _FP8
    scale = torch.randint(0x20, 0x40, (n, groups), generator=generator, dtype=torch.uint8)
    codes = torch.randint(1, 0x7F, (n, groups, BLOCK), generator=generator, dtype=torch.uint8)
    codes = torch.where(is_fp8.unsqueeze(-1), codes, codes & 0x7 | 1)
    scale = torch.where(is_fp8, torch.full_like(scale, FP8_BLOCK), scale)
    return pack_blocks(BlockCodes(is_fp8, codes, scale), k, 1e-4, "mixed")


def make_checkpoint(folder: Path, layers: int, hidden: int) -> int:
    """Write the checkpoint; returns the number of its quantized weights."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    linears_of: dict[str, list[str]] = {}
    sites: dict[str, Site] = {}
    scores: dict[str, Tensor] = {}
    elements = 0
    for layer in range(layers):
        for group, members in shapes(hidden).items():
            stem = f"model.layers.{layer}.{group.partition('.')[0]}"
            names = {f"{stem}.{name}": shape for name, shape in members.items()}
            owner = next(iter(names))
            k = names[owner][1]
            sites[owner] = Site(multiplier(4.0), torch.full((k,), 0x38, dtype=torch.uint8), 1.0, 0)
            linears_of[owner] = list(names)
            for name, (n, width) in names.items():
                packed = random_weight(n, width, generator)
                tensors |= {f"{name}.weight_{p}": t for p, t in packed.tensors().items()}
                scores[name] = torch.randn(n, width // BLOCK, generator=generator).exp().double()
                elements += n * width
            tensors |= {
                f"{owner}.input_site.r": torch.tensor(sites[owner].r),
                f"{owner}.input_site.gamma": torch.tensor(1.0),
                f"{owner}.input_site.sensitivity": sites[owner].sensitivity,
                f"{owner}.input_site.threshold": torch.tensor(0),
            }
    histograms = {owner: new_histogram(site) for owner, site in sites.items()}
    for histogram in histograms.values():
        values = torch.randn(10_000, generator=generator).mul(3).add(20).exp()
        histogram.add(values.long())
    variant = ScoredWeights({}, scores, {}, clipped=True)
    all_scores = Scores(linears_of, sites, histograms, [variant], POLICIES["fisher"], 1000)
    fractions = Fractions(1 - _FP8, 1 - _FP8)
    config = CheckpointConfig(
        sites={
            owner: SiteConfig(names, sites[owner].rule, 1 - _FP8, sites[owner].scales)
            for owner, names in linears_of.items()
        },
        recipe=Recipe(fp4=1 - _FP8).to_dict(),
        result={"fp4_activations": 1 - _FP8, "quantized_share": 1.0},
    )

    def extra(inside: Path) -> None:
        summaries = score_summaries(all_scores, fractions, clipped=True)
        write_json(inside / SCORES, summaries, indent=None)

    write(folder, tensors, {"quantization_config": config.to_dict()}, extra)
    return elements


def measure(folder: Path, page: Path) -> dict[str, float]:
    """Seconds and peak bytes of a process that makes the report, and bytes of the page."""
    command = [sys.executable, "-c", _MEASURE, str(folder), str(page)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, peak = run.stdout.split()[-2:]
    return {
        "seconds": float(seconds),
        "peak_bytes": int(float(peak)),
        "page_bytes": page.stat().st_size,
    }


def main() -> None:
    """Make, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="keep checkpoint and page there"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        weights = make_checkpoint(folder / "checkpoint", args.layers, args.hidden)
        row: dict[str, Any] = {
            "layers": args.layers,
            "hidden": args.hidden,
            "weights": weights,
            **measure(folder / "checkpoint", folder / "report.html"),
        }
    if args.json:
        print(json.dumps({**machine(), **row}, indent=1))
        return
    print(
        f"{row['weights']:,} weights: {row['seconds']:.1f} s, peak {row['peak_bytes'] / 1e9:.2f} "
        f"GB, page {row['page_bytes'] / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
