"""Equal inputs have equal digests in every process; one number or name more makes another."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fgmp.assign.methods import Methods
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.weight import nearest_scale_codes
from fgmp.storage.fingerprint import bytes_of, sha256


@dataclass(frozen=True)
class Setting:
    rate: float
    values: Tensor
    search: Any = search_scale_codes


class Called:
    """A callable object, as a loss may be; its representation holds an address."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.itself = self

    def __call__(self) -> float:
        return self.rate

    def method(self) -> float:
        return self.rate


class OtherCalled(Called):
    pass


def values() -> dict[str, Any]:
    """One value of every kind that a fingerprint is made of; equal at each call."""
    return {
        "function": search_scale_codes,
        "class": Setting,
        "method": Setting.__init__,
        "partial": partial(search_scale_codes, t=0.5),
        "callable object": Called(0.5),
        "bound method": Called(0.5).method,
        "partial of an object": partial(Called(0.5), 1),
        "partial with a tensor": partial(sha256, torch.arange(3)),
        "dataclass": Setting(0.1, torch.arange(5), partial(nearest_scale_codes, t=1.0)),
        "methods": Methods(search_scales=partial(search_scale_codes, t=2.0), damping=0.5),
        "numbers": [1, 1.0, True, None, "1"],
        "mapping": {"a": [1, (2, "b")], "c": {}},
        "tensor": torch.linspace(0, 1, 7).bfloat16(),
        "array": np.arange(6).reshape(2, 3),
        "path": Path("a/b"),
    }


def test_equal_values_have_equal_digests_in_every_process() -> None:
    """Digests hold no address and no hash seed: an interrupted run resumes in another process."""
    script = (
        "from test_fingerprint import values; from fgmp.storage.fingerprint import sha256;"
        "print(*(sha256(value) for value in values().values()))"
    )
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    process = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [sha256(value) for value in values().values()]


def test_values_of_every_kind_differ() -> None:
    digests = [sha256(value) for value in values().values()]
    assert len(set(digests)) == len(digests)
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (search_scale_codes, nearest_scale_codes),
        (partial(search_scale_codes, t=0.5), partial(search_scale_codes, t=0.25)),
        (partial(search_scale_codes, t=0.5), partial(nearest_scale_codes, t=0.5)),
        (partial(search_scale_codes, t=0.5), search_scale_codes),
        (Setting(0.1, torch.arange(5)), Setting(0.2, torch.arange(5))),
        (Setting(0.1, torch.arange(5)), Setting(0.1, torch.tensor([0, 1, 2, 3, 5]))),
        (Methods(), Methods(search_scales=partial(search_scale_codes, t=1.0))),
        (Methods(), replace(Methods(), relief=0.5)),
        ({"a": 1}, {"b": 1}),
        ([1, 2], [2, 1]),
        ([[1], 2], [[1, 2]]),
        ([[], [1]], [[1], []]),
        (["a", "b"], ["a'", "'b"]),
        (["ab"], ["a", "b"]),
        ([1, 23], [12, 3]),
        ({"a": {"b": 1}}, {"a": {}, "b": 1}),
        ([{"a": 1}], {"a": 1}),
        (Called(1), Called(2)),
        (Called(1), OtherCalled(1)),
        (Called(1).method, Called(2).method),
        (partial(Called(1), t=1), partial(Called(2), t=1)),
        ("1", 1),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_what_differs_has_another_digest(one: Any, other: Any) -> None:
    assert sha256(one) != sha256(other)


def test_every_element_of_a_tensor_counts() -> None:
    """Also in the middle, which a printed tensor of this size would not show."""
    tensor = torch.zeros(500, 8, dtype=torch.bfloat16)
    before = sha256({"x": tensor})
    tensor[250, 4] = 2.0**-133
    assert sha256({"x": tensor}) != before


def test_bytes_are_row_by_row_whatever_the_strides() -> None:
    tensor = torch.arange(12, dtype=torch.int16).view(3, 4)
    assert bytes_of(tensor.T) == tensor.T.contiguous().numpy().tobytes()
    assert bytes_of(tensor.T) != bytes_of(tensor)
    assert bytes_of(torch.tensor(3, dtype=torch.uint8)) == b"\x03"
    assert bytes_of(torch.zeros(0, 4)) == b""
    assert sha256(tensor.numpy()) == sha256(tensor)
