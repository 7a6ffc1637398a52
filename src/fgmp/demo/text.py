"""Documentation text that ships with every Python interpreter.

The demonstration model is trained and calibrated on docstrings and evaluated on
``pydoc_data.topics``, the language reference behind ``help("...")``. Both come with the
interpreter, so ``fgmp quickstart`` needs no network and no data file. The two texts must not
overlap: :func:`docstrings` drops every paragraph that shares :data:`SHINGLE` consecutive words with
the topics.
"""

import ast
import hashlib
import inspect
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

SHINGLE = 10
"""Consecutive words in common that count as overlap with the evaluation text."""

_WORD = re.compile(r"\w+")
_SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "site-packages", "pydoc_data"}


def topics() -> str:
    """Language reference of the interpreter as one text, topics in alphabetical order."""
    from pydoc_data.topics import topics as by_name

    return "\n\n".join(by_name[name].strip() for name in sorted(by_name)) + "\n"


def standard_library() -> list[Path]:
    """Source files of the standard library, without its tests, in sorted order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path
        for path in root.rglob("*.py")
        if not _SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def docstrings(files: Iterable[Path], *, min_chars: int = 160) -> Iterator[str]:
    """Yield the docstrings of ``files``, without repeats and without text of the topics.

    Args:
        files: Python source files. A file that cannot be parsed is skipped, since packages contain
            templates and sources for other Python versions.
        min_chars: shorter documents are dropped.

    Yields:
        One document per file: its docstrings in source order, separated by blank lines.
    """
    held_out = set(_shingles(topics()))
    seen: set[bytes] = set()
    for path in files:
        paragraphs = []
        for text in _docstrings_of(path):
            for paragraph in re.split(r"\n\s*\n", text):
                digest = hashlib.blake2b(paragraph.strip().encode(), digest_size=12).digest()
                if digest in seen or not held_out.isdisjoint(_shingles(paragraph)):
                    continue
                seen.add(digest)
                paragraphs.append(paragraph.rstrip())
            paragraphs.append("")
        document = re.sub(r"\n{3,}", "\n\n", "\n\n".join(paragraphs)).strip()
        if len(document) >= min_chars:
            yield document


def _docstrings_of(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError, RecursionError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node, clean=False)
            if text:
                yield inspect.cleandoc(text)


def _shingles(text: str) -> Iterator[int]:
    words = _WORD.findall(text.lower())
    for i in range(len(words) - SHINGLE + 1):
        yield hash(tuple(words[i : i + SHINGLE]))
