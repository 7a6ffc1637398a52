"""Sensitivity-weighted clipping: the best block scale, exactly and without trying all 126.

For every FP4 block the scale code s in 0x01..0x7E that minimises, in float64,

    E(s) = sum F_i (Q(v_i; s) - v_i)^2            F the Fisher information of the weight

with the larger scale where two are equal. Two exceptions keep blocks meaningful: one in which
no nonzero value has Fisher information, which would be indifferent to every scale, counts all
values alike; and one that its best scale flushes to zeros gets 0x01, which is no worse.

Two bounds make the search short. Write m = |v| / t:

* a scale clips what exceeds 6 s:       E(s) >= sum F (m - 6 s)^2  over m > 6 s, falling in s;
* a scale flushes what is below s / 4:  E(s) >= sum F m^2          over m < s / 4, rising in s.

Starting at the nearest-rounding scale and walking down, then up, a block drops out as soon as
its bound exceeds the best error seen, and by monotony no scale further on can win. The idea of
sweeping with proven bounds is ScaleSweep's (arXiv 2606.07618); these two bounds are ours.
"""

import torch
from torch import Tensor

from fgmp.formats.codec import decode_e4m3, round_e2m1, to_blocks
from fgmp.formats.spec import E2M1, SCALE_MAX_CODE, SCALE_MIN_CODE
from fgmp.formats.weight import fp4_codes, nearest_scale_codes

_CHUNK_BLOCKS = 1 << 16

# A bound is compared with a float64 sum that may be off by some ulps: prune only past this.
_SLACK = 1 + 1e-9


def search_scale_codes(weight: Tensor, fisher: Tensor, t: float) -> Tensor:
    """The error-minimising scale of every block.

    Args:
        weight: finite, (N, K).
        fisher: non-negative, (N, K); all equal minimises the plain squared error.
        t: tensor scale.

    Returns:
        uint8 (N, G), E4M3 codes 0x01 to 0x7E.
    """
    weight = weight.float()
    start = nearest_scale_codes(weight, t)
    blocks = to_blocks(weight).flatten(0, 1)
    weights = to_blocks(fisher.double()).flatten(0, 1)
    matters = ((weights > 0) & (blocks != 0)).any(-1, keepdim=True)
    weights = torch.where(matters, weights, 1.0)
    best = [
        _search(b, f, s, t)
        for b, f, s in zip(
            blocks.split(_CHUNK_BLOCKS),
            weights.split(_CHUNK_BLOCKS),
            start.flatten().split(_CHUNK_BLOCKS),
            strict=True,
        )
    ]
    return torch.cat(best).view_as(start)


def error(blocks: Tensor, fisher: Tensor, scale_codes: Tensor, t: float) -> Tensor:
    """E(s) of fp32 blocks (B, 16) under float64 ``fisher`` (B, 16), codes (B,); float64 (B,)."""
    scale = decode_e4m3(scale_codes).unsqueeze(-1)
    quotient = blocks / (scale * torch.tensor(t, dtype=torch.float32, device=blocks.device))
    value = round_e2m1(quotient).double() * (scale.double() * t)
    return (fisher * (value - blocks.double()).square()).sum(-1)


def _search(blocks: Tensor, fisher: Tensor, start: Tensor, t: float) -> Tensor:
    best = start.clone()
    best_error = error(blocks, fisher, start, t)
    magnitude = blocks.abs().double() / t
    for direction in (-1, 1):
        code = start.int()
        alive = torch.arange(len(blocks), device=blocks.device)
        while True:
            code = code + direction
            inside = (code >= SCALE_MIN_CODE) & (code <= SCALE_MAX_CODE)
            scale = decode_e4m3(code.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)).double()
            bound = _bound(magnitude[alive], fisher[alive], scale.unsqueeze(-1), direction)
            keep = inside & (bound * t**2 <= best_error[alive] * _SLACK)
            alive, code = alive[keep], code[keep]
            if not len(alive):
                break
            e = error(blocks[alive], fisher[alive], code.to(torch.uint8), t)
            # Equal errors take the larger scale: strictly better going down, at least as good up.
            better = e < best_error[alive] if direction < 0 else e <= best_error[alive]
            winners = alive[better]
            best[winners] = code[better].to(torch.uint8)
            best_error[winners] = e[better]
    flushed = (fp4_codes(blocks, best, t) & (E2M1.sign_bit - 1) == 0).all(-1)
    best[flushed] = SCALE_MIN_CODE
    return best


def _bound(magnitude: Tensor, fisher: Tensor, scale: Tensor, direction: int) -> Tensor:
    """A lower bound of E(s) / t^2, monotone in the direction of the walk."""
    if direction < 0:
        return (fisher * (magnitude - E2M1.max * scale).clamp(min=0).square()).sum(-1)
    flushed = magnitude < E2M1.smallest / 2 * scale * (1 - 1e-6)
    return (fisher * magnitude.square() * flushed).sum(-1)
