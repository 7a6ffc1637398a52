"""The checkpoint folder that a server loads: checked as a whole first, then read layer by layer.

Everything that can be checked without decoding a weight is checked when the folder is opened, so
that a bad checkpoint is refused before the server has started its processes. Planes are verified
when a layer reads them. The tensors that are not quantized are read by the server itself, which
checks none of them, so they are compared with their checksums here.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from fgmp.errors import CheckpointError
from fgmp.formats.activation import Site
from fgmp.kernels.check import PLANES
from fgmp.pack.checkpoint import SITE_TENSORS, CheckpointConfig, read_config
from fgmp.pack.folder import CONFIG, weight_files
from fgmp.pack.planes import PackedWeight
from fgmp.pack.reader import Reader
from fgmp.serving.linears import Parts

SUFFIXES = tuple(
    [f".weight_{plane}" for plane in ("shape", "t", *PLANES)]
    + [f".input_site.{name}" for name in SITE_TENSORS]
)
"""Ends of the names of tensors that belong to a quantized linear or its site."""


class Source:
    """A checkpoint folder; a copy in another process opens its files anew.

    Args:
        folder: written by :func:`fgmp.save`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def reader(self) -> Reader:
        """The folder's tensors.

        Raises:
            CheckpointError: a file is missing, unreadable or ambiguous.
        """
        return Reader(weight_files(self.folder))

    @cached_property
    def config(self) -> CheckpointConfig:
        """The folder's configuration.

        Raises:
            InputError: the folder is no checkpoint of fgmp.
            CheckpointError: an unknown format version, or a malformed configuration.
        """
        values = read_config(self.folder)["quantization_config"]
        return CheckpointConfig.from_dict(values, str(self.folder / CONFIG))

    def close(self) -> None:
        """Close the files; they are opened again when something is read."""
        self.__dict__.pop("reader", None)

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder}

    def verify(self, *, planes: bool) -> None:
        """Check the folder, and compare tensors with their checksums.

        Args:
            planes: whether the tensors of quantized linears are compared, too.

        Raises:
            CheckpointError: names the file, the tensor and the rule.
        """
        config, reader = self.config, self.reader
        reader.require_own_config(read_config(self.folder), self.folder / CONFIG)
        reader.require_listed(config.linears)
        names = set(reader.names)
        for name in config.linears:
            if f"{name}.weight_shape" not in names:
                raise CheckpointError(f"{self.folder}: tensor {name}.weight_shape is missing")
        if planes:
            reader.verify()
            return
        for name in reader.names:
            if not name.endswith(SUFFIXES):
                reader.tensor(name)

    def weights(self, parts: Parts) -> tuple[Site, list[PackedWeight]]:
        """Read and validate the weights of a layer and the constants of its site.

        Raises:
            CheckpointError: as :meth:`fgmp.pack.reader.Reader.group`.
        """
        site = self.config.sites[parts.owner]
        linears = list(dict.fromkeys([parts.owner, *parts.linears]))
        constants, weights = self.reader.group(parts.owner, replace(site, linears=linears))
        return constants, [weights[name] for name in parts.linears]
