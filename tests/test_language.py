"""The cheap half of language: first words of docstrings, lengths of sentences, names of nothing."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "fgmp").rglob("*.py"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

LONGEST_SENTENCE = 45
"""Words."""

VAGUE = {"found", "told", "kept", "wanted"}
"""Names that say what happened to a thing, and not what it is."""

ALLOWED: set[tuple[str, str]] = set()
"""Bindings of such names that stay: (file below src/fgmp, name)."""


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Docstrings with their lines, those of attributes and constants among them."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:  # a lambda has an expression
            if (
                isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Constant)
                and isinstance(statement.value.value, str)
            ):
                yield statement.lineno, statement.value.value


def bindings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Names that a file binds: assignments, loops, ``with``, ``except`` and arguments."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name


def sentences(markdown: str) -> Iterator[str]:
    """Sentences of a document, without code, tables, headings and targets of links."""
    text = re.sub(r"^ *```.*?^ *```", "\n\n", markdown, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(?:^|(?<=\n\n))(?: {4}.*\n+)+", "\n\n", text, flags=re.MULTILINE)
    text = re.sub(r"^ *\|.*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"^#.*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\$\$.*?\$\$", " formula ", text, flags=re.DOTALL)
    text = re.sub(r"\]\([^)]*\)", "]", text)
    text = re.sub(r"`[^`\n]+`", "code", text)
    text = re.sub(r"^ *(?:[-*+]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in re.split(r"(?<=[.!?])[\"')\]*_]*\s+", paragraph.strip()):
            if sentence:
                yield sentence


def words(sentence: str) -> int:
    return len(re.findall(r"\S*\w\S*", sentence))


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_no_docstring_opens_with_of(path: Path) -> None:
    """It would need the signature to be a sentence."""
    opened = [line for line, text in docstrings(ast.parse(path.read_text()))
              if text.lstrip().startswith("Of ")]  # fmt: skip
    assert not opened, f"{named(path)}, lines {opened}"


@pytest.mark.parametrize("path", SOURCES, ids=named)
def test_names_say_what_a_thing_is(path: Path) -> None:
    below = str(path.relative_to(ROOT / "src" / "fgmp"))
    vague = [
        (line, name)
        for line, name in bindings(ast.parse(path.read_text()))
        if name in VAGUE and (below, name) not in ALLOWED
    ]
    assert not vague, f"{named(path)}: {vague}"


def test_every_allowance_is_needed() -> None:
    for below, name in ALLOWED:
        tree = ast.parse((ROOT / "src" / "fgmp" / below).read_text())
        assert name in {bound for _, bound in bindings(tree)}, f"{below}: {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_sentences_are_short(path: Path) -> None:
    long = [s for s in sentences(path.read_text()) if words(s) > LONGEST_SENTENCE]
    assert not long, "\n".join(f"{words(s)} words: {' '.join(s.split())[:120]}" for s in long)


def test_what_counts_as_a_sentence() -> None:
    text = (
        "# A heading of five words\n\nOne two [three](http://x.y/a.b). Four `a.b c` five?\n\n"
        "| a | table |\n|---|---|\n\n* an item\n* another\n\n    indented code here\n\n"
        "```\nfenced. code\n```\n\nlast 1.5 words\n"
    )
    split = [" ".join(s.split()) for s in sentences(text)]
    assert split == ["One two [three].", "Four code five?", "an item", "another", "last 1.5 words"]
    assert [words(s) for s in split] == [3, 3, 2, 1, 3]
