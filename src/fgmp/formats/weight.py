"""Weights to codes, offline (docs/numerics.md, section 2).

All in fp32, one IEEE division per step, in this order:

    t  = fl32(amax / 2688)                  one for all weights of a site, 1 if amax is 0
    u  = fl32(x / fl32(6 t))
    s  = E4M3(max |u| of the block)          at least 2**-9, or the result of a scale search
    FP4 code = E2M1(fl32(x / fl32(s t)))     value e2m1 * s * t
    FP8 code = E4M3(u)                       value 6 * e4m3 * t

Multiplying by a reciprocal instead of dividing would be another format: it differs at ties.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.codec import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    from_blocks,
    to_blocks,
)
from fgmp.formats.spec import FP8_FACTOR, SCALE_MAX_CODE, SCALE_MIN_CODE, UNIT_MAX

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def tensor_scale(amax: float) -> float:
    """Tensor scale t = fl32(amax / 2688), an fp32 value; 1 for a zero tensor, never subnormal."""
    if amax == 0:
        return 1.0
    t = torch.tensor(amax, dtype=torch.float32) / torch.tensor(UNIT_MAX, dtype=torch.float32)
    return max(t.item(), _SMALLEST_NORMAL)


def check_finite(name: str, weight: Tensor) -> None:
    """Check that a weight holds neither NaN nor infinity.

    Raises:
        InputError: names the weight, the first such element and their number.
    """
    bad = ~weight.isfinite()
    if bad.any():
        index = bad.nonzero()[0].tolist()
        raise InputError(
            f"weights must be finite: {name} holds {weight[tuple(index)].item()} at {index} "
            f"({int(bad.sum())} such values)"
        )


@dataclass(frozen=True)
class WeightCodes:
    """Codes of a weight in both formats, before each block is assigned one.

    Attributes:
        fp4: E2M1 codes, uint8 (N, G, 16).
        scale: E4M3 codes of the FP4 block scales, uint8 (N, G), 0x01 to 0x7E.
        fp8: E4M3 codes, uint8 (N, G, 16).
        t: the tensor scale, an fp32 value.
        k: values per row before padding.
    """

    fp4: Tensor
    scale: Tensor
    fp8: Tensor
    t: float
    k: int

    def fp4_units(self) -> Tensor:
        """Values in FP4, in units of t, fp32 (N, G, 16), exact."""
        return decode_e2m1(self.fp4) * decode_e4m3(self.scale).unsqueeze(-1)

    def fp8_units(self) -> Tensor:
        """Values in FP8, in units of t, fp32 (N, G, 16), exact."""
        return decode_e4m3(self.fp8) * FP8_FACTOR

    def units(self, is_fp8: Tensor) -> Tensor:
        """Values of the mixed weight in units of t, fp32 (N, K); ``is_fp8`` is bool (N, G)."""
        mixed = torch.where(is_fp8.unsqueeze(-1), self.fp8_units(), self.fp4_units())
        return from_blocks(mixed, self.k)


def nearest_scale_codes(weight: Tensor, t: float) -> Tensor:
    """Block scales without a search: E4M3 codes 0x01 to 0x7E, uint8 (N, G), of fp32 (N, K)."""
    amax = _over_6t(to_blocks(weight), t).abs().amax(-1)
    return encode_e4m3(amax).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)


def fp4_codes(blocks: Tensor, scale_codes: Tensor, t: float) -> Tensor:
    """Encode fp32 blocks (..., 16) as E2M1 codes, uint8 (..., 16), under scale codes (...)."""
    scale = decode_e4m3(scale_codes) * torch.tensor(t, dtype=torch.float32, device=blocks.device)
    return encode_e2m1(blocks / scale.unsqueeze(-1), blocks)


def fp8_codes(values: Tensor, t: float) -> Tensor:
    """Encode fp32 values of any shape as E4M3 codes, uint8."""
    return encode_e4m3(_over_6t(values, t), values)


def quantize_weight(weight: Tensor, t: float, scale_codes: Tensor | None = None) -> WeightCodes:
    """Encode a weight in both formats.

    Args:
        weight: finite, (N, K), any float dtype.
        t: tensor scale from :func:`tensor_scale`.
        scale_codes: E4M3 codes of the FP4 block scales, uint8 (N, G); default:
            :func:`nearest_scale_codes`.
    """
    weight = weight.float()
    blocks = to_blocks(weight)
    if scale_codes is None:
        scale_codes = nearest_scale_codes(weight, t)
    return WeightCodes(
        fp4=fp4_codes(blocks, scale_codes, t),
        scale=scale_codes,
        fp8=fp8_codes(blocks, t),
        t=t,
        k=weight.shape[-1],
    )


def _over_6t(blocks: Tensor, t: float) -> Tensor:
    """u = fl32(x / fl32(6 t))."""
    return blocks / (torch.tensor(t, dtype=torch.float32, device=blocks.device) * FP8_FACTOR)
