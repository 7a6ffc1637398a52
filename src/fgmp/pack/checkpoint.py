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

import glob
import json
import os
import shutil
import socket
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fgmp.errors import CheckpointError, InputError
from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import BLOCK
from fgmp.pack import checksums
from fgmp.pack.folder import CONFIG, INDEX, read_json, require_single_source

QUANT_METHOD = "fgmp"
FORMAT_VERSION = 1
NUMERICS = "fgmp-1"
SCALE_CONVENTION = "multiplier"
RUN = "fgmp_run.json"
"""File of measurements during quantization: seconds and bytes of memory. It differs from run to
run, so it has no checksum; all other files are equal for equal inputs."""
SCORES = "fgmp_scores.json"
"""File of histograms of block scores, for reports."""
CARD = "README.md"
"""Model card. ``fgmp compare`` changes its results, so it has no checksum."""

_FIXED = {
    "quant_method": QUANT_METHOD,
    "format_version": FORMAT_VERSION,
    "numerics": NUMERICS,
    "scale_convention": SCALE_CONVENTION,
    "block_size": BLOCK,
}
SITE_TENSORS = ("r", "gamma", "sensitivity", "threshold")


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
        shared: linears that use the packed weight of another, and the name of that one, by name.
        recipe: ``Recipe.to_dict()``.
        calibration: the calibration text (fingerprint, sequences, tokens), and the dtype of the
            passes.
        result: fractions of FP4 blocks, the decision on scale search and its measurements.
        producer: name and version of the program that wrote the checkpoint.
        run: measurements during quantization, in seconds and bytes; stored in :data:`RUN`.
        scores: histograms of block scores; stored in :data:`SCORES`.
    """

    sites: dict[str, SiteConfig]
    shared: dict[str, str] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] = field(default_factory=dict)
    result: dict[str, Any] = field(default_factory=dict)
    producer: dict[str, str] = field(
        default_factory=lambda: {"name": "fgmp", "version": version("fgmp")}
    )
    run: dict[str, Any] = field(default_factory=dict, compare=False)
    scores: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def linears(self) -> list[str]:
        """Names of all quantized linears."""
        return [name for site in self.sites.values() for name in site.linears]

    @property
    def holders(self) -> list[str]:
        """Names of the quantized linears that have a packed weight of their own."""
        return [name for name in self.linears if name not in self.shared]

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types, with the fixed keys of the format."""
        values = asdict(self)
        del values["run"], values["scores"]
        if not self.shared:
            del values["shared"]
        return {**_FIXED, **values}

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
            shared = _shared(values.get("shared", {}))
            if not sites:
                raise ValueError("no sites")
            _require_names(rest["result"].get("unquantized", []))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CheckpointError(f"{where} is malformed: {error!r:.200}") from error
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
        config = cls(sites=sites, shared=shared, **rest)
        for name, times in Counter(config.linears).items():
            if times > 1:
                raise CheckpointError(f"{where}.sites must list a linear once, got {name} twice")
        linears, holders = set(config.linears), set(config.holders)
        for name, holder in shared.items():
            if name not in linears or holder not in holders:
                raise CheckpointError(
                    f"{where}.shared must map a linear of sites to one that has a weight of its "
                    f"own, got {name!r}: {holder!r}"
                )
        return config


def _shared(values: object) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
        raise TypeError(f"shared must map names to names, got {values!r:.80}")
    return values


def _require_names(names: object) -> None:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"unquantized must be a list of names, got {names!r:.80}")


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
    max_shard_size: int | str = "5GB",
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
        partial = Path(tempfile.mkdtemp(prefix=_partial_prefix(target, os.getpid()), dir=around))
        write_extra(partial)
        _write_files(partial, tensors, config, max_shard_size)
        _open_to_others(partial)
        if around == target:
            for path in sorted(partial.iterdir(), key=lambda path: path.name == CONFIG):
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


def _partial_prefix(target: Path, pid: int | str) -> str:
    """Prefix of the temporary folder for a target, with a hash of the host and the process id."""
    host = checksums.of_bytes(socket.gethostname().encode())
    return f".{target.name}.partial-{host}-{pid}-"


def _remove_stale(directory: Path) -> None:
    """Delete temporary folders that killed processes left behind for this target."""
    target = directory.absolute()
    for around in (target, target.parent):
        for path in around.glob(glob.escape(_partial_prefix(target, "")[:-1]) + "*"):
            pid = path.name.split(".partial-")[-1].split("-")[1]
            if path.is_dir() and not path.is_symlink() and not _is_alive(pid):
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    return not pid.isdecimal() or psutil.pid_exists(int(pid))


def require_free(directory: Path) -> None:
    """Check that a target folder is absent or empty, and can be created.

    Temporary folders of killed processes are deleted.

    Raises:
        InputError: it is in use or not writable, or its name is too long or not UTF-8.
    """
    require_writable(directory)
    _remove_stale(directory)
    taken = directory.exists() or directory.is_symlink()
    if taken and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: already exists; choose another folder or remove it")


_LONGEST_NAME = 180
"""Largest number of bytes in a target's name: temporary names are longer, and 255 is the limit of
file systems."""


def _require_name(path: Path) -> None:
    try:
        length = max(len(part.encode()) for part in path.absolute().parts)
    except UnicodeEncodeError as error:
        raise InputError(f"{str(path)!r}: the name of a file or folder must be UTF-8") from error
    if length > _LONGEST_NAME or "\0" in str(path):
        raise InputError(
            f"{str(path)[:80]!r}...: the name of a file or folder must have at most "
            f"{_LONGEST_NAME} bytes, and none of them 0, got {length}"
        )


def require_writable(path: Path) -> None:
    """Check that a file or folder can be created, with the folders above it.

    Raises:
        InputError: it cannot, or its name is too long or not UTF-8.
    """
    _require_name(path)
    target = path.absolute()
    parent = target if target.is_dir() else next(p for p in target.parents if p.exists())
    try:
        with tempfile.TemporaryFile(dir=parent):  # permission bits alone can mislead, as in /proc
            pass
    except OSError as error:
        raise InputError(f"{path}: could not be written: {parent} is no writable folder") from error


def free_space(directory: Path) -> int:
    """Free bytes of the disk of a folder, which need not exist."""
    target = directory.absolute()
    existing = next(p for p in (target, *target.parents) if p.exists())
    return shutil.disk_usage(existing).free


def require_space(directory: Path, needed: int) -> None:
    """Check that the disk of a target folder has ``needed`` bytes free.

    Raises:
        InputError: it has fewer.
    """
    free = free_space(directory)
    if free < needed:
        raise InputError(
            f"{directory}: the disk is full: the checkpoint needs {needed:,} bytes, "
            f"{free:,} are free"
        )


def _write_files(
    folder: Path, tensors: dict[str, Tensor], config: dict[str, Any], max_shard_size: int | str
) -> None:
    tensors = {name: t.detach().contiguous() for name, t in tensors.items()}
    split = split_torch_state_dict_into_shards(
        tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
    )
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / INDEX, index)
    write_json(folder / CONFIG, config)
    # The other files are small; every tensor file carries their checksums.
    others = {
        path.relative_to(folder).as_posix(): checksums.of_bytes(path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (RUN, CARD)
    }
    for filename, names in split.filename_to_tensors.items():
        part = {name: tensors[name].cpu() for name in names}
        save_file(part, folder / filename, metadata=checksums.metadata(part, others, config))
        _sort_metadata(folder / filename)


def _sort_metadata(path: Path) -> None:
    """Sort the metadata of a safetensors file, which the library writes in random order."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "the same values in another order"
        file.seek(8)
        file.write(text.ljust(length))


def _open_to_others(folder: Path) -> None:
    """Give the temporary folder and its files the modes that this process's umask implies."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_json(path: Path, content: dict[str, Any], indent: int | None = 2) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content, indent=indent) + "\n")


def read_config(directory: Path) -> dict[str, Any]:
    """Read ``config.json`` of a checkpoint folder.

    Raises:
        InputError: the file cannot be read, or has no ``quantization_config``.
        CheckpointError: it is not JSON, names another file of weights, or its
            ``quantization_config`` is not a mapping.
    """
    path = directory / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or "quantization_config" not in config:
        raise InputError(f"{directory}: not an fgmp checkpoint: no quantization_config in {path}")
    if not isinstance(config["quantization_config"], dict):
        raise CheckpointError(
            f"{path}: quantization_config must be a mapping, got "
            f"{config['quantization_config']!r:.80}"
        )
    require_single_source(config, path)
    return config
