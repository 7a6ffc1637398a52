"""The operator for a mixture of experts, beside the modules that Transformers' models run."""

from typing import Any

import pytest
import torch

import fgmp
from fgmp.errors import CheckpointError
from fgmp.pack.planes import PackedWeight
from fgmp.serving.experts import Stacked, packed_experts, stacked
from fgmp.serving.shards import columns, stack, take

from .checkpoints import write_random

EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = write_random(tmp_path_factory.mktemp("serving") / "moe", "qwen3_moe")
    return fgmp.load(folder)


def linears_of(model: Any, name: str) -> list[Any]:
    return [getattr(expert, name) for expert in model.get_submodule(EXPERTS)]


def a_stack(linears: list[Any]) -> Stacked:
    weights = [linear.packed for linear in linears]
    return stacked(EXPERTS, weights, [linear.input_site.record for linear in linears])


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, weights of their experts, and the experts; expert 3 gets none."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, 128, generator=generator)
    experts = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    return x, torch.rand(tokens, 2, generator=generator), experts


@pytest.mark.parametrize("tokens", [1, 9])
def test_equals_the_modules(model: Any, tokens: int) -> None:
    x, weights, experts = routed(tokens)
    first = a_stack(linears_of(model, "gate_up_proj"))
    down = a_stack(linears_of(model, "down_proj"))
    arguments = (*first.tensors().values(), *down.tensors().values(), first.rule, first.scales)
    y = torch.ops.fgmp.packed_experts(x, weights, experts, *arguments, "silu")
    expected = model.get_submodule(EXPERTS)(x, experts, weights)
    assert torch.equal(y, expected) and y.dtype == x.dtype


def test_ranks_add_up(model: Any) -> None:
    x, weights, experts = routed(5)
    size = 32  # of 64 rows of the gate, and as many of up
    total = torch.zeros_like(x)
    for rank in range(2):
        start = rank * size
        rows = torch.cat([torch.arange(start, start + size) + half for half in (0, 64)])
        first = a_stack(linears_of(model, "gate_up_proj"))
        down = a_stack(linears_of(model, "down_proj"))
        up = [take([linear.packed], rows) for linear in linears_of(model, "gate_up_proj")]
        cut = [columns(linear.packed, start, start + size)
               for linear in linears_of(model, "down_proj")]  # fmt: skip
        arguments = (
            *with_planes(first, up),
            *with_planes(down, cut, slice(start, start + size)),
            *(first.rule, first.scales, "silu"),
        )
        total += packed_experts(x, weights, experts, *arguments)
    expected = model.get_submodule(EXPERTS)(x, experts, weights)
    assert torch.allclose(total, expected, rtol=1e-4, atol=1e-6)


def with_planes(
    whole: Stacked, weights: list[PackedWeight], channels: slice = slice(None)
) -> list[torch.Tensor | None]:
    """Arguments of the operator for other rows and columns of the same linears."""
    sensitivity = whole.constants["sensitivity"][:, channels].contiguous()
    part = Stacked(stack(weights), {**whole.constants, "sensitivity": sensitivity}, "", "")
    return list(part.tensors().values())


def test_no_token_and_compiled(model: Any) -> None:
    first = a_stack(linears_of(model, "gate_up_proj"))
    down = a_stack(linears_of(model, "down_proj"))
    arguments = (*first.tensors().values(), *down.tensors().values(), first.rule, first.scales)

    def run(x: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = torch.ops.fgmp.packed_experts(x, weights, experts, *arguments, "silu")
        return y + 1

    compiled = torch.compile(run, backend="eager", fullgraph=True)
    for tokens in (0, 4):
        assert torch.equal(compiled(*routed(tokens) if tokens else empty()),
                           run(*routed(tokens) if tokens else empty()))  # fmt: skip


def empty() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty(0, 128), torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64)


def test_sites_of_two_rules_are_refused(model: Any) -> None:
    linears = linears_of(model, "down_proj")
    sites = [linear.input_site.record for linear in linears]
    other = "difference" if sites[0].rule != "difference" else "benefit"
    sites[1] = type(sites[1])(**{**sites[1].__dict__, "rule": other})
    with pytest.raises(CheckpointError, match=r"sites of all experts must have one rule"):
        stacked(EXPERTS, [linear.packed for linear in linears], sites)
