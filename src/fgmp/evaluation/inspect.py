"""Inspect a checkpoint: integrity, sizes, and distribution of its FP8 blocks.

Only the files are read; the model is not built.
"""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CheckpointConfig
from fgmp.pack.folder import weight_files
from fgmp.pack.planes import PackedWeight
from fgmp.pack.reader import Reader
from fgmp.pack.stream import image_bytes

_LAYER = re.compile(r"^(?P<stem>.*?)(?:\.(?P<index>\d+)\.)(?P<kind>.*)$")


@dataclass(frozen=True)
class LinearFacts:
    """One packed weight.

    Attributes:
        name: name of the linear.
        n, k: rows and columns.
        blocks, fp8_blocks: number of all blocks and of FP8 blocks.
        plane_bytes: bytes of its planes.
        image_bytes: bytes of its streamed image.
    """

    name: str
    n: int
    k: int
    blocks: int
    fp8_blocks: int
    plane_bytes: int
    image_bytes: int

    @property
    def fp8_share(self) -> float:
        """Fraction of FP8 blocks."""
        return self.fp8_blocks / self.blocks


@dataclass(frozen=True)
class ByLayout:
    """A size in both layouts: ``planes`` on disk, and the ``streamed_image`` for hardware."""

    planes: float
    streamed_image: float


@dataclass(frozen=True)
class Fp8Shares:
    """Fractions of FP8 blocks.

    Attributes:
        weights: fraction of all weight blocks.
        by_layer, by_kind, by_linear: fractions by layer index, by kind of layer, by linear.
        activations_by_site: fractions of activation blocks at calibration, by site.
    """

    weights: float
    by_layer: dict[str, float]
    by_kind: dict[str, float]
    by_linear: dict[str, float]
    activations_by_site: dict[str, float]


@dataclass(frozen=True)
class Inspection:
    """Result of ``fgmp inspect``.

    Attributes:
        path: the checkpoint folder.
        tensors, file_bytes: number of tensors and bytes of files that were read and verified.
        linears, quantized_weights: number of packed linears and of their elements.
        fp8_share: fractions of FP8 blocks.
        bits_per_weight, bytes: size of the quantized weights, by layout.
        unquantized: names of matrices that are not quantized.
        quantized_share: fraction of matrix elements that are quantized.
        recipe, calibration, clip, tune: as stored, without the digest of the calibration text.
    """

    path: str
    tensors: int
    file_bytes: int
    linears: int
    quantized_weights: int
    fp8_share: Fp8Shares
    bits_per_weight: ByLayout
    bytes: ByLayout
    unquantized: list[str]
    quantized_share: float | None
    recipe: dict[str, Any]
    calibration: dict[str, Any]
    clip: dict[str, Any] | None
    tune: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return asdict(self)


def inspect_checkpoint(directory: str | Path) -> Inspection:
    """Verify a whole checkpoint and describe it.

    Raises:
        InputError: no checkpoint can be read there.
        CheckpointError: names the first fault by file, tensor, rule and value.
    """
    directory = Path(directory)
    raw = checkpoint.read_config(directory)
    files = weight_files(directory)
    reader = Reader(files)
    reader.verify_files()
    reader.verify()
    config = CheckpointConfig.from_dict(raw["quantization_config"], str(directory / "config.json"))
    reader.require_listed(config.holders)
    facts = _linear_facts(reader, config)
    elements = sum(f.n * f.k for f in facts)
    planes, image = sum(f.plane_bytes for f in facts), sum(f.image_bytes for f in facts)
    return Inspection(
        path=str(directory),
        tensors=len(reader.names),
        file_bytes=sum(f.stat().st_size for f in files),
        linears=len(facts),
        quantized_weights=elements,
        fp8_share=Fp8Shares(
            weights=sum(f.fp8_blocks for f in facts) / sum(f.blocks for f in facts),
            by_layer=_shares(facts, "index"),
            by_kind=_shares(facts, "kind"),
            by_linear={f.name: f.fp8_share for f in facts},
            activations_by_site={n: 1 - s.fp4_fraction for n, s in config.sites.items()},
        ),
        bits_per_weight=ByLayout(8 * planes / elements, 8 * image / elements),
        bytes=ByLayout(planes, image),
        unquantized=config.result.get("unquantized", []),
        quantized_share=config.result.get("quantized_share"),
        recipe=config.recipe,
        calibration={k: v for k, v in config.calibration.items() if k != "digest"},
        clip=config.result.get("clip"),
        tune=config.result.get("tune", {}),
    )


def layer_and_kind(name: str) -> tuple[str, str]:
    """Layer index and kind of a linear, such as ``3`` and ``mlp.up_proj``.

    All experts of a layer are of one kind. A name without an index is both.
    """
    match = _LAYER.match(name)
    if match is None:
        return name, name
    return match["index"], re.sub(r"\.\d+\.", ".*.", match["kind"])


def linear_facts(name: str, packed: PackedWeight) -> LinearFacts:
    """Facts of one packed weight."""
    fp8, blocks = int(packed.is_fp8().sum()), packed.is_fp8().numel()
    image = image_bytes(blocks, fp8)
    return LinearFacts(name, packed.n, packed.k, blocks, fp8, packed.nbytes, image)


def _linear_facts(reader: Reader, config: CheckpointConfig) -> list[LinearFacts]:
    facts = []
    for owner, site in config.sites.items():
        _, weights = reader.group(owner, site, config.shared)
        for name, packed in weights.items():
            if name in config.shared:
                continue
            facts.append(linear_facts(name, packed))
    return facts


def _shares(facts: list[LinearFacts], part: str) -> dict[str, float]:
    """Fraction of FP8 blocks by layer index or by kind of layer, in order of appearance."""
    sums: dict[str, list[int]] = {}
    for fact in facts:
        key = layer_and_kind(fact.name)[0 if part == "index" else 1]
        total = sums.setdefault(key, [0, 0])
        total[0] += fact.fp8_blocks
        total[1] += fact.blocks
    return {key: fp8 / blocks for key, (fp8, blocks) in sums.items()}
