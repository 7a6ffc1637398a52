"""The activation quantizer against PyTorch's own ways of doing it, and against a peer.

    python benchmarks/quantizer.py [--json] [--tokens M] [--columns K] [--threads T] [--repeats R]

Rows: the operator under every rule and choice of scales; the definition in eager PyTorch
(``formats.activation.quantize``), its faster eager twin that the operator falls back on without a
compiler (``fake_quantize``) and that twin under torch.compile; and compressed-tensors' NVFP4
fake quantization, which has no FP8, no decision and no search. ``over`` is a row's time over the
operator's under the same rule and scales, the peer's over ``difference`` and ``max``.
"""

import argparse
import json

import torch
from interleaved import Case, machine, medians

from fgmp.formats.activation import Site, fake_quantize, multiplier, quantize
from fgmp.kernels import ops

CHOICES = [
    ("difference", "max"),
    ("benefit", "max"),
    ("difference", "search"),
    ("benefit", "search"),
]


def site(x: torch.Tensor, rule: str, scales: str) -> Site:
    """A record under which 30% of the blocks of ``x`` are FP8."""
    g = torch.Generator().manual_seed(1)
    sensitivity = torch.randint(1, 0x7F, (x.shape[1],), dtype=torch.uint8, generator=g)
    record = Site(multiplier(x.abs().max().item()), sensitivity, 1.0, 0, rule, scales)
    scores = quantize(x[:8], record).score.flatten().sort().values
    return Site(record.r, sensitivity, 1.0, int(scores[len(scores) * 7 // 10]), rule, scales)


def peer(x: torch.Tensor) -> Case:
    """compressed-tensors' NVFP4 fake quantization of an activation."""
    from compressed_tensors.quantization import QuantizationScheme, fake_quantize
    from compressed_tensors.quantization.quant_scheme import NVFP4
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    arguments = QuantizationScheme(targets=["Linear"], **NVFP4).input_activations
    blocks = x.unflatten(-1, (-1, 16))

    def run(_: int) -> torch.Tensor:
        low, high = blocks.amin(-1), blocks.amax(-1)
        total = generate_gparam(low.min(), high.max())
        scale, zero = calculate_qparams(low, high, arguments, global_scale=total)
        return fake_quantize(x, scale, zero, arguments, global_scale=total)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(args.tokens, args.columns, generator=g).to(torch.bfloat16)

    compiled = torch.compile(fake_quantize)
    cases: dict[str, Case] = {}
    for rule, scales in CHOICES:
        record = site(x, rule, scales)
        r, threshold = torch.tensor(record.r), torch.tensor(record.threshold)
        arguments = (x, r, record.sensitivity, threshold, rule, scales)
        name = f"{rule}, {scales}"
        cases[f"operator, {name}"] = lambda _, a=arguments: ops.fake_quantize_activation(*a)
        cases[f"eager fake_quantize, {name}"] = lambda _, s=record: fake_quantize(x, s)
        if (rule, scales) == CHOICES[0]:
            cases[f"eager definition, {name}"] = lambda _, s=record: quantize(x, s)
            cases[f"torch.compile, {name}"] = lambda _, s=record: compiled(x, s)
    cases["compressed-tensors NVFP4"] = peer(x)
    seconds = medians(cases, args.repeats)

    def own(name: str) -> float:
        rule = name.split(", ", 1)[1] if ", " in name else "difference, max"
        return seconds[f"operator, {rule}"]

    rows = [
        {"name": name, "ms": value * 1e3, "over": value / own(name)}
        for name, value in seconds.items()
    ]
    shape = f"{args.tokens}x{args.columns}"
    if args.json:
        print(
            json.dumps(
                {**machine(), "shape": shape, "threads": args.threads, "rows": rows}, indent=1
            )
        )
        return
    print(f"{shape}, {args.threads} threads")
    for row in rows:
        print(f"{row['name']:<40} {row['ms']:8.2f} ms {row['over']:6.1f} x")


if __name__ == "__main__":
    main()
