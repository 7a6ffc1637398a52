"""Bytes that tell one input from another, to find out whether what is on disk belongs to a run."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sha256(value: Any) -> str:
    """Of all that ``value`` holds, hexadecimal."""
    digest = hashlib.sha256()
    for part in parts(value):
        digest.update(part)
    return digest.hexdigest()


def parts(value: Any) -> Iterator[bytes]:
    """All that a value holds; the repr of a large tensor would leave out its middle."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield bytes_of(value)
    elif isinstance(value, Mapping):
        yield from parts(list(value.items()))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from parts(part)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from parts({f.name: getattr(value, f.name) for f in fields(value)})
    else:
        yield repr(value).encode()


def bytes_of(tensor: Tensor) -> bytes:
    """Of its elements, row by row."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
