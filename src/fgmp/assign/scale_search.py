"""Scale search of FP4 weight blocks: the exact best scale, without trying all 126.

For every block it finds the scale code s in 0x01..0x7E that minimizes, in float64,

    E(s) = sum F_i (Q(v_i; s) - v_i)^2            F the sensitivities of the weight

Ties go to the larger scale. There are two exceptions. A block whose nonzero values all have
sensitivity zero would have E(s) = 0 for every scale; it is searched with equal sensitivities. A
block that its best scale rounds to zeros gets 0x01, which is no worse.

Two bounds make the search short:

* a scale clips what exceeds 6 s t: E(s) >= sum F (|v| - 6 s t)^2 over |v| > 6 s t, falling in s;
* it flushes what is below s t / 4: E(s) >= sum F v^2 over |v| < s t / 4, rising in s.

The search starts at the round-to-nearest scale and goes down, then up. A block is finished as soon
as its bound exceeds its least error so far; by monotony, no scale beyond can be better. Searching
with proven bounds is the idea of ScaleSweep (arXiv 2606.07618); these two bounds are new here.

The recipe calls this search ``clip``: a smaller scale clips the largest values of a block.

The C++ kernels run the same search block by block, in an eighth of the time.
"""

import torch
from torch import Tensor

from fgmp.formats.codec import block_sums, decode_e4m3, round_e2m1, to_blocks
from fgmp.formats.spec import E2M1, SCALE_MAX_CODE, SCALE_MIN_CODE
from fgmp.formats.weight import fp4_codes, nearest_scale_codes
from fgmp.kernels.cpu.library import kernels

_CHUNK_BLOCKS = 1 << 14

# A bound is compared with a float64 sum, which may be off by a few ulps: prune beyond this factor.
_SLACK = 1 + 1e-9

# A quotient with two fp32 roundings can reach a midpoint that the exact value is just below.
_QUOTIENT_ERROR = 1e-6


def search_scale_codes(weight: Tensor, fisher: Tensor, t: float) -> Tensor:
    """Block scales of least weighted squared error.

    Args:
        weight: finite, (N, K).
        fisher: sensitivities, non-negative, (N, K); equal ones minimize the plain squared error.
        t: tensor scale.

    Returns:
        E4M3 codes 0x01 to 0x7E, uint8 (N, G).
    """
    weight, compiled = weight.float(), kernels()
    if compiled and weight.device.type == "cpu" and fisher.dtype == torch.float32:
        return compiled.search_scales(weight.contiguous(), fisher.contiguous(), t)
    return search_definition(weight, fisher, t)


def search_definition(weight: Tensor, fisher: Tensor, t: float) -> Tensor:
    """:func:`search_scale_codes` of an fp32 weight in PyTorch."""
    start = nearest_scale_codes(weight, t)
    blocks = to_blocks(weight).flatten(0, 1)
    weights = to_blocks(fisher.double()).flatten(0, 1)
    is_sensitive = ((weights > 0) & (blocks != 0)).any(-1, keepdim=True)
    weights = torch.where(is_sensitive, weights, 1.0)
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
    """E(s) of each block, float64 (B,).

    Args:
        blocks: fp32 (B, 16).
        fisher: sensitivities, float64 (B, 16).
        scale_codes: E4M3 codes, uint8 (B,).
        t: tensor scale.
    """
    scale = decode_e4m3(scale_codes).unsqueeze(-1)
    quotient = blocks / (scale * torch.tensor(t, dtype=torch.float32, device=blocks.device))
    value = round_e2m1(quotient).double().mul_(scale.double() * t)
    return block_sums(value.sub_(blocks.double()).square_().mul_(fisher))


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
    """Try scales from ``start`` in one direction; update ``best`` and ``best_error`` in place."""
    index = torch.arange(len(blocks), device=blocks.device)
    code, least = start.int(), best_error.clone()
    while True:
        code = code + direction
        inside = (code >= SCALE_MIN_CODE) & (code <= SCALE_MAX_CODE)
        bound = _bound(blocks, fisher, code.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE), t, direction)
        alive = (inside & (bound <= least * _SLACK)).nonzero().squeeze(-1)
        if not len(alive):
            return
        # Blocks are copied rather than masked: index_select takes a third of the time.
        blocks, fisher, index, code, least = (
            x.index_select(0, alive) for x in (blocks, fisher, index, code, least)
        )
        errors = error(blocks, fisher, code, t)
        # Ties go to the larger scale: strictly better going down, at least as good going up.
        better = errors < least if direction < 0 else errors <= least
        least = torch.where(better, errors, least)
        best[index[better]] = code[better].to(torch.uint8)
        best_error[index[better]] = errors[better]


def _bound(
    magnitude: Tensor, fisher: Tensor, scale_codes: Tensor, t: float, direction: int
) -> Tensor:
    """Lower bound of E(s) that rises in the direction of search; shapes as in :func:`error`."""
    step = decode_e4m3(scale_codes).double().unsqueeze(-1) * t
    wide = magnitude.double()
    if direction < 0:
        return wide.sub_(E2M1.max * step).clamp_(min=0).square_().mul_(fisher).sum(-1)
    not_flushed = wide >= E2M1.smallest / 2 * step * (1 - _QUOTIENT_ERROR)
    return wide.square_().mul_(fisher).masked_fill_(not_flushed, 0).sum(-1)
