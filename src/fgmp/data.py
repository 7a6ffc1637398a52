"""Text to token windows for calibration and evaluation.

``fgmp.documents`` reads the documents of a text. They are tokenized with the tokenizer's own
special tokens and joined by its end-of-sequence token, where it has one. The stream is cut into
windows that do not overlap. There is no padding; the tail is dropped.

Every window starts with a beginning-of-sequence token if the tokenizer itself puts one before a
text, or as the caller says.
"""

import base64
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgmp.documents import read_documents, sample_documents
from fgmp.errors import InputError

HELD_OUT_SHARE = 8
"""Calibration windows per held-out window."""

_CANDIDATES = 4
"""Windows of a large text to choose from, per chosen window: few shall come from one place."""

_PIECE_BYTES, _PIECE_BYTES_PER_TOKEN = 16 << 10, 32
"""Pieces of a large text: at least this size, and about 8 windows at 4 bytes per token."""

_CALL_CHARACTERS = 1 << 18
_LONG_DOCUMENT = 4 << 20
"""Characters per call of a tokenizer, and above which a document is tokenized in pieces: a
tokenizer takes about 200 bytes of memory per character."""

_PROBE = 64
"""Characters of a document that show which special tokens the tokenizer adds."""

_SPAN = 32
"""Consecutive tokens in common that :func:`overlap` reports."""

_PIECE = 48
_PIECES = 1024
_HASH_BYTES = 6
"""The digest of a text: characters per piece, largest number of pieces, bytes per hash."""

_WINDOWS = 256
"""Windows that are decoded or hashed at once, which bounds the memory."""

_NOTHING = torch.zeros(0, dtype=torch.int64)


def tokenize(documents: Iterable[str], tokenizer: Any) -> Tensor:
    """Token ids of all documents in one stream, int64 (T,), joined by end-of-sequence tokens.

    A document keeps the special tokens that the tokenizer adds. Where it puts an end-of-sequence
    token at a border, no second one is inserted. A document above 4 million characters is tokenized
    in pieces that end at line ends, which bounds the memory.
    """
    return _joined(_encodings(documents, tokenizer), tokenizer)


def _joined(parts: Iterable[Tensor], tokenizer: Any) -> Tensor:
    """Join token ids, int64 (T,), by an end-of-sequence token where there is none."""
    end = getattr(tokenizer, "eos_token_id", None)
    joined: list[Tensor] = []
    last = None
    for i, ids in enumerate(parts):
        if i and end is not None and end not in (last, *ids[:1].tolist()):
            joined.append(torch.tensor([end]))
            last = end
        joined.append(ids)
        last = ids[-1].item() if len(ids) else last
    return torch.cat(joined) if joined else _NOTHING


def _encodings(documents: Iterable[str], tokenizer: Any) -> Iterator[Tensor]:
    """Yield the token ids of each document, int64 (T,)."""
    for batch in _batches(documents):
        if len(batch[0]) > _LONG_DOCUMENT:
            yield _encode_in_pieces(batch[0], tokenizer)
        else:
            yield from (torch.tensor(ids, dtype=torch.int64) for ids in _ids(batch, tokenizer))


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents to about as many characters as one call of a tokenizer gets."""
    batch: list[str] = []
    characters = 0
    for document in documents:
        if batch and characters + len(document) > _CALL_CHARACTERS:
            yield batch
            batch, characters = [], 0
        batch.append(document)
        characters += len(document)
    if batch:
        yield batch


def _encode_in_pieces(document: str, tokenizer: Any) -> Tensor:
    """Token ids of a long document, int64 (T,)."""
    before, after = _added_ids(document[:_PROBE], tokenizer)
    parts = [torch.tensor(before, dtype=torch.int64)]
    start = 0
    while start < len(document):
        stop = start + _CALL_CHARACTERS
        if stop < len(document):  # a space belongs to the word that follows
            line, space = document.rfind("\n", start, stop), document.rfind(" ", start + 1, stop)
            stop = line + 1 if line >= start else space if space > start else stop
        (ids,) = _ids([document[start:stop]], tokenizer, add_special_tokens=False)
        parts.append(torch.tensor(ids, dtype=torch.int64))
        start = stop
    return torch.cat([*parts, torch.tensor(after, dtype=torch.int64)])


def _added_ids(text: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Special tokens that the tokenizer puts before and after a text."""
    (plain,) = _ids([text], tokenizer, add_special_tokens=False)
    (full,) = _ids([text], tokenizer)
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return full[:start], full[start + len(plain) :]
    return [], []


def _ids(documents: list[str], tokenizer: Any, **options: bool) -> list[list[int]]:
    # Documents are longer than the model's context by design: verbose=False hides that warning.
    encoded = tokenizer(documents, return_attention_mask=False, verbose=False, **options)
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def beginning(tokenizer: Any, bos: bool | None = None) -> int | None:
    """Token id that starts every window, or None.

    Args:
        tokenizer: a Transformers tokenizer.
        bos: whether windows start with the beginning-of-sequence token; None: if the tokenizer puts
            it before a text.

    Raises:
        InputError: ``bos`` is true, and the tokenizer has no such token.
    """
    token: int | None = getattr(tokenizer, "bos_token_id", None)
    if bos and token is None:
        raise InputError("bos: the tokenizer has no beginning-of-sequence token")
    if bos is None:
        bos = token is not None and _ids(["a"], tokenizer)[0][:1] == [token]
    return token if bos else None


def windows(stream: Tensor, length: int, bos_id: int | None = None) -> Tensor:
    """Cut a stream, int64 (T,), into windows, int64 (B, length); the tail is dropped.

    With ``bos_id``, every window starts with this token. It is inserted unless the stream has it
    there.
    """
    if bos_id is None:
        count = len(stream) // length
        return stream[: count * length].view(count, length)
    bos = torch.tensor([bos_id])
    cut, position = [], 0
    while position < len(stream):
        inserted = bos[:0] if stream[position] == bos_id else bos
        stop = position + length - len(inserted)
        if stop > len(stream):
            break
        cut.append(torch.cat([inserted, stream[position:stop]]))
        position = stop
    return torch.stack(cut) if cut else stream.new_zeros(0, length)


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
    source: str | Path,
    tokenizer: Any,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    bos: bool | None = None,
) -> CalibrationText:
    """Choose random calibration windows of a text, and a held-out slice of other windows.

    Args:
        source: as for :func:`fgmp.documents.read_documents`.
        tokenizer: a Transformers tokenizer.
        samples: calibration windows to choose; a short text gives fewer.
        seq_len: tokens per window.
        seed: random seed for sampling windows.
        bos: whether every window starts with the beginning-of-sequence token; None: if the
            tokenizer puts it before a text.

    Raises:
        InputError: the text does not give two windows; ``samples`` below 1, ``seq_len`` below 2;
            ``bos`` without such a token.
    """
    bos_id = beginning(tokenizer, bos)
    stream = calibration_stream(source, tokenizer, samples=samples, seq_len=seq_len, seed=seed)
    return choose_windows(
        stream, samples=samples, seq_len=seq_len, seed=seed, bos_id=bos_id, source=str(source)
    )


def calibration_stream(
    source: str | Path, tokenizer: Any, *, samples: int, seq_len: int, seed: int
) -> Tensor:
    """Token stream to choose calibration windows from, int64 (T,).

    A text up to 8 MB is read as a whole. A larger one is read in pieces at random positions until
    there are tokens for four times the windows; arguments as for :func:`calibration_text`.
    """
    needed = _CANDIDATES * (samples + held_out_count(samples)) * seq_len
    piece_bytes = max(_PIECE_BYTES, _PIECE_BYTES_PER_TOKEN * seq_len)
    parts, tokens = [], 0
    for documents in sample_documents(source, piece_bytes=piece_bytes, seed=seed):
        parts.append(tokenize(documents, tokenizer))
        tokens += len(parts[-1])
        if tokens >= needed:
            break
    return _joined(parts, tokenizer)


def choose_windows(
    stream: Tensor,
    *,
    samples: int,
    seq_len: int,
    seed: int,
    bos_id: int | None = None,
    source: str = "text",
) -> CalibrationText:
    """Choose random calibration windows of a token stream, as :func:`calibration_text`.

    Args:
        stream: int64 (T,).
        samples, seq_len, seed: as for :func:`calibration_text`.
        bos_id: token that starts every window; see :func:`beginning`.
        source: name of the text in errors.
    """
    if samples < 1:
        raise InputError(f"samples must be 1 or more, got {samples}")
    _require_length(seq_len)
    cut = windows(stream, seq_len, bos_id)
    if len(cut) < 2:
        raise InputError(
            f"text {source}: calibration needs at least 2 sequences of {seq_len} tokens, "
            f"got {len(stream)} tokens"
        )
    order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(seed))
    held_out_windows = held_out_count(min(samples, len(cut)))
    chosen = cut[order[: min(samples, len(cut) - held_out_windows)].sort().values]
    held_out = cut[order[len(chosen) : len(chosen) + held_out_windows].sort().values]
    fingerprint = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
    return CalibrationText(chosen, held_out, fingerprint, samples)


def held_out_count(samples: int) -> int:
    """Number of sequences that are held out beside a number of calibration sequences."""
    return max(1, samples // HELD_OUT_SHARE)


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise InputError(f"seq_len must be 2 or more to predict a token, got {seq_len}")


def evaluation_windows(
    source: str | Path,
    tokenizer: Any,
    seq_len: int,
    documents: list[str] | None = None,
    *,
    bos: bool | None = None,
) -> Tensor:
    """All windows of an evaluation text, int64 (B, seq_len); a shorter text is one window.

    Args:
        source: as for :func:`fgmp.documents.read_documents`.
        tokenizer: a Transformers tokenizer.
        seq_len: tokens per window.
        documents: the documents of ``source``, if the caller has already read them.
        bos: as for :func:`calibration_text`.

    Raises:
        InputError: the text has fewer than two tokens, so nothing can be predicted; ``bos`` without
            such a token.
    """
    _require_length(seq_len)
    bos_id = beginning(tokenizer, bos)
    stream = tokenize(documents or read_documents(source), tokenizer)
    inserted = bos_id is not None and stream[:1].tolist() != [bos_id]
    available = len(stream) + inserted
    if available < 2:
        raise InputError(f"text {source}: nothing to predict in {available} tokens")
    return windows(stream, min(seq_len, available), bos_id)


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """Fraction of evaluation windows that contain 32 consecutive tokens of the calibration windows.

    The calibration windows are cut into spans of 32 tokens, so any 63 tokens in common contain a
    whole span.

    Args:
        calibration: int64 (B, L).
        evaluation: int64 (B', L').
    """
    calibration_hashes = _hashes(calibration, _SPAN, _SPAN).flatten()
    matches = [
        torch.isin(_hashes(some, _SPAN, 1), calibration_hashes).any(-1)
        for some in evaluation.split(_WINDOWS)
    ]
    return torch.cat(matches).double().mean().item()


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
    for some in windows.split(_WINDOWS):
        for text in tokenizer.batch_decode(some.tolist(), skip_special_tokens=True):
            encoded = bytearray("".join(filter(str.isalnum, text.casefold())), "utf-32-le")
            yield torch.frombuffer(encoded, dtype=torch.int32).long() if encoded else _NOTHING


def _hashes(values: Tensor, length: int, step: int) -> Tensor:
    """Hash runs of ``length`` values at multiples of ``step``: 48 bits in int64 (..., M)."""
    if values.shape[-1] < length:
        return values[..., :0]
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(2**62, (length,), generator=generator) * 2 + 1
    wrapped = (values.unfold(-1, length, step) * factors).sum(-1)
    return wrapped >> 16 & (1 << 8 * _HASH_BYTES) - 1
