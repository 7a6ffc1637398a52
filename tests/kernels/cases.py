"""Packed weights, activation sites and operator calls that tests of several kernels share."""

from typing import Any

import torch
from torch import Tensor

from fgmp.formats.activation import Site, multiplier, quantize, sensitivity_codes
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels.check import PLANES
from fgmp.pack.planes import PackedWeight, pack

MODES = {"fp4": 0.0, "mixed": 0.3, "fp8": 1.0}
"""Share of FP8 blocks by the mode that packing then takes."""

K = 72
"""Columns of the operands of :func:`calls`: four blocks and a half."""


def packed(n: int, k: int, share: float, seed: int = 0) -> PackedWeight:
    """A packed random weight (n, k), rows of very different size, some blocks zero."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, k, generator=g) * torch.randn(n, 1, generator=g).exp()
    weight[:, : k // 3] *= 1e-3
    weight[0, :16] = 0
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    return pack(codes, torch.rand(codes.scale.shape, generator=g) < share)


def planes(weight: PackedWeight) -> tuple[Tensor | None, ...]:
    """The planes in the order in which operators take them."""
    return tuple(getattr(weight, name) for name in PLANES)


def site(k: int, rule: str = "difference", scales: str = "max", seed: int = 0) -> Site:
    """A site whose threshold is the median score of :func:`tokens`."""
    g = torch.Generator().manual_seed(seed)
    codes, gamma = sensitivity_codes(torch.rand(k, generator=g).square())
    undecided = Site(multiplier(4.0), codes, gamma, 0, rule, scales)
    scores = quantize(tokens(8, k), undecided).score
    middle = int(scores.flatten().sort().values[scores.numel() // 2])
    return Site(undecided.r, codes, gamma, middle, rule, scales)


def tokens(m: int, k: int, seed: int = 5) -> Tensor:
    """fp32 (m, k) with outliers, tiny and zero blocks, values that saturate."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(m, k, generator=g)
    x[0, : k // 2] *= 1e-4
    x[-1, -1] = 50.0
    x[m // 2, :16] = 0.0
    return x


def arguments(site: Site) -> tuple[Tensor, Tensor, Tensor, str, str]:
    """The site as operators take it."""
    r = torch.tensor(site.r, dtype=torch.float32)
    return r, site.sensitivity, torch.tensor(site.threshold), site.rule, site.scales


def calls(share: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Any, ...]]:
    """Operators by name with arguments that they take."""
    weight, record = packed(24, K, share), site(K)
    x = tokens(6, K).view(2, 3, K).to(dtype)
    units = quantize(x, record).units(K).to(torch.bfloat16)
    r, t = torch.tensor(record.r), weight.t
    return {
        "quantize_activation": (x, *arguments(record)),
        "fake_quantize_activation": (x, *arguments(record)),
        "score_activation": (x, *arguments(record)),
        "unpack_weight": (*planes(weight), K, torch.float32),
        "packed_linear": (units, *planes(weight), r, t, torch.ones(24), dtype),
    }
