"""Checkpoints on disk: safetensors that are written atomically and verified when read.

``docs/format.md`` is the specification. A checkpoint is written to a folder beside the target,
which is renamed at the end, so a killed run leaves no half checkpoint. Every file carries the
CRC-32 of its tensors. Reading checks these and every rule of the format; an error names the file,
the tensor, the rule and the value of the first fault.

A quantized linear ``X`` has the tensors ``X.weight_low``, ``X.weight_scale``, ``X.weight_t`` and so
on, one per plane. The first linear of a site also holds the site's constants, ``X.input_site.r``,
``gamma``, ``sensitivity`` and ``threshold``. For readers of vLLM and ModelOpt: ``weight_low`` is
their ``weight_packed``, ``weight_t`` is 1 / ``weight_global_scale``, and 6 ``input_site.r`` is
about ``input_global_scale``; :mod:`fgmp.pack.planes` has the whole table.
"""

import json
import os
import shutil
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fgmp.errors import CheckpointError, InputError
from fgmp.formats.activation import Site, is_multiplier
from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import (
    BLOCK,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
    THRESHOLD_ALL_FP8,
)
from fgmp.pack.planes import PackedWeight, validate

QUANT_METHOD = "fgmp"
FORMAT_VERSION = 1
NUMERICS = "fgmp-1"
SCALE_CONVENTION = "multiplier"
CHECKSUMS = "fgmp_crc32"
"""Metadata key of a JSON map from tensor name to CRC-32, eight hex digits."""
FILE_CHECKSUMS = "fgmp_files_crc32"
"""Metadata key of a JSON map from the name of every other file in the folder to its CRC-32."""
LIST_CHECKSUM = "fgmp_list_crc32"
"""Metadata key of the CRC-32 of the text of :data:`FILE_CHECKSUMS`. It tells a damaged map from a
damaged file. fgmp 0.1.0 wrote none."""

_FIXED = {
    "quant_method": QUANT_METHOD,
    "format_version": FORMAT_VERSION,
    "numerics": NUMERICS,
    "scale_convention": SCALE_CONVENTION,
    "block_size": BLOCK,
}
_SITE_TENSORS = ("r", "gamma", "sensitivity", "threshold")


@dataclass(frozen=True)
class SiteConfig:
    """Configuration of one activation site.

    Attributes:
        linears: names of the linears that read it, its owner among them.
        rule: decision rule, a key of ``formats.rules.RULES``.
        fp4_fraction: fraction of FP4 blocks on the calibration tokens.
        scales: candidates for FP4 block scales, a key of ``formats.rules.SCALES``.
    """

    linears: list[str]
    rule: str
    fp4_fraction: float
    scales: str


@dataclass(frozen=True)
class CheckpointConfig:
    """Content of ``quantization_config`` in a checkpoint's config.json.

    Attributes:
        sites: by *owner*, the linear that holds the site's tensors.
        recipe: ``Recipe.to_dict()``.
        calibration: the calibration set: fingerprint, sequences, tokens.
        result: fractions of FP4 blocks, the decision on scale search and its measurements.
        producer: name and version of the program that wrote the checkpoint.
    """

    sites: dict[str, SiteConfig]
    recipe: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, str] = field(
        default_factory=lambda: {"name": "fgmp", "version": version("fgmp")}
    )

    @property
    def linears(self) -> list[str]:
        """Names of all quantized linears."""
        return [name for site in self.sites.values() for name in site.linears]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types, with the fixed keys of the format."""
        return {**_FIXED, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config.json") -> "CheckpointConfig":
        """Parse the content of ``quantization_config``; ``source`` names the file in errors.

        Raises:
            CheckpointError: an unknown format version, or a key that is missing or malformed.
        """
        where = f"{source}: quantization_config"
        for key, required in _FIXED.items():
            if values.get(key) != required:
                raise CheckpointError(
                    f"{where}.{key} must be {required!r}, got {values.get(key)!r}; this is fgmp "
                    f"{version('fgmp')}, which reads format version {FORMAT_VERSION}"
                )
        try:
            sites = {name: _site_config(**site) for name, site in values["sites"].items()}
            rest = {k: dict(values[k]) for k in ("recipe", "calibration", "result", "producer")}
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {error!r}") from error
        for name, site in sites.items():
            for key, value, valid in (("rule", site.rule, RULES), ("scales", site.scales, SCALES)):
                if value not in valid:
                    raise CheckpointError(
                        f"{where}.sites.{name}.{key} must be one of {sorted(valid)}, got {value!r}"
                    )
            if name not in site.linears:
                raise CheckpointError(
                    f"{where}.sites.{name}.linears must hold its owner, got {site.linears}"
                )
        config = cls(sites=sites, **rest)
        for name, times in Counter(config.linears).items():
            if times > 1:
                raise CheckpointError(f"{where}.sites must list a linear once, got {name} twice")
        return config


def _site_config(
    linears: list[str], rule: str, fp4_fraction: float, scales: str = "max"
) -> SiteConfig:
    """Build a :class:`SiteConfig` from unverified values, checking their types."""
    if not isinstance(linears, list) or not all(isinstance(name, str) for name in linears):
        raise TypeError(f"linears must be a list of names, got {linears!r}")
    both_names = isinstance(rule, str) and isinstance(scales, str)
    if not both_names or not isinstance(fp4_fraction, int | float):
        raise TypeError(
            "rule, scales and fp4_fraction must be two names and a number, got "
            f"{rule!r}, {scales!r}, {fp4_fraction!r}"
        )
    return SiteConfig(linears, rule, fp4_fraction, scales)


def write(
    directory: Path,
    tensors: dict[str, Tensor],
    config: dict[str, Any],
    write_extra: Callable[[Path], None] = lambda folder: None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a checkpoint folder; it appears complete or not at all.

    An existing empty folder is filled file by file, ``config.json`` last: without that file the
    folder is no checkpoint.

    Args:
        directory: must not exist, or be an empty folder.
        tensors: by full name; no two may share memory.
        config: content of ``config.json``, ``quantization_config`` included.
        write_extra: called with a folder, writes further files there, such as the tokenizer's.
        max_shard_size: a larger checkpoint is sharded like any Hugging Face model.

    Raises:
        InputError: the target is in use or cannot be created, or the disk is full. Nothing is left
            behind then.
    """
    require_free(directory)
    total = sum(t.nbytes for t in tensors.values())
    target = directory.absolute()
    # An empty folder may be a mount point, so it is filled rather than replaced.
    around = target if target.exists() else target.parent
    partial, moved = None, []
    try:
        around.mkdir(parents=True, exist_ok=True)
        require_space(directory, total)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=around))
        write_extra(partial)
        _write_files(partial, tensors, config, max_shard_size)
        _open_to_others(partial)
        if around == target:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == "config.json"):
                moved.append(path.rename(target / path.name))
            moved.clear()
        else:
            partial.rename(target)
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{directory}: could not be written ({error}); nothing was left behind"
        ) from error
    finally:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)


def require_free(directory: Path) -> None:
    """Check that a target folder is absent or empty, and can be created.

    Raises:
        InputError: it is in use or not writable.
    """
    require_writable(directory)
    taken = directory.exists() or directory.is_symlink()
    if taken and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: already exists; choose another folder or remove it")


def require_writable(path: Path) -> None:
    """Check that a file or folder can be created, with the folders above it.

    Raises:
        InputError: it cannot.
    """
    target = path.absolute()
    parent = target if target.is_dir() else next(p for p in target.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # permission bits alone can mislead, as in /proc
            pass
    except OSError as error:
        raise InputError(f"{path}: could not be written: {parent} is no writable folder") from error


def require_space(directory: Path, needed: int) -> None:
    """Check that the disk of a target folder has ``needed`` bytes free.

    Raises:
        InputError: it has fewer.
    """
    target = directory.absolute()
    existing = next(p for p in (target, *target.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InputError(
            f"{directory}: the disk is full: the checkpoint needs {needed:,} bytes, "
            f"{free:,} are free"
        )


def _write_files(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], max_shard_size: str
) -> None:
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", config)
    # The other files are small; every tensor file carries their checksums.
    others = {
        path.relative_to(folder).as_posix(): _crc32(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    for filename, names in split.filename_to_tensors.items():
        part = {name: tensors[name].cpu() for name in names}
        sums = {name: checksum(tensor) for name, tensor in part.items()}
        listed = json.dumps(others)
        metadata = {
            "format": "pt",
            CHECKSUMS: json.dumps(sums),
            FILE_CHECKSUMS: listed,
            LIST_CHECKSUM: _crc32(listed.encode()),
        }
        save_file(part, folder / filename, metadata=metadata)


def _open_to_others(folder: Path) -> None:
    """Give the temporary folder and its files the modes that this process's umask implies."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def checksum(tensor: Tensor) -> str:
    """CRC-32 over the text ``"dtype shape "`` and a tensor's bytes, eight hex digits."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    prefix = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} ".encode()
    return _crc32(flat.view(torch.uint8).numpy().data, zlib.crc32(prefix))


def _crc32(data: bytes | memoryview, start: int = 0) -> str:
    return f"{zlib.crc32(data, start):08x}"


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        InputError: the file cannot be read, or has no ``quantization_config``.
        CheckpointError: it is not JSON, or ``quantization_config`` is not a mapping.
    """
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}") from error
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise InputError(f"{directory}: not an fgmp checkpoint: no quantization_config in {path}")
    if not isinstance(config["quantization_config"], dict):
        raise CheckpointError(
            f"{path}: quantization_config must be a mapping, got {config['quantization_config']!r}"
        )
    return config


def tensor_files(directory: Path) -> list[Path]:
    """Paths of a checkpoint's safetensors files: those in its index, or the single one.

    Raises:
        CheckpointError: the index is malformed.
    """
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [directory / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{index}: malformed ({error!r})") from error


class Reader:
    """Lazy, verified access to the tensors of safetensors files.

    Every tensor that is read is compared with its checksum in the file's metadata.

    Args:
        files: the safetensors files of one checkpoint.

    Raises:
        CheckpointError: a file is unreadable, lacks its metadata, or lacks a tensor that it should
            hold.
    """

    def __init__(self, files: Iterable[str | os.PathLike[str]]) -> None:
        self._files: dict[str, Path] = {}
        self._sums: dict[str, str] = {}
        self._metadata: dict[Path, dict[str, str]] = {}
        for file in map(Path, files):
            try:
                with safe_open(file, framework="pt") as opened:
                    names = list(opened.keys())
                    metadata = opened.metadata() or {}
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: unreadable or truncated: {error}") from error
            try:
                sums = json.loads(metadata[CHECKSUMS])
                dict(json.loads(metadata[FILE_CHECKSUMS]))
                self._sums |= {name: str(sums[name]) for name in names}
            except (KeyError, ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{file}: its metadata must hold {CHECKSUMS} of every tensor and "
                    f"{FILE_CHECKSUMS}, got {error!r}"
                ) from error
            if metadata.get("format") != "pt":
                raise CheckpointError(
                    f"{file}: its metadata must hold format 'pt', got {metadata.get('format')!r}"
                )
            missing = set(sums) - set(names)
            if missing:
                raise CheckpointError(f"{file}: tensor {sorted(missing)[0]} is missing")
            self._files |= dict.fromkeys(names, file)
            self._metadata[file] = metadata

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
        file = self._files[name]
        with torch.device("cpu"):
            try:
                with safe_open(file, framework="pt") as opened:
                    tensor: Tensor = opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: tensor {name}: {error}") from error
            crc32 = checksum(tensor)
        if crc32 != self._sums[name]:
            raise CheckpointError(
                f"{file}: tensor {name}: its bytes must have CRC-32 {self._sums[name]}, got {crc32}"
            )
        return tensor

    def verify(self) -> None:
        """Read every tensor once and compare it with its checksum."""
        for name in self._files:
            self.tensor(name)

    def require_listed(self, linears: Iterable[str]) -> None:
        """Check that every packed linear in the files is one of ``linears``, those of all sites.

        Raises:
            CheckpointError: names the first other one, whose planes nothing would read.
        """
        suffix = ".weight_shape"
        packed_linears = {n.removesuffix(suffix) for n in self._files if n.endswith(suffix)}
        for name in sorted(packed_linears - set(linears)):
            raise CheckpointError(
                f"{self._files[name + suffix]}: tensor {name}{suffix}: every packed linear must be "
                f"listed by a site of config.json, got none for {name}"
            )

    def verify_files(self) -> None:
        """Compare the other files of the folder, such as ``config.json``, with their checksums.

        Only ``fgmp inspect`` does this. Loading does not, since such a file may be edited on
        purpose.

        Raises:
            CheckpointError: a file, or the metadata of a tensor file, has changed.
        """
        changed = "it was changed after the checkpoint was written"
        allowed_keys = {"format", CHECKSUMS, FILE_CHECKSUMS, LIST_CHECKSUM}
        for file, metadata in self._metadata.items():
            if unknown := metadata.keys() - allowed_keys:
                raise CheckpointError(
                    f"{file}: its metadata must hold {', '.join(sorted(allowed_keys))} only, got "
                    f"{min(unknown)}: {changed}"
                )
            listed = metadata[FILE_CHECKSUMS]
            actual = _crc32(listed.encode())
            expected = metadata.get(LIST_CHECKSUM, actual)
            if actual != expected:
                raise CheckpointError(
                    f"{file}: its {FILE_CHECKSUMS} must have CRC-32 {expected}, got {actual}: "
                    f"{changed}"
                )
            for name, expected in dict(json.loads(listed)).items():
                path = file.parent / name
                try:
                    actual = _crc32(path.read_bytes())
                except OSError as error:
                    raise CheckpointError(f"{path}: {error.strerror}") from error
                if actual != expected:
                    raise CheckpointError(
                        f"{path}: its bytes must have CRC-32 {expected}, got {actual}: {changed}"
                    )

    def packed(self, linear: str) -> PackedWeight:
        """Read and validate the planes of one linear.

        Raises:
            CheckpointError: a plane is missing, unknown or damaged, or breaks a rule of the format.
        """
        prefix = f"{linear}.weight_"
        planes = {
            n.removeprefix(prefix): self.tensor(n) for n in self._files if n.startswith(prefix)
        }
        file = self._files.get(prefix + "shape", self._where())
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

    def group(self, owner: str, config: SiteConfig) -> tuple[Site, dict[str, PackedWeight]]:
        """Read and validate a site and the weights of the linears that read it, by name.

        Raises:
            CheckpointError: as :meth:`packed` and :meth:`site`, or the linears do not agree on K
                and on their tensor scale.
        """
        weights = {name: self.packed(name) for name in config.linears}
        expected = weights[owner].k, weights[owner].t.item()
        for name, weight in weights.items():
            actual = weight.k, weight.t.item()
            if actual != expected:
                raise CheckpointError(
                    f"{self._files[f'{name}.weight_t']}: {name}: K and weight_t must be those of "
                    f"{owner}, which reads the same site, {expected}, got {actual}"
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
        r, gamma, sensitivity, threshold = (self.tensor(prefix + n) for n in _SITE_TENSORS)

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
