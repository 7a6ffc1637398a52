"""Read a checkpoint into the record that a report shows.

Weights are read site by site and verified as for loading; of each only its map, its first codes and
a few numbers are kept in memory. Files that people need but no reader does, ``fgmp_run.json`` and
``fgmp_scores.json``, may be missing or malformed: the panels that need them are then listed as
missing, with the reason.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fgmp.errors import CheckpointError, FGMPError, InputError
from fgmp.evaluation.inspect import layer_and_kind, linear_facts
from fgmp.formats.rules import SENSITIVITIES, QuantizerConfig
from fgmp.formats.spec import BLOCK
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import RUN, SCORES, CheckpointConfig
from fgmp.pack.folder import CONFIG, read_json, weight_files
from fgmp.pack.planes import PackedWeight
from fgmp.pack.reader import Reader
from fgmp.report import records
from fgmp.report.blocks import block_map, window
from fgmp.report.energy import energy_of
from fgmp.report.records import Checkpoint, Energy, Matrix, SiteShare
from fgmp.report.scores import read_scores

_LONGEST = 400
"""Characters of a text from a checkpoint that are shown."""


def weight_shapes(directory: Path) -> list[tuple[int, int]]:
    """N and K of every packed weight of a checkpoint, from its files.

    Raises:
        InputError: no checkpoint can be read there.
        CheckpointError: it breaks a rule of the format.
    """
    config, reader = _open(directory)
    shapes = [reader.tensor(f"{name}.weight_shape") for name in config.holders]
    for name, shape in zip(config.holders, shapes, strict=True):
        if tuple(shape.shape) != (2,):
            raise CheckpointError(
                f"{directory}: {name}.weight_shape must have shape [2], got {list(shape.shape)}"
            )
    return [(int(shape[0]), int(shape[1])) for shape in shapes]


def gather(directory: Path, tile: int, window_size: tuple[int, int]) -> Checkpoint:
    """Read one checkpoint, without comparison and passages.

    Args:
        directory: the checkpoint.
        tile: of the block maps, see :func:`fgmp.report.blocks.tile_for`.
        window_size: rows and blocks per row whose codes are kept.

    Raises:
        InputError, CheckpointError: as for :func:`weight_shapes`.
    """
    config, reader = _open(directory)
    raw = checkpoint.read_config(directory)
    reader.require_own_config(raw, directory / CONFIG)
    reader.require_listed(config.holders)
    missing: dict[str, str] = {}
    matrices: list[Matrix] = []
    sites: list[SiteShare] = []
    for owner, site in config.sites.items():
        _, weights = reader.group(owner, site, config.shared)
        layer, kind = layer_and_kind(owner)
        share = 1 - site.fp4_fraction
        sites.append(SiteShare(owner, layer, kind, weights[owner].k, share, site.linears))
        matrices += [
            _matrix(name, packed, tile, window_size)
            for name, packed in weights.items()
            if name not in config.shared
        ]
    blocks = sum(m.facts.blocks for m in matrices)
    elements = sum(m.facts.n * m.facts.k for m in matrices)
    plane_bytes = sum(m.facts.plane_bytes for m in matrices)
    fp4_weights = 1 - sum(m.facts.fp8_blocks for m in matrices) / blocks
    fp4_activations = _number(config.result.get("fp4_activations"))
    run = _run(directory, missing)
    return Checkpoint(
        name=directory.absolute().name,
        sentences=_sentences(config, raw, fp4_weights, fp4_activations, 8 * plane_bytes / elements),
        facts=_facts(config, run),
        recipe={key: _text(value) for key, value in config.recipe.items()},
        matrices=matrices,
        sites=sites,
        fp4_weights=fp4_weights,
        fp4_activations=fp4_activations,
        bits_per_weight=8 * plane_bytes / elements,
        plane_bytes=plane_bytes,
        file_bytes=sum(file.stat().st_size for file in weight_files(directory)),
        scores=_scores(directory, missing),
        energy=_energy(config, matrices, sites, missing),
        missing=missing,
    )


def _open(directory: Path) -> tuple[CheckpointConfig, Reader]:
    raw = checkpoint.read_config(directory)
    where = str(directory / CONFIG)
    config = CheckpointConfig.from_dict(raw["quantization_config"], where)
    return config, Reader(weight_files(directory))


def _matrix(name: str, packed: PackedWeight, tile: int, size: tuple[int, int]) -> Matrix:
    layer, kind = layer_and_kind(name)
    return Matrix(
        linear_facts(name, packed),
        layer,
        kind,
        packed.t.item(),
        block_map(packed.is_fp8(), tile),
        window(packed, size),
    )


def _scores(directory: Path, missing: dict[str, str]) -> dict[str, Any] | None:
    try:
        scores = read_scores(directory)
    except FGMPError as error:
        missing[records.SCORES] = str(error)
        return None
    if scores is None:
        missing[records.SCORES] = (
            f"the checkpoint has no {SCORES}: an older fgmp or another program made it. "
            "Quantize again to have it"
        )
    return scores


def _energy(
    config: CheckpointConfig,
    matrices: list[Matrix],
    sites: list[SiteShare],
    missing: dict[str, str],
) -> Energy | None:
    chosen = config.recipe.get("sensitivities")
    sensitivities = chosen if chosen in SENSITIVITIES else QuantizerConfig.sensitivities
    quantizers = {QuantizerConfig(s.rule, s.scales, sensitivities) for s in config.sites.values()}
    try:
        return energy_of(matrices, sites, config.shared, quantizers)
    except InputError as error:
        missing[records.ENERGY] = f"{error}. `fgmp hw energy` measures it"
        return None


def _run(directory: Path, missing: dict[str, str]) -> Mapping[str, Any]:
    """Content of ``fgmp_run.json``, or nothing."""
    path = directory / RUN
    try:
        run = read_json(path) if path.exists() else None
    except FGMPError:
        run = None
    if not isinstance(run, dict):
        missing[records.RUN] = (
            f"the checkpoint has no readable {RUN}: model, command line, versions, time and memory "
            "of the run are unknown"
        )
        return {}
    return run


def _sentences(
    config: CheckpointConfig,
    raw: Mapping[str, Any],
    fp4_weights: float,
    fp4_activations: float | None,
    bits_per_weight: float,
) -> list[str]:
    """What was quantized and how, for readers who know no format."""
    share = _number(config.result.get("quantized_share"))
    part = "the model's large matrices" if share is None else f"{share:.0%} of the matrix weights"
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(str(dtype))
    before = f" instead of {bits}" if bits else ""
    also = ""
    if fp4_activations is not None:
        also = f" and {fp4_activations:.0%} of the values that flow between the layers"
    return [
        f"This is a compressed copy of a language model: {part} now take {bits_per_weight:.2f} "
        f"bits each on average{before}.",
        f"In groups of {BLOCK} neighbours, {fp4_weights:.0%} of the weights{also} are held in 4 "
        "bits (NVFP4), and the rest, where rounding would hurt most, in 8 bits (FP8).",
    ]


def _facts(config: CheckpointConfig, run: Mapping[str, Any]) -> dict[str, str]:
    """Labelled lines on calibration and provenance; what is unknown has no line."""
    calibration, recipe, result = config.calibration, config.recipe, config.result
    source, versions = _mapping(run.get("source")), _mapping(run.get("versions"))
    seconds, peak = _mapping(run.get("seconds")), _number(run.get("peak_bytes"))
    total = _number(seconds.get("total"))
    unquantized = result.get("unquantized", [])
    more = f" and {len(unquantized) - 12} more" if len(unquantized) > 12 else ""
    lines: dict[str, Any] = {
        "model": source.get("model"),
        "command line": source.get("command"),
        "calibration text": calibration.get("text"),
        "calibration set": _sequences(calibration),
        "seed": recipe.get("seed"),
        "passes ran in": calibration.get("dtype"),
        "text fingerprint": calibration.get("fingerprint"),
        "policy and rule": _joined(recipe.get("policy"), recipe.get("rule")),
        "budget": _pairs(result.get("budget")),
        "scale search": _used(result.get("clip")),
        "tuning": _used(result.get("tune")),
        "not quantized": ", ".join(unquantized[:12]) + more or "no matrix",
        "written by": _joined(config.producer.get("name"), config.producer.get("version")),
        "versions": _pairs(versions),
        "time": None if total is None else f"{total:,.0f} s",
        "peak memory": None if peak is None else f"{peak / 1e9:.2f} GB",
    }
    return {label: _text(value) for label, value in lines.items() if value not in (None, "")}


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _number(value: Any) -> float | None:
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if usable else None


def _sequences(calibration: Mapping[str, Any]) -> str | None:
    count, length = calibration.get("sequences"), calibration.get("seq_len")
    if count is None:
        return None
    return f"{count} sequences" + (f" of {length} tokens" if length is not None else "")


def _joined(*parts: Any) -> str:
    return ", ".join(str(part) for part in parts if part is not None)


def _pairs(value: Any) -> str:
    return ", ".join(f"{key} {number}" for key, number in _mapping(value).items())


def _used(value: Any) -> str | None:
    if "used" not in _mapping(value):
        return None
    return "used" if value["used"] else "not used"
