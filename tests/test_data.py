"""Texts become windows of tokens: every token once, held-out apart, and errors that help."""

import hashlib
import json
import sys
import types
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fgmp.data import (
    calibration_text,
    choose_windows,
    digest,
    evaluation_windows,
    overlap,
    overlap_with,
    read_documents,
    tokenize,
    windows,
)
from fgmp.errors import InputError


class Bytes:
    """A tokenizer: a token is a byte; 1 begins a document, and 2 ends one where ``eos`` is on."""

    def __init__(self, eos: bool = True) -> None:
        self.eos_token_id = 2 if eos else None

    def __call__(self, documents: list[str], **options: object) -> dict[str, list[list[int]]]:
        assert options == {"return_attention_mask": False, "verbose": False}
        return {"input_ids": [[1, *d.encode()] for d in documents]}


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


def test_documents_are_joined_by_the_end_token() -> None:
    assert tokenize(["a", "b"], Bytes()).tolist() == [1, 97, 2, 1, 98]
    assert tokenize(["a", "b"], Bytes(eos=False)).tolist() == [1, 97, 1, 98]
    assert tokenize([], Bytes()).shape == (0,)
    assert tokenize(["a"], Bytes()).dtype == torch.int64


def test_windows_drop_the_tail() -> None:
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(3), 4).shape == (0, 4)


def rows(*tensors: Tensor) -> list[int]:
    """Windows of ``arange`` by the number they begin with."""
    return [int(row[0]) for tensor in tensors for row in tensor]


@pytest.mark.parametrize(
    ("available", "asked", "samples", "held"),
    [
        (100, 16, 16, 2),
        (100, 8, 8, 1),
        (100, 1, 1, 1),
        (10, 16, 9, 1),
        (20, 64, 18, 2),
        (2, 9, 1, 1),
    ],
)
def test_samples_and_held_out_are_apart(
    available: int, asked: int, samples: int, held: int
) -> None:
    text = choose_windows(torch.arange(available * 4 + 3), samples=asked, seq_len=4, seed=3)
    assert (len(text.samples), len(text.held_out), text.asked) == (samples, held, asked)
    found = rows(text.samples, text.held_out)
    assert len(set(found)) == samples + held
    assert all(n % 4 == 0 and n < available * 4 for n in found)
    assert rows(text.samples) == sorted(rows(text.samples))
    digest = hashlib.sha256(text.samples.numpy().tobytes()).hexdigest()
    assert text.fingerprint == digest


def test_the_seed_chooses() -> None:
    stream = torch.arange(4000)
    chosen = [
        rows(choose_windows(stream, samples=10, seq_len=4, seed=s).samples) for s in (0, 0, 1)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    # All windows are as likely: of 300 draws of 10 from 1,000, none should come up 15 times.
    often = Counter(
        n
        for s in range(300)
        for n in rows(choose_windows(stream, samples=10, seq_len=4, seed=s).samples)
    )
    assert max(often.values()) < 15 and len(often) > 900


def test_a_text_too_short_for_calibration(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * 14)
    with pytest.raises(
        InputError,
        match=r"a\.txt: calibration needs at least 2 sequences of 8 tokens, got 15 tokens",
    ):
        calibration_text(path, Bytes(), samples=4, seq_len=8, seed=0)
    path.write_text("x" * 15)
    text = calibration_text(path, Bytes(), samples=4, seq_len=8, seed=0)
    assert text.samples.shape == text.held_out.shape == (1, 8)
    with pytest.raises(InputError, match="samples must be 1 or more, got 0"):
        calibration_text(path, Bytes(), samples=0, seq_len=8, seed=0)
    with pytest.raises(InputError, match="seq_len must be 2 or more to predict a token, got 1"):
        calibration_text(path, Bytes(), samples=4, seq_len=1, seed=0)
    with pytest.raises(InputError, match="seq_len must be 2 or more to predict a token, got 0"):
        evaluation_windows(path, Bytes(), 0)


def test_evaluation_takes_all_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh")
    assert evaluation_windows(path, Bytes(), 3).tolist() == [
        [1, 97, 98],
        [99, 100, 101],
        [102, 103, 104],
    ]
    assert evaluation_windows(path, Bytes(), 100).shape == (1, 9)  # a short text is one window
    path.write_text("\n")
    with pytest.raises(InputError, match=r"a\.txt: holds no text"):
        evaluation_windows(path, Bytes(), 3)
    path.write_text("a")
    with pytest.raises(InputError, match=r"a\.txt: nothing to predict in 1 tokens"):
        evaluation_windows(path, lambda documents, **options: {"input_ids": [[97]]}, 3)


def test_overlap_finds_a_passage_wherever_it_lies() -> None:
    g = torch.Generator().manual_seed(5)
    calibration, evaluation = torch.randint(500, (2, 6, 100), generator=g)
    assert overlap(calibration, evaluation) == 0
    evaluation[4, 20:83] = calibration[1, 30:93]  # 63 tokens, off every multiple of 32
    assert overlap(calibration, evaluation) == pytest.approx(1 / 6)
    assert overlap(calibration, calibration) == 1
    assert overlap(calibration[:, :20], calibration[:, :20]) == 0  # shorter than a piece


class Characters:
    """Tokens are runs of ``width`` characters: two widths tokenize one text differently."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.known: list[str] = []

    def windows(self, text: str, length: int) -> Tensor:
        pieces = [text[i : i + self.width] for i in range(0, len(text), self.width)]
        self.known = sorted(set(pieces))
        number = {piece: i for i, piece in enumerate(self.known)}
        return windows(torch.tensor([number[p] for p in pieces]), length)

    def batch_decode(self, ids: list[list[int]], skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return ["".join(self.known[i] for i in window) for window in ids]


def words(count: int, seed: int) -> str:
    letters = torch.randint(97, 123, (count, 5), generator=torch.Generator().manual_seed(seed))
    return " ".join("".join(map(chr, word)) for word in letters.tolist())


def test_text_is_known_again_however_it_is_tokenized_and_cut() -> None:
    calibration, evaluation = words(400, 0), words(400, 1)
    one, other = Characters(3), Characters(2)
    known = digest(one.windows(calibration, 100), one)
    assert overlap_with(known, other.windows(evaluation, 150), other) == 0
    # 30 words in other case and spacing: 150 letters hold two pieces of 48.
    passage = " ".join(calibration.split()[70:100]).upper().replace(" ", ",\n ")
    mixed = f"{evaluation[:1000]} {passage} {evaluation[1000:]}"
    found = other.windows(mixed, 150)
    assert 0 < overlap_with(known, found, other) <= 2 / len(found)
    assert overlap_with(known, other.windows(calibration, 150), other) == 1
    assert overlap_with(known, other.windows("too short", 3), other) == 0


def test_what_a_checkpoint_remembers_is_bounded() -> None:
    long = words(15_000, 2)  # 1,100 pieces and more
    one = Characters(4)
    known = digest(one.windows(long, 500), one)
    assert len(known) == 1024 * 6 * 4 / 3
    # Nearly all pieces of a window are known.
    assert overlap_with(known, one.windows(long, 500), one) > 0.99
    assert overlap_with(known, one.windows(words(15_000, 3), 500), one) == 0
    assert digest(one.windows("?" * 200, 50), one) == ""
