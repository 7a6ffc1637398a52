"""Checks of the operators' arguments: each violation has its own message, in every kernel."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fgmp.errors import InputError
from fgmp.kernels import check, ops

from .cases import K, calls, packed, planes


def replaced(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


Change = Callable[[Any], Any]

BAD: list[tuple[str, int, Change, str]] = [
    ("quantize_activation", 0, lambda x: x.int(), "x must be floating point, got torch.int32"),
    ("quantize_activation", 0, lambda x: x[0, 0, 0], r"x must have shape \[..., K\], got \[\]"),
    ("quantize_activation", 1, lambda r: r.double(), "r must be torch.float32, got torch.float64"),
    ("quantize_activation", 1, lambda r: r[None], r"r must have shape \[\], got \[1\]"),
    ("quantize_activation", 2, lambda s: s[1:], r"sensitivity must have shape \[72\], got \[71\]"),
    ("quantize_activation", 2, lambda s: s.repeat(2)[::2], "sensitivity must be contiguous, got"),
    ("quantize_activation", 3, lambda t: t.int(), "threshold must be torch.int64, got torch.int32"),
    ("quantize_activation", 4, lambda _: "best", "rule must be one of difference, benefit"),
    ("quantize_activation", 5, lambda _: "all", "scales must be one of max, search, got all"),
    ("unpack_weight", 0, lambda p: p.int(), "low must be torch.uint8, got torch.int32"),
    ("unpack_weight", 0, lambda p: p[:, :-1], r"low must have shape \[24, 40\], got \[24, 39\]"),
    ("unpack_weight", 0, lambda _: None, r"planes must be low\+scale\+overflow\+row_ptr or .* got"),
    ("unpack_weight", 1, lambda p: p.T.contiguous().T, "scale must be contiguous, got strides"),
    ("unpack_weight", 2, lambda p: p[:, :4], r"overflow must have shape \[\d+, 8\], got"),
    ("unpack_weight", 2, lambda p: p[:-1], "row_ptr must count the bytes 0x80 of scale .* row 23"),
    ("unpack_weight", 3, lambda p: p.long(), "row_ptr must be torch.int32, got torch.int64"),
    ("unpack_weight", 3, lambda p: p[1:], r"row_ptr must have shape \[25\], got \[24\]"),
    ("unpack_weight", 3, lambda p: p.flip(0), "row_ptr must count the bytes 0x80 .* row 0 does"),
    ("unpack_weight", 5, lambda _: 0, "k must be positive, got 0"),
    (
        "packed_linear",
        0,
        lambda x: x.half(),
        "units must be bfloat16 or float32, got torch.float16",
    ),
    ("packed_linear", 0, lambda x: x[..., :40], r"low must have shape \[24, 24\], got \[24, 40\]"),
    ("packed_linear", 6, lambda r: r.double(), "r must be torch.float32"),
    ("packed_linear", 7, lambda t: t[None], r"t must have shape \[\]"),
    ("packed_linear", 8, lambda b: b[:3], r"bias must have shape \[24\], got \[3\]"),
    ("packed_linear", 8, lambda b: b.int(), "bias must be floating point, got torch.int32"),
    ("packed_linear", 9, lambda _: torch.int32, "dtype must be floating point, got torch.int32"),
]


@pytest.mark.parametrize(("name", "at", "change", "message"), BAD)
def test_bad_arguments(name: str, at: int, change: Change, message: str) -> None:
    good = calls()[name]
    for operator in (getattr(ops, name), getattr(ops, f"{name}_definition")):
        with pytest.raises(InputError, match=f"^{name}: {message}"):
            operator(*replaced(good, at, change(good[at])))


def test_tensors_of_other_devices() -> None:
    x, r, sensitivity, *rest = calls()["fake_quantize_activation"]
    with pytest.raises(InputError, match="sensitivity must be on cpu, got meta"):
        ops.fake_quantize_activation_definition(x, r, sensitivity.to("meta"), *rest)


def test_the_definition_of_calls_is_accepted() -> None:
    """The arguments that every case above spoils are good before."""
    for name, good in calls().items():
        getattr(ops, f"{name}_definition")(*good)


def test_planes_without_scale_have_no_counts() -> None:
    check.counts("unpack_weight", planes(packed(24, K, 1.0)))


def test_counts_of_a_mode_without_overflow() -> None:
    """In FP4 mode no scale byte may flag an FP8 block."""
    low, scale, *rest = planes(packed(24, K, 0.0))
    assert scale is not None
    check.counts("unpack_weight", (low, scale, *rest))
    scale[5, 2] = 0x80
    with pytest.raises(InputError, match="row 5 does not hold to it"):
        check.counts("unpack_weight", (low, scale, *rest))
