"""SHA-256 of models, token sequences and settings, to match state on disk with a run."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sha256(value: Any) -> str:
    """Hexadecimal SHA-256 of a value with all its parts; see :func:`parts`."""
    digest = hashlib.sha256()
    for part in parts(value):
        digest.update(part)
    return digest.hexdigest()


def parts(value: Any) -> Iterator[bytes]:
    """Yield the bytes of a value, recursively through containers and dataclasses.

    Tensors give all their elements, with dtype and shape. Functions and classes give only their
    qualified names.
    """
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
    elif isinstance(value, partial):
        yield from parts([value.func, value.args, value.keywords])
    elif hasattr(value, "__qualname__"):  # a function or class: its repr would hold an address
        yield f"{value.__module__}.{value.__qualname__}".encode()
    else:
        yield repr(value).encode()


def bytes_of(tensor: Tensor) -> bytes:
    """Bytes of a tensor's elements in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
