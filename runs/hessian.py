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

from fgmp.assign.compensate import (
    Factors,
    RoundedBlock,
    ScaleSearch,
    column_by_column,
    round_columns,
)
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.spec import SCALE_MAX_CODE, SCALE_MIN_CODE
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
    reach = torch.tensor(offsets, device=weight.device)
    tried, rows = len(reach), torch.arange(len(weight), device=weight.device)

    def round_block(block: int, columns: Tensor, spread: Tensor) -> RoundedBlock:
        near = nearest_scale_codes(columns, t).int()
        scale = (near + reach).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).to(torch.uint8).flatten()
        formats = is_fp8[:, block].repeat_interleave(tried)
        every = round_columns(columns.repeat_interleave(tried, 0), spread, scale, formats, t)
        best = rows * tried + every[-1].square().sum(1).reshape(-1, tried).argmin(1)
        return RoundedBlock(scale[best], *(part[best] for part in every))

    return column_by_column(weight.float(), factors, t, round_block)[0]
