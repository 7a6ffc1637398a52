"""Parts of packed weights: rows, columns and joins multiply to what the whole weights do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.pack.planes import BlockCodes, PackedWeight, pack_blocks, unpack, unpack_units
from fgmp.serving.shards import ZERO_ROW, columns, stack, take

T = 2.0**-8


def a_weight(n: int, k: int, mode: str, seed: int = 0, t: float = T) -> PackedWeight:
    """Random valid codes; of a mixed weight about half of the blocks are FP8."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // BLOCK)
    is_fp8 = torch.rand(n, groups, generator=generator) < {"fp4": 0, "fp8": 1, "mixed": 0.5}[mode]
    codes = torch.randint(1, 8, (n, groups, BLOCK), generator=generator, dtype=torch.uint8)
    codes = torch.where(is_fp8.unsqueeze(-1), codes * 16 + codes, codes)
    codes[:, -1, (k - 1) % BLOCK + 1 :] = 0
    scale = torch.randint(1, 0x7F, (n, groups), generator=generator, dtype=torch.uint8)
    scale = torch.where(is_fp8, torch.full_like(scale, 0x80), scale)
    return pack_blocks(BlockCodes(is_fp8, codes, scale), k, t, mode)


def product(x: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
    planes = [getattr(packed, name) for name in PLANES]
    return ops.packed_linear(x, *planes, torch.tensor(1.0), packed.t, None, torch.float32)


MODES = ["fp4", "mixed", "fp8"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("k", "ranks"), [(96, 2), (96, 3), (64, 4), (44, 1)])
def test_columns_of_all_ranks_add_up(mode: str, k: int, ranks: int) -> None:
    weight = a_weight(7, k, mode)
    g = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (3, k), generator=g).to(
        torch.bfloat16
    )  # sums of few such products are exact
    share = k // ranks
    sliced = [columns(weight, r * share, (r + 1) * share) for r in range(ranks)]
    for rank, part in enumerate(sliced):
        columns_of_all = unpack_units(weight)[:, rank * share : (rank + 1) * share]
        assert torch.equal(unpack_units(part), columns_of_all) and part.mode == mode
    total = sum(product(x[:, r * share : (r + 1) * share], part) for r, part in enumerate(sliced))
    expected = product(x, weight)
    # Each share is rounded once when it is scaled; a sum may be far smaller than its shares.
    assert (total - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_the_last_columns_may_be_a_part_of_a_block() -> None:
    weight = a_weight(5, 44, "mixed")
    assert torch.equal(unpack_units(columns(weight, 32, 44)), unpack_units(weight)[:, 32:])


@pytest.mark.parametrize(("start", "stop"), [(8, 32), (0, 24)])
def test_a_block_is_not_divided(start: int, stop: int) -> None:
    with pytest.raises(InputError, match=f"multiples of 16, got {start} to {stop} of 96"):
        columns(a_weight(5, 96, "mixed"), start, stop)


@settings(deadline=None, max_examples=60)
@given(
    modes=st.lists(st.sampled_from(MODES), min_size=1, max_size=3),
    numbers=st.lists(st.integers(-1, 11), min_size=1, max_size=20),
)
def test_any_rows_of_any_modes(modes: list[str], numbers: list[int]) -> None:
    weights = [a_weight(4, 40, mode, seed) for seed, mode in enumerate(modes)]
    numbers = [min(number, 4 * len(modes) - 1) for number in numbers]
    packed = take(weights, torch.tensor(numbers))
    whole = torch.cat([*map(unpack_units, weights), torch.zeros(1, 40)])  # -1 is the last row
    assert torch.equal(unpack_units(packed), whole[numbers])
    x = torch.randint(-4, 5, (2, 40)).to(torch.bfloat16)
    products = torch.cat([*(product(x, weight) for weight in weights), torch.zeros(2, 1)], dim=1)
    assert torch.allclose(product(x, packed), products[:, numbers], rtol=1e-5)


@pytest.mark.parametrize(
    "modes", [("fp4", "fp4"), ("fp8", "fp8"), ("fp4", "fp8"), ("fp4", "mixed")]
)
def test_a_join_keeps_every_code(modes: tuple[str, str]) -> None:
    weights = [a_weight(3, 48, mode, seed) for seed, mode in enumerate(modes)]
    packed = take(weights, torch.arange(6))
    assert packed.mode == (modes[0] if modes[0] == modes[1] else "mixed")
    content, parts = unpack(packed), [unpack(weight) for weight in weights]
    for name in ("is_fp8", "codes", "scale"):
        assert torch.equal(getattr(content, name), torch.cat([getattr(p, name) for p in parts]))


def test_all_rows_of_one_weight_are_not_copied() -> None:
    weight = a_weight(6, 32, "fp4")
    assert weight.low is not None
    packed = take([weight], torch.arange(6))
    assert packed.low is not None and packed.low.data_ptr() == weight.low.data_ptr()
    assert columns(weight, 0, 32) is weight


def test_padding_is_rows_of_zeros() -> None:
    for mode in MODES:
        packed = take([a_weight(3, 32, mode)], torch.tensor([2, ZERO_ROW, ZERO_ROW]))
        assert packed.mode == mode and not unpack_units(packed)[1:].any()


def test_a_stack_forgets_tensor_scales_only() -> None:
    weights = [a_weight(2, 32, "fp4", 0, t=1.0), a_weight(2, 32, "mixed", 1, t=2.0)]
    units = unpack_units(stack(weights))
    assert torch.equal(units, torch.cat([unpack_units(weight) for weight in weights]))
