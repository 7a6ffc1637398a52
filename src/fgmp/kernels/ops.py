"""The operators ``torch.ops.fgmp.*``.

    quantize_activation       x, site -> codes, scale bytes
    fake_quantize_activation  x, site -> units, flags
    score_activation          x, site -> S of every block, for calibration
    unpack_weight             planes -> units
    packed_linear             units, planes, r, t -> y = fl32(A * fl32(t_w * t_x)) + bias

A *site* stands for the arguments ``r, sensitivity, threshold, rule, scales``: all constants of
:class:`fgmp.formats.activation.Site` that the decision needs. The first three are tensors, so that
no call waits for a GPU to read them. *Units* are decoded values over their tensor scale, exact in
bf16. *Flags* say which blocks are FP8. Planes are those of
:class:`fgmp.pack.planes.PackedWeight`.

The default of each operator is the definition in plain PyTorch, on any device. The C++ kernels
replace it on the CPU where they are compiled, the Triton kernels on CUDA where Triton is installed.
All give the same codes, scales, flags and units; sums of products agree within
:func:`fgmp.formats.linear.error_bound`.

A shape function ``_..._like`` gives the outputs of an operator as empty tensors: torch.compile
traces with it.
"""

import importlib.util
import logging
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from fgmp.formats import activation, linear
from fgmp.formats.activation import Site
from fgmp.formats.spec import BLOCK, FP8_BLOCK, FP8_FACTOR
from fgmp.kernels import check
from fgmp.kernels.check import Planes
from fgmp.kernels.cpu import library as cpu
from fgmp.pack.planes import PackedWeight, unpack_units

_PLANES = "Tensor? low, Tensor? scale, Tensor? overflow, Tensor? row_ptr, Tensor? fp8"
_SITE = "Tensor r, Tensor sensitivity, Tensor threshold, str rule, str scales"

_lib = torch.library.Library("fgmp", "DEF")
_lib.define(f"quantize_activation(Tensor x, {_SITE}) -> (Tensor, Tensor)")
_lib.define(f"fake_quantize_activation(Tensor x, {_SITE}) -> (Tensor, Tensor)")
_lib.define(f"score_activation(Tensor x, {_SITE}) -> Tensor")
_lib.define(f"unpack_weight({_PLANES}, int k, ScalarType dtype) -> Tensor")
_lib.define(
    f"packed_linear(Tensor units, {_PLANES}, Tensor r, Tensor t, Tensor? bias, ScalarType dtype)"
    " -> Tensor"
)


def _groups(k: int) -> int:
    return -(-k // BLOCK)


def _codes_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], _groups(x.shape[-1]))
    codes = x.new_empty((*shape, BLOCK), dtype=torch.uint8)
    return codes, x.new_empty(shape, dtype=torch.uint8)


def _units_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    flags = x.new_empty((*x.shape[:-1], _groups(x.shape[-1])), dtype=torch.bool)
    return x.new_empty(x.shape, dtype=torch.bfloat16), flags


def _scores_like(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], _groups(x.shape[-1])), dtype=torch.int64)


def _rows(planes: Planes) -> int:
    dense = planes[0] if planes[0] is not None else planes[4]
    assert dense is not None
    return dense.shape[0]


def _weight_like(*arguments: Any) -> Tensor:
    *planes, k, dtype = arguments
    dense = planes[0] if planes[0] is not None else planes[4]
    result: Tensor = dense.new_empty((dense.shape[0], k), dtype=dtype)
    return result


def _output_like(units: Tensor, *arguments: Any) -> Tensor:
    return units.new_empty((*units.shape[:-1], _rows(arguments[:5])), dtype=arguments[-1])


def _site(r: Tensor, sensitivity: Tensor, threshold: Tensor, rule: str, scales: str) -> Site:
    return Site(_checked(r.item()), sensitivity, 0.0, int(threshold.item()), rule, scales)


@lru_cache(maxsize=1024)
def _checked(r: float) -> float:
    """``r``, if it is a multiplier that a site can have."""
    check.require(activation.is_multiplier(r), "fgmp", "r", "be positive with at most 12 bits", r)
    return r


def quantize_activation_definition(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
    """:func:`fgmp.formats.activation.quantize`, with the codes of each block's chosen format."""
    check.activation("quantize_activation", x, *site)
    result = activation.quantize(x, _site(*site))
    codes = torch.where(result.is_fp8.unsqueeze(-1), result.fp8, result.fp4)
    marker = torch.full_like(result.scale, FP8_BLOCK)
    return codes, torch.where(result.is_fp8, marker, result.scale)


def fake_quantize_activation_definition(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
    """:func:`fgmp.formats.activation.fake_quantize`, with units in bf16."""
    check.activation("fake_quantize_activation", x, *site)
    units, flags = activation.fake_quantize(x, _site(*site))
    return units.to(torch.bfloat16), flags


def score_activation_definition(x: Tensor, *site: Any) -> Tensor:
    """:func:`fgmp.formats.activation.scores`."""
    check.activation("score_activation", x, *site)
    return activation.scores(x, _site(*site))


def unpack_weight_definition(*arguments: Any) -> Tensor:
    """:func:`fgmp.pack.planes.unpack_units`."""
    *planes, k, dtype = arguments
    return _unpack("unpack_weight", tuple(planes), k).to(dtype)


def _unpack(operator: str, planes: Planes, k: int) -> Tensor:
    check.weight(operator, planes, k)
    check.counts(operator, planes)
    named = dict(zip(check.PLANES, planes, strict=True))
    shape = torch.tensor([_rows(planes), k])
    return unpack_units(PackedWeight(shape=shape, t=torch.ones(()), **named))


def packed_linear_definition(units: Tensor, *arguments: Any) -> Tensor:
    """:func:`fgmp.formats.linear.linear` on the unpacked weight."""
    *planes, r, t, bias, dtype = arguments
    check.linear("packed_linear", units, tuple(planes), r, t, bias, dtype)
    if units.device.type == "cpu":
        _say_slow()
    weight = _unpack("packed_linear", tuple(planes), units.shape[-1])
    return linear.linear(units, weight, _scale_of(r.item()), t.item(), bias).to(dtype)


@lru_cache(maxsize=1024)
def _scale_of(r: float) -> float:
    """Tensor scale t_x of a site with multiplier ``r``; cached, since it takes rationals."""
    return Site(_checked(r), torch.empty(0), 0.0, 0).t


_DEFINITIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "quantize_activation": (quantize_activation_definition, _codes_like),
    "fake_quantize_activation": (fake_quantize_activation_definition, _units_like),
    "score_activation": (score_activation_definition, _scores_like),
    "unpack_weight": (unpack_weight_definition, _weight_like),
    "packed_linear": (packed_linear_definition, _output_like),
}
"""Definition and shape function of each operator."""


def _tokens(x: Tensor) -> Tensor:
    """``x`` as a contiguous matrix (M, K) of a dtype that the kernels read, bf16 or fp32."""
    tokens = x.reshape(-1, x.shape[-1])
    if tokens.dtype not in (torch.bfloat16, torch.float32):
        tokens = tokens.to(torch.bfloat16)
    return tokens.contiguous()


def _shaped_like(x: Tensor, parts: Iterable[Tensor]) -> list[Tensor]:
    """Give a kernel's outputs (M, ...) for ``_tokens(x)`` the leading shape of ``x``."""
    return [part.view(*x.shape[:-1], *part.shape[1:]) for part in parts]


def _cpu(kernels: cpu.Kernels) -> dict[str, Callable[..., Any]]:
    """Operators in C++; rules that the kernels do not implement go to the definition."""

    def quantize_activation(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
        if not cpu.implements(site[3]):
            return quantize_activation_definition(x, *site)
        check.activation("quantize_activation", x, *site)
        codes, scale = _shaped_like(x, kernels.quantize(_tokens(x), _site(*site)))
        return codes, scale

    def fake_quantize_activation(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
        if not cpu.implements(site[3]):
            return fake_quantize_activation_definition(x, *site)
        check.activation("fake_quantize_activation", x, *site)
        units, flags = _shaped_like(x, kernels.fake_quantize(_tokens(x), _site(*site)))
        return units, flags

    def score_activation(x: Tensor, *site: Any) -> Tensor:
        if not cpu.implements(site[3]):
            return score_activation_definition(x, *site)
        check.activation("score_activation", x, *site)
        return _shaped_like(x, [kernels.scores(_tokens(x), _site(*site))])[0]

    def unpack_weight(*arguments: Any) -> Tensor:
        *planes, k, dtype = arguments
        check.weight("unpack_weight", tuple(planes), k)
        kernel_dtype = torch.float32 if dtype != torch.bfloat16 else dtype
        units, corrupt_row = kernels.unpack(tuple(planes), k, kernel_dtype)
        if corrupt_row >= 0:
            raise check.corrupt("unpack_weight", corrupt_row)
        return units.to(dtype)

    def packed_linear(units: Tensor, *arguments: Any) -> Tensor:
        *planes, r, t, bias, dtype = arguments
        check.linear("packed_linear", units, tuple(planes), r, t, bias, dtype)
        tokens = units.reshape(-1, units.shape[-1]).contiguous()
        kernel_dtype = torch.float32 if dtype != torch.bfloat16 else dtype
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        # The product of two fp32 numbers is exact in a Python float; ctypes rounds it once to fp32.
        scale = _scale_of(r.item()) * t.item()
        y, corrupt_row = kernels.linear(tokens, tuple(planes), scale, bias, kernel_dtype)
        if corrupt_row >= 0:
            raise check.corrupt("packed_linear", corrupt_row)
        return y.view(*units.shape[:-1], y.shape[-1]).to(dtype)

    return {
        "quantize_activation": quantize_activation,
        "fake_quantize_activation": fake_quantize_activation,
        "score_activation": score_activation,
        "unpack_weight": unpack_weight,
        "packed_linear": packed_linear,
    }


@cache
def _say_slow() -> None:
    """Warn once that packed models run slowly without the C++ kernels."""
    logging.getLogger("fgmp").warning(
        "the C++ kernels are not compiled here: packed models run correctly but slowly; "
        "install a C++ compiler and reinstall fgmp"
    )


def _cuda() -> dict[str, Callable[..., Any]]:
    """Operators in Triton.

    No call waits for the GPU, so planes that contradict each other are not detected here.
    :func:`fgmp.pack.planes.validate` checked them when they were loaded.
    """
    from fgmp.kernels.triton import linear as triton_linear
    from fgmp.kernels.triton import quantize, unpack

    def quantize_activation(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
        if not quantize.implements(site[3]):
            return quantize_activation_definition(x, *site)
        check.activation("quantize_activation", x, *site)
        return quantize.quantize_activation(x, *site)

    def fake_quantize_activation(x: Tensor, *site: Any) -> tuple[Tensor, Tensor]:
        if not quantize.implements(site[3]):
            return fake_quantize_activation_definition(x, *site)
        check.activation("fake_quantize_activation", x, *site)
        return quantize.fake_quantize_activation(x, *site)

    def unpack_weight(*arguments: Any) -> Tensor:
        low, scale, overflow, row_ptr, fp8, k, dtype = arguments
        check.weight("unpack_weight", (low, scale, overflow, row_ptr, fp8), k)
        return unpack.unpack_weight(low, scale, overflow, row_ptr, fp8, k, dtype)

    def packed_linear(units: Tensor, *arguments: Any) -> Tensor:
        low, scale, overflow, row_ptr, fp8, r, t, bias, dtype = arguments
        planes = (low, scale, overflow, row_ptr, fp8)
        check.linear("packed_linear", units, planes, r, t, bias, dtype)
        t_x = 1 / (FP8_FACTOR * r)  # 6 r is exact, so only the division rounds
        return triton_linear.packed_linear(
            units, low, scale, overflow, row_ptr, fp8, t_x, t, bias, dtype
        )

    return {
        "quantize_activation": quantize_activation,
        "fake_quantize_activation": fake_quantize_activation,
        "unpack_weight": unpack_weight,
        "packed_linear": packed_linear,
    }


def _implement() -> None:
    """Register the definitions and the kernels that this machine can run."""
    for name, (definition, fake) in _DEFINITIONS.items():
        _lib.impl(name, definition, "CompositeExplicitAutograd")
        torch.library.register_fake(f"fgmp::{name}", fake, lib=_lib)
    kernels = cpu.kernels()
    if kernels is not None:
        for name, function in _cpu(kernels).items():
            _lib.impl(name, function, "CPU")
    if torch.cuda.is_available() and importlib.util.find_spec("triton"):
        for name, function in _cuda().items():
            _lib.impl(name, function, "CUDA")


_implement()

quantize_activation = torch.ops.fgmp.quantize_activation.default
fake_quantize_activation = torch.ops.fgmp.fake_quantize_activation.default
score_activation = torch.ops.fgmp.score_activation.default
unpack_weight = torch.ops.fgmp.unpack_weight.default
packed_linear = torch.ops.fgmp.packed_linear.default
