"""The texts that ship with every interpreter: documents without repeats and without overlap."""

from collections.abc import Callable
from pathlib import Path

import pytest

from fgmp.demo import text
from fgmp.demo.text import SHINGLE, docstrings, standard_library, topics

WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"),
    *("lambda", "mu", "nu", "xi", "omicron"),
]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> str:
    """A language reference of fifteen words, instead of the interpreter's."""
    reference = " ".join(WORDS)
    monkeypatch.setattr(text, "topics", lambda: reference)
    return reference


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    def write(name: str, source: str) -> Path:
        path = tmp_path / name
        path.write_text(source)
        return path

    return write


def test_topics_are_the_same_text_every_time() -> None:
    """In alphabetical order, whatever the order of the interpreter's table."""
    from pydoc_data.topics import topics as by_name

    reference = topics()
    assert reference == topics() and reference.endswith("\n")
    first, last = min(by_name), max(by_name)
    assert reference.startswith(by_name[first].strip())
    assert reference.rstrip().endswith(by_name[last].strip())


def test_the_standard_library_is_without_its_tests() -> None:
    files = standard_library()
    assert files == sorted(files) and len(files) > 300
    names = {path.name for path in files}
    assert {"argparse.py", "decimal.py"} <= names
    for path in files:
        assert not {"test", "tests", "site-packages", "pydoc_data"} & set(path.parts[-4:-1])


@pytest.mark.usefixtures("reference")
def test_a_document_is_the_docstrings_of_a_file(write: Callable[[str, str], Path]) -> None:
    """Docstrings of module, classes and functions, cleaned; no other strings or comments."""
    path = write(
        "a.py",
        '"""Module."""\n# comment\nx = "string"\nclass C:\n    """Class."""\n'
        '    def f(self):\n        """Method,\n        two lines."""\n'
        'async def g():\n    """Coroutine."""\ndef h():\n    return 1\n',
    )
    (document,) = docstrings([path], min_chars=1)
    assert sorted(document.split("\n\n")) == [
        "Class.",
        "Coroutine.",
        "Method,\ntwo lines.",
        "Module.",
    ]


@pytest.mark.usefixtures("reference")
def test_a_paragraph_comes_once(write: Callable[[str, str], Path]) -> None:
    """However many files and docstrings repeat it."""
    a = write("a.py", '"""Same paragraph.\n\nOnly here."""\ndef f():\n    """Same paragraph."""\n')
    b = write("b.py", '"""Same paragraph.\n\nOnly there."""\n')
    assert list(docstrings([a, b], min_chars=1)) == [
        "Same paragraph.\n\nOnly here.",
        "Only there.",
    ]


@pytest.mark.parametrize("shared", [SHINGLE - 1, SHINGLE, SHINGLE + 3])
def test_overlap_with_the_reference_is_dropped(
    shared: int, reference: str, write: Callable[[str, str], Path]
) -> None:
    """From ten consecutive words on, whatever the case and punctuation between them."""
    words = ", ".join(WORDS[2 : 2 + shared]).upper()
    path = write("a.py", f'"""Before {words} after.\n\nAnother paragraph."""\n')
    (document,) = docstrings([path], min_chars=1)
    assert ("Before" in document) == (shared < SHINGLE)
    assert document.endswith("Another paragraph.")


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("length", [159, 160])
def test_short_documents_are_dropped(length: int, write: Callable[[str, str], Path]) -> None:
    path = write("a.py", f'"""{"x" * length}"""\n')
    assert len(list(docstrings([path]))) == (length == 160)


@pytest.mark.usefixtures("reference")
def test_files_that_cannot_be_parsed_are_skipped(
    write: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """Templates, sources of other versions, files that are gone, and NUL bytes."""
    broken = [write("template.py", "def {{name}}():"), write("old.py", 'print "text"')]
    binary = tmp_path / "binary.py"
    binary.write_bytes(b'"""text\0"""')
    good = write("good.py", '"""Good."""\n')
    files = [*broken, binary, tmp_path / "absent.py", good]
    assert list(docstrings(files, min_chars=1)) == ["Good."]


def test_calibration_and_evaluation_share_no_ten_words() -> None:
    """The real texts, as ``fgmp quickstart`` uses them."""
    reference = set(text._shingles(topics()))
    for document in docstrings(standard_library()[:150]):
        for paragraph in document.split("\n\n"):
            assert reference.isdisjoint(text._shingles(paragraph)), paragraph
