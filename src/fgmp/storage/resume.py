"""Partial results of a run, stored on disk until the final result is written.

Every stage uses the same mechanism. A :class:`StateFile` is one safetensors file with tensors,
facts (JSON), checksums, and the *fingerprint* of the inputs that they depend on. A file with
another fingerprint is not read, and a damaged one is never used. :class:`PartialResults` is a
folder of such files, one per stage or part of a stage, named by the fingerprint of the stage's
inputs.

Writing is atomic. A failure to write, as on a full disk, is only a warning: the state is still in
memory, and the run goes on without being resumable.
"""

import json
import re
import signal
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fgmp.errors import InputError
from fgmp.storage.atomic import replacing
from fgmp.storage.fingerprint import parts

SAVE_EVERY_SECONDS = 120
"""Seconds between two writes of a running stage's state."""

_METADATA = "fgmp_state"
"""Metadata key of a state file: JSON of fingerprint, facts, and CRC-32 of tensors and facts."""


@dataclass(frozen=True)
class State:
    """Content of a state file.

    Attributes:
        tensors: tensors by name, on the CPU.
        facts: other values, of JSON types.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


class StateMismatchError(InputError):
    """A state file belongs to other inputs.

    Attributes:
        path: the state file.
        differing: key of the first digest in the fingerprint that differs.
    """

    def __init__(self, path: Path, differing: str) -> None:
        super().__init__(f"{path}: state of another {differing}; name another file, or delete it")
        self.path, self.differing = path, differing


@dataclass(frozen=True)
class StateFile:
    """One file of resumable state.

    Attributes:
        path: safetensors file.
        fingerprint: digests of the inputs that the state depends on, by kind of input.
    """

    path: Path
    fingerprint: Mapping[str, str]

    def load(self) -> State | None:
        """Read the state; None if there is no file.

        Raises:
            StateMismatchError: the state belongs to other inputs.
            InputError: not a state file, or damaged; the message names the tensor.
        """
        if not self.path.exists():
            return None
        if self.path.is_dir():
            raise InputError(f"{self.path}: is a folder, not a state file")
        advice = "name another file, or move this one away"  # it may be another program's file
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if _METADATA not in metadata:
                    raise ValueError(f"no {_METADATA!r} in its metadata")
                advice = "delete it"
                saved = json.loads(metadata[_METADATA])
                if saved["fingerprint"] != dict(self.fingerprint):
                    raise StateMismatchError(self.path, self._differing(saved["fingerprint"]))
                tensors = {name: file.get_tensor(name) for name in saved["crc32"]}
                if tensors.keys() != set(file.keys()):  # damage can make two names equal
                    raise ValueError("a tensor without a checksum")
            self._verify(tensors, saved)
            return State(tensors, saved["facts"])
        except InputError:
            raise
        except (OSError, SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{self.path}: not a state file ({error}); {advice}") from error

    def store(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Write the state, replacing the file; a failure is a warning."""
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        saved: dict[str, Any] = {
            "fingerprint": dict(self.fingerprint),
            "facts": dict(facts or {}),
            "crc32": {name: _crc32(tensor) for name, tensor in tensors.items()},
        }
        saved["facts_crc32"] = zlib.crc32(json.dumps(saved["facts"], sort_keys=True).encode())
        try:
            with replacing(self.path) as draft:
                save_file(tensors, draft, metadata={_METADATA: json.dumps(saved)})
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{self.path}: could not be written ({error}); this stage could not be resumed",
                stacklevel=2,
            )

    def _verify(self, tensors: dict[str, Tensor], saved: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if _crc32(tensor) != saved["crc32"][name]:
                raise InputError(
                    f"{self.path}: tensor {name} is damaged (CRC-32 differs); delete it"
                )
        if zlib.crc32(json.dumps(saved["facts"], sort_keys=True).encode()) != saved["facts_crc32"]:
            raise InputError(f"{self.path}: its facts are damaged (CRC-32 differs); delete it")

    def _differing(self, stored: object) -> str:
        digests = stored if isinstance(stored, dict) else {}
        differing = (k for k, digest in self.fingerprint.items() if digests.get(k) != digest)
        return next(differing, "kind")


@dataclass(frozen=True)
class PartialResults:
    """Partial results of one stage: state files in a folder, named by a fingerprint.

    Another model, text or recipe has another fingerprint, so only the same run reads these files. A
    damaged file is reported and counts as absent: that part is computed again.

    Attributes:
        folder: contains the files of all stages.
        key: fingerprint of the stage's inputs.
        report: called with a line about a file that cannot be used.
    """

    folder: Path
    key: str
    report: Callable[[str], None] = lambda line: None

    def load(self, part: str) -> State | None:
        """Read the state of a part; None if there is none or it is damaged."""
        try:
            return self.file(part).load()
        except InputError as error:
            self.report(f"{error}: {part} is done again")
            return None

    def store(
        self, part: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Store the state of a part."""
        self.file(part).store(tensors, facts)

    def unusable(self, part: str, why: Exception) -> None:
        """Report that the state of a part lacks what this run needs; ``why`` says how."""
        self.report(f"{self.file(part).path}: not {part} of this run ({why!r}): it is done again")

    def file(self, part: str) -> StateFile:
        """State file of a part."""
        name = f"{self.key[:16]}-{part.replace(' ', '-')}.safetensors"
        return StateFile(self.folder / name, {"run": self.key, "part": part})


class Periodic:
    """Timer that says when to store the state of a running stage."""

    def __init__(self, seconds: float = SAVE_EVERY_SECONDS) -> None:
        self.seconds, self._last = seconds, time.monotonic()

    def due(self) -> bool:
        """Whether ``seconds`` have passed since creation or the last True."""
        now = time.monotonic()
        if now - self._last <= self.seconds:
            return False
        self._last = now
        return True


_OWN = re.compile(r"[0-9a-f]{16}-[^/]*\.safetensors")
"""Names of the files that :class:`PartialResults` writes."""


def require_own(folder: Path) -> None:
    """Check that a folder of partial results is absent, or a folder and no link to one.

    Raises:
        InputError: it is something else, which nothing here may write to or delete from.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder}: must be a folder of partial results, got a link or a file")


def forget(folder: Path) -> None:
    """Remove the partial results of all runs, and the folder if it contains nothing else.

    A link is not followed, and files of other names are not touched.
    """
    if folder.is_symlink():
        return
    with suppress(OSError):
        for file in folder.iterdir():
            if _OWN.fullmatch(file.name) and not file.is_dir():
                file.unlink()
        folder.rmdir()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within this context, the first Ctrl-C or SIGTERM is delayed to the end; a second is not.

    A run cannot resume from sums over half a sequence.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    received = []

    def note(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, usual[number])

    usual = {int(n): signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    for number in received:
        signal.raise_signal(number)


def _crc32(tensor: Tensor) -> int:
    """Checksum of a tensor's type, shape and values."""
    checksum = 0
    for part in parts(tensor):
        checksum = zlib.crc32(part, checksum)
    return checksum
