"""Checksums of a checkpoint, stored in the metadata of its safetensors files.

Every tensor has a CRC-32. Without one most flipped bits would go unnoticed: they give valid codes,
and a slightly wrong model. The other files of the folder have a CRC-32 each, and so has every key
of ``config.json``, so that a reader can name the one that was edited. ``docs/format.md`` specifies
the metadata.
"""

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgmp.errors import CheckpointError

TENSORS = "fgmp_crc32"
"""Metadata key of a JSON map from tensor name to CRC-32, eight hex digits."""
FILES = "fgmp_files_crc32"
"""Metadata key of a JSON map from the name of every other file in the folder to its CRC-32."""
FILES_LIST = "fgmp_list_crc32"
"""Metadata key of the CRC-32 of the text of :data:`FILES`. It tells a damaged map from a damaged
file. fgmp 0.1.0 wrote none."""
CONFIG = "fgmp_config_crc32"
"""Metadata key of a JSON map from keys of ``config.json`` to the CRC-32 of their values. The keys
within ``quantization_config`` are listed one by one, as ``quantization_config.KEY``. fgmp 0.1.0
wrote none."""

CHANGED = "it was changed after the checkpoint was written"

_NESTED = "quantization_config"


def of_bytes(data: bytes | memoryview, start: int = 0) -> str:
    """CRC-32 of bytes, eight lower-case hex digits."""
    return f"{zlib.crc32(data, start):08x}"


def of_tensor(tensor: Tensor) -> str:
    """CRC-32 over the text ``"dtype shape "`` and a tensor's bytes."""
    prefix = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return of_bytes(flat.numpy().data, zlib.crc32(prefix))


def of_config(config: Mapping[str, Any]) -> dict[str, str]:
    """CRC-32 of the value of every key of ``config.json``, as canonical JSON."""
    values = {key: value for key, value in config.items() if key != _NESTED}
    nested = config.get(_NESTED)
    if isinstance(nested, Mapping):
        values |= {f"{_NESTED}.{key}": value for key, value in nested.items()}
    return {key: of_bytes(json.dumps(v, sort_keys=True).encode()) for key, v in values.items()}


def metadata(
    tensors: Mapping[str, Tensor], files: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, str]:
    """Metadata of one safetensors file.

    Args:
        tensors: tensors of the file, by name.
        files: CRC-32 of every other file of the folder, by name.
        config: content of ``config.json``.
    """
    listed = json.dumps(files)
    return {
        "format": "pt",
        TENSORS: json.dumps({name: of_tensor(tensor) for name, tensor in tensors.items()}),
        FILES: listed,
        FILES_LIST: of_bytes(listed.encode()),
        CONFIG: json.dumps(of_config(config)),
    }


def read_tensors(file: Path, metadata: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Read the CRC-32 of every tensor of a file, by name.

    Raises:
        CheckpointError: a map is missing or malformed, or lacks a tensor of ``names``.
    """
    try:
        sums = json.loads(metadata[TENSORS])
        dict(json.loads(metadata[FILES]))
        for name in names:
            sums[name]
        return {str(name): str(crc32) for name, crc32 in sums.items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: its metadata must hold {TENSORS} of every tensor and {FILES}, got {error!r}"
        ) from error


def read_files(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Read the CRC-32 of the other files, by name, after checking the metadata itself.

    Raises:
        CheckpointError: an unknown key, or a map that was changed.
    """
    allowed_keys = {"format", TENSORS, FILES, FILES_LIST, CONFIG}
    if unknown := metadata.keys() - allowed_keys:
        raise CheckpointError(
            f"{file}: its metadata must hold {', '.join(sorted(allowed_keys))} only, got "
            f"{min(unknown)}: {CHANGED}"
        )
    listed = metadata[FILES]
    actual = of_bytes(listed.encode())
    expected = metadata.get(FILES_LIST, actual)
    if actual != expected:
        raise CheckpointError(
            f"{file}: its {FILES} must have CRC-32 {expected}, got {actual}: {CHANGED}"
        )
    return dict(json.loads(listed))


def edited_keys(file: Path, metadata: Mapping[str, str], config: Mapping[str, Any]) -> list[str]:
    """Keys of ``config.json`` whose values differ from those that were written.

    Returns:
        Keys as in :data:`CONFIG`; none if the file does not record them.

    Raises:
        CheckpointError: the map of checksums is malformed.
    """
    try:
        written = dict(json.loads(metadata.get(CONFIG, "{}")))
    except (RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: its {CONFIG} is malformed ({error!r})") from error
    if not written:
        return []
    actual = of_config(config)
    return sorted(key for key in written | actual if written.get(key) != actual.get(key))
