"""Sensitivity-weighted clipping: the best block scale, exactly and without trying all 126.

For every FP4 block the scale code s in 0x01..0x7E that minimises, in float64,

    E(s) = sum F_i (Q(v_i; s) - v_i)^2            F the Fisher information of the weight

with the larger scale where two are equal. Two exceptions keep blocks meaningful: one in which
no nonzero value has Fisher information, which would be indifferent to every scale, counts all
values alike; and one that its best scale flushes to zeros gets 0x01, which is no worse.

Two bounds make the search short:

* a scale clips what exceeds 6 s t: E(s) >= sum F (|v| - 6 s t)^2 over |v| > 6 s t, falling in s;
* it flushes what is below s t / 4: E(s) >= sum F v^2 over |v| < s t / 4, rising in s.

Starting at the nearest-rounding scale and walking down, then up, a block drops out as soon as
its bound exceeds the best error seen, and by monotony no scale further on can win. The idea of
sweeping with proven bounds is ScaleSweep's (arXiv 2606.07618); these two bounds are ours.
"""

import torch
from torch import Tensor

from fgmp.formats.codec import decode_e4m3, round_e2m1, to_blocks
from fgmp.formats.spec import E2M1, SCALE_MAX_CODE, SCALE_MIN_CODE
from fgmp.formats.weight import fp4_codes, nearest_scale_codes

_CHUNK_BLOCKS = 1 << 14

# A bound is compared with a float64 sum that may be off by some ulps: prune only past this.
_SLACK = 1 + 1e-9

# A quotient of two fp32 roundings may round up to a midpoint that the value stays below.
_QUOTIENT_ERROR = 1e-6


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
            torch.split(blocks, _CHUNK_BLOCKS),
            torch.split(weights, _CHUNK_BLOCKS),
            torch.split(start.flatten(), _CHUNK_BLOCKS),
            strict=True,
        )
    ]
    return torch.cat(best).view_as(start)


def error(blocks: Tensor, fisher: Tensor, scale_codes: Tensor, t: float) -> Tensor:
    """E(s) of fp32 blocks (B, 16) under float64 ``fisher`` (B, 16), codes (B,); float64 (B,)."""
    scale = decode_e4m3(scale_codes).unsqueeze(-1)
    quotient = blocks / (scale * torch.tensor(t, dtype=torch.float32, device=blocks.device))
    value = round_e2m1(quotient).double().mul_(scale.double() * t)
    return value.sub_(blocks.double()).square_().mul_(fisher).sum(-1)


def _search(blocks: Tensor, fisher: Tensor, start: Tensor, t: float) -> Tensor:
    best, best_error = start.clone(), error(blocks, fisher, start, t)
    for direction in (-1, 1):
        _walk(blocks.abs(), fisher, start, t, direction, best, best_error)
    flushed = (fp4_codes(blocks, best, t) & (E2M1.sign_bit - 1) == 0).all(-1)
    best[flushed] = SCALE_MIN_CODE
    return best


def _walk(
    blocks: Tensor,
    fisher: Tensor,
    start: Tensor,
    t: float,
    direction: int,
    best: Tensor,
    best_error: Tensor,
) -> None:
    """Try the scales from ``start`` in one direction; update ``best`` and its errors in place."""
    at = torch.arange(len(blocks), device=blocks.device)
    code, least = start.int(), best_error.clone()
    while True:
        code = code + direction
        inside = (code >= SCALE_MIN_CODE) & (code <= SCALE_MAX_CODE)
        bound = _bound(blocks, fisher, code.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE), t, direction)
        alive = (inside & (bound <= least * _SLACK)).nonzero().squeeze(-1)
        if not len(alive):
            return
        # Rows are copied rather than masked: index_select takes a third of the time.
        blocks, fisher, at, code, least = (
            x.index_select(0, alive) for x in (blocks, fisher, at, code, least)
        )
        found = error(blocks, fisher, code, t)
        # Equal errors take the larger scale: strictly better going down, at least as good up.
        better = found < least if direction < 0 else found <= least
        least = torch.where(better, found, least)
        best[at[better]] = code[better].to(torch.uint8)
        best_error[at[better]] = found[better]


def _bound(
    magnitude: Tensor, fisher: Tensor, scale_codes: Tensor, t: float, direction: int
) -> Tensor:
    """A lower bound of E(s), monotone in the direction of the walk; shapes as in :func:`error`."""
    step = decode_e4m3(scale_codes).double().unsqueeze(-1) * t
    wide = magnitude.double()
    if direction < 0:
        return wide.sub_(E2M1.max * step).clamp_(min=0).square_().mul_(fisher).sum(-1)
    kept = wide >= E2M1.smallest / 2 * step * (1 - _QUOTIENT_ERROR)
    return wide.square_().mul_(fisher).masked_fill_(kept, 0).sum(-1)
