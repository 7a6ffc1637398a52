"""Which files are read as texts and how, which are refused, and what is taken of a large one."""

import gzip
import itertools
import json
import os
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fgmp import documents
from fgmp.documents import read_documents, sample_documents
from fgmp.errors import InputError


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("één\n\ntwo", encoding="utf-8")
    assert read_documents(path) == ["één\n\ntwo"]
    path.write_text("one<|endoftext|>\ntwo<|endoftext|>  \n")
    assert read_documents(str(path)) == ["one", "\ntwo"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", ""),
        ("a.txt", " \n<|endoftext|>\n"),
        ("a.jsonl", "\n"),
        ("a.jsonl", '{"text": ""}\n{"text": " "}\n'),
    ],
)
def test_a_text_without_text_is_refused(name: str, content: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match=rf"^text {path}: holds no text$"):
        read_documents(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson"])
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"a{suffix}"
    lines = [{"text": "one\u2028still one"}, {"text": " ", "x": 1}, {"text": "two\nlines"}]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    assert read_documents(path) == ["one\u2028still one", "two\nlines"]


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "line 2 is not JSON"),
        ('{"content": "x"}', 'line 2 has no string field "text"'),
        ('{"text": 3}', 'line 2 has no string field "text"'),
        ('["text"]', 'line 2 has no string field "text"'),
    ],
)
def test_bad_lines_are_numbered(line: str, fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(InputError, match=rf"a\.jsonl: {fault}"):
        read_documents(path)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a folder, not a file"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match=r"nowhere\.txt: no such file"):
        read_documents(tmp_path / "nowhere.txt")
    with pytest.raises(InputError, match=r"^text x{60}\.\.\.: File name too long"):
        read_documents("x" * 300)
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(InputError, match=r"binary\.txt: not UTF-8 at byte 2"):
        read_documents(tmp_path / "binary.txt")


def test_a_name_needs_the_datasets_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"wikitext: no such file.*pip install 'fgmp\[datasets\]'"):
        read_documents("wikitext")


def test_a_dataset_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    class Loaded(dict[str, list[str]]):
        @property
        def column_names(self) -> list[str]:
            return list(self)

    def load_dataset(name: str, config: str | None, split: str) -> Loaded:
        asked.append((name, config, split))
        if name == "gone":
            raise RuntimeError("not on the hub")
        if name == "speech":
            return Loaded(audio=["a"])
        return Loaded(text=["a", " ", "b"] if name == "wiki" else [" "])

    module = types.SimpleNamespace(load_dataset=load_dataset)
    monkeypatch.setitem(sys.modules, "datasets", module)
    assert read_documents("wiki") == ["a", "b"]
    assert read_documents("wiki:raw") == read_documents("wiki:raw:test") == ["a", "b"]
    assert asked == [("wiki", None, "train"), ("wiki", "raw", "train"), ("wiki", "raw", "test")]
    for name in ("a/wiki:20231101.en", "a/wiki-v1.5"):  # a dot is no suffix of a text
        with pytest.raises(InputError, match="holds no text"):
            read_documents(name)
    assert asked[3:] == [("a/wiki", "20231101.en", "train"), ("a/wiki-v1.5", None, "train")]
    with pytest.raises(InputError, match=r'speech: no column "text", only \[\'audio\'\]'):
        read_documents("speech")
    with pytest.raises(InputError, match="text blank: holds no text"):
        read_documents("blank")
    with pytest.raises(InputError, match="gone: no such file, and as a dataset: not on the hub"):
        read_documents("gone")


def write_lines(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", '[{"text": "one", "x": 1}, {"text": " "}, {"text": "two"}]', ["one", "two"]),
        ("a.json", '["one",\n "two"]', ["one", "two"]),
        ("a.json", '{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.json", '{\n  "text": "one"\n}', ["one"]),
        ("A.JSONL", '{"text": "one"}\r\n\r\n{"text": "two"}', ["one", "two"]),
        ("a.NdJson", '{"text": "one"}', ["one"]),
        ("a.jsonl", '[{"text": "one"}, "two"]', ["one", "two"]),
        ("a.txt", '\n{"text": "one"}\n{"text": "two"}', ["one", "two"]),
        ("a", ' [\n{"text": "one"},\n"two"]', ["one", "two"]),
        ("a.txt", "[1] a note\n[2] another", ["[1] a note\n[2] another"]),
        ("a.txt", "{ braces }\nand text", ["{ braces }\nand text"]),
        ("a.txt", "[" * 100_000, ["[" * 100_000]),
        ("a.txt", "3\nis a number", ["3\nis a number"]),
        ("a.txt", '"quoted"\n', ['"quoted"\n']),
    ],
)
def test_the_content_says_what_is_json(
    name: str, content: str, expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert read_documents(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.json", '{"text": "one"', "a.json: is not JSON: Expecting ',' delimiter"),
        ("a.json", "plain", "a.json: is not JSON: Expecting value"),
        ("a.json", "[" * 100_000, "a.json: is not JSON: maximum recursion depth"),
        ("a.json", "[" + "1" * 5000 + "]", "a.json: is not JSON: Exceeds the limit"),
        ("a.JSON", '["one", {"content": "x"}]', 'item 2 has no string field "text"'),
        ("a.json", '{\n"data": []}', 'the value has no string field "text"'),
        ("a.json", '[["one"]]', 'item 1 has no string field "text"'),
        ("a.txt", '[{"content": "x"}]', 'item 1 has no string field "text"'),
        ("a.txt", '{"content": "x"}\n{"content": "y"}', 'line 1 has no string field "text"'),
        ("a.txt", '{"text": "x"}\nand text', "line 2 is not JSON"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, "line 2 is not JSON: maximum recursion"),
    ],
)
def test_json_without_texts_is_refused(name: str, content: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError) as refused:
        read_documents(tmp_path / name)
    assert str(refused.value).startswith(f"text {tmp_path}") and fault in str(refused.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    content = "one" if name == "a.txt" else '{"text": "one"}'
    (tmp_path / name).write_text(content, encoding="utf-8-sig")
    assert read_documents(tmp_path / name) == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.csv", b"text\none", "is a table; give UTF-8 text, or JSON lines"),
        ("A.TSV", b"text\none", "is a table; give"),
        ("a.parquet", b"", "is a table; give"),
        ("a.txt", b"PAR1\x15\x04", "is a table; give"),
        ("a.arrow", b"\xff\xff\xff\xff", "is a table; give"),
        ("a.txt", b"ARROW1\0\0", "is a table; give"),
        (
            "a.jsonl.gz",
            gzip.compress(b"{}", mtime=0),
            "is compressed or an archive; unpack it first",
        ),
        ("a.txt", gzip.compress(b"one", mtime=0), "is compressed or an archive; unpack it first"),
        ("a.txt", b"BZh91AY&SY\x01", "is compressed or an archive"),
        ("a.txt", b"\x28\xb5\x2f\xfd\x01", "is compressed or an archive"),
        ("a.zst", b"one", "is compressed or an archive"),
        ("a.txt", b"PK\x03\x04", "is compressed or an archive"),
        ("a.txt", b"%PDF-1.7", "is a PDF document; give"),
        ("a.txt", "one".encode("utf-16"), "is UTF-16; convert it to UTF-8"),
        ("a.txt", b"one\0two", "is binary, with a NUL at byte 3; give UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused(name: str, content: bytes, fault: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_documents(tmp_path / name)
    assert str(refused.value).startswith(f"text {tmp_path / name}: {fault}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["pipe", "socket", "/dev/zero"])
def test_only_regular_files_are_read(name: str, tmp_path: Path) -> None:
    """Without waiting for a writer, or reading without end."""
    path = tmp_path / name
    if name == "pipe":
        os.mkfifo(path)
    with socket.socket(socket.AF_UNIX) as server:
        if name == "socket":
            server.bind(str(path))
        with pytest.raises(InputError, match=r"must be a regular file, got a pipe, socket or dev"):
            read_documents(path)
        with pytest.raises(InputError, match="must be a regular file"):
            next(sample_documents(path, piece_bytes=100, seed=0))


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.jsonl", '{"text": "good"}\n{"text": "a\\udfff b"}', "line 2"),
        ("a.json", '["good", "a\\uD83D"]', "item 2"),
        ("a.json", '{\n"text": "\\ud800"}', "the value"),
    ],
)
def test_lone_surrogates_are_refused(name: str, content: str, where: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    fault = rf"{name}: {where} holds a lone surrogate, \\ud[8f]\w\w, which is no character"
    with pytest.raises(InputError, match=fault):
        read_documents(tmp_path / name)
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read_documents(tmp_path / "a.jsonl") == ["\U0001f600"]


# Large texts.

PIECE = 100


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every text above 300 bytes a large one."""
    monkeypatch.setattr(documents, "WHOLE_BYTES", 300)


def flat(lists: list[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(lists))


def pieces(source: str | Path, seed: int = 0, piece_bytes: int = PIECE) -> list[list[str]]:
    return list(sample_documents(source, piece_bytes=piece_bytes, seed=seed))


def test_small_texts_come_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 500 + "<|endoftext|> <|endoftext|>two")
    assert pieces(path) == [["x" * 500, "two"]]
    path.write_text(" ")
    with pytest.raises(InputError, match=r"a\.txt: holds no text"):
        pieces(path)


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("lines", ["short", "long", "wide", "mixed"])
def test_pieces_of_a_large_text_hold_every_character_once(lines: str, tmp_path: Path) -> None:
    texts = {
        "short": "".join(f"line {n}\n" for n in range(200)),
        "long": "".join(map(str, range(500))),
        "wide": "x" + "".join(chr(0x1F600 + n) for n in range(80)) * 4,  # 4 bytes each, no line end
        "mixed": "".join(f"{n} " * (n % 40) + "é\n" for n in range(60)),
    }
    text = texts[lines]
    path = tmp_path / "a.txt"
    path.write_text(text)
    found = pieces(path)
    assert sorted("".join(flat(found))) == sorted(text)
    assert all(text.count(piece) for (piece,) in found)
    assert all(len(piece.encode()) < 2 * PIECE + 4 for (piece,) in found)
    if lines == "short":
        assert all(piece.startswith("line ") and piece.endswith("\n") for (piece,) in found)
        in_order = sorted(found, key=lambda piece: text.index(piece[0]))
        assert found != in_order and "".join(flat(in_order)) == text
    assert found == pieces(path) and found != pieces(path, seed=1)


@pytest.mark.usefixtures("large")
def test_pieces_of_a_large_text_are_split_at_separators(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + b"one<|endoftext|>\r\n" * 40)
    found = flat(pieces(path))
    assert len(found) == 40 and {text.strip() for text in found} == {"one"}


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.json"])
def test_pieces_of_large_json_lines_are_whole_lines(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    texts = [f"text {n}" * (1 + n % 5) for n in range(50)]
    write_lines(path, texts)
    found = pieces(path)
    assert sorted(flat(found)) == sorted(texts)
    assert len(found) > 10 and found != pieces(path, seed=1)


@pytest.mark.usefixtures("large")
def test_a_long_document_gives_a_part_as_long_as_two_pieces(tmp_path: Path) -> None:
    long = "".join(f"line {n}\n" for n in range(200))
    path = tmp_path / "a.jsonl"
    write_lines(path, ["short", long, "short"])
    found = flat(pieces(path))
    assert sorted(map(len, found))[:2] == [5, 5] and len(found) == 3
    (part,) = (text for text in found if text != "short")
    assert part in long and part.startswith("line ") and PIECE < len(part) <= 2 * PIECE
    parts = {text for seed in range(5) for text in flat(pieces(path, seed))}
    assert len(parts) > 3


@pytest.mark.usefixtures("large")
def test_large_arrays_are_sampled_by_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    texts = [f"text {n}" for n in range(100)]
    path.write_text(json.dumps([{"text": text} for text in texts]))
    found = pieces(path)
    assert sorted(flat(found)) == sorted(texts) and flat(found) != texts and len(found) > 2
    monkeypatch.setattr(documents, "_MAX_JSON_BYTES", 1000)
    size = path.stat().st_size
    with pytest.raises(InputError, match=rf"may have 1,000 bytes, got {size:,}; give JSON lines"):
        pieces(path)
    (tmp_path / "a.txt").write_text("[1] a note\n" * 200)  # need not be JSON
    assert len(pieces(tmp_path / "a.txt")) > 5


@pytest.mark.usefixtures("large")
def test_faults_in_large_texts_have_a_place(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"0123456789\n" * 50 + b"ab\xff")
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 at byte 552"):
        pieces(path)
    path.write_bytes(b"0123456789\n" * 50 + b"ab\0")
    with pytest.raises(InputError, match=r"a\.txt: is binary, with a NUL at byte 552"):
        pieces(path)
    write_lines(path, ["one"] * 50)
    with path.open("a") as file:
        file.write("{}")
    with pytest.raises(InputError, match=r'line \d after byte \d+ has no string field "text"'):
        pieces(path)
    path.write_text(" \n" * 500)
    with pytest.raises(InputError, match=r"a\.txt: holds no text"):
        pieces(path)
    with pytest.raises(InputError, match="is a folder, not a file"):
        pieces(tmp_path)


def test_a_large_text_is_not_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:  # 1 TB without a byte on the disk, and text at its start
        file.write(b"0123456789\n" * 2000)
        file.truncate(1 << 40)
    monkeypatch.setattr(documents.torch, "randperm", lambda count, generator: Indices(range(3)))
    assert len(next(sample_documents(path, piece_bytes=1000, seed=0))[0]) > 900


class Indices(list[int]):
    """Stands for a tensor of indices."""

    def tolist(self) -> list[int]:
        return self


@pytest.mark.usefixtures("large")
def test_large_datasets_are_sampled_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[Any] = [f"row {n}" for n in range(200)] + [None, ""]

    class Loaded:
        column_names = ("text",)

        def __getitem__(self, name: str) -> list[Any]:
            return rows

    load: Callable[..., Loaded] = lambda name, config, split: Loaded()  # noqa: E731
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    found = flat(pieces("wiki"))
    assert sorted(found) == sorted(rows[:-2]) and found != rows[:-2]
    assert read_documents("wiki") == rows[:-2]
    rows[3:] = []
    assert pieces("wiki") == [rows]
    rows[1] = ["one"]
    with pytest.raises(InputError, match="text wiki: a row holds list, not a string"):
        read_documents("wiki")
