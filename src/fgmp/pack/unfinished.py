"""Packed weights of a run that has not finished, so that hours of compensation survive Ctrl-C.

A folder holds one safetensors file for each stage, written at once under a name that begins with a
key: the run's own, which another model, text or recipe does not have. It is no checkpoint: nothing
but the same run reads it, and what has another key is left alone until the folder goes.
"""

import shutil
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fgmp.errors import InputError
from fgmp.files import replacing
from fgmp.pack.planes import PackedWeight


@dataclass(frozen=True)
class Unfinished:
    """Stages of the run that ``key`` names, kept in ``folder``."""

    folder: Path
    key: str

    def load(self, stage: int, names: Collection[str]) -> dict[str, PackedWeight] | None:
        """Weights of a stage, by linear, on the CPU; None if they are not there.

        Raises:
            InputError: the file is damaged, or holds other linears than ``names``.
        """
        file = self._file(stage)
        if not file.exists():
            return None
        planes: dict[str, dict[str, object]] = {name: {} for name in names}
        try:
            for key, tensor in load_file(file).items():
                name, _, plane = key.rpartition(".")
                planes[name][plane] = tensor
            return {name: PackedWeight(**found) for name, found in planes.items()}  # type: ignore[arg-type]
        except (OSError, SafetensorError, KeyError, TypeError) as error:
            raise InputError(
                f"{file}: not the packed weights of {', '.join(names)} ({error!r}); delete it"
            ) from error

    def store(self, stage: int, weights: dict[str, PackedWeight]) -> None:
        """Keep a stage; a full disk costs no more than the resumption."""
        tensors = {
            f"{name}.{plane}": tensor.contiguous()
            for name, packed in weights.items()
            for plane, tensor in packed.tensors().items()
        }
        file = self._file(stage)
        try:
            with replacing(file) as draft:
                save_file(tensors, draft)
        except (OSError, SafetensorError) as error:
            warnings.warn(
                f"{file}: could not be written ({error}); this stage could not be resumed",
                stacklevel=2,
            )

    def _file(self, stage: int) -> Path:
        return self.folder / f"{self.key[:16]}-{stage:05d}.safetensors"


def forget(folder: Path) -> None:
    """Remove all that is kept, if there is any."""
    shutil.rmtree(folder, ignore_errors=True)
