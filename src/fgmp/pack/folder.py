"""Files of a checkpoint folder, and the rules for opening them.

``fgmp inspect``, :func:`fgmp.load`, ``from_pretrained`` and ``fgmp hw`` all use these functions, so
the files that are inspected are those that run:

* the weights are ``model.safetensors``, or the shards that ``model.safetensors.index.json`` names.
  A folder that has both, or any other file of weights, is ambiguous and refused; so is a
  ``transformers_weights`` in ``config.json``, by which Transformers would read another file;
* every name in the index or in a list of checksums stays inside the folder;
* only regular files are opened, or links to them, as hub caches have. A pipe or device would be
  read without end;
* JSON has a limit on its size and depth.
"""

import json
import stat
from pathlib import Path, PurePosixPath
from typing import Any

from fgmp.errors import CheckpointError, InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

MAX_JSON_BYTES = 256 << 20
"""Largest JSON file that is read. An index of a million tensors takes about 100 MB."""

_WEIGHT_PATTERNS = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "*.pt", "*.pth")
_OTHER_WEIGHTS = "transformers_weights"


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, unreadable or no regular file.
        CheckpointError: it is larger than :data:`MAX_JSON_BYTES`, or not JSON.
    """
    require_regular(path)
    size = path.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: JSON of at most {MAX_JSON_BYTES:,} bytes is read, got {size:,}"
        )
    try:
        return json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except RecursionError as error:
        raise CheckpointError(f"{path}: not JSON: nested too deep") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error


def require_regular(path: Path) -> None:
    """Check that a path is a regular file or a link to one.

    Raises:
        InputError: names the file and what it is.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InputError(f"{path}: {reason}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"{path}: is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: must be a regular file, got a pipe, socket or device")


def require_part(path: Path) -> None:
    """Check that a file of a checkpoint exists and is regular.

    Raises:
        CheckpointError: names the file and what it is.
    """
    try:
        require_regular(path)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise CheckpointError(f"{path}: unreadable or truncated: {reason}") from error


def require_inside(name: object, source: Path) -> str:
    """Check that a file name in ``source`` stays inside the folder, and return it.

    Raises:
        CheckpointError: not text, absolute, with ``..``, or no name that a file can have.
    """
    if isinstance(name, str) and name and "\0" not in name and "\\" not in name:
        try:
            name.encode()
            path = PurePosixPath(name)
            is_inside = not path.is_absolute() and ".." not in path.parts and str(path) == name
        except UnicodeEncodeError:
            is_inside = False
        if is_inside:
            return name
    raise CheckpointError(
        f"{source}: malformed: file names must stay inside its folder, got {name!r:.80}"
    )


def weight_files(directory: Path) -> list[Path]:
    """Paths of the safetensors files that hold a checkpoint's tensors.

    Raises:
        CheckpointError: a file is missing, the index is malformed, or the folder is ambiguous.
    """
    single, index = directory / WEIGHTS, directory / INDEX
    if index.exists() or index.is_symlink():
        files = [directory / name for name in _shards(index)]
        if single.exists() and single not in files:
            raise CheckpointError(
                f"{directory}: holds both {WEIGHTS} and {INDEX}, which names other files: remove "
                "what does not belong to the checkpoint"
            )
    else:
        files = [single]
    for file in files:
        require_part(file)
    _refuse_strays(directory, files)
    return files


def require_single_source(config: dict[str, Any], path: Path) -> None:
    """Check that a configuration names no other file of weights.

    Raises:
        CheckpointError: names the key and its value.
    """
    if config.get(_OTHER_WEIGHTS) is not None:
        raise CheckpointError(
            f"{path}: {_OTHER_WEIGHTS} must be absent, got {config[_OTHER_WEIGHTS]!r}: the weights "
            f"are {WEIGHTS} or the files that {INDEX} names"
        )


def _shards(index: Path) -> list[str]:
    try:
        content = read_json(index)
    except CheckpointError as error:
        raise CheckpointError(f"{index}: malformed: {error}") from error
    shards = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(
            f"{index}: malformed: weight_map must map tensors to files, got {shards!r:.80}"
        )
    names = sorted({require_inside(name, index) for name in shards.values()})
    for name in names:
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: malformed: shards must be safetensors, got {name!r}")
    return names


def _refuse_strays(directory: Path, files: list[Path]) -> None:
    """Check that a folder has no other files of weights, which another program might read."""
    for pattern in _WEIGHT_PATTERNS:
        for path in sorted(directory.glob(pattern)):
            if path not in files:
                raise CheckpointError(
                    f"{path}: is no part of the checkpoint, whose tensors are in "
                    f"{', '.join(file.name for file in files[:3])}: remove it"
                )
