"""What a report knows of a checkpoint, before anything is drawn.

Panels whose data a checkpoint lacks are named in :attr:`Checkpoint.missing`, each with the reason
and what to do; everything else is drawn.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fgmp.evaluation.inspect import LinearFacts
from fgmp.evaluation.passages import Passage

SCORES, ENERGY, COMPARISON, PASSAGES, RUN = "scores", "energy", "comparison", "passages", "run"
"""Names of panels that may be missing."""


@dataclass(frozen=True)
class BlockMap:
    """Formats of the blocks of one weight.

    Attributes:
        tile: rows and blocks per entry: 1 for a bit per block, else the side of a square of blocks.
        data: compressed by zlib. With tile 1 one bit per block, row by row, the first in the
            highest bit, 1 for FP8; else one byte per square, 255 times its fraction of FP8 blocks.
    """

    tile: int
    data: bytes


@dataclass(frozen=True)
class Window:
    """Codes of the first blocks of one weight.

    Attributes:
        rows, blocks: size of the window.
        data: compressed by zlib: the scale byte of every block, row by row, then sixteen codes per
            block, one byte each.
    """

    rows: int
    blocks: int
    data: bytes


@dataclass(frozen=True)
class Matrix:
    """One packed weight.

    Attributes:
        facts: name, sizes and number of FP8 blocks.
        layer, kind: from its name, see :func:`fgmp.evaluation.inspect.layer_and_kind`.
        t: tensor scale.
        blocks: formats of all blocks.
        window: codes of the first blocks.
    """

    facts: LinearFacts
    layer: str
    kind: str
    t: float
    blocks: BlockMap
    window: Window


@dataclass(frozen=True)
class SiteShare:
    """One activation site.

    Attributes:
        owner: the linear that names it; ``layer`` and ``kind`` are from its name.
        k: channels.
        fp8_share: fraction of FP8 blocks at calibration.
        linears: names of the linears that read it.
    """

    owner: str
    layer: str
    kind: str
    k: int
    fp8_share: float
    linears: list[str]


@dataclass(frozen=True)
class Energy:
    """Energy of matmuls in percent of an accelerator with FP8 lanes only.

    Attributes:
        percent: of all quantized linears.
        all_fp4_percent: with every block in FP4.
        by_layer: by layer index.
    """

    percent: float
    all_fp4_percent: float
    by_layer: dict[str, float]


@dataclass(frozen=True)
class Rows:
    """Rows of ``fgmp compare``, with whatever columns they have, and where they come from."""

    rows: list[dict[str, Any]]
    source: str

    def named(self, name: str) -> dict[str, Any] | None:
        """The row of this name, or None."""
        return next((row for row in self.rows if row["name"] == name), None)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint.

    Attributes:
        name: its folder's name.
        sentences: what was quantized and how, for readers who know no format.
        facts: labelled lines on calibration and provenance.
        recipe: the recipe's fields as text.
        matrices, sites: packed weights and activation sites.
        fp4_weights, fp4_activations: fractions of FP4 blocks.
        bits_per_weight, plane_bytes: size of the quantized weights, every stored byte counted.
        file_bytes: bytes of the safetensors files.
        scores: content of ``fgmp_scores.json``, checked, or None.
        energy, comparison, passages: None if unknown.
        passages_source: what the passages are from.
        missing: reasons by panel.
    """

    name: str
    sentences: list[str]
    facts: dict[str, str]
    recipe: dict[str, str]
    matrices: list[Matrix]
    sites: list[SiteShare]
    fp4_weights: float
    fp4_activations: float | None
    bits_per_weight: float
    plane_bytes: int
    file_bytes: int
    scores: Mapping[str, Any] | None
    energy: Energy | None
    comparison: Rows | None = None
    passages: list[Passage] | None = None
    passages_source: str = ""
    missing: dict[str, str] = field(default_factory=dict)
