"""Texts become windows of tokens: every token once, held-out apart, and errors that help."""

import hashlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fgmp import data, documents
from fgmp.data import (
    beginning,
    calibration_stream,
    calibration_text,
    choose_windows,
    digest,
    evaluation_windows,
    overlap,
    overlap_with,
    tokenize,
    windows,
)
from fgmp.errors import InputError


class Bytes:
    """A tokenizer: a token is a byte.

    Args:
        eos: it has an end-of-sequence token, 2.
        bos: it has a beginning-of-sequence token, 1.
        before, after: what it puts around a text.
    """

    def __init__(
        self,
        eos: bool = True,
        bos: bool = False,
        before: tuple[int, ...] = (1,),
        after: tuple[int, ...] = (),
    ) -> None:
        self.eos_token_id = 2 if eos else None
        self.bos_token_id = 1 if bos else None
        self.before, self.after = before, after
        self.calls: list[list[str]] = []

    def __call__(
        self, documents: list[str], *, add_special_tokens: bool = True, **options: object
    ) -> dict[str, list[list[int]]]:
        assert options == {"return_attention_mask": False, "verbose": False}
        self.calls.append(documents)
        before, after = (self.before, self.after) if add_special_tokens else ((), ())
        return {"input_ids": [[*before, *d.encode(), *after] for d in documents]}


def test_documents_are_joined_by_the_end_token() -> None:
    assert tokenize(["a", "b"], Bytes()).tolist() == [1, 97, 2, 1, 98]
    assert tokenize(["a", "b"], Bytes(eos=False)).tolist() == [1, 97, 1, 98]
    assert tokenize([], Bytes()).shape == (0,)
    assert tokenize(["a"], Bytes()).dtype == torch.int64


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((), (), [97, 2, 98]),
        ((1,), (2,), [1, 97, 2, 1, 98, 2]),
        ((), (2,), [97, 2, 98, 2]),
        ((2,), (), [2, 97, 2, 98]),  # OPT's
        ((2,), (2,), [2, 97, 2, 2, 98, 2]),
    ],
)
def test_a_document_keeps_the_tokens_that_the_tokenizer_adds(
    before: tuple[int, ...], after: tuple[int, ...], expected: list[int]
) -> None:
    assert tokenize(["a", "b"], Bytes(before=before, after=after)).tolist() == expected


def test_documents_are_tokenized_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [words(n, n) for n in (5, 1, 30, 2, 2, 0, 9)]
    whole = tokenize(texts, Bytes())
    monkeypatch.setattr(data, "_CALL_CHARACTERS", 40)
    tokenizer = Bytes()
    assert torch.equal(tokenize(iter(texts), tokenizer), whole)
    assert [list(map(len, call)) for call in tokenizer.calls] == [[29, 5], [179], [11, 11, 0], [53]]


@pytest.mark.parametrize("separator", ["\n", " ", "", "é"])
def test_a_long_document_is_tokenized_in_pieces(
    separator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_CALL_CHARACTERS", 40)
    monkeypatch.setattr(data, "_LONG_DOCUMENT", 100)
    long = words(50, 0).replace(" ", separator)
    for before, after in (((1,), ()), ((), (2,)), ((1, 3), (2, 4)), ((), ())):
        tokenizer = Bytes(before=before, after=after)
        stream = tokenize(["a", long, long[:99]], tokenizer).tolist()
        content = [97, *long.encode(), *long[:99].encode()]
        assert [token for token in stream if token > 4] == content
        assert stream.count(1) == 3 * before.count(1) and stream.count(4) == 3 * after.count(4)
        assert stream.count(2) == (3 if 2 in after[-1:] else 2 + 3 * after.count(2))
        pieces = [call[0] for call in tokenizer.calls if len(call[0]) <= 40][1:]
        assert "".join(pieces) == long and min(map(len, pieces[:-1])) > 30
        if separator == "\n":
            assert all(piece.endswith("\n") for piece in pieces[:-1])
        if separator == " ":
            assert all(piece.startswith(" ") for piece in pieces[1:])


def test_windows_drop_the_tail() -> None:
    assert windows(torch.arange(11), 4).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows(torch.arange(3), 4).shape == (0, 4)


def test_every_window_starts_with_one_bos() -> None:
    stream = torch.arange(10, 20)
    assert windows(stream, 4, bos_id=1).tolist() == [
        [1, 10, 11, 12],
        [1, 13, 14, 15],
        [1, 16, 17, 18],
    ]
    stream[[0, 3, 5]] = 1  # those that documents begin with
    assert windows(stream, 3, bos_id=1).tolist() == [
        [1, 11, 12],
        [1, 14, 1],
        [1, 16, 17],
        [1, 18, 19],
    ]
    assert windows(stream[:3], 3, bos_id=1).tolist() == [[1, 11, 12]]
    assert (
        windows(stream[:2], 3, bos_id=1).shape == windows(stream[:0], 3, bos_id=1).shape == (0, 3)
    )
    assert windows(stream[:1], 2, bos_id=1).shape == (0, 2)


def test_the_tokenizer_decides_whether_windows_start_with_bos(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefgh" * 3)
    adds, has, lacks = Bytes(bos=True), Bytes(bos=True, before=()), Bytes()
    assert [beginning(t) for t in (adds, has, lacks)] == [1, None, None]
    assert [beginning(t, bos=False) for t in (adds, has, lacks)] == [None] * 3
    assert [beginning(t, bos=True) for t in (adds, has)] == [1, 1]
    with pytest.raises(InputError, match="the tokenizer has no beginning-of-sequence token"):
        beginning(lacks, bos=True)
    for tokenizer, bos, expected in (
        (adds, None, True),
        (adds, False, False),
        (has, None, False),
        (has, True, True),
    ):
        sets = [evaluation_windows(path, tokenizer, 5, bos=bos)]
        text = calibration_text(path, tokenizer, samples=4, seq_len=5, seed=0, bos=bos)
        sets += [text.samples, text.held_out]
        for found in sets:
            assert (found[:, 0] == 1).all().item() == expected and len(found) > 0
            assert (found[:, 1:] != 1).all()
        assert sets[0].flatten().tolist().count(1) == (6 if expected else adds is tokenizer)


def test_a_short_evaluation_text_with_bos(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    tokenizer = Bytes(bos=True, before=())
    assert evaluation_windows(path, tokenizer, 9, bos=True).tolist() == [[1, 97]]
    assert evaluation_windows(path, Bytes(bos=True), 9, bos=True).tolist() == [[1, 97]]
    with pytest.raises(InputError, match=r"a\.txt: nothing to predict in 1 tokens"):
        evaluation_windows(path, tokenizer, 9)


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


def test_a_large_calibration_text_is_sampled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    lines = [f"{line}\n" for line in words(4000, 0).split()]
    path.write_text("".join(lines))
    options = {"samples": 16, "seq_len": 8}
    whole = calibration_text(path, Bytes(), **options, seed=0)
    stream = tokenize(["".join(lines)], Bytes())
    assert torch.equal(whole.samples, choose_windows(stream, **options, seed=0).samples)
    monkeypatch.setattr(documents, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(data, "_PIECE_BYTES", 100)
    monkeypatch.setattr(data, "_PIECE_BYTES_PER_TOKEN", 4)
    tokenizer = Bytes()
    text = calibration_text(path, tokenizer, **options, seed=0)
    assert text.samples.shape == (16, 8) and text.held_out.shape == (2, 8)
    # Four times 18 windows of 8 tokens, in pieces of about 100 that begin with a line.
    read = sum(len(document) for call in tokenizer.calls for document in call)
    assert 450 < read < 800
    assert all(document[:6] in lines for call in tokenizer.calls[1:] for document in call)
    again = calibration_text(path, Bytes(), **options, seed=0)
    assert again.fingerprint == text.fingerprint
    assert calibration_text(path, Bytes(), **options, seed=1).fingerprint != text.fingerprint
    # Who asks for more than there is gets all of it.
    stream = calibration_stream(path, Bytes(), samples=10_000, seq_len=8, seed=0)
    assert sorted(token for token in stream.tolist() if token > 2) == sorted(
        "".join(lines).encode()
    )


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


def test_windows_are_compared_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    one = Characters(3)
    cut = one.windows(words(400, 0), 100)
    known = digest(cut[::3], one)
    whole = overlap_with(known, cut, one), overlap(cut[::3], cut)
    monkeypatch.setattr(data, "_WINDOWS", 2)
    assert (overlap_with(known, cut, one), overlap(cut[::3], cut)) == whole
    assert digest(cut[::3], one) == known and 0 < whole[1] < 1


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
