"""The operators: accepted by torch, equal to their definitions, on any rule and stride."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fgmp.formats.activation import quantize
from fgmp.formats.spec import FP8_BLOCK
from fgmp.kernels import ops
from fgmp.model.linear import ActivationSite, MixedLinear
from fgmp.pack.planes import unpack_units

from .cases import MODES, K, arguments, calls, packed, planes, site, tokens


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
