"""SHA-256 of models, token sequences and settings, to match state on disk with a run."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import MethodType
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
    """Yield the bytes of a value, recursively through containers, dataclasses and objects.

    Every part says where it ends, so two different values have different bytes. Tensors give all
    their elements, with dtype and shape. Functions and classes give only their qualified names.
    Other objects without a representation of their own give their class and attributes: the
    default one holds an address, which is another in every process.
    """
    return _parts(value, ())


def _parts(value: Any, within: tuple[int, ...]) -> Iterator[bytes]:
    """Parts of a value that lies in the objects with these identities."""
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if id(value) in within:
        yield _text(f"object {len(within) - within.index(id(value))} levels up")
        return
    inside = (*within, id(value))
    if isinstance(value, Tensor):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield bytes_of(value)
    elif isinstance(value, Mapping):
        yield b"mapping of"
        yield from _parts(list(value.items()), inside)
    elif isinstance(value, list | tuple):
        yield f"{len(value)} parts ".encode()
        for part in value:
            yield from _parts(part, inside)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from _parts({f.name: getattr(value, f.name) for f in fields(value)}, inside)
    elif isinstance(value, partial):
        yield from _parts([value.func, value.args, value.keywords], inside)
    elif isinstance(value, MethodType):
        yield from _parts([value.__func__, value.__self__], inside)
    elif hasattr(value, "__qualname__"):  # a function or class: its repr would hold an address
        yield _text(f"{value.__module__}.{value.__qualname__}")
    elif type(value).__repr__ is object.__repr__:  # type: ignore[comparison-overlap]
        yield from _parts([type(value), getattr(value, "__dict__", {})], inside)
    else:
        yield _text(repr(value))


def _text(text: str) -> bytes:
    encoded = text.encode(errors="surrogatepass")
    return f"{len(encoded)} bytes ".encode() + encoded


def bytes_of(tensor: Tensor) -> bytes:
    """Bytes of a tensor's elements in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()
