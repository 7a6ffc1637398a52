"""What a checkpoint keeps of its block scores: content of ``fgmp_scores.json``.

The scores themselves are eight bytes per block and are not stored. A histogram per weight and per
activation site is, and the scores of the first blocks of each weight, in bf16. docs/format.md
describes the file; ``fgmp report`` draws it.
"""

import base64
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fgmp.assign.frontier import Fractions
from fgmp.assign.policy import weight_masks
from fgmp.quantization.task import Scores
from fgmp.sensitivity.histogram import global_threshold
from fgmp.sensitivity.summary import BINS_PER_OCTAVE, summarize

WINDOW = (64, 16)
"""Rows and blocks per row whose scores are stored, from the first of each weight."""

_WINDOW_BYTES = 1 << 20
"""Limit on all windows together; with very many weights the windows have fewer rows."""


def score_summaries(scores: Scores, fractions: Fractions, *, clipped: bool) -> dict[str, Any]:
    """Content of the file, as plain JSON types.

    Args:
        scores: block scores of the run.
        fractions: fractions of FP4 blocks that were requested.
        clipped: whether the scores are those under searched scales.
    """
    variant = next(v for v in scores.variants if v.clipped == clipped or len(scores.variants) == 1)
    _, thresholds = weight_masks(scores.policy, variant.scores, fractions.weights)
    window = _window(variant.scores)
    return {
        "version": 1,
        "bins_per_octave": BINS_PER_OCTAVE,
        "scale_search": variant.clipped,
        "tokens": scores.predictions,
        "window": list(window),
        "weights": {
            name: {
                **summarize(of_weight, thresholds[name]).to_dict(),
                "scores": _encoded(of_weight[: window[0], : window[1]]),
            }
            for name, of_weight in variant.scores.items()
        },
        "activations": _activations(scores, fractions.activations),
    }


def _activations(scores: Scores, fp4_fraction: float) -> dict[str, Any]:
    """Summaries by site; empty where no threshold followed from scores."""
    histograms = scores.histograms
    if not any(histogram.total for histogram in histograms.values()):
        return {}
    shared = global_threshold(list(histograms.values()), fp4_fraction)
    summaries = {}
    for owner, histogram in histograms.items():
        own = scores.policy.per_layer and histogram.total
        threshold = global_threshold([histogram], fp4_fraction) if own else shared
        losses, counts = histogram.occupied()
        summaries[owner] = summarize(losses, threshold, counts).to_dict()
    return summaries


def _window(scores: Mapping[str, Tensor]) -> tuple[int, int]:
    rows, blocks = WINDOW
    limit = _WINDOW_BYTES // (torch.bfloat16.itemsize * blocks * max(1, len(scores)))
    return max(1, min(rows, limit)), blocks


def _encoded(scores: Tensor) -> str:
    """Scores as base64 of little-endian bf16, row by row."""
    raw = scores.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8)
    return base64.b64encode(raw.numpy().tobytes()).decode()
