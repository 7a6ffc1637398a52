"""Text to token windows for calibration and evaluation.

A source is a text file, a JSON-lines file with a ``text`` field, or a Hugging Face dataset named
``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT`` (this needs the package ``datasets``). A text
file is one document unless ``<|endoftext|>`` separates several.

Documents are tokenized with the tokenizer's own special tokens and joined by its end-of-sequence
token, where it has one. The stream is cut into windows that do not overlap. There is no padding;
the tail is dropped.
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
"""Calibration windows per held-out window."""

_SPAN = 32
"""Consecutive tokens in common that :func:`overlap` reports."""

_PIECE = 48
_PIECES = 1024
_HASH_BYTES = 6
"""The digest of a text: characters per piece, largest number of pieces, bytes per hash."""

_TEXT_SUFFIXES = (".txt", ".md", ".text", ".json", ".jsonl", ".ndjson", ".csv", ".parquet")

_NOTHING = torch.zeros(0, dtype=torch.int64)


def read_documents(source: str | Path) -> list[str]:
    """Read the documents, at least one, of a text file, JSON-lines file or Hugging Face dataset.

    Blank documents are dropped.

    Raises:
        InputError: nothing can be read there, or all documents are blank.
    """
    path = Path(source)
    try:
        is_file = path.exists()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"text {str(source)[:60]}...: {error.strerror}") from error
    documents = _read_file(path) if is_file else _read_dataset(str(source))
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
        # splitlines would also split at characters that JSON allows inside a string.
        lines = enumerate(text.split("\n"), start=1)
        return [_text_of(line, path, number) for number, line in lines if line.strip()]
    return text.split(SEPARATOR)


def tokenize(documents: list[str], tokenizer: Any) -> Tensor:
    """Token ids of all documents in one stream, int64 (T,), joined by end-of-sequence tokens."""
    # The stream is longer than the model's context by design: verbose=False hides that warning.
    encoded = tokenizer(documents, return_attention_mask=False, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    stream: list[int] = []
    for i, ids in enumerate(encoded):
        if i and end is not None:
            stream.append(end)
        stream.extend(ids)
    return torch.tensor(stream, dtype=torch.int64)


def windows(stream: Tensor, length: int) -> Tensor:
    """Cut a stream, int64 (T,), into windows, int64 (B, length); the tail is dropped."""
    count = len(stream) // length
    return stream[: count * length].view(count, length)


@dataclass(frozen=True)
class CalibrationText:
    """Token windows of a calibration text.

    Attributes:
        samples: the calibration sequences, int64 (B, L).
        held_out: other windows of the same text, int64 (B', L).
        fingerprint: SHA-256 of the samples' token ids.
        asked: number of samples requested; a short text gives fewer.
    """

    samples: Tensor
    held_out: Tensor
    fingerprint: str
    asked: int


def calibration_text(
    source: str | Path, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> CalibrationText:
    """Choose random calibration windows of a text, and a held-out slice of other windows.

    Args:
        source: as for :func:`read_documents`.
        tokenizer: a Transformers tokenizer.
        samples: calibration windows to choose; a short text gives fewer.
        seq_len: tokens per window.
        seed: of the random choice.

    Raises:
        InputError: the text does not give two windows; ``samples`` below 1, ``seq_len`` below 2.
    """
    stream = tokenize(read_documents(source), tokenizer)
    return choose_windows(stream, samples=samples, seq_len=seq_len, seed=seed, source=str(source))


def choose_windows(
    stream: Tensor, *, samples: int, seq_len: int, seed: int, source: str = "text"
) -> CalibrationText:
    """:func:`calibration_text` for a token stream, int64 (T,); ``source`` names it in errors."""
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
    held_out_count = max(1, min(samples, len(cut)) // HELD_OUT_SHARE)
    chosen = cut[order[: min(samples, len(cut) - held_out_count)].sort().values]
    held_out = cut[order[len(chosen) : len(chosen) + held_out_count].sort().values]
    fingerprint = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    return CalibrationText(chosen, held_out, fingerprint, samples)


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"seq_len must be 2 or more to predict a token, got {seq_len}")


def evaluation_windows(
    source: str | Path, tokenizer: Any, seq_len: int, documents: list[str] | None = None
) -> Tensor:
    """All windows of an evaluation text, int64 (B, seq_len); a shorter text is one window.

    Args:
        source: as for :func:`read_documents`.
        tokenizer: a Transformers tokenizer.
        seq_len: tokens per window.
        documents: the documents of ``source``, if the caller has already read them.

    Raises:
        InputError: the text has fewer than two tokens, so nothing can be predicted.
    """
    _require_length(seq_len)
    stream = tokenize(documents or read_documents(source), tokenizer)
    if len(stream) < 2:
        raise InputError(f"text {source}: nothing to predict in {len(stream)} tokens")
    return windows(stream, min(seq_len, len(stream)))


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """Fraction of evaluation windows that contain 32 consecutive tokens of the calibration windows.

    The calibration windows are cut into spans of 32 tokens, so any 63 tokens in common contain a
    whole span.

    Args:
        calibration: int64 (B, L).
        evaluation: int64 (B', L').
    """
    calibration_hashes = _hashes(calibration, _SPAN, _SPAN).flatten()
    matches = torch.isin(_hashes(evaluation, _SPAN, 1), calibration_hashes)
    return matches.any(-1).double().mean().item()


def digest(windows: Tensor, tokenizer: Any) -> str:
    """Digest of the calibration text for the checkpoint: base64 of hashes of its pieces.

    A piece is 48 letters and digits, about ten words, case folded; pieces of a window follow each
    other without overlap. The 1,024 smallest hashes are stored, 8 KB at most. docs/format.md,
    section 1, specifies the digest.

    Args:
        windows: int64 (B, L).
        tokenizer: the tokenizer that produced the windows.
    """
    hashes = [_hashes(text, _PIECE, _PIECE) for text in _letters(windows, tokenizer)]
    smallest = sorted(set(torch.cat(hashes).tolist()))[:_PIECES]
    return base64.b64encode(b"".join(h.to_bytes(_HASH_BYTES, "little") for h in smallest)).decode()


def overlap_with(calibrated: str, windows: Tensor, tokenizer: Any) -> float:
    """Fraction of evaluation windows that contain a piece of the calibration text.

    Text is compared rather than tokens, since tokenizers and window lengths may differ. The result
    is a lower bound where the calibration text had more pieces than the digest holds.

    Args:
        calibrated: result of :func:`digest` for the calibration windows.
        windows: int64 (B, L).
        tokenizer: the tokenizer that produced ``windows``.
    """
    raw = base64.b64decode(calibrated)
    calibration_hashes = torch.tensor(
        [
            int.from_bytes(raw[i : i + _HASH_BYTES], "little")
            for i in range(0, len(raw), _HASH_BYTES)
        ],
        dtype=torch.int64,
    )
    matches = [
        torch.isin(_hashes(text, _PIECE, 1), calibration_hashes).any().item()
        for text in _letters(windows, tokenizer)
    ]
    return sum(matches) / len(matches)


def _letters(windows: Tensor, tokenizer: Any) -> Iterator[Tensor]:
    """Yield the code points of each window's letters and digits, case folded, int64."""
    for text in tokenizer.batch_decode(windows.tolist(), skip_special_tokens=True):
        encoded = "".join(filter(str.isalnum, text.casefold())).encode("utf-32-le")
        yield (
            torch.frombuffer(bytearray(encoded), dtype=torch.int32).long() if encoded else _NOTHING
        )


def _hashes(values: Tensor, length: int, step: int) -> Tensor:
    """Hash runs of ``length`` values at multiples of ``step``: 48 bits in int64 (..., M)."""
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
