"""Load the compiled kernels and call them.

Arguments must have passed the checks of ``kernels/check.py``; nothing here checks them again.

The kernels run on the threads of PyTorch's own OpenMP runtime, whose entry points Python looks up
in this process: a second thread pool would compete for the cores. Without such a runtime they run
on the caller's thread.
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
from fgmp.formats.rules import RULES
from fgmp.formats.spec import BLOCK
from fgmp.kernels.check import Planes
from fgmp.kernels.cpu.build import LIBRARY

SCALES = {"max": 0, "search": 2}
"""Bits that ``Site.rule`` (abi.h) has beside a rule's code, by key of ``formats.rules.SCALES``."""


def implements(rule: str) -> bool:
    """Whether the C++ kernels implement a rule."""
    return rule in RULES and RULES[rule].cpu is not None


INSTRUCTION_SETS = ("portable", "avx2", "avxvnni", "avx512vnni", "avx512", "dotprod")
"""Instruction sets: any processor's; x86's, with VNNI in its two encodings and with AVX-512 BF16;
ARM's dot products of bytes. Of those that a processor supports, the last is the fastest."""


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


class _Columns(Structure):
    _fields_ = (
        *((field, c_void_p) for field in ("values", "spread", "scale", "is_fp8", "fp4", "fp8")),
        *(("errors", c_void_p), ("rows", c_int64), ("count", c_int64)),
    )


class _Team(Structure):
    _fields_ = (
        *((function, c_void_p) for function in ("start", "member", "size")),
        ("threads", c_int64),
    )


class Kernels:
    """Kernels of one instruction set.

    Args:
        path: the library that :func:`fgmp.kernels.cpu.build.build` compiled.
        instruction_set: one of :data:`INSTRUCTION_SETS` that this processor supports; default:
            the fastest.

    Attributes:
        supported: the instruction sets of the library that this processor supports.

    Raises:
        OSError: the library cannot be loaded.
        ValueError: the processor lacks the instruction set.
    """

    def __init__(self, path: Path = LIBRARY, instruction_set: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        bits = library.fgmp_instruction_sets()
        self.supported = [name for i, name in enumerate(INSTRUCTION_SETS) if bits >> i & 1]
        self.instruction_set = instruction_set or self.supported[-1]
        if self.instruction_set not in self.supported:
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
        self._search_scales = bind("search_scales", POINTER(_Matrix), c_void_p, c_float, c_void_p)
        self._weight_scores = bind(
            *("weight_scores", POINTER(_Matrix), c_void_p, c_void_p, c_float, c_int64, c_void_p)
        )
        self._round_columns = bind("round_columns", POINTER(_Columns), c_float)

    def linear(
        self, units: Tensor, planes: Planes, t: float, bias: Tensor | None, dtype: torch.dtype
    ) -> tuple[Tensor, int]:
        """Multiply activations by a packed weight.

        Args:
            units: activations in units of t_x, bf16 or fp32 (M, K).
            planes: planes of the weight (N, K).
            t: product of both tensor scales.
            bias: fp32 (N,) or None.
            dtype: dtype of the result, bf16 or fp32.

        Returns:
            The output (M, N), and the first row whose planes contradict each other, or -1.
        """
        weight = _weight(planes, units.shape[1])
        y = torch.empty(units.shape[0], weight.n, dtype=dtype)
        bias_address = None if bias is None else bias.data_ptr()
        return y, self._linear(weight, _matrix(units), _matrix(y), bias_address, t, _team())

    def unpack(self, planes: Planes, k: int, dtype: torch.dtype) -> tuple[Tensor, int]:
        """Decode a packed weight to units of t, bf16 or fp32 (N, K).

        Returns:
            The decoded weight, and the first row whose planes contradict each other, or -1.
        """
        weight = _weight(planes, k)
        units = torch.empty(weight.n, k, dtype=dtype)
        return units, self._unpack(weight, _matrix(units), _team())

    def quantize(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Quantize tokens (M, K), bf16 or fp32.

        Returns:
            Codes, uint8 (M, G, 16), and scale bytes, uint8 (M, G), 0x80 in FP8 blocks.
        """
        m, groups = x.shape[0], _groups(x)
        codes = torch.empty(m, groups, BLOCK, dtype=torch.uint8)
        scale = torch.empty(m, groups, dtype=torch.uint8)
        self._quantize(_matrix(x), _site(site), codes.data_ptr(), scale.data_ptr(), _team())
        return codes, scale

    def fake_quantize(self, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
        """Quantize tokens (M, K), bf16 or fp32, and decode them.

        Returns:
            Units, bf16 (M, K), and which blocks are FP8, bool (M, G).
        """
        units = torch.empty(x.shape, dtype=torch.bfloat16)
        flags = torch.empty(x.shape[0], _groups(x), dtype=torch.bool)
        self._fake_quantize(_matrix(x), _site(site), units.data_ptr(), flags.data_ptr(), _team())
        return units, flags

    def scores(self, x: Tensor, site: Site) -> Tensor:
        """Integer scores S of the blocks of tokens (M, K), bf16 or fp32: int64 (M, G)."""
        result = torch.empty(x.shape[0], _groups(x), dtype=torch.int64)
        self._scores(_matrix(x), _site(site), result.data_ptr(), _team())
        return result

    def search_scales(self, weight: Tensor, sensitivity: Tensor, t: float) -> Tensor:
        """FP4 scale codes of least weighted error, uint8 (N, G).

        Args:
            weight: finite, contiguous fp32 (N, K).
            sensitivity: not negative, contiguous fp32 (N, K).
            t: tensor scale.
        """
        scale = torch.empty(weight.shape[0], _groups(weight), dtype=torch.uint8)
        self._search_scales(_matrix(weight), sensitivity.data_ptr(), t, scale.data_ptr(), _team())
        return scale

    def weight_scores(
        self, weight: Tensor, sensitivity: Tensor, scale: Tensor, t: float, score: str
    ) -> Tensor:
        """Scores of the blocks of a weight, float64 (N, G).

        Args:
            weight, sensitivity, t: as for :meth:`search_scales`.
            scale: codes of FP4 scales, contiguous uint8 (N, G).
            score: ``benefit`` or ``difference``.
        """
        scores = torch.empty(scale.shape, dtype=torch.float64)
        self._weight_scores(
            _matrix(weight),
            sensitivity.data_ptr(),
            scale.data_ptr(),
            t,
            score == "benefit",
            scores.data_ptr(),
            _team(),
        )
        return scores

    def round_columns(
        self, columns: Tensor, spread: Tensor, scale: Tensor, is_fp8: Tensor, t: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Round one block of columns with error compensation within it.

        Args:
            columns: finite, contiguous fp32 (N, B), B at most 16; overwritten.
            spread: upper triangular, contiguous fp32 (B, B).
            scale: codes of FP4 scales, contiguous uint8 (N,).
            is_fp8: format of each row's block, contiguous bool (N,).
            t: tensor scale.

        Returns:
            FP4 and FP8 codes, uint8 (N, 16), decoded values and errors, fp32 (N, B).
        """
        rows, count = columns.shape
        fp4, fp8 = torch.zeros(2, rows, BLOCK, dtype=torch.uint8)
        errors = torch.empty_like(columns)
        tensors = (columns, spread, scale, is_fp8, fp4, fp8, errors)
        block = _Columns(*(tensor.data_ptr() for tensor in tensors), rows, count)
        self._round_columns(block, t, _team())
        return fp4, fp8, columns, errors


@cache
def kernels() -> Kernels | None:
    """Kernels of the fastest instruction set of this processor; None if none are compiled."""
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
    code = RULES[site.rule].cpu
    assert code is not None, f"no C++ for rule {site.rule}"
    flags = code | SCALES[site.scales]
    return _Site(site.sensitivity.data_ptr(), site.threshold, site.r, flags)


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
