"""Documents of text files and Hugging Face datasets.

A source is a file, or a dataset named ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT`` (this
needs the package ``datasets``). The content of a file decides its format:

    JSON lines    the first line is an object; each line has a string field ``text``
    JSON          an array of objects with ``text`` or of strings, or one such object
    plain text    anything else; one document, or several separated by ``<|endoftext|>``

Files named ``.json``, ``.jsonl`` or ``.ndjson`` must be JSON. Text is UTF-8, with or without a byte
order mark. Tables, compressed and binary files are refused.

:func:`read_documents` reads a whole text, :func:`sample_documents` random pieces of a large one.
"""

import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from fgmp.errors import InputError

SEPARATOR = "<|endoftext|>"

WHOLE_BYTES = 8 << 20
"""Largest text that :func:`sample_documents` reads as a whole; of a dataset, its characters."""

_MAX_JSON_BYTES = 256 << 20
_MAX_LINE_BYTES = 64 << 20
"""Largest JSON file that is not JSON lines, and longest line of a large file of JSON lines."""

_ROWS = 32
"""Rows of a large dataset per sampled list of documents."""

_LINES_SUFFIXES = (".jsonl", ".ndjson")
_JSON_SUFFIXES = (".json", *_LINES_SUFFIXES)
_ADVICE = 'give UTF-8 text, or JSON lines with a string field "text"'
_UNREADABLE_SUFFIXES = {
    **dict.fromkeys((".csv", ".tsv", ".xls", ".xlsx"), f"is a table; {_ADVICE}"),
    **dict.fromkeys((".parquet", ".arrow", ".feather", ".orc"), f"is a table; {_ADVICE}"),
    **dict.fromkeys(
        (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".7z", ".rar", ".tar", ".tgz"),
        "is compressed or an archive; unpack it first",
    ),
}
_UNREADABLE_STARTS = {
    b"PAR1": _UNREADABLE_SUFFIXES[".parquet"],
    b"ARROW1": _UNREADABLE_SUFFIXES[".arrow"],
    b"\x1f\x8b": _UNREADABLE_SUFFIXES[".gz"],
    **{b"BZh%d1AY&SY" % level: _UNREADABLE_SUFFIXES[".bz2"] for level in range(1, 10)},
    b"\xfd7zXZ\0": _UNREADABLE_SUFFIXES[".xz"],
    b"\x28\xb5\x2f\xfd": _UNREADABLE_SUFFIXES[".zst"],
    b"\x04\x22\x4d\x18": _UNREADABLE_SUFFIXES[".lz4"],
    b"PK\x03\x04": _UNREADABLE_SUFFIXES[".zip"],
    b"7z\xbc\xaf\x27\x1c": _UNREADABLE_SUFFIXES[".7z"],
    b"%PDF-": f"is a PDF document; {_ADVICE}",
    b"\xff\xfe": "is UTF-16; convert it to UTF-8",
    b"\xfe\xff": "is UTF-16; convert it to UTF-8",
}
_LONGEST_START = max(map(len, _UNREADABLE_STARTS))
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that start no character."""

_TEXT_SUFFIXES = (".txt", ".md", ".text", *_JSON_SUFFIXES, *_UNREADABLE_SUFFIXES)


def read_documents(source: str | Path) -> list[str]:
    """Read the documents, at least one, of a text file or Hugging Face dataset.

    Blank documents are dropped.

    Raises:
        InputError: nothing can be read there, or all documents are blank.
    """
    path = _file(source)
    return _documents(_dataset(str(source)) if path is None else _read_file(path), source)


def sample_documents(source: str | Path, *, piece_bytes: int, seed: int) -> Iterator[list[str]]:
    """Yield the documents of a text: all at once, or pieces of a large text in random order.

    A text above :data:`WHOLE_BYTES` is not read as a whole, unless it is a JSON array. Pieces of
    plain text start at line starts and are documents of their own. Pieces of JSON lines are whole
    lines. Of a document longer than two pieces, a random part is taken.

    Args:
        source: as for :func:`read_documents`.
        piece_bytes: approximate size of a piece.
        seed: chooses the order of the pieces.

    Yields:
        One document or more, not blank. All lists together cover the text once, but for the rest of
        longer documents.

    Raises:
        InputError: as :func:`read_documents`.
    """
    generator = torch.Generator().manual_seed(seed)
    path = _file(source)
    if path is None:
        rows = _dataset(str(source))
        is_large = _has_more_characters(rows, WHOLE_BYTES)
    else:
        is_large = path.stat().st_size > WHOLE_BYTES
        rows = [] if is_large else _read_file(path)
    if not is_large:
        yield _documents(rows, source)
        return
    pieces = (
        _sampled_rows(rows, generator)
        if path is None
        else _sampled_file(path, piece_bytes, generator)
    )
    is_empty = True
    for piece in pieces:
        documents = [_part(text, 2 * piece_bytes, generator) for text in _not_blank(piece, source)]
        if documents:
            is_empty = False
            yield documents
    if is_empty:
        raise InputError(f"text {source}: holds no text")


def _documents(rows: Sequence[Any], source: str | Path) -> list[str]:
    documents = _not_blank(rows, source)
    if not documents:
        raise InputError(f"text {source}: holds no text")
    return documents


def _not_blank(rows: Sequence[Any], source: str | Path) -> list[str]:
    """Documents that hold more than white space; a row of a dataset may be None."""
    documents = []
    for text in rows:
        if not isinstance(text, str | None):
            raise InputError(f"text {source}: a row holds {type(text).__name__}, not a string")
        if text and not text.isspace():
            documents.append(text)
    return documents


def _part(text: str, length: int, generator: torch.Generator) -> str:
    """Random part of a text longer than ``length`` characters; it starts a line if it can."""
    if len(text) <= length:
        return text
    start = int(torch.randint(len(text) - length + 1, (), generator=generator))
    line = text.find("\n", start, start + length) + 1
    return text[line or start : start + length]


def _sampled_rows(rows: Sequence[Any], generator: torch.Generator) -> Iterator[Sequence[Any]]:
    """Yield all rows in random order, some at a time."""
    for indices in torch.randperm(len(rows), generator=generator).split(_ROWS):
        yield [rows[index] for index in indices.tolist()]


# Files.


def _file(source: str | Path) -> Path | None:
    """The regular file of this name; None if there is nothing of this name."""
    path = Path(source)
    try:
        if not path.exists():
            return None
        mode = path.stat().st_mode
    except OSError as error:  # such as a name that is too long
        raise InputError(f"text {str(source)[:60]}...: {error.strerror}") from error
    if stat.S_ISDIR(mode):
        raise InputError(f"text {path}: is a folder, not a file")
    if not stat.S_ISREG(mode):  # reading a pipe could wait without end
        raise InputError(f"text {path}: must be a regular file, got a pipe, socket or device")
    return path


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading, unless its first bytes or its suffix say that it is no text."""
    try:
        with path.open("rb") as file:
            head = file.read(_LONGEST_START)
            file.seek(0)
            for start, fault in _UNREADABLE_STARTS.items():
                if head.startswith(start):
                    raise InputError(f"text {path}: {fault}")
            if path.suffix.lower() in _UNREADABLE_SUFFIXES:
                raise InputError(f"text {path}: {_UNREADABLE_SUFFIXES[path.suffix.lower()]}")
            yield file
    except OSError as error:
        raise InputError(f"text {path}: {error.strerror}") from error


def _read_file(path: Path) -> list[str]:
    with _opened(path) as file:
        text = _decode(file.read(), path)
    first_line = text.lstrip().partition("\n")[0]
    if _is_json_lines(first_line, path):
        return _line_documents(text, path)
    documents = _json_documents(text, path) if _may_be_json(first_line, path) else None
    return text.split(SEPARATOR) if documents is None else documents


def _decode(content: bytes, path: Path, offset: int = 0) -> str:
    """Text of a file's bytes from ``offset`` on; every line ends with a line feed."""
    if offset == 0:
        content = content.removeprefix(_BYTE_ORDER_MARK)
    nul = content.find(0)
    if nul >= 0:
        raise InputError(f"text {path}: is binary, with a NUL at byte {offset + nul}; {_ADVICE}")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text {path}: not UTF-8 at byte {offset + error.start}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _sampled_file(
    path: Path, piece_bytes: int, generator: torch.Generator
) -> Iterator[Sequence[str]]:
    """Yield the documents of a large file, piece by piece in random order."""
    size = path.stat().st_size
    with _opened(path) as file:
        first_line = _first_line(file)
        is_lines = _is_json_lines(first_line, path)
        if not is_lines and _may_be_json(first_line, path):
            documents = _large_json(file, size, path)
            if documents is not None:
                yield from _sampled_rows(documents, generator)
                return
        reach = _MAX_LINE_BYTES if is_lines else piece_bytes
        for index in torch.randperm(-(-size // piece_bytes), generator=generator).tolist():
            start = _boundary(file, index * piece_bytes, reach)
            stop = _boundary(file, (index + 1) * piece_bytes, reach)
            file.seek(start)
            text = _decode(file.read(max(0, stop - start)), path, start)
            yield _line_documents(text, path, start) if is_lines else text.split(SEPARATOR)


def _first_line(file: BinaryIO) -> str:
    """First line that is not blank, or its start."""
    line = b"\n"
    while line and not line.removeprefix(_BYTE_ORDER_MARK).strip():
        line = file.readline(_MAX_LINE_BYTES)
    return line.removeprefix(_BYTE_ORDER_MARK).decode("utf-8", "replace")


def _boundary(file: BinaryIO, position: int, reach: int) -> int:
    """First line start at ``position`` or later, at most ``reach`` bytes on.

    In a longer line, the first character that starts at ``position`` or later.
    """
    if position == 0:
        return 0
    file.seek(position - 1)
    line = file.readline(reach)
    if len(line) < reach or line.endswith(b"\n"):
        return position - 1 + len(line)
    file.seek(position)
    head = file.read(4)
    return position + len(head) - len(head.lstrip(_CONTINUATION_BYTES))


# JSON.


def _is_json_lines(first_line: str, path: Path) -> bool:
    if path.suffix.lower() in _LINES_SUFFIXES and not first_line.lstrip().startswith("["):
        return True
    try:
        return isinstance(json.loads(first_line), dict)
    except (ValueError, RecursionError):
        return False


def _may_be_json(first_line: str, path: Path) -> bool:
    return path.suffix.lower() in _JSON_SUFFIXES or first_line.lstrip().startswith(("[", "{"))


def _line_documents(text: str, path: Path, offset: int = 0) -> list[str]:
    """Documents of JSON lines, which start at byte ``offset`` of the file."""
    documents = []
    after = f" after byte {offset}" if offset else ""
    # splitlines would also split at characters that JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"text {path}: line {number}{after}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON: {error}") from error
        documents.append(_text_of(record, where))
    return documents


def _json_documents(text: str, path: Path) -> list[str] | None:
    """Documents of a JSON array or object; None if the text is not JSON and need not be."""
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() not in _JSON_SUFFIXES:
            return None
        raise InputError(f"text {path}: is not JSON: {error}") from error
    if not isinstance(content, list):
        return [_text_of(content, f"text {path}: the value")]
    return [
        _text_of({"text": item} if isinstance(item, str) else item, f"text {path}: item {number}")
        for number, item in enumerate(content, start=1)
    ]


def _large_json(file: BinaryIO, size: int, path: Path) -> list[str] | None:
    """:func:`_json_documents` of a file up to the limit on JSON that is read as a whole."""
    if size <= _MAX_JSON_BYTES:
        file.seek(0)
        return _json_documents(_decode(file.read(), path), path)
    if path.suffix.lower() in _JSON_SUFFIXES:
        raise InputError(
            f"text {path}: a JSON array may have {_MAX_JSON_BYTES:,} bytes, got {size:,}; give "
            "JSON lines"
        )
    return None


def _text_of(record: object, where: str) -> str:
    """Document of a JSON value."""
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no string field "text"')
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise InputError(
            f"{where} holds a lone surrogate, \\u{code:x}, which is no character"
        ) from error
    return text


# Datasets.


def _has_more_characters(rows: Sequence[Any], limit: int) -> bool:
    characters = 0
    for text in rows:
        characters += len(text or "")
        if characters > limit:
            return True
    return False


def _dataset(source: str) -> Sequence[Any]:
    suffix = Path(source.partition(":")[0]).suffix.lower()
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
    rows: Sequence[Any] = loaded["text"]
    return rows
