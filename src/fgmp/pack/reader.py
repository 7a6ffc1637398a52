"""Read the tensors of a checkpoint lazily, and verify each one."""

import logging
import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fgmp.errors import CheckpointError
from fgmp.formats.activation import Site, is_multiplier
from fgmp.formats.spec import SCALE_MAX_CODE, SCALE_MIN_CODE, THRESHOLD_ALL_FP8
from fgmp.pack import checksums
from fgmp.pack.checkpoint import SITE_TENSORS, SiteConfig
from fgmp.pack.folder import CONFIG, read_json, require_inside, require_part
from fgmp.pack.planes import PackedWeight, validate

_ARITHMETIC = ("quantization_config.sites", "quantization_config.shared")
"""Keys of ``config.json`` that decide what a checkpoint computes."""


class Reader:
    """Lazy, verified access to the tensors of safetensors files.

    Headers are parsed once and files stay open, so reading takes time in proportion to the bytes
    that are read, however many tensors there are. Every tensor is compared with its checksum.

    Args:
        files: the safetensors files of one checkpoint.

    Raises:
        CheckpointError: a file is unreadable, lacks its metadata, lacks a tensor that it should
            hold, or holds one that another file holds, too.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._files: dict[str, Path] = {}
        self._opened: dict[Path, Any] = {}
        self._sums: dict[str, str] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        for file in map(Path, files):
            self._open(file)
        self._planes = _planes_by_linear(self._files)

    def _open(self, file: Path) -> None:
        require_part(file)
        try:
            opened = safe_open(file, framework="pt")
            names: list[str] = list(opened.keys())  # type: ignore[no-untyped-call]
            metadata: dict[str, str] = opened.metadata() or {}  # type: ignore[no-untyped-call]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: unreadable or truncated: {error}") from error
        sums = checksums.read_tensors(file, metadata, names)
        if metadata.get("format") != "pt":
            raise CheckpointError(
                f"{file}: its metadata must hold format 'pt', got {metadata.get('format')!r}"
            )
        missing = sums.keys() - set(names)
        if missing:
            raise CheckpointError(f"{file}: tensor {min(missing)} is missing")
        for name in names:
            if name in self._files:
                raise CheckpointError(f"tensor {name} is in both {self._files[name]} and {file}")
            self._files[name] = file
        self._sums |= sums
        self._opened[file], self._metadata[file] = opened, metadata

    @property
    def names(self) -> list[str]:
        """Names of all tensors in the files."""
        return list(self._files)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor to the CPU and compare it with its checksum.

        Raises:
            CheckpointError: it is missing, unreadable or damaged.
        """
        if name not in self._files:
            raise CheckpointError(f"{self._where()}: tensor {name} is missing")
        with _on_cpu():
            return self._read(name)

    def _read(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            tensor: Tensor = self._opened[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file}: tensor {name}: {error}") from error
        crc32 = checksums.of_tensor(tensor)
        if crc32 != self._sums[name]:
            raise CheckpointError(
                f"{file}: tensor {name}: its bytes must have CRC-32 {self._sums[name]}, got {crc32}"
            )
        return tensor

    def verify(self) -> None:
        """Read every tensor once and compare it with its checksum."""
        with _on_cpu():
            for name in self._files:
                self._read(name)

    def require_listed(self, linears: Iterable[str]) -> None:
        """Check that every packed linear in the files is one of ``linears``, those of all sites.

        Raises:
            CheckpointError: names the first other one, whose planes nothing would read.
        """
        listed = set(linears)
        for name in sorted(self._planes.keys() - listed):
            if "shape" in self._planes[name]:
                tensor = f"{name}.weight_shape"
                raise CheckpointError(
                    f"{self._files[tensor]}: tensor {tensor}: every packed linear must be listed "
                    f"by a site of config.json, got none for {name}"
                )

    def require_only(self, expected: Iterable[str]) -> None:
        """Check that the files hold no tensor but those of ``expected``.

        Raises:
            CheckpointError: names the first other one. Another program might read it: a second
                output head, for example, changes what Transformers computes.
        """
        extra = self._files.keys() - set(expected)
        if extra:
            name = min(extra)
            raise CheckpointError(
                f"{self._files[name]}: tensor {name} belongs to no part of this model: remove it"
            )

    def verify_files(self) -> None:
        """Compare the other files of the folder, such as ``config.json``, with their checksums.

        Only ``fgmp inspect`` does this. Loading does not, since such a file may be edited on
        purpose; see :meth:`edited_keys`.

        Raises:
            CheckpointError: a file, or the metadata of a tensor file, has changed.
        """
        for file, metadata in self._metadata.items():
            for name, expected in checksums.read_files(file, metadata).items():
                path = file.parent / require_inside(name, file)
                require_part(path)
                actual = checksums.of_bytes(path.read_bytes())
                if actual != expected:
                    raise CheckpointError(
                        f"{path}: its bytes must have CRC-32 {expected}, got {actual}: "
                        f"{checksums.CHANGED}"
                    )
            self._verify_config_checksums(file, metadata)

    def _verify_config_checksums(self, file: Path, metadata: Mapping[str, str]) -> None:
        """Compare the checksums of configuration keys with ``config.json``, verified before."""
        path = file.parent / CONFIG
        if path.exists() and checksums.edited_keys(file, metadata, read_json(path)):
            raise CheckpointError(
                f"{file}: its {checksums.CONFIG} must be that of {CONFIG}: {checksums.CHANGED}"
            )

    def require_own_config(self, config: Mapping[str, Any], path: Path) -> None:
        """Compare ``config.json`` with the checksums of its keys.

        Edits are allowed, since they may be on purpose, and logged. The sites and what linears
        share are an exception: another rule, other scales or another's weight would give another
        model with the same codes.

        Raises:
            CheckpointError: one of these was edited.
        """
        edited = self.edited_keys(config)
        for key in _ARITHMETIC:
            if key in edited:
                raise CheckpointError(
                    f"{path}: {key} must be as written, since it decides the arithmetic: "
                    f"{checksums.CHANGED}"
                )
        if edited:
            logging.getLogger("fgmp").warning(
                "%s: edited after the checkpoint was written: %s", path, ", ".join(edited)
            )

    def edited_keys(self, config: Mapping[str, Any]) -> list[str]:
        """Keys of ``config.json`` whose values differ from those that were written.

        Args:
            config: the parsed file.

        Returns:
            Top-level keys and ``quantization_config.KEY``; none for a checkpoint of fgmp 0.1.0,
            which did not record them.
        """
        for file, metadata in self._metadata.items():
            return checksums.edited_keys(file, metadata, config)
        return []

    def packed(self, linear: str) -> PackedWeight:
        """Read and validate the planes of one linear.

        Raises:
            CheckpointError: a plane is missing, unknown or damaged, or breaks a rule of the format.
        """
        planes = {n: self.tensor(full) for n, full in self._planes.get(linear, {}).items()}
        file = self._files.get(f"{linear}.weight_shape", self._where())
        try:
            packed = PackedWeight(**planes)
        except TypeError as error:
            raise CheckpointError(
                f"{file}: {linear}: planes are missing or unknown: {error}"
            ) from error
        try:
            validate(f"{linear}.weight", packed)
        except CheckpointError as error:
            raise CheckpointError(f"{file}: {error}") from error
        return packed

    def group(
        self, owner: str, config: SiteConfig, shared: Mapping[str, str] | None = None
    ) -> tuple[Site, dict[str, PackedWeight]]:
        """Read and validate a site and the weights of the linears that read it, by name.

        Args:
            owner: the linear that holds the site's constants.
            config: the site's entry in config.json.
            shared: linears that use the weight of another, and the name of that one.

        Raises:
            CheckpointError: as :meth:`packed` and :meth:`site`, or the linears do not agree on K
                and on their tensor scale.
        """
        shared = shared or {}
        weights = {name: self.packed(shared.get(name, name)) for name in config.linears}
        expected = weights[owner].k, weights[owner].t.item()
        for name, weight in weights.items():
            actual = weight.k, weight.t.item()
            if actual != expected:
                file = self._files[f"{shared.get(name, name)}.weight_t"]
                raise CheckpointError(
                    f"{file}: {name}: K and weight_t must be those of {owner}, which reads the "
                    f"same site, {expected}, got {actual}"
                )
        return self.site(owner, config, weights[owner].k), weights

    def site(self, owner: str, config: SiteConfig, k: int) -> Site:
        """Read and validate the constants of one activation site.

        Args:
            owner: the linear that holds them.
            config: the site's entry in config.json.
            k: input features of its linears.

        Raises:
            CheckpointError: a constant is missing, damaged or out of range.
        """
        prefix = f"{owner}.input_site."
        r, gamma, sensitivity, threshold = (self.tensor(prefix + n) for n in SITE_TENSORS)

        def require(holds: bool, name: str, rule: str, value: object) -> None:
            if not holds:
                raise CheckpointError(
                    f"{self._files[prefix + name]}: {prefix}{name}: {rule}, got {value}"
                )

        for name, tensor, dtype, shape in (
            ("r", r, torch.float32, ()),
            ("gamma", gamma, torch.float32, ()),
            ("sensitivity", sensitivity, torch.uint8, (k,)),
            ("threshold", threshold, torch.int64, ()),
        ):
            actual = (tensor.dtype, tuple(tensor.shape))
            require(actual == (dtype, shape), name, f"must be {dtype} of shape {shape}", actual)
        require(is_multiplier(r.item()), "r", "must be positive with at most 12 bits", r.item())
        require(
            0 <= gamma.item() < float("inf"), "gamma", "must be finite, 0 or more", gamma.item()
        )
        valid = (sensitivity >= SCALE_MIN_CODE) & (sensitivity <= SCALE_MAX_CODE)
        offending = (~valid).nonzero().flatten().tolist()
        first = f"0x{int(sensitivity[offending[0]]):02X} at [{offending[0]}]" if offending else ""
        require(not offending, "sensitivity", "codes must be 0x01 to 0x7E", first)
        limit = int(threshold.item())
        require(limit >= THRESHOLD_ALL_FP8, "threshold", "must be -1 or more", limit)
        return Site(r.item(), sensitivity, gamma.item(), limit, config.rule, config.scales)

    def _where(self) -> str:
        """Names of all files, for messages about a tensor that none of them holds."""
        return ", ".join(sorted({str(f) for f in self._files.values()}))


def _on_cpu() -> AbstractContextManager[object]:
    """Tensors are read to the CPU, whatever the default device; its context costs time per call."""
    return nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def _planes_by_linear(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Full tensor names by linear and plane; ``X.weight_low`` is plane ``low`` of linear ``X``."""
    planes: dict[str, dict[str, str]] = {}
    for name in names:
        linear, dot, plane = name.rpartition(".weight_")
        if dot:
            planes.setdefault(linear, {})[plane] = name
    return planes
