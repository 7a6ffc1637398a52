"""Load the compiled kernels and call them. Tensors must have been checked: see kernels/check.py.

Threads are those of PyTorch's own OpenMP runtime, whose entry points are found in this process and
handed to the kernels: a second pool would fight with it for the cores. Where there is no such
runtime the kernels run on the caller's thread.
"""

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from fgmp.formats.activation import Site
from fgmp.formats.spec import BLOCK
from fgmp.kernels.check import Planes
from fgmp.kernels.cpu.build import LIBRARY

RULES = {"difference": 0, "benefit": 1}
SCALES = {"max": 0, "search": 2}
"""Bits of ``Site.rule`` in abi.h, by the names of formats.activation."""

INSTRUCTION_SETS = ("portable", "avx2", "avx512")


class _Weight(Structure):
    _fields_ = (
        *((plane, c_void_p) for plane in ("low", "scale", "overflow", "row_ptr", "fp8")),
        *((size, c_int64) for size in ("n", "k", "n_fp8")),
    )


class _Matrix(Structure):
    _fields_ = (
        ("data", c_void_p),
        *((field, c_int64) for field in ("rows", "columns", "is_bf16")),
    )


class _Site(Structure):
    _fields_ = (
        *(("sensitivity", c_void_p), ("threshold", c_int64)),
        *(("r", c_float), ("rule", c_int32)),
    )


class _Team(Structure):
    _fields_ = (
        *((function, c_void_p) for function in ("start", "member", "size")),
        ("threads", c_int64),
    )


class Kernels:
    """The kernels of one instruction set.

    Args:
        path: the library that fgmp.kernels.cpu.build made.
        instruction_set: one of :data:`INSTRUCTION_SETS` that this processor can run; default
            the widest.

    Raises:
        OSError: the library cannot be loaded.
        ValueError: the processor lacks the instruction set.
    """

    def __init__(self, path: Path = LIBRARY, instruction_set: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        widest = library.fgmp_instruction_set()
        self.instruction_set = instruction_set or INSTRUCTION_SETS[widest]
        if INSTRUCTION_SETS.index(self.instruction_set) > widest:
            raise ValueError(f"this processor has no {instruction_set}")

        def bind(name: str, *arguments: type) -> Callable[..., int]:
            function: Any = getattr(library, f"fgmp_{name}_{self.instruction_set}")
            function.restype, function.argtypes = c_int64, (*arguments, POINTER(_Team))
            return cast(Callable[..., int], function)

        self._linear = bind(
            *("linear", POINTER(_Weight), POINTER(_Matrix), POINTER(_Matrix), c_void_p, c_float)
        )
        self._unpack = bind("unpack", POINTER(_Weight), POINTER(_Matrix))
        codes = (POINTER(_Matrix), POINTER(_Site), c_void_p, c_void_p)
        self._quantize = bind("quantize", *codes)
        self._fake_quantize = bind("fake_quantize", *codes)
        self._scores = bind("scores", *codes[:-1])

    def linear(
        self, units: Tensor, planes: Planes, t: float, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """Units (M, K), bf16 or fp32, times a packed weight.

        Args:
            t: the product of both tensor scales.
            bias: fp32 (N,) or None.
            dtype: of the result, bf16 or fp32.

        Returns:
            (M, N), and the first row whose planes contradict each other, or -1.
        """
        weight = _weight(planes, units.shape[1])
        y = torch.empty(units.shape[0], weight.n, dtype=dtype)
        bias_at = None if bias is None else bias.data_ptr()
        return y, self._linear(weight, _matrix(units), _matrix(y), bias_at, t, _team())

    def unpack(self, planes: Planes, k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """A packed weight in units of t, bf16 or fp32 (N, K); returns as :meth:`linear` does."""
        weight = _weight(planes, k)
        units = torch.empty(weight.n, k, dtype=dtype)
        return units, self._unpack(weight, _matrix(units), _team())

    def quantize(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Tokens (M, K), bf16 or fp32, to codes uint8 (M, G, 16) and scale bytes uint8 (M, G)."""
        m, groups = x.shape[0], _groups(x)
        codes = torch.empty(m, groups, BLOCK, dtype=torch.uint8)
        scale = torch.empty(m, groups, dtype=torch.uint8)
        self._quantize(_matrix(x), _site(site), codes.data_ptr(), scale.data_ptr(), _team())
        return codes, scale

    def fake_quantize(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Tokens (M, K), bf16 or fp32, to units bf16 (M, K) and flags bool (M, G)."""
        units = torch.empty(x.shape, dtype=torch.bfloat16)
        flags = torch.empty(x.shape[0], _groups(x), dtype=torch.bool)
        self._fake_quantize(_matrix(x), _site(site), units.data_ptr(), flags.data_ptr(), _team())
        return units, flags

    def scores(self, x: Tensor, site: Site) -> Tensor:
        """Tokens (M, K), bf16 or fp32, to S, int64 (M, G)."""
        found = torch.empty(x.shape[0], _groups(x), dtype=torch.int64)
        self._scores(_matrix(x), _site(site), found.data_ptr(), _team())
        return found


@cache
def kernels() -> Kernels | None:
    """The kernels for this processor, or None where none were compiled."""
    try:
        return Kernels()
    except OSError:
        return None


def _groups(x: Tensor) -> int:
    return -(-x.shape[1] // BLOCK)


def _weight(planes: Planes, k: int) -> _Weight:
    low, _, overflow, _, fp8 = planes
    dense = low if low is not None else fp8
    assert dense is not None
    pointers = (None if plane is None else plane.data_ptr() for plane in planes)
    return _Weight(*pointers, dense.shape[0], k, 0 if overflow is None else overflow.shape[0])


def _matrix(x: Tensor) -> _Matrix:
    return _Matrix(x.data_ptr(), x.shape[0], x.shape[1], x.dtype == torch.bfloat16)


def _site(site: Site) -> _Site:
    rule = RULES[site.rule] | SCALES[site.scales]
    return _Site(site.sensitivity.data_ptr(), site.threshold, site.r, rule)


@cache
def _openmp() -> tuple[int, int, int] | None:
    """Addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads."""
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    process = ctypes.CDLL(None)
    if not all(hasattr(process, name) for name in names):
        return None
    start, member, size = (ctypes.cast(getattr(process, n), c_void_p).value or 0 for n in names)
    return start, member, size


def _team() -> _Team:
    openmp = _openmp()
    return _Team(*openmp, torch.get_num_threads()) if openmp else _Team(None, None, None, 1)
