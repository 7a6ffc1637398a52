"""What quantizes weights in C++ gives the bits of its definitions on every instruction set."""

import pytest
import torch
from torch import Tensor

from fgmp.assign.compensate import round_columns_definition
from fgmp.assign.impact import WEIGHT_SCORES
from fgmp.assign.scale_search import search_definition
from fgmp.formats.weight import nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.kernels.cpu.library import Kernels

from .test_library import SETS

SHAPES = ((1, 1), (3, 44), (37, 64), (5, 172))


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(instruction_set=request.param)


def a_weight(n: int, k: int) -> tuple[Tensor, Tensor, float]:
    """Heavy-tailed values with zeros, sensitivities over many decades, and the tensor scale."""
    g = torch.Generator().manual_seed(n * k)
    weight = torch.randn(n, k, generator=g) * torch.randn(n, k, generator=g).mul(2).exp()
    weight[torch.rand(n, k, generator=g) < 0.1] = 0
    fisher = torch.randn(n, k, generator=g).mul(3).exp()
    fisher[torch.rand(n, k, generator=g) < 0.2] = 0
    return weight, fisher, tensor_scale(weight.abs().max().item() * 1.5)


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_and_scores(kernels: Kernels, shape: tuple[int, int]) -> None:
    weight, fisher, t = a_weight(*shape)
    scale = search_definition(weight, fisher, t)
    assert torch.equal(kernels.search_scales(weight, fisher, t), scale)
    for codes in (scale, nearest_scale_codes(weight, t)):
        both = quantize_weight(weight, t, codes)
        for name, score in WEIGHT_SCORES.items():
            found = kernels.weight_scores(weight, fisher, codes, t, name)
            assert torch.equal(found, score(both, weight, fisher)), name


@pytest.mark.parametrize("count", [1, 12, 16])
def test_columns(kernels: Kernels, count: int) -> None:
    columns, _, t = a_weight(53, count)
    g = torch.Generator().manual_seed(count)
    columns[3], columns[4, 0], columns[5] = 0.0, -1e-30, columns[5] * 1e4
    spread = (torch.randn(count, count, generator=g) * 0.3).triu(1) + torch.eye(count) * 1.3
    scale = torch.randint(1, 0x7F, (53,), generator=g).to(torch.uint8)
    is_fp8 = torch.rand(53, generator=g) < 0.4
    expected = round_columns_definition(columns.clone(), spread, scale, is_fp8, t)
    found = kernels.round_columns(columns.clone(), spread, scale, is_fp8, t)
    assert all(torch.equal(part, other) for part, other in zip(found, expected, strict=True))


def test_the_number_of_threads_changes_no_bit(kernels: Kernels) -> None:
    weight, fisher, t = a_weight(37, 172)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            scale = kernels.search_scales(weight, fisher, t)
            scores = kernels.weight_scores(weight, fisher, scale, t, "benefit")
            flags = torch.arange(37) % 2 == 0
            columns = weight[:, :16].clone()
            spread = torch.eye(16) + torch.ones(16, 16).triu(1) * 0.1
            results.append(
                (
                    scale,
                    scores,
                    *kernels.round_columns(columns, spread, scale[:, 0].contiguous(), flags, t),
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
