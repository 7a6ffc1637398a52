"""What produced a checkpoint: model, command line and versions, for ``fgmp_run.json``.

Folders are private: of a local path only the last part is stored.
"""

import platform
import shlex
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

_PACKAGES = ("fgmp", "torch", "transformers")


def provenance(model_name: str, command: str | None) -> dict[str, Any]:
    """Entries ``source`` and ``versions``.

    Args:
        model_name: folder or hub name of the original.
        command: from :func:`command_line`, if there was one.
    """
    source = {"model": without_folder(model_name)}
    if command is not None:
        source["command"] = command
    versions = {"python": platform.python_version()} | {name: version(name) for name in _PACKAGES}
    return {"source": source, "versions": versions}


def command_line(arguments: Sequence[str]) -> str:
    """A command line that a shell would read, without the folders of local paths."""
    program, *rest = arguments
    name = Path(program).name
    shown = "fgmp" if name == "__main__.py" else name
    return shlex.join([shown, *map(without_folder, rest)]).encode(errors="replace").decode()


def without_folder(name: str) -> str:
    """The last part of a local path; a hub name, an option or a number as it is."""
    option, equals, value = name.partition("=")
    if equals and option.startswith("-"):
        return f"{option}={without_folder(value)}"
    if "/" not in name:
        return name
    local = name.startswith(("/", ".", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).resolve().name if local else name
