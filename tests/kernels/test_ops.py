"""The operators: what torch demands of them, and what they demand of their arguments."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import quantize
from fgmp.formats.spec import FP8_BLOCK
from fgmp.kernels import ops
from fgmp.model.linear import ActivationSite, MixedLinear
from fgmp.pack.planes import unpack_units

from .cases import MODES, arguments, packed, planes, site, tokens

K = 72


def calls(share: float = 0.3, dtype: torch.dtype = torch.bfloat16) -> dict[str, tuple[Any, ...]]:
    """Operators by name with arguments that they take."""
    weight, record = packed(24, K, share), site(K)
    x = tokens(6, K).view(2, 3, K).to(dtype)
    units = quantize(x, record).units(K).to(torch.bfloat16)
    r, t = torch.tensor(record.r), weight.t
    return {
        "quantize_activation": (x, *arguments(record)),
        "fake_quantize_activation": (x, *arguments(record)),
        "score_activation": (x, *arguments(record)),
        "unpack_weight": (*planes(weight), K, torch.float32),
        "packed_linear": (units, *planes(weight), r, t, torch.ones(24), dtype),
    }


@pytest.mark.parametrize("share", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", list(calls()))
def test_torch_accepts_them(name: str, share: float) -> None:
    torch.library.opcheck(getattr(ops, name), calls(share)[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(calls()))
def test_kernels_equal_the_definitions(name: str, dtype: torch.dtype) -> None:
    arguments = calls(dtype=dtype)[name]
    results = getattr(ops, name)(*arguments)
    wanted = getattr(ops, f"{name}_definition")(*arguments)
    if name == "packed_linear":
        # Both round sums that may differ in fp32's last places: to neighbours at most.
        torch.testing.assert_close(results, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert results.dtype == dtype and results.shape == (2, 3, 24)
        return
    for result, expected in zip(results, wanted, strict=True):
        assert torch.equal(result, expected) and result.dtype == expected.dtype


def test_a_rule_that_no_kernel_knows_is_left_to_the_definition() -> None:
    record = replace(site(K), rule="truncated", scales="search", threshold=2**30)
    x = tokens(6, K)
    wanted = quantize(x, record)
    codes, scale = ops.quantize_activation(x, *arguments(record))
    assert torch.equal(scale == FP8_BLOCK, wanted.is_fp8) and wanted.is_fp8.any()
    assert torch.equal(codes[wanted.is_fp8], wanted.fp8[wanted.is_fp8])
    units, flags = ops.fake_quantize_activation(x, *arguments(record))
    assert torch.equal(flags, wanted.is_fp8) and torch.equal(units.float(), wanted.units(K))
    assert torch.equal(ops.score_activation(x, *arguments(record)), wanted.score)


def test_a_strange_stride_of_x_is_fine() -> None:
    x, *rest = calls()["fake_quantize_activation"]
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not turned.is_contiguous()
    for a, b in zip(
        ops.fake_quantize_activation(turned, *rest),
        ops.fake_quantize_activation(x, *rest),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_no_tokens_are_fine() -> None:
    x, *rest = calls()["fake_quantize_activation"]
    assert [p.shape for p in ops.fake_quantize_activation(x[:, :0], *rest)] == [
        (2, 0, K),
        (2, 0, 5),
    ]
    units, *rest = calls()["packed_linear"]
    assert ops.packed_linear(units[:, :0], *rest).shape == (2, 0, 24)


def test_a_rule_without_kernels_goes_to_the_definition() -> None:
    record = replace(site(K), rule="random", threshold=2**59)
    x = tokens(6, K)
    scale = ops.quantize_activation(x, *arguments(record))[1]
    assert torch.equal(scale == FP8_BLOCK, quantize(x, record).is_fp8)
    assert 0.2 < (scale == FP8_BLOCK).double().mean() < 0.8


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own
def test_a_quantized_layer_compiles_into_one_graph() -> None:
    weight, record = packed(24, K, 0.3), site(K)
    linear = MixedLinear(weight, torch.ones(24), ActivationSite(record), owns_site=True)
    x = tokens(5, K)
    compiled = torch.compile(lambda x: torch.relu(linear(x * 2.0)) + 1.0, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), torch.relu(linear(x * 2.0)) + 1.0)


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


def test_units_of_the_weight_are_exact_in_every_dtype() -> None:
    weight = packed(24, K, 0.3)
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(
            ops.unpack_weight(*planes(weight), K, dtype), unpack_units(weight).to(dtype)
        )


def test_results_are_tensors_of_their_own() -> None:
    """An operator must not return its argument: torch forbids outputs that alias inputs."""
    x, *rest = calls(dtype=torch.bfloat16)["fake_quantize_activation"]
    units: Tensor = ops.fake_quantize_activation(x, *rest)[0]
    assert units.data_ptr() != x.data_ptr()
