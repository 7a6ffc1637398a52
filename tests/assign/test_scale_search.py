"""The scale search is exact: it returns what trying all 126 scales would, and tries few.

Brute force computes every error from the definition in docs/numerics.md with the encoders of
``formats``, in the same order of operations, so that even ties between floats must agree.
"""

from fractions import Fraction

import pytest
import torch

from fgmp.assign import scale_search
from fgmp.assign.scale_search import search_definition, search_scale_codes
from fgmp.formats.codec import block_sums, decode_e2m1, decode_e4m3, to_blocks
from fgmp.formats.spec import E4M3
from fgmp.formats.weight import fp4_codes, nearest_scale_codes, quantize_weight, tensor_scale

SCALES = torch.arange(0x01, 0x7F, dtype=torch.uint8)


def errors(weight: torch.Tensor, fisher: torch.Tensor, t: float) -> torch.Tensor:
    """E(s) of every block for every scale, float64 (N, G, 126)."""
    blocks = to_blocks(weight.float()).unsqueeze(-2)
    codes = SCALES.expand(*blocks.shape[:2], -1)
    scale = decode_e4m3(codes).double() * t
    values = decode_e2m1(fp4_codes(blocks, codes, t)).double() * scale.unsqueeze(-1)
    f = to_blocks(fisher.double())
    matters = ((f > 0) & (blocks[..., 0, :] != 0)).any(-1, keepdim=True)
    return block_sums(f.where(matters, 1.0).unsqueeze(-2) * (values - blocks.double()).square())


def brute_force(weight: torch.Tensor, fisher: torch.Tensor, t: float) -> torch.Tensor:
    """The last of the scales with the least error; 0x01 where it leaves nothing but zeros."""
    every = errors(weight, fisher, t)
    last = 125 - every.flip(-1).argmin(-1)
    best = SCALES[last]
    zero = (fp4_codes(to_blocks(weight.float()), best, t) & 7 == 0).all(-1)
    return best.where(~zero, 0x01)


def gaussian(n: int, k: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.02


def heavy(n: int, k: int) -> torch.Tensor:
    return gaussian(n, k) * gaussian(n, k, seed=1).mul(100).exp()


def spread(n: int, k: int) -> torch.Tensor:
    """Fisher information over six decades, as real layers have it."""
    return gaussian(n, k, seed=2).mul(150).exp() * 1e-8


def on_the_grid(n: int, k: int) -> torch.Tensor:
    """Values that many scales represent without error: ties everywhere."""
    g = torch.Generator().manual_seed(3)
    grid = torch.tensor([0.0, 0.5, 1, 2, 4, -1, -4, 3])
    few = torch.randint(8, (n, k), generator=g) * (torch.rand(n, k, generator=g) < 0.2)
    return grid[few] * torch.tensor([0.125, 1, 3, 96]).repeat(n // 4 + 1)[:n, None]


def half_way(n: int, k: int) -> torch.Tensor:
    """Values halfway between neighbours of the grid under a scale of 1."""
    g = torch.Generator().manual_seed(4)
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0])
    return middles[torch.randint(8, (n, k), generator=g)] * torch.tensor([1.0, -2.0]).repeat(k // 2)


def outlier(n: int, k: int) -> torch.Tensor:
    """One huge value: everything else is below the least scale, or nearly."""
    w = gaussian(n, k)
    w[0, 0] = 3e4
    w[1:, 16:32] *= torch.logspace(-8, 3, n - 1).unsqueeze(-1)
    return w


def mostly_zero_fisher(n: int, k: int) -> torch.Tensor:
    """Whole blocks without Fisher information, and single elements."""
    f = spread(n, k) * (gaussian(n, k, seed=5) > 0)
    f[:, 16:48] = 0
    f[::2, 48:64] = 0
    f[::2, 50] = 1e-30
    return f


CASES = {
    "gaussian": (gaussian(48, 256), spread(48, 256)),
    "gaussian, plain error": (gaussian(48, 256), torch.ones(48, 256)),
    "heavy tails": (heavy(48, 256), spread(48, 256)),
    "ragged K": (gaussian(48, 172), spread(48, 172)),
    "tiny, t at its least": (gaussian(16, 64) * 1e-34, spread(16, 64)),
    "large": (gaussian(16, 64) * 1e20, spread(16, 64)),
    "on the grid": (on_the_grid(64, 128), spread(64, 128)),
    "on the grid, plain error": (on_the_grid(64, 128), torch.ones(64, 128)),
    "half way": (half_way(32, 64), torch.ones(32, 64)),
    "huge outlier": (outlier(40, 64), spread(40, 64)),
    "zero fisher": (gaussian(32, 128), mostly_zero_fisher(32, 128)),
    "zero fisher on the grid": (on_the_grid(64, 128), mostly_zero_fisher(64, 128)),
    "huge fisher": (gaussian(8, 64), spread(8, 64) * 1e30),
    "all zero": (torch.zeros(2, 32), torch.ones(2, 32)),
}


@pytest.mark.parametrize("case", CASES)
def test_search_equals_brute_force(case: str) -> None:
    weight, fisher = CASES[case]
    t = tensor_scale(weight.abs().max().item())
    expected = brute_force(weight, fisher, t)
    assert torch.equal(search_scale_codes(weight, fisher, t), expected)
    assert torch.equal(search_definition(weight, fisher, t), expected)


def test_search_equals_brute_force_under_a_shared_scale() -> None:
    # Linears of a site share t, so a weight may be far smaller than its tensor scale expects.
    weight, fisher = heavy(32, 128), spread(32, 128)
    for factor in (3.0, 1e3, 1e6):
        t = tensor_scale(weight.abs().max().item() * factor)
        assert torch.equal(search_scale_codes(weight, fisher, t), brute_force(weight, fisher, t))


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = heavy(16, 172), spread(16, 172)
    t = tensor_scale(weight.abs().max().item())
    whole = search_definition(weight, fisher, t)
    monkeypatch.setattr(scale_search, "_CHUNK_BLOCKS", 7)
    assert torch.equal(search_definition(weight, fisher, t), whole)


def test_error_is_the_sum_of_the_definition() -> None:
    weight, fisher, t = heavy(4, 32), spread(4, 32), 2.0**-9
    blocks, f = to_blocks(weight).flatten(0, 1), to_blocks(fisher.double()).flatten(0, 1)
    codes = nearest_scale_codes(weight, t).flatten()
    held = quantize_weight(weight, t).fp4_units().flatten(0, 1)
    for i, result in enumerate(scale_search.error(blocks, f, codes, t).tolist()):
        rows = zip(f[i].tolist(), held[i].tolist(), blocks[i].tolist(), strict=True)
        exact = sum(
            Fraction(w) * (Fraction(q) * Fraction(t) - Fraction(v)) ** 2 for w, q, v in rows
        )
        # 16 non-negative terms of float64: 20 roundings of 2**-53 each at most.
        assert result == pytest.approx(float(exact), rel=20 * 2.0**-53)


def test_equal_errors_take_the_larger_scale() -> None:
    # One value of 3 t * 2**n is exact under codes 6 down to 0.5: the largest scale wins, by 0.5.
    weight = torch.zeros(1, 16)
    weight[0, 5] = 3.0
    code = search_scale_codes(weight, torch.ones(1, 16), 1.0)
    assert decode_e4m3(code).item() == 6.0
    assert quantize_weight(weight, 1.0, code).fp4[0, 0, 5] == 1


@pytest.mark.parametrize("value", [0.0, 2.0**-11, -(2.0**-11), 2.0**-30])
def test_blocks_that_every_scale_flushes_get_the_least_scale(value: float) -> None:
    weight = torch.full((1, 16), value)  # 2**-11 is halfway from 0 to the least value, 2**-10
    assert search_scale_codes(weight, torch.ones(1, 16), 1.0).item() == 0x01


def test_a_value_without_fisher_does_not_vanish_with_its_neighbours() -> None:
    # Only zeros have Fisher information: the scale is chosen as if all had the same.
    weight, fisher = torch.zeros(1, 16), torch.ones(1, 16)
    weight[0, 0], fisher[0, 0] = 3.0, 0.0
    plain = search_scale_codes(weight, torch.ones(1, 16), 1.0)
    assert torch.equal(search_scale_codes(weight, fisher, 1.0), plain)


def test_search_never_does_worse_than_the_nearest_scale() -> None:
    weight, fisher = heavy(48, 256), spread(48, 256)
    t = tensor_scale(weight.abs().max().item())
    every = errors(weight, fisher, t)

    def total(codes: torch.Tensor) -> torch.Tensor:
        return every.gather(-1, codes.long().unsqueeze(-1) - 1).squeeze(-1)

    nearest = total(nearest_scale_codes(weight, t))
    result = total(search_scale_codes(weight, fisher, t))
    assert (result <= nearest).all()
    assert result.sum() < 0.8 * nearest.sum()  # measured 0.6: the search is worth its time


@pytest.mark.parametrize("case", ["gaussian", "heavy tails", "on the grid", "zero fisher"])
@pytest.mark.parametrize("direction", [-1, 1])
def test_bounds_are_below_the_error_and_monotone(case: str, direction: int) -> None:
    weight, fisher = CASES[case]
    t = tensor_scale(weight.abs().max().item())
    magnitude = to_blocks(weight).abs()
    f = to_blocks(fisher.double())
    f = f.where(((f > 0) & (magnitude > 0)).any(-1, keepdim=True), 1.0)
    bound = torch.stack(
        [
            scale_search._bound(magnitude, f, code.expand(magnitude.shape[:2]), t, direction)
            for code in SCALES
        ],
        -1,
    )
    assert (bound <= errors(weight, fisher, t) * scale_search._SLACK).all()
    assert (bound.diff(dim=-1) * direction >= 0).all()
    assert bound.max() > 0  # a bound of zero would be true and useless


@pytest.mark.parametrize("case", ["gaussian", "gaussian, plain error", "heavy tails"])
def test_few_scales_are_tried(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, fisher = CASES[case]
    tried = 0
    real = scale_search.error

    def counting(blocks: torch.Tensor, *rest: object) -> torch.Tensor:
        nonlocal tried
        tried += len(blocks)
        return real(blocks, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(scale_search, "error", counting)
    search_scale_codes(weight, fisher, tensor_scale(weight.abs().max().item()))
    assert tried / (48 * 16) < 16  # measured 11 to 13 of 126


def test_scales_are_valid_codes() -> None:
    weight, fisher = CASES["huge outlier"]
    codes = search_scale_codes(weight, fisher, tensor_scale(3e4))
    assert codes.dtype == torch.uint8 and codes.shape == (40, 4)
    assert codes.min() >= 1 and codes.max() <= E4M3.max_code
