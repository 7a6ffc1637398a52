"""State survives or is refused: no damage to a state file ever comes back as a result."""

import json
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fgmp.errors import InputError
from fgmp.storage.resume import (
    PartialResults,
    Periodic,
    State,
    StateFile,
    StateMismatchError,
    forget,
    uninterrupted,
)

FINGERPRINT = {"model": "abc", "text": "def"}


def example_tensors() -> dict[str, Tensor]:
    """Two tensors that differ in one bit of their names only, and one without elements."""
    return {
        "p": torch.zeros(2, 3),
        "q": torch.zeros(2, 3),
        "none": torch.zeros(0, 3, dtype=torch.uint8),
    }


def example(path: Path) -> StateFile:
    file = StateFile(path, FINGERPRINT)
    file.store(example_tensors(), {"done": 3, "t": {"p": 0.1}})
    return file


def equal(a: State, b: State) -> bool:
    return (
        a.facts == b.facts
        and a.tensors.keys() == b.tensors.keys()
        and all(
            tensor.dtype == b.tensors[name].dtype and torch.equal(tensor, b.tensors[name])
            for name, tensor in a.tensors.items()
        )
    )


# State files.


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    file = StateFile(tmp_path / "new" / "run.state", FINGERPRINT)
    assert file.load() is None
    tensors = {
        "transposed": torch.arange(24, dtype=torch.uint8).view(4, 6).T,
        "scalar": torch.tensor(3),
        "half": torch.randn(5).bfloat16(),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 7),
    }
    facts = {"done": 3, "sites": {"q": [["q", "k"], 0.1, 24]}, "none": None, "nan": [1e-300]}
    file.store(tensors, facts)
    state = file.load()
    assert state is not None and equal(state, State(tensors, facts))
    file.store({})
    assert file.load() == State({}, {})
    assert [p.name for p in file.path.parent.iterdir()] == ["run.state"]


def test_state_of_other_inputs_is_refused_with_the_first_difference(tmp_path: Path) -> None:
    path = example(tmp_path / "run.state").path
    before = path.read_bytes()
    for fingerprint, differing in (
        ({"model": "abd", "text": "deg"}, "model"),
        ({"model": "abc", "text": "deg"}, "text"),
        ({"model": "abc", "text": "def", "loss": "x"}, "loss"),
        ({"model": "abc"}, "kind"),  # the file's has a part more
    ):
        message = rf"^{path}: state of another {differing}; name another file, or delete it$"
        with pytest.raises(StateMismatchError, match=message) as refused:
            StateFile(path, fingerprint).load()
        assert (refused.value.path, refused.value.differing) == (path, differing)
    assert path.read_bytes() == before


def unreadable(path: Path) -> Iterator[str]:
    """Write what is not a state file; yields the end of the message.

    Only what is known to be a state file may be deleted.
    """
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    yield "name another file, or move this one away"
    path.write_bytes(b"")
    yield "name another file, or move this one away"
    path.write_bytes(b"not a file of tensors")
    yield "name another file, or move this one away"
    save_file({"x": torch.zeros(1)}, path)
    yield r"\(no 'fgmp_state' in its metadata\); name another file, or move this one away"
    for content in ("{", "[1]", "{}", '{"fingerprint": []}'):
        save_file({"x": torch.zeros(1)}, path, metadata={"fgmp_state": content})
        yield "delete it"


def test_what_is_not_a_state_file_is_named(tmp_path: Path) -> None:
    file = example(tmp_path / "run.state")
    count = 0
    for message in unreadable(file.path):
        with pytest.raises(InputError, match=rf"^{file.path}: .*{message}$"):
            file.load()
        count += 1
    assert count == 8
    with pytest.raises(InputError, match=rf"^{tmp_path}: is a folder, not a state file$"):
        StateFile(tmp_path, FINGERPRINT).load()


def rewritten(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace the tensors of a state file and keep its metadata."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(tensors, path, metadata=metadata)


def test_every_tensor_has_a_checksum_of_values_shape_and_type(tmp_path: Path) -> None:
    file = example(tmp_path / "run.state")
    for name, tensor, message in (
        ("q", torch.full((2, 3), 2.0**-149), "tensor q is damaged"),
        ("q", torch.zeros(3, 2), "tensor q is damaged"),
        ("p", torch.zeros(2, 3, dtype=torch.int32), "tensor p is damaged"),
        ("none", torch.zeros(0, 2, dtype=torch.uint8), "tensor none is damaged"),
        ("r", torch.zeros(2, 3), "not a state file .*a tensor without a checksum"),
    ):
        rewritten(file.path, {**example_tensors(), name: tensor})
        with pytest.raises(InputError, match=rf"^{file.path}: {message}.*; delete it$"):
            file.load()
    fewer = example_tensors()
    del fewer["none"]
    rewritten(file.path, fewer)
    with pytest.raises(InputError, match=r"not a state file .* tensor none.*; delete it$"):
        file.load()
    rewritten(file.path, example_tensors())
    assert file.load() is not None


def test_facts_have_a_checksum(tmp_path: Path) -> None:
    file = example(tmp_path / "run.state")
    with safe_open(file.path, framework="pt") as opened:
        content = json.loads(opened.metadata()["fgmp_state"])
    content["facts"]["done"] = 2
    save_file(example_tensors(), file.path, metadata={"fgmp_state": json.dumps(content)})
    message = rf"^{file.path}: its facts are damaged \(CRC-32 differs\); delete it$"
    with pytest.raises(InputError, match=message):
        file.load()


def test_no_flipped_bit_of_a_file_changes_what_is_read(tmp_path: Path) -> None:
    """Every bit of a file, one at a time: the same state, or an error that names the file."""
    file = example(tmp_path / "run.state")
    whole, intact = file.path.read_bytes(), file.load()
    assert intact is not None
    refused = 0
    with file.path.open("r+b", buffering=0) as content:
        for position, byte in enumerate(whole):
            for bit in range(8):
                content.seek(position)
                content.write(bytes([byte ^ 1 << bit]))
                try:
                    state = file.load()
                except InputError as error:
                    assert str(file.path) in str(error)
                    refused += 1
                else:
                    assert state is not None and equal(state, intact), (position, bit)
            content.seek(position)
            content.write(bytes([byte]))
    # What is left are paddings and spellings: "done" and "\\u0064one" are one key.
    assert refused > 0.95 * 8 * len(whole)


def test_a_full_disk_costs_the_state_and_not_the_run(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    file = StateFile(tmp_path / "taken" / "run.state", FINGERPRINT)
    message = rf"{file.path}: could not be written .*; this stage could not be resumed"
    with pytest.warns(UserWarning, match=message):
        file.store({"a": torch.ones(3)})
    assert file.load() is None


# Partial results.


def test_partial_results_are_of_one_run_and_part(tmp_path: Path) -> None:
    results = PartialResults(tmp_path / "a" / "b", "0123456789abcdef0")
    assert results.load("stage 2") is None
    results.store("stage 2", {"a": torch.ones(3)}, {"done": 1})
    state = results.load("stage 2")
    assert state is not None and equal(state, State({"a": torch.ones(3)}, {"done": 1}))
    (file,) = results.folder.iterdir()
    assert file.name == "0123456789abcdef-stage-2.safetensors"
    assert file == results.file("stage 2").path
    assert results.load("stage 1") is None
    assert PartialResults(results.folder, "1" * 16).load("stage 2") is None


def test_a_damaged_part_is_reported_and_counts_as_absent(tmp_path: Path) -> None:
    lines: list[str] = []
    results = PartialResults(tmp_path, "0" * 16, lines.append)
    results.store("tuning", {"a": torch.ones(3)})
    file = tmp_path / "0000000000000000-tuning.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    assert results.load("tuning") is None
    (line,) = lines
    assert line.startswith(f"{file}: ") and line.endswith(": tuning is done again")


def test_a_part_under_another_key_of_the_same_beginning_is_not_read(tmp_path: Path) -> None:
    """File names hold 16 digits of a key, the fingerprint all of them."""
    lines: list[str] = []
    PartialResults(tmp_path, "0" * 64).store("tuning", {"a": torch.ones(3)})
    assert PartialResults(tmp_path, "0" * 63 + "1", lines.append).load("tuning") is None
    assert "state of another run" in lines[0]


def test_a_part_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    lines: list[str] = []
    results = PartialResults(tmp_path, "0" * 16, lines.append)
    results.unusable("stage 3", KeyError("low"))
    path = results.file("stage 3").path
    assert lines == [f"{path}: not stage 3 of this run (KeyError('low')): it is done again"]


def test_forgetting_removes_partial_results_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "unfinished"
    for key in ("0" * 16, "1" * 16):
        PartialResults(folder, key).store("tuning", {"a": torch.ones(3)})
    names = {"notes.txt", "model.safetensors"}
    for name in names:
        (folder / name).write_text("mine")
    forget(folder)
    assert {p.name for p in folder.iterdir()} == names
    for name in names:
        (folder / name).unlink()
    forget(folder)
    forget(folder)  # also where there is none
    assert not folder.exists()


# When state is stored.


def test_state_is_due_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1000.0, 1000.0, 1060.0, 1061.0, 1062.0, 1121.0, 1122.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    periodic = Periodic(60)
    due = [periodic.due() for _ in range(6)]
    assert due == [False, False, True, False, False, True]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_waits_and_the_second_does_not(number: signal.Signals) -> None:
    received: list[str] = []

    def handler(*_: object) -> None:
        received.append("handled")
        raise KeyboardInterrupt

    usual = signal.signal(number, handler)
    try:
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(number)
            received.append("finished")
        assert received == ["finished", "handled"]
        assert signal.getsignal(number) is handler
        received.clear()
        with pytest.raises(KeyboardInterrupt), uninterrupted():
            signal.raise_signal(number)
            signal.raise_signal(number)
            received.append("finished")
        assert received[0] == "handled" and "finished" not in received
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, usual)


def test_other_threads_are_left_alone() -> None:
    usual, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [usual]
