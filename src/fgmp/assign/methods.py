"""Replaceable steps of weight quantization, for research; each is a function.

``fgmp.quantize(model, samples, recipe, methods=Methods(search_scales=mine))`` runs the whole method
with one step replaced; docs/extending.md has worked examples. A checkpoint stores its recipe but no
functions, so these are not part of the recipe.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from fgmp.assign.compensate import DAMPING, Factors, ScaleSearch, compensated
from fgmp.assign.frontier import RELIEF
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.weight import WeightCodes

WeightScore = Callable[[WeightCodes, Tensor, Tensor], Tensor]
"""Block scores: maps (codes in both formats, weight (N, K), sensitivities (N, K)) to float64
(N, G)."""


class Compensate(Protocol):
    """Rounds a weight so that later columns compensate the errors of earlier ones."""

    def __call__(
        self,
        weight: Tensor,
        factors: Factors,
        is_fp8: Tensor,
        t: float,
        sensitivity: Tensor | None,
        search: ScaleSearch = search_scale_codes,
    ) -> WeightCodes:
        """Round a weight; arguments and result as :func:`fgmp.assign.compensate.compensated`."""


@dataclass(frozen=True, kw_only=True)
class Methods:
    """Replaceable steps; the defaults are the package's method.

    Attributes:
        weight_score: scores weight blocks; None: the score of the recipe's rule.
        search_scales: scale search of FP4 weight blocks, used if the recipe has ``clip``.
        compensate: error compensation, used if the recipe has ``compensate``.
        damping: GPTQ's percdamp; see ``assign.compensate.DAMPING``.
        relief: factor on the scores of compensated weights; see ``assign.frontier.RELIEF``.
    """

    weight_score: WeightScore | None = None
    search_scales: ScaleSearch = search_scale_codes
    compensate: Compensate = compensated
    damping: float = DAMPING
    relief: float = RELIEF


DEFAULT_METHODS = Methods()
"""The package's method, nothing replaced."""
