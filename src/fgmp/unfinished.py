"""What a run has done before it ends, kept as tensors, so that hours of work survive Ctrl-C.

A folder holds one safetensors file for each part of the work, written at once under a name that
begins with a key: the run's own, which another model, text or recipe does not have. Nothing but the
same run reads it.
"""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fgmp.errors import InputError
from fgmp.files import replacing


@dataclass(frozen=True)
class Unfinished:
    """Parts of the run that ``key`` names, kept in ``folder``."""

    folder: Path
    key: str

    def load(self, part: str) -> dict[str, Tensor] | None:
        """Tensors of a part, by name, on the CPU; None if none were kept.

        Raises:
            InputError: the file is damaged.
        """
        file = self._file(part)
        if not file.exists():
            return None
        try:
            found: dict[str, Tensor] = load_file(file)
            return found
        except (OSError, SafetensorError) as error:
            raise self.damaged(part, error) from error

    def store(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep a part; a full disk costs no more than the resumption."""
        file = self._file(part)
        try:
            with replacing(file) as draft:
                save_file({name: t.contiguous() for name, t in tensors.items()}, draft)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{file}: could not be written ({error}); this part could not be resumed",
                stacklevel=2,
            )

    def damaged(self, part: str, why: Exception) -> InputError:
        """What to raise where a part is not what was kept."""
        return InputError(f"{self._file(part)}: not {part} of this run ({why!r}); delete it")

    def _file(self, part: str) -> Path:
        return self.folder / f"{self.key[:16]}-{part.replace(' ', '-')}.safetensors"


def forget(folder: Path) -> None:
    """Remove all that is kept, of any run, and the folder if nothing else lies in it."""
    with suppress(OSError):
        for file in folder.glob("*.safetensors"):
            file.unlink()
        folder.rmdir()
