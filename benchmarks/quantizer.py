"""The activation quantizer against plain PyTorch, torch.compile and compressed-tensors.

    python benchmarks/quantizer.py [--json] [--tokens M] [--columns K] [--threads T] [--repeats R]

Rows:

* the operator under several rules and choices of scales;
* the definition in eager PyTorch (``formats.activation.quantize``);
* the faster eager version, to which the operator falls back without a compiler (``fake_quantize``),
  and the same under torch.compile;
* compressed-tensors' NVFP4 fake quantization, which has no FP8, no decision and no search.

``over`` is a row's time over the operator's under the same rule and scales. compressed-tensors is
compared with ``difference`` and ``max``.
"""

import argparse
import json
from typing import Any

import torch
from interleaved import Case, machine, medians, site

from fgmp.formats.activation import fake_quantize, quantize
from fgmp.kernels import ops

CHOICES = [
    ("difference", "max"),
    ("benefit", "max"),
    ("difference", "search"),
    ("benefit", "search"),
]


def peer(x: torch.Tensor) -> Case:
    """Case of compressed-tensors' NVFP4 fake quantization of an activation."""
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


def cases_of(x: torch.Tensor) -> dict[str, Case]:
    """All rows: a name and what is called."""
    compiled = torch.compile(fake_quantize)
    cases: dict[str, Case] = {}
    for rule, scales in CHOICES:
        constants = site(x, rule, scales)
        r, threshold = torch.tensor(constants.r), torch.tensor(constants.threshold)
        arguments = (x, r, constants.sensitivity, threshold, rule, scales)
        name = f"{rule}, {scales}"
        cases[f"operator, {name}"] = lambda _, a=arguments: ops.fake_quantize_activation(*a)
        cases[f"eager fake_quantize, {name}"] = lambda _, s=constants: fake_quantize(x, s)
        if (rule, scales) == CHOICES[0]:
            cases[f"eager definition, {name}"] = lambda _, s=constants: quantize(x, s)
            cases[f"torch.compile, {name}"] = lambda _, s=constants: compiled(x, s)
    cases["compressed-tensors NVFP4"] = peer(x)
    return cases


def rows_of(seconds: dict[str, float]) -> list[dict[str, Any]]:
    """Time of every case, and over the operator's under the same rule and scales."""

    def operator_seconds(name: str) -> float:
        rule = name.split(", ", 1)[1] if ", " in name else "difference, max"
        return seconds[f"operator, {rule}"]

    return [
        {"name": name, "ms": value * 1e3, "over": value / operator_seconds(name)}
        for name, value in seconds.items()
    ]


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
    rows = rows_of(medians(cases_of(x), args.repeats))
    shape = f"{args.tokens}x{args.columns}"
    if args.json:
        facts = {**machine(), "shape": shape, "threads": args.threads, "rows": rows}
        print(json.dumps(facts, indent=1))
        return
    print(f"{shape}, {args.threads} threads")
    for row in rows:
        print(f"{row['name']:<40} {row['ms']:8.2f} ms {row['over']:6.1f} x")


if __name__ == "__main__":
    main()
