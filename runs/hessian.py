"""Ablation: FP4 scales by a local Hessian instead of the Fisher information's diagonal.

Compensation rounds a block's columns one after the other and spreads each error over the columns
not yet rounded. The effect of a scale on the layer's output error, if all later columns compensate,
is the sum of GPTQ's squared errors over the block. Their matrix is the local Hessian (arXiv
2210.17323). Here every candidate scale is tried in the block's rounding, and the one with the least
error is used. The default method instead searches the scale with the least Fisher-weighted squared
error.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fgmp.assign.compensate import Factors, ScaleSearch, rounded
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.spec import BLOCK, E2M1, SCALE_MAX_CODE, SCALE_MIN_CODE
from fgmp.formats.weight import WeightCodes, nearest_scale_codes

OFFSETS = range(-10, 8)
"""Candidates, as offsets from the code of the nearest scale: half to nearly twice the scale."""


def compensated(
    weight: Tensor,
    factors: Factors,
    is_fp8: Tensor,
    t: float,
    sensitivity: Tensor | None,
    search: ScaleSearch = search_scale_codes,
    offsets: Sequence[int] = OFFSETS,
) -> WeightCodes:
    """Compensate a weight; a ``Methods.compensate``.

    Arguments are those of ``fgmp.assign.compensate.compensated``. ``sensitivity`` and ``search``
    are not used: candidates are the codes at ``offsets``.
    """
    n, k = weight.shape
    v = weight.double() @ factors.transfer
    reach = torch.tensor(offsets, device=weight.device)
    tried, rows = len(reach), torch.arange(n, device=weight.device)
    fp4 = torch.zeros(*is_fp8.shape, BLOCK, dtype=torch.uint8, device=weight.device)
    fp8, scale = torch.zeros_like(fp4), torch.zeros_like(fp4[..., 0])
    for block in range(is_fp8.shape[1]):
        start, stop = block * BLOCK, min((block + 1) * BLOCK, k)
        spread = factors.spread[start:stop]
        near = nearest_scale_codes(v[:, start:stop].float(), t).int()
        candidates = (near + reach).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).to(torch.uint8).flatten()
        columns = v[:, start:stop].repeat_interleave(tried, 0)
        formats = is_fp8[:, block].repeat_interleave(tried)
        codes = torch.zeros(2, n * tried, BLOCK, dtype=torch.uint8, device=weight.device)
        errors = torch.zeros_like(columns)
        for j in range(stop - start):
            codes[0, :, j], codes[1, :, j], value = rounded(
                columns[:, j].float(), candidates, formats, t
            )
            errors[:, j] = (columns[:, j] - value) / spread[j, start + j]
            columns[:, j + 1 :] -= errors[:, j, None] * spread[j, start + j + 1 : stop]
        best = rows * tried + errors.square().sum(1).reshape(n, tried).argmin(1)
        fp4[:, block], fp8[:, block], scale[:, block] = *codes[:, best], candidates[best]
        v[:, stop:] -= errors[best] @ spread[:, stop:]
    scale[(fp4 & (E2M1.sign_bit - 1) == 0).all(-1)] = SCALE_MIN_CODE
    return WeightCodes(fp4, scale, fp8, t, k)
