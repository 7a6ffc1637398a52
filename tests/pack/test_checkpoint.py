"""Every way to damage a checkpoint is noticed, and named by file, tensor, rule and value.

A checkpoint either appears whole or not at all, whatever happens while it is written.
"""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fgmp.errors import CheckpointError, FGMPError, InputError
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig, read_config, write
from fgmp.pack.checksums import FILES as FILE_CHECKSUMS
from fgmp.pack.checksums import FILES_LIST as LIST_CHECKSUM
from fgmp.pack.checksums import TENSORS as CHECKSUMS
from fgmp.pack.checksums import of_tensor as checksum
from fgmp.pack.folder import weight_files
from fgmp.pack.planes import pack
from fgmp.pack.reader import Reader

K = 40

SITES = {
    "a": SiteConfig(["a", "b"], "difference", 0.7, "max"),
    "c": SiteConfig(["c"], "benefit", 0.5, "search"),
    "d": SiteConfig(["d"], "difference", 0.0, "max"),
}
MODES = {"a": "mixed", "b": "mixed", "c": "fp4", "d": "fp8"}


def content() -> dict[str, Tensor]:
    """Linears of every mode, their sites, and a tensor that is not quantized."""
    tensors = {"norm.weight": torch.linspace(0.5, 1.5, K)}
    for seed, (name, mode) in enumerate(MODES.items()):
        weight = torch.randn(6, K, generator=torch.Generator().manual_seed(seed)).clamp(-2, 2)
        codes = quantize_weight(weight, tensor_scale(4.0))
        blocks = torch.arange(codes.scale.numel()).view(codes.scale.shape)
        is_fp8 = {"mixed": blocks % 3 == 0, "fp4": blocks < 0, "fp8": blocks >= 0}[mode]
        for plane, tensor in pack(codes, is_fp8).tensors().items():
            tensors[f"{name}.weight_{plane}"] = tensor
    for owner in SITES:
        tensors |= {
            f"{owner}.input_site.r": torch.tensor(112.0),
            f"{owner}.input_site.gamma": torch.tensor(1e-4),
            f"{owner}.input_site.sensitivity": torch.full((K,), 0x30, dtype=torch.uint8),
            f"{owner}.input_site.threshold": torch.tensor(2**50),
        }
    return tensors


def config() -> dict[str, Any]:
    return {"quantization_config": CheckpointConfig(SITES).to_dict()}


def read(folder: Path) -> dict[str, Tensor]:
    """All that a reader of a checkpoint may do; the tensors."""
    raw = read_config(folder)
    parsed = CheckpointConfig.from_dict(raw["quantization_config"], f"{folder / 'config.json'}")
    reader = Reader(weight_files(folder))
    reader.verify_files()
    reader.verify()
    reader.require_listed(parsed.linears)
    for owner, site in parsed.sites.items():
        reader.group(owner, site)
    return {name: reader.tensor(name) for name in reader.names}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "out", content(), config())
    return tmp_path / "out"


def file_of(folder: Path) -> Path:
    return folder / "model.safetensors"


def rewritten(folder: Path, sums: bool = True, **changes: Tensor | None) -> None:
    """Change tensors as an honest writer would, checksums included, or as rot would."""
    tensors = load_file(file_of(folder))
    stored = {name: checksum(tensor) for name, tensor in tensors.items()}
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
        if sums:
            stored = {n: checksum(t) for n, t in tensors.items()}
    with safe_open(file_of(folder), framework="pt") as file:
        metadata = {**file.metadata(), CHECKSUMS: json.dumps(stored)}
    save_file(tensors, file_of(folder), metadata=metadata)


def refused(folder: Path, *parts: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def test_reads_what_was_written(folder: Path) -> None:
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    found = read(folder)
    assert found.keys() == content().keys()
    for name, tensor in content().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    parsed = CheckpointConfig.from_dict(read_config(folder)["quantization_config"])
    assert parsed == CheckpointConfig(SITES)
    assert parsed.linears == ["a", "b", "c", "d"]


# Damaged tensors.


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes lie in a safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    return {
        name: tuple(8 + length + offset for offset in facts["data_offsets"])
        for name, facts in header.items()
        if name != "__metadata__"
    }


@pytest.mark.parametrize("name", content())
def test_a_flipped_byte_is_named(name: str, folder: Path) -> None:
    """The first, a middle and the last byte of every tensor."""
    whole = file_of(folder).read_bytes()
    start, stop = spans(file_of(folder))[name]
    for position in {start, (start + stop) // 2, stop - 1}:
        damaged = bytearray(whole)
        damaged[position] ^= 0x10
        file_of(folder).write_bytes(damaged)
        text = refused(folder, f"model.safetensors: tensor {name}: its bytes must have CRC-32 ")
        wanted, found = re.findall(r"\b[0-9a-f]{8}\b", text)[-2:]
        assert wanted == checksum(content()[name]) and found != wanted


def test_any_flipped_bit_of_the_header_is_refused(folder: Path) -> None:
    whole = file_of(folder).read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for position in range(0, header, 5):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 7
        file_of(folder).write_bytes(damaged)
        refused(folder, str(folder))


def test_a_changed_side_file_is_named(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text() + " ")
    refused(folder, "config.json: its bytes must have CRC-32")


def test_side_files_may_lie_in_folders(tmp_path: Path) -> None:
    """As a tokenizer's further chat templates do."""

    def templates(folder: Path) -> None:
        (folder / "templates").mkdir()
        (folder / "templates" / "tool.jinja").write_text("{{ tool }}")

    write(tmp_path / "out", content(), config(), templates)
    read(tmp_path / "out")
    (tmp_path / "out" / "templates" / "tool.jinja").write_text("{{ fool }}")
    refused(tmp_path / "out", "templates/tool.jinja: its bytes must have CRC-32")


@pytest.mark.parametrize("length", [0, 4, 8, 300, -1])
def test_a_truncated_file_is_named(length: int, folder: Path) -> None:
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(whole[:length])
    refused(folder, "model.safetensors: unreadable or truncated")


def test_a_garbage_header_is_named(folder: Path) -> None:
    whole = file_of(folder).read_bytes()
    file_of(folder).write_bytes(b"\xff" * 64 + whole[64:])
    refused(folder, "model.safetensors: unreadable or truncated")


def test_a_missing_file_is_named(folder: Path) -> None:
    file_of(folder).unlink()
    refused(folder, "model.safetensors: unreadable or truncated: No such file")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        {},
        {FILE_CHECKSUMS: "{}"},
        {FILE_CHECKSUMS: "{}", CHECKSUMS: "{"},
        {FILE_CHECKSUMS: "{}", CHECKSUMS: "[]"},
        {FILE_CHECKSUMS: "{}", CHECKSUMS: "{}"},
    ],
    ids=["none", "empty", "one of two", "no JSON", "a list", "no sums"],
)
def test_checksums_must_be_there(metadata: dict[str, str] | None, folder: Path) -> None:
    save_file(load_file(file_of(folder)), file_of(folder), metadata=metadata)
    refused(folder, "model.safetensors: its metadata must hold fgmp_crc32 of every tensor")


def test_a_tensor_without_its_checksum_is_named(folder: Path) -> None:
    rewritten(folder, sums=False, extra=torch.zeros(3))
    refused(folder, "model.safetensors", "fgmp_crc32 of every tensor", "got KeyError('extra')")


def test_a_checksum_without_its_tensor_is_named(folder: Path) -> None:
    rewritten(folder, sums=False, norm__weight=None)
    refused(folder, "model.safetensors: tensor norm.weight is missing")


@pytest.mark.parametrize("name", [n for n in content() if n != "norm.weight"])
def test_every_tensor_is_needed(name: str, folder: Path) -> None:
    """Also where checksums agree that it is not there."""
    rewritten(folder, **{name: None})
    text = refused(folder, "model.safetensors", name.partition(".")[0])
    assert "missing" in text or "planes must be" in text


def test_planes_that_no_site_lists_are_named(folder: Path) -> None:
    """Nothing would read them, so the model would run with something else in their place."""
    rewritten(folder, stray__weight_shape=torch.tensor([16, 16]))
    refused(folder, "model.safetensors: tensor stray.weight_shape", "listed by a site")


FAULTS: dict[str, tuple[str, Tensor, str]] = {
    "scale byte": (
        "a.weight_scale",
        content()["a.weight_scale"].index_put(
            (torch.tensor(4), torch.tensor(1)), torch.tensor(0).byte()
        ),
        "bytes must be 0x01 to 0x7E, or 0x80 for an FP8 block, got 0x00 at [4, 1]",
    ),
    "dtype": ("b.weight_t", torch.tensor(1.0, dtype=torch.float64), "must be torch.float32"),
    "shape": ("c.weight_low", torch.zeros(6, 8, dtype=torch.uint8), "must have shape [6, 24]"),
    "t": ("d.weight_t", torch.tensor(-1.0), "must be a positive normal number, got -1.0"),
    "NaN code": (
        "d.weight_fp8",
        torch.full((6, 48), 0x7F, dtype=torch.uint8),
        "FP8 codes must not be NaN, got 0x7F at [0, 0, 0]",
    ),
    "superfluous plane": (
        "c.weight_fp8",
        torch.zeros(6, 48, dtype=torch.uint8),
        "planes must be low+scale+overflow+row_ptr or low+scale or fp8",
    ),
    "unknown plane": ("c.weight_color", torch.zeros(2), "planes are missing or unknown"),
    "r sign": (
        "a.input_site.r",
        torch.tensor(-1.0),
        "must be positive with at most 12 bits, got -1.0",
    ),
    "r bits": ("a.input_site.r", torch.tensor(1 + 2.0**-12), "at most 12 bits, got 1.000244140625"),
    "r infinite": ("a.input_site.r", torch.tensor(torch.inf), "at most 12 bits, got inf"),
    "r shape": ("a.input_site.r", torch.ones(1), "must be torch.float32 of shape ()"),
    "r dtype": ("a.input_site.r", torch.tensor(1), "must be torch.float32 of shape ()"),
    "gamma sign": ("c.input_site.gamma", torch.tensor(-1.0), "must be finite, 0 or more, got -1.0"),
    "gamma NaN": (
        "c.input_site.gamma",
        torch.tensor(torch.nan),
        "must be finite, 0 or more, got nan",
    ),
    "sensitivity width": (
        "d.input_site.sensitivity",
        torch.ones(K + 8, dtype=torch.uint8),
        "must be torch.uint8 of shape (40,), got (torch.uint8, (48,))",
    ),
    "sensitivity zero": (
        "d.input_site.sensitivity",
        torch.arange(K, dtype=torch.uint8),
        "codes must be 0x01 to 0x7E, got 0x00 at [0]",
    ),
    "sensitivity NaN": (
        "d.input_site.sensitivity",
        torch.arange(0x60, 0x60 + K, dtype=torch.uint8),
        "codes must be 0x01 to 0x7E, got 0x7F at [31]",
    ),
    "threshold": ("a.input_site.threshold", torch.tensor(-2), "must be -1 or more, got -2"),
    "threshold dtype": (
        "a.input_site.threshold",
        torch.tensor(3, dtype=torch.int32),
        "must be torch.int64 of shape ()",
    ),
}


@pytest.mark.parametrize(("name", "tensor", "rule"), FAULTS.values(), ids=FAULTS.keys())
def test_broken_rules_are_named(name: str, tensor: Tensor, rule: str, folder: Path) -> None:
    """Where checksums are right: what an erring writer makes."""
    rewritten(folder, **{name: tensor})
    text = refused(folder, "model.safetensors", rule)
    # What several planes hold together is named by the linear.
    shown = name.partition(".")[0] if "plane" in rule or "codes must not" in rule else name
    assert f"model.safetensors: {shown}" in text


@pytest.mark.parametrize("name", ["t", "K"])
def test_linears_of_a_site_agree(name: str, folder: Path) -> None:
    if name == "t":
        rewritten(folder, b__weight_t=torch.tensor(0.25))
    else:
        weight = torch.ones(6, 56)
        weight[:, ::5] = 3
        codes = quantize_weight(weight, tensor_scale(4.0))
        is_fp8 = torch.arange(6 * 4).view(6, 4) % 3 == 0
        rewritten(folder, **{f"b.weight_{n}": t for n, t in pack(codes, is_fp8).tensors().items()})
    refused(folder, "model.safetensors: b: K and weight_t must be those of a, which reads the same")


# Damaged configurations.


def configured(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    change(raw["quantization_config"])
    path.write_text(json.dumps(raw))
    unsummed(folder)


def unsummed(folder: Path) -> None:
    """Drop the checksums of side files, so that what is in them decides."""
    file = next(folder.glob("*.safetensors"))
    with safe_open(file, framework="pt") as opened:
        metadata = {**opened.metadata(), FILE_CHECKSUMS: "{}"}
    del metadata[LIST_CHECKSUM]
    save_file(load_file(file), file, metadata=metadata)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format_version", 2),
        ("format_version", None),
        ("quant_method", "gptq"),
        ("numerics", "fgmp-2"),
        ("scale_convention", "reciprocal"),
        ("block_size", 32),
    ],
)
def test_another_format_is_refused(key: str, value: object, folder: Path) -> None:
    configured(folder, lambda values: values.update({key: value}))
    wanted = CheckpointConfig(SITES).to_dict()[key]
    rule = f"config.json: quantization_config.{key} must be {wanted!r}, got {value!r}"
    refused(folder, rule, "which reads format version 1")


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no sites": (lambda c: c.pop("sites"), "is malformed: KeyError('sites')"),
    "sites are a list": (lambda c: c.update(sites=[]), "is malformed"),
    "a site is a name": (lambda c: c["sites"].update(a="x"), "is malformed"),
    "a site lacks a key": (lambda c: c["sites"]["a"].pop("rule"), "is malformed"),
    "a site has one more": (lambda c: c["sites"]["a"].update(x=1), "is malformed"),
    "linears is a name": (lambda c: c["sites"]["a"].update(linears="ab"), "a list of names"),
    "linears are numbers": (lambda c: c["sites"]["a"].update(linears=["a", 1]), "a list of names"),
    "the share is text": (lambda c: c["sites"]["a"].update(fp4_fraction="x"), "a number"),
    "the rule is a list": (lambda c: c["sites"]["a"].update(rule=[]), "is malformed"),
    "the rule is unknown": (
        lambda c: c["sites"]["a"].update(rule="entropy"),
        "sites.a.rule must be one of ['benefit', 'difference', 'random', 'truncated'], "
        "got 'entropy'",
    ),
    "the scales are unknown": (
        lambda c: c["sites"]["a"].update(scales="all"),
        "sites.a.scales must be one of ['max', 'search'], got 'all'",
    ),
    "the scales are a number": (lambda c: c["sites"]["a"].update(scales=4), "is malformed"),
    "the owner is not listed": (
        lambda c: c["sites"]["a"].update(linears=["b"]),
        "sites.a.linears must hold its owner, got ['b']",
    ),
    "a linear is listed twice": (
        lambda c: c["sites"]["c"].update(linears=["c", "b"]),
        "sites must list a linear once, got b twice",
    ),
    "no recipe": (lambda c: c.pop("recipe"), "is malformed: KeyError('recipe')"),
    "the result is a number": (lambda c: c.update(result=3), "is malformed"),
}


@pytest.mark.parametrize(("change", "rule"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_configuration(
    change: Callable[[dict[str, Any]], object], rule: str, folder: Path
) -> None:
    configured(folder, change)
    refused(folder, "config.json: quantization_config", rule)


@pytest.mark.parametrize(
    ("text", "kind", "rule"),
    [
        ("{", CheckpointError, "config.json: not JSON"),
        ("\xff", CheckpointError, "config.json: not JSON"),
        ("[]", InputError, "not an fgmp checkpoint: no quantization_config in"),
        ('{"model_type": "llama"}', InputError, "not an fgmp checkpoint"),
        ('{"quantization_config": [1]}', CheckpointError, "must be a mapping, got [1]"),
    ],
    ids=["truncated", "no text", "a list", "another model", "a list inside"],
)
def test_another_config(text: str, kind: type[FGMPError], rule: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(kind, match=re.escape(rule)):
        read(folder)


def test_no_config_and_no_folder(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match=r"out/config\.json: No such file"):
        read(folder)
    with pytest.raises(InputError, match=r"nowhere/config\.json: No such file"):
        read(folder / "nowhere")


# Shards.


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    write(tmp_path / "out", content(), config(), max_shard_size="1KB")
    return tmp_path / "out"


def test_shards(sharded: Path) -> None:
    assert len(weight_files(sharded)) > 1 and not file_of(sharded).exists()
    found = read(sharded)
    assert found.keys() == content().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in content().items())


def test_a_missing_shard_is_named(sharded: Path) -> None:
    gone = weight_files(sharded)[1]
    gone.unlink()
    refused(sharded, f"{gone}: unreadable or truncated")


def test_a_shard_of_another_checkpoint_is_named(sharded: Path) -> None:
    """Its own checksums are right; what it holds is in another shard, too."""
    first, second, *_ = weight_files(sharded)
    shutil.copy(first, second)
    text = refused(sharded, str(sharded))
    assert f"is in both {first} and {second}" in text


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"x": 5}}']
)
def test_a_malformed_index_is_named(text: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    refused(sharded, "model.safetensors.index.json: malformed")


def test_a_missing_index_is_noticed(sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").unlink()
    refused(sharded, "model.safetensors: unreadable or truncated: No such file")


# Writing: all or nothing.


def test_a_failure_half_way_leaves_nothing(tmp_path: Path) -> None:
    for error, kind in ((OSError("no"), InputError), (RuntimeError("no"), RuntimeError)):

        def fail(folder: Path, error: Exception = error) -> None:
            (folder / "tokenizer.json").write_text("{}")
            raise error

        with pytest.raises(kind, match="no"):
            write(tmp_path / "out", content(), config(), fail)
        assert list(tmp_path.iterdir()) == []


def test_the_folder_appears_at_once(tmp_path: Path) -> None:
    """It is the one that was written, with a new name: no copy that could be cut short."""
    written: list[int] = []
    write(tmp_path / "out", content(), config(), lambda f: written.append(f.stat().st_ino))
    assert written == [(tmp_path / "out").stat().st_ino]


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", content(), config(), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_no_checkpoint(tmp_path: Path) -> None:
    script = """
        import sys, time
        from pathlib import Path
        import torch
        from fgmp.pack import checkpoint

        def wait(folder):
            print(sorted(p.name for p in folder.iterdir()), flush=True)
            time.sleep(60)

        checkpoint._open_to_others = wait  # the last step before the folder gets its name
        checkpoint.write(Path(sys.argv[1]), {"x": torch.ones(8)}, {"quantization_config": {}})
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "['config.json', 'model.safetensors']\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", content(), config())  # what is left beside it does not disturb
    assert read(tmp_path / "out")


def test_an_empty_folder_is_filled(small_disk: Path) -> None:
    """Also one where another disk begins, which can be neither removed nor replaced."""
    write(small_disk, content(), config())
    assert read(small_disk)


def test_an_empty_folder_through_a_link_and_from_within(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("real", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write(tmp_path / "link", content(), config())
    assert read(tmp_path / "real")
    monkeypatch.chdir(tmp_path / "here")
    write(Path("."), content(), config())
    assert read(tmp_path / "here")
    assert {p.name for p in tmp_path.iterdir()} == {"real", "here", "link"}
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="gone: already exists"):
        checkpoint.require_free(tmp_path / "gone")


def test_an_empty_folder_is_empty_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "config.json":
            raise OSError("no more")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(InputError, match=r"could not be written \(no more\); nothing was left"):
        write(tmp_path, content(), config(), lambda folder: (folder / "sub").mkdir())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(t.nbytes for t in content().values())
    usage = type(shutil.disk_usage(tmp_path))(total=10**9, used=10**9, free=needed - 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    text = f"out: the disk is full: the checkpoint needs {needed:,} bytes, {needed - 1:,} are free"
    with pytest.raises(InputError, match=re.escape(text)):
        write(tmp_path / "out", content(), config())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB, or a folder where no file may be larger: what the system permits."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], capture_output=True
    )
    if mounted.returncode == 0:
        yield tmp_path
        subprocess.run(["umount", tmp_path], check=True)
        return
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_on_the_way(small_disk: Path) -> None:
    """The tensors fit, the tokenizer beside them does not."""

    def fill(folder: Path) -> None:
        (folder / "tokenizer.json").write_bytes(b"x" * 100_000)

    with pytest.raises(InputError, match=r"out: could not be written \(.*\); nothing was left"):
        write(small_disk / "out", content(), config(), fill)
    assert list(small_disk.iterdir()) == []
    write(small_disk / "out", content(), config())
    assert read(small_disk / "out")


def test_a_disk_that_fills_up_with_tensors(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(shutil.disk_usage(small_disk))(total=10**9, used=0, free=10**9)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"out: could not be written \(.*\); nothing was left"):
        write(small_disk / "out", {"x": torch.ones(100_000)}, config())
    assert list(small_disk.iterdir()) == []


def test_a_place_where_no_folder_can_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"file/out: could not be written"):
        write(tmp_path / "file" / "out", content(), config())


def test_files_are_as_open_as_any(tmp_path: Path) -> None:
    mask = os.umask(0o027)
    try:
        write(tmp_path / "out", content(), config())
    finally:
        os.umask(mask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == 0o640
