"""What a checkpoint holds: integrity, sizes, and where its FP8 blocks are.

Reads the files alone; the model is not built.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CheckpointConfig, Reader
from fgmp.pack.stream import image_bytes

_LAYER = re.compile(r"^(?P<stem>.*?)(?:\.(?P<index>\d+)\.)(?P<kind>.*)$")


@dataclass(frozen=True)
class LinearFacts:
    """One packed weight: blocks in all and in FP8, bytes of its planes and of its image."""

    name: str
    n: int
    k: int
    blocks: int
    fp8_blocks: int
    plane_bytes: int
    image_bytes: int

    @property
    def fp8_share(self) -> float:
        """Share of FP8 blocks."""
        return self.fp8_blocks / self.blocks


def inspect_checkpoint(directory: str | Path) -> dict[str, Any]:
    """Validate a checkpoint whole and describe it in plain JSON types.

    Raises:
        CheckpointError: names the first fault by file, tensor, rule and value.
    """
    directory = Path(directory)
    raw = checkpoint.read_config(directory)
    files = checkpoint.tensor_files(directory)
    reader = Reader(files)
    reader.verify_files()
    reader.verify()
    config = CheckpointConfig.from_dict(raw["quantization_config"], str(directory / "config.json"))
    reader.require_listed(config.linears)
    facts = []
    for owner, site in config.sites.items():
        _, weights = reader.group(owner, site)
        for name, packed in weights.items():
            fp8 = int(packed.is_fp8().sum())
            blocks = packed.is_fp8().numel()
            facts.append(
                LinearFacts(
                    name, packed.n, packed.k, blocks, fp8, packed.nbytes, image_bytes(blocks, fp8)
                )
            )
    elements = sum(f.n * f.k for f in facts)
    blocks = sum(f.blocks for f in facts)
    return {
        "path": str(directory),
        "intact": True,
        "tensors": len(reader.names),
        "file_bytes": sum(f.stat().st_size for f in files),
        "linears": len(facts),
        "quantized_weights": elements,
        "fp8_share": {
            "weights": sum(f.fp8_blocks for f in facts) / blocks,
            "by_layer": _shares(facts, "index"),
            "by_kind": _shares(facts, "kind"),
            "by_linear": {f.name: f.fp8_share for f in facts},
            "activations_by_site": {n: 1 - s.fp4_fraction for n, s in config.sites.items()},
        },
        "bits_per_weight": {
            "planes": 8 * sum(f.plane_bytes for f in facts) / elements,
            "streamed_image": 8 * sum(f.image_bytes for f in facts) / elements,
        },
        "bytes": {
            "planes": sum(f.plane_bytes for f in facts),
            "streamed_image": sum(f.image_bytes for f in facts),
        },
        "unquantized": config.result.get("unquantized", []),
        "quantized_share": config.result.get("quantized_share"),
        "recipe": config.recipe,
        "calibration": {k: v for k, v in config.calibration.items() if k != "digest"},
        "clip": config.result.get("clip"),
        "tune": config.result.get("tune", {}),
    }


def _shares(facts: list[LinearFacts], part: str) -> dict[str, float]:
    """FP8 share by layer index or by kind of layer, in order of appearance."""
    sums: dict[str, list[int]] = {}
    for fact in facts:
        match = _LAYER.match(fact.name)
        key = match[part] if match else fact.name
        # Experts of one layer are one kind: their own number is no part of it.
        key = re.sub(r"\.\d+\.", ".*.", key)
        total = sums.setdefault(key, [0, 0])
        total[0] += fact.fp8_blocks
        total[1] += fact.blocks
    return {key: fp8 / blocks for key, (fp8, blocks) in sums.items()}
