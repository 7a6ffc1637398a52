"""Text to token windows for calibration and evaluation.

Sources: a text file, JSON lines with a ``text`` field, or the name of a Hugging Face dataset
(``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``, where the package ``datasets`` is installed).
A text file is one document unless ``<|endoftext|>`` lines part it into several. Documents are
tokenized with the tokenizer's own special tokens, joined by its end-of-sequence token where it
has one, and cut into windows that do not overlap. There is no padding; the tail is dropped.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgmp.errors import InputError

SEPARATOR = "<|endoftext|>"
HELD_OUT_SHARE = 8
"""The held-out slice of a calibration text is one window for this many calibration windows."""

_SPAN = 32
_PIECE = 48
_PIECES = 1024
_HASH_BYTES = 6
"""Of text, for a checkpoint: characters in a piece, pieces kept, bytes of a hash."""

_TEXT_SUFFIXES = (".txt", ".md", ".text", ".json", ".jsonl", ".ndjson", ".csv", ".parquet")

_NOTHING = torch.zeros(0, dtype=torch.int64)


def read_documents(source: str | Path) -> list[str]:
    """The documents of a text file, a JSON-lines file or a Hugging Face dataset, one or more.

    Raises:
        InputError: nothing can be read there, or all of it is blank.
    """
    path = Path(source)
    try:
        found = path.exists()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"text {str(source)[:60]}...: {error.strerror}") from error
    documents = _read_file(path) if found else _read_dataset(str(source))
    documents = [d for d in documents if d.strip()]
    if not documents:
        raise InputError(f"text {source}: holds no text")
    return documents


def _read_file(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except IsADirectoryError as error:
        raise InputError(f"text {path}: is a folder, not a file") from error
    except OSError as error:
        raise InputError(f"text {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"text {path}: not UTF-8 at byte {error.start}") from error
    if path.suffix in (".jsonl", ".ndjson"):
        # Not splitlines, which also parts at characters that JSON allows inside a string.
        lines = enumerate(text.split("\n"), start=1)
        return [_text_of(line, path, number) for number, line in lines if line.strip()]
    return text.split(SEPARATOR)


def tokenize(documents: list[str], tokenizer: Any) -> Tensor:
    """One stream of token ids, int64 (T,)."""
    # Over-long input is the point here, so the tokenizer's own remark about it is switched off.
    encoded = tokenizer(documents, return_attention_mask=False, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    for i, ids in enumerate(encoded):
        if i and end is not None:
            stream.append(end)
        stream.extend(ids)
    return torch.tensor(stream, dtype=torch.int64)


def windows(stream: Tensor, length: int) -> Tensor:
    """Cut a stream into windows: int64 (B, length), the tail dropped."""
    count = len(stream) // length
    return stream[: count * length].view(count, length)


@dataclass(frozen=True)
class CalibrationText:
    """Token windows of a calibration text.

    Attributes:
        samples: int64 (B, L), the calibration sequences.
        held_out: int64 (B', L), windows of the same text that are not among them.
        fingerprint: SHA-256 of the samples' token ids.
        asked: how many samples were asked for; fewer are there if the text is short.
    """

    samples: Tensor
    held_out: Tensor
    fingerprint: str
    asked: int


def calibration_text(
    source: str | Path, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> CalibrationText:
    """Choose calibration windows at random, and a held-out slice beside them.

    Raises:
        InputError: the text does not give two windows; ``samples`` below 1, ``seq_len`` below 2.
    """
    stream = tokenize(read_documents(source), tokenizer)
    return choose_windows(stream, samples=samples, seq_len=seq_len, seed=seed, source=str(source))


def choose_windows(
    stream: Tensor, *, samples: int, seq_len: int, seed: int, source: str = "text"
) -> CalibrationText:
    """:func:`calibration_text` from a token stream, int64 (T,)."""
    if samples < 1:
        raise InputError(f"samples must be 1 or more, got {samples}")
    _require_length(seq_len)
    cut = windows(stream, seq_len)
    if len(cut) < 2:
        raise InputError(
            f"text {source}: calibration needs at least 2 sequences of {seq_len} tokens, "
            f"got {len(stream)} tokens"
        )
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
    held = max(1, min(samples, len(cut)) // HELD_OUT_SHARE)
    chosen = cut[order[: min(samples, len(cut) - held)].sort().values]
    kept_apart = cut[order[len(chosen) : len(chosen) + held].sort().values]
    fingerprint = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    return CalibrationText(chosen, kept_apart, fingerprint, samples)


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"seq_len must be 2 or more to predict a token, got {seq_len}")


def evaluation_windows(
    source: str | Path, tokenizer: Any, seq_len: int, documents: list[str] | None = None
) -> Tensor:
    """All windows of an evaluation text, int64 (B, seq_len); a shorter text is one window.

    ``documents``: those of ``source``, if they were read before.

    Raises:
        InputError: the text has fewer than two tokens, so nothing can be predicted.
    """
    _require_length(seq_len)
    stream = tokenize(documents or read_documents(source), tokenizer)
    if len(stream) < 2:
        raise InputError(f"text {source}: nothing to predict in {len(stream)} tokens")
    return windows(stream, min(seq_len, len(stream)))


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """Share of evaluation windows that hold 32 consecutive tokens of the calibration windows.

    Args:
        calibration: int64 (B, L). Pieces at multiples of 32 are looked for, so that any passage of
            63 tokens in common is found.
        evaluation: int64 (B', L').
    """
    known = _hashes(calibration, _SPAN, _SPAN).flatten()
    found = torch.isin(_hashes(evaluation, _SPAN, 1), known)
    return found.any(-1).double().mean().item()


def digest(windows: Tensor, tokenizer: Any) -> str:
    """What a checkpoint remembers of its calibration text: hashes of pieces of it, base64.

    Hashed are pieces of 48 letters and digits, about ten words, case folded, one after the other
    in each window. Of more than 1,024 pieces those with the smallest hashes stay, 8 KB in all.

    Args:
        windows: int64 (B, L).
        tokenizer: what made them.
    """
    found = [_hashes(text, _PIECE, _PIECE) for text in _letters(windows, tokenizer)]
    kept = sorted(set(torch.cat(found).tolist()))[:_PIECES]
    return base64.b64encode(b"".join(h.to_bytes(_HASH_BYTES, "little") for h in kept)).decode()


def overlap_with(calibrated: str, windows: Tensor, tokenizer: Any) -> float:
    """Share of evaluation windows that hold a piece of the calibration text.

    Of text, not of tokens: the two may be tokenized and cut differently. A lower bound where the
    calibration text had more pieces than are kept.

    Args:
        calibrated: from :func:`digest`.
        windows: int64 (B, L).
        tokenizer: what made them.
    """
    raw = base64.b64decode(calibrated)
    known = torch.tensor(
        [
            int.from_bytes(raw[i : i + _HASH_BYTES], "little")
            for i in range(0, len(raw), _HASH_BYTES)
        ],
        dtype=torch.int64,
    )
    found = [
        torch.isin(_hashes(text, _PIECE, 1), known).any().item()
        for text in _letters(windows, tokenizer)
    ]
    return sum(found) / len(found)


def _letters(windows: Tensor, tokenizer: Any) -> Iterator[Tensor]:
    """Code points of each window's letters and digits, int64."""
    for text in tokenizer.batch_decode(windows.tolist(), skip_special_tokens=True):
        kept = "".join(filter(str.isalnum, text.casefold())).encode("utf-32-le")
        yield torch.frombuffer(bytearray(kept), dtype=torch.int32).long() if kept else _NOTHING


def _hashes(values: Tensor, length: int, step: int) -> Tensor:
    """Hashes, 48 bits in int64 (..., M), of runs of ``length`` values at multiples of ``step``."""
    if values.shape[-1] < length:
        return values[..., :0]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (length,), generator=generator) * 2 + 1
    wrapped = (values.unfold(-1, length, step) * factors).sum(-1)
    return wrapped >> 16 & (1 << 8 * _HASH_BYTES) - 1


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"text {path}: line {number} is not JSON: {error}") from error
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'text {path}: line {number} has no string field "text"')
    return text


def _read_dataset(source: str) -> list[str]:
    suffix = Path(source.partition(":")[0]).suffix
    if source.startswith((".", "/", "~")) or suffix in _TEXT_SUFFIXES or source.count("/") > 1:
        raise InputError(f"text {source}: no such file")
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"text {source}: no such file, and to read it as a Hugging Face dataset "
            "the package `datasets` is needed (pip install 'fgmp[datasets]')"
        ) from error
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the library raises many kinds, all meaning "cannot be had"
        raise InputError(f"text {source}: no such file, and as a dataset: {error}") from error
    if "text" not in loaded.column_names:
        raise InputError(f'dataset {source}: no column "text", only {loaded.column_names}')
    return list(loaded["text"])
