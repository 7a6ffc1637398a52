"""Compensation is the least-squares problem that its docstring states, solved column by column.

The judge solves that problem anew for every column by ``lstsq`` on the tokens themselves, and
shares with the package only the rounding of single values.
"""

import pytest
import torch
from torch import Tensor

from fgmp.assign import compensate
from fgmp.assign.compensate import (
    Factors,
    compensated,
    factorize,
    factors_of,
    round_columns,
    round_columns_definition,
)
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.activation import Site, fake_quantize, multiplier, sensitivity_codes
from fgmp.formats.codec import from_blocks
from fgmp.formats.spec import THRESHOLD_ALL_FP4
from fgmp.formats.weight import (
    WeightCodes,
    nearest_scale_codes,
    quantize_weight,
    tensor_scale,
)
from fgmp.pack.planes import pack, unpack_units
from fgmp.sensitivity.moments import Moments, add_moments, new_moments

N, K = 24, 44  # ragged: the last block has 12 columns


def tokens(count: int = 300, seed: int = 0) -> tuple[Tensor, Site]:
    """Correlated activations (count, K) and a site that keeps all of them in FP4."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 12, generator=g) @ torch.randn(12, K, generator=g)
    x = (x + torch.randn(count, K, generator=g) * 0.3).bfloat16().float()
    return x, all_fp4_site(x, torch.rand(K, generator=g))


def all_fp4_site(x: Tensor, g2: Tensor) -> Site:
    codes, gamma = sensitivity_codes(g2)
    r = multiplier(x.abs().max().item())
    return Site(r, codes, gamma, THRESHOLD_ALL_FP4, rule="difference", scales="max")


def quantized_tokens(x: Tensor, site: Site) -> Tensor:
    return fake_quantize(x, site)[0] * site.t


def moments_of(x: Tensor, site: Site) -> Moments:
    moments = new_moments(K, x.device)
    for part in x.split(70):
        add_moments(moments, part.unsqueeze(0), quantized_tokens(part, site).unsqueeze(0))
    return moments


def factors_for(weight: Tensor, moments: Moments) -> Factors:
    root = factorize(moments.h)
    assert root is not None
    return factors_of(root, moments.drift("", weight))


def a_weight(seed: int = 1) -> tuple[Tensor, Tensor, float, Tensor]:
    """Weight, formats of its blocks, tensor scale and Fisher information."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(N, K, generator=g) * 0.05
    mask = torch.rand(N, 3, generator=g) < 0.4
    fisher = torch.rand(N, K, generator=g)
    return weight, mask, tensor_scale(weight.abs().max().item()), fisher


def value_of(codes: WeightCodes, mask: Tensor) -> Tensor:
    return codes.units(mask).double() * codes.t


def system(x: Tensor, q: Tensor) -> tuple[Tensor, Tensor, float]:
    """Rows whose least squares are the objective: tokens, then sqrt(m) times the identity."""
    m = compensate.DAMPING * q.double().square().sum().item() / K
    ridge = torch.eye(K, dtype=torch.float64) * m**0.5
    return torch.cat([x.double(), ridge]), torch.cat([q.double(), ridge]), m


def loss_of(weight: Tensor, v: Tensor, x: Tensor, q: Tensor) -> float:
    inputs, quantized, _ = system(x, q)
    return (inputs @ weight.double().T - quantized @ v.T).square().sum().item()


def test_the_target_is_the_least_squares_solution() -> None:
    x, site = tokens()
    q = quantized_tokens(x, site)
    weight, *_ = a_weight()
    factors = factors_for(weight, moments_of(x, site))
    inputs, quantized, _ = system(x, q)
    best = torch.linalg.lstsq(quantized, inputs @ weight.double().T).solution.T
    root = factors.root.double()
    target = weight + torch.linalg.solve_triangular(
        root, factors.shift.double(), upper=True, left=False
    )
    # Moments are summed in fp32: 300 terms of relative error 2**-24, amplified by the inverse.
    torch.testing.assert_close(target, best, rtol=0, atol=2e-6)
    assert torch.equal(root, root.triu())
    spread = torch.linalg.inv(root)
    identity = spread @ (moments_of(x, site).h.double() + m_of(q)) @ spread.T
    torch.testing.assert_close(identity, torch.eye(K, dtype=torch.float64), rtol=0, atol=1e-4)


def m_of(q: Tensor) -> Tensor:
    return torch.eye(K, dtype=torch.float64) * compensate.DAMPING * q.double().square().sum() / K


def column_by_column(
    weight: Tensor, mask: Tensor, t: float, fisher: Tensor, x: Tensor, q: Tensor
) -> Tensor:
    """The rounded weight, each column after a least-squares fit of all that follow."""
    inputs, quantized, _ = system(x, q)
    targets = inputs @ weight.double().T
    done = torch.zeros(N, K, dtype=torch.float64)
    scale = torch.zeros(N, 1, dtype=torch.uint8)
    for j in range(K):
        rest = torch.linalg.lstsq(quantized[:, j:], targets - quantized[:, :j] @ done[:, :j].T)
        free = rest.solution.T
        if j % 16 == 0:
            width = min(16, K - j)
            scale = search_scale_codes(free[:, :width].float(), fisher[:, j : j + width], t)
        codes = quantize_weight(free[:, :1].float(), t, scale)
        done[:, j] = value_of(codes, mask[:, j // 16 : j // 16 + 1])[:, 0]
    return done


def test_every_column_is_fitted_to_what_is_rounded_already() -> None:
    x, site = tokens()
    q = quantized_tokens(x, site)
    weight, mask, t, fisher = a_weight()
    factors = factors_for(weight, moments_of(x, site))
    result = value_of(compensated(weight, factors, mask, t, fisher), mask)
    expected = column_by_column(weight, mask, t, fisher, x, q)
    # fp32 moments move a value across a rounding point now and then, and what follows with it.
    assert (result == expected).double().mean() > 0.97
    plain = quantize_weight(weight, t, search_scale_codes(weight, fisher, t))
    by_loss = [loss_of(weight, v, x, q) for v in (result, expected, value_of(plain, mask))]
    assert by_loss[0] == pytest.approx(by_loss[1], rel=0.02)
    assert by_loss[0] < 0.8 * by_loss[2]


def test_the_result_is_a_packed_weight_like_any_other() -> None:
    x, site = tokens()
    weight, mask, t, _ = a_weight()
    weight[3, :16] = 0
    mask[3, 0] = False
    factors = factors_for(weight, moments_of(x, site))
    codes = compensated(weight, factors, mask, t, None)
    packed = pack(codes, mask)
    assert torch.equal(packed.is_fp8(), mask)
    assert torch.equal(unpack_units(packed), codes.units(mask))
    # Padding is code zero, and a block of zeros has the smallest scale.
    assert not codes.fp4[:, 2, 12:].any() and not codes.fp8[:, 2, 12:].any()
    zero = (codes.fp4 & 7 == 0).all(-1)
    assert (codes.scale[zero] == 1).all() and ((codes.scale >= 1) & (codes.scale <= 0x7E)).all()
    assert from_blocks(codes.units(mask).unsqueeze(1), K).shape == (N, K)


def test_an_idle_input_says_nothing() -> None:
    assert factorize(new_moments(K, torch.device("cpu")).h) is None


def test_white_inputs_without_noise_leave_the_weight_alone() -> None:
    """H = C = n I: no column can make up for another, and the target is the weight."""
    weight, mask, t, fisher = a_weight()
    eye = torch.eye(K) * 300
    factors = factors_for(weight, Moments(eye, torch.zeros(K, K)))
    codes = compensated(weight, factors, mask, t, fisher)
    plain = quantize_weight(weight, t, search_scale_codes(weight, fisher, t))
    assert torch.equal(value_of(codes, mask), value_of(plain, mask))


def test_harm_is_what_the_objective_has_above_its_least() -> None:
    x, site = tokens()
    q = quantized_tokens(x, site)
    weight, mask, t, _ = a_weight()
    factors = factors_for(weight, moments_of(x, site))
    v = value_of(quantize_weight(weight, t, nearest_scale_codes(weight, t)), mask)
    shift = factors.shift.double()
    best = weight + torch.linalg.solve_triangular(
        factors.root.double(), shift, upper=True, left=False
    )
    result = compensate.distances(v.float(), weight, factors)
    for row in range(N):
        one = slice(row, row + 1)
        above = loss_of(weight[one], v[one], x, q) - loss_of(weight[one], best[one], x, q)
        # Moments are summed in fp32, and the objective is a difference of larger sums.
        assert result[row].item() == pytest.approx(above, rel=1e-3)


def test_a_clipped_outlier_does_not_take_its_row_along() -> None:
    """F sees no use in the large weight of a busy channel; the output error does."""
    g = torch.Generator().manual_seed(0)
    x, site = tokens()
    x[:, 5] *= 30
    site = all_fp4_site(x, torch.rand(K, generator=g))
    q = quantized_tokens(x, site)
    weight, mask, _, fisher = a_weight()
    weight[7, 5], mask[7], fisher[7, 5] = 8.0, False, 1e-9
    t = tensor_scale(8.0)
    factors = factors_for(weight, moments_of(x, site))
    alone = value_of(quantize_weight(weight, t, nearest_scale_codes(weight, t)), mask)
    limited, unlimited = (
        value_of(compensated(weight, factors, mask, t, fisher, limit=limit), mask)
        for limit in (compensate.LIMIT, float("inf"))
    )
    loss = [loss_of(weight[7:8], v[7:8], x, q) for v in (limited, alone, unlimited)]
    assert loss[0] == loss[1] < loss[2] / 8
    others = torch.arange(N) != 7
    assert torch.equal(limited[others], unlimited[others])


def long_tokens(k: int) -> Tensor:
    """Activations (400, k) of a spectrum that falls by four decades."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(400, k, generator=g) * torch.logspace(0, -4, k)


@pytest.mark.parametrize("k", [1, 127, 128, 129, 300])
def test_the_root_is_assembled_from_panels(k: int) -> None:
    h = long_tokens(k).T @ long_tokens(k)
    root = factorize(h)
    assert root is not None and root.dtype == torch.float32
    m = compensate.DAMPING * h.diagonal().double().mean()
    damped = h.double() + m * torch.eye(k, dtype=torch.float64)
    exact = torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(root.double(), exact, rtol=1e-5, atol=1e-6 * float(exact.max()))


def test_an_inaccurate_root_is_computed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """One direction has all the energy: in fp32 the damping is lost in rounding errors."""
    k = 300
    h = torch.full((k, k), 1e6)
    seen: list[torch.dtype] = []
    root_of = compensate._root

    def recorded(h: Tensor, m: float) -> Tensor | None:
        seen.append(h.dtype)
        return root_of(h, m)

    monkeypatch.setattr(compensate, "_root", recorded)
    for damping, dtypes in ((0.3, [torch.float32]), (1e-7, [torch.float32, torch.float64])):
        seen.clear()
        root = factorize(h, damping)
        assert root is not None and root.isfinite().all() and seen == dtypes


def test_batches_of_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    x = long_tokens(K)
    weight, mask, t, fisher = a_weight()
    moments = Moments(x.T @ x, torch.full((K, K), 0.1))
    whole = compensated(weight, factors_for(weight, moments), mask, t, fisher)
    for width in (16, 32):
        monkeypatch.setattr(compensate, "BATCH", width)
        parts = compensated(weight, factors_for(weight, moments), mask, t, fisher)
        # Sums in another order move a value across a rounding point now and then.
        assert (value_of(parts, mask) == value_of(whole, mask)).double().mean() > 0.99


@pytest.mark.parametrize("count", [1, 12, 16])
def test_compiled_columns_are_those_of_the_definition(count: int) -> None:
    """Bit for bit, with outliers that saturate, zeros, and small values of either sign."""
    g = torch.Generator().manual_seed(count)
    rows, t = 53, 2.0**-9
    columns = torch.randn(rows, count, generator=g) * torch.randn(rows, 1, generator=g).mul(4).exp()
    columns[::7] *= 1e-9
    columns[3], columns[4, 0] = 0.0, -1e-30
    spread = (torch.randn(count, count, generator=g) * 0.3).triu(1) + torch.eye(count) * 1.3
    scale = torch.randint(1, 0x7F, (rows,), generator=g).to(torch.uint8)
    is_fp8 = torch.rand(rows, generator=g) < 0.4
    expected = round_columns_definition(columns.clone(), spread, scale, is_fp8, t)
    for part, other in zip(
        round_columns(columns.clone(), spread, scale, is_fp8, t), expected, strict=True
    ):
        assert torch.equal(part, other)
