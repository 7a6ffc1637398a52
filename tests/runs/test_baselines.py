"""The baselines of ``runs/baselines.py``, each against its rule spelt out."""

import itertools
from pathlib import Path
from typing import Any

import baselines
import hessian
import pytest
import torch
from conftest import make_model
from setting import Setting
from tiny_setting import tiny_setting
from torch import Tensor

from fgmp.assign.compensate import Factors, compensated, factorize
from fgmp.formats.codec import decode_e2m1, decode_e4m3
from fgmp.formats.spec import E2M1, E4M3, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import WeightCodes, nearest_scale_codes
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.store import config_of
from fgmp.pack.planes import pack
from fgmp.sensitivity.moments import Moments, add_moments, new_moments


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return tiny_setting(tmp_path)


def test_gptq_uses_inputs_of_its_own_layers(setting: Setting) -> None:
    model, original = baselines.gptq(setting), make_model("llama")
    linears = mixed_linears(model)
    moments = {n: new_moments(m.in_features, torch.device("cpu")) for n, m in linears.items()}
    for name, linear in linears.items():

        def add(linear: Any, args: tuple[Tensor], sums: Moments = moments[name]) -> None:
            q = linear.input_site(args[0]).float() * linear.input_site.record.t
            add_moments(sums, q, q)

        linear.register_forward_pre_hook(add)
    with torch.no_grad():
        for sample in setting.text.samples:
            model(input_ids=sample[None])
    for name, linear in linears.items():
        w, h = original.get_submodule(name).weight.detach(), moments[name].h
        root = factorize(h, baselines.GPTQ_DAMPING)
        assert root is not None
        factors = Factors(root, torch.zeros_like(w))
        fp4 = torch.zeros_like(linear.packed.is_fp8())
        assert not linear.packed.is_fp8().any()
        codes = compensated(w, factors, fp4, linear.packed.t.item(), torch.ones_like(w))
        assert torch.equal(pack(codes, fp4).low, linear.packed.low), name


def test_the_best_subset_is_the_best() -> None:
    """All subsets by hand, with gains of either sign and sizes that repeat."""
    generator = torch.Generator().manual_seed(0)
    names = [f"n{i}" for i in range(9)]
    for room in (0, 7, 11.5, 40):
        gains = dict(zip(names, torch.randn(9, generator=generator).tolist(), strict=True))
        size = dict(
            zip(names, torch.randint(1, 8, (9,), generator=generator).tolist(), strict=True)
        )
        subsets = (s for n in range(10) for s in itertools.combinations(names, n))
        best = max(sum(gains[n] for n in s) for s in subsets if sum(size[n] for n in s) <= room)
        chosen = baselines.best_subset(gains, size, room)
        assert sum(size[n] for n in chosen) <= room
        assert sum(gains[n] for n in chosen) == pytest.approx(best)


def test_autoquantize_is_the_best_choice_under_its_budget(setting: Setting) -> None:
    parts = baselines.Parts(setting)
    scores = baselines.layer_scores(setting)
    size = {o: sum(parts.weights[n].numel() for n in ns) for o, ns in parts.linears_of.items()}
    gain = {o: s["fp4"] - s["fp8"] for o, s in scores.items()}
    for bits in (5.0, 6.0, 7.0):
        room = (bits - 4.5) / 3.5 * sum(size.values())
        best = max(
            (sum(gain[o] for o in some), some)
            for count in range(len(size) + 1)
            for some in itertools.combinations(size, count)
            if sum(size[o] for o in some) <= room
        )[1]
        model = baselines.autoquantize(setting, bits)
        for owner, site in sites(model).items():
            high = owner in best
            assert site.record.threshold == (THRESHOLD_ALL_FP8 if high else THRESHOLD_ALL_FP4)
            for name in config_of(setting.base).sites[owner].linears:
                assert mixed_linears(model)[name].packed.mode == ("fp8" if high else "fp4")


def test_four_over_six_takes_the_better_scale(setting: Setting) -> None:
    model = baselines.four_over_six(setting)
    site = next(iter(sites(model).values()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    site.counting = True
    units = site(x).float()
    assert site.counts == [12, 12, 0]
    grid = torch.tensor([*E2M1.magnitudes, *(-m for m in E2M1.magnitudes)], dtype=torch.float64)
    scales = torch.tensor(E4M3.magnitudes, dtype=torch.float64)
    for row, block in itertools.product(range(3), range(4)):
        u = x[row, 16 * block : 16 * block + 16].double() * site.record.r
        errors = []
        for factor in (1, 1.5):
            s = scales[(scales - u.abs().max() * factor).abs().argmin()]
            errors.append(((6 * u[:, None] - grid * s).abs().min(-1).values.square()).sum().item())
        q = units[row, 16 * block : 16 * block + 16].double()
        assert (q - 6 * u).square().sum().item() == pytest.approx(min(errors), rel=1e-5)
    assert min(errors) > 0


def test_channels_are_read_in_order_and_by_their_format(setting: Setting) -> None:
    """The packed linear's output is that of reordered channels, FP8 blocks exact to FP8."""
    model = baselines.by_channel(setting, 0.7)
    linear, order, fp8 = next(
        (linear, *quantizer.args)
        for linear in mixed_linears(model).values()
        if (quantizer := linear.input_site.quantizer).args[1].unique().numel() == 2
    )
    site, k, groups = linear.input_site, len(order), len(fp8)
    assert sorted(order.tolist()) == list(range(k))
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    x = x * E4M3.max / site.record.r / x.abs().max()  # nothing saturates
    units = site(x).float().view(3, groups, 16)
    target = (6 * x.bfloat16().float() * site.record.r)[:, order].view(3, groups, 16)
    assert ((units - target).abs() <= target.abs() / 16 + 0.01)[:, fp8].all()
    coarse = (units - target).abs()[:, ~fp8].max()
    assert coarse > (units - target).abs()[:, fp8].max()
    assert torch.equal(linear.packed.is_fp8(), fp8.expand(linear.packed.n, groups))


def test_scales_by_the_local_hessian_are_the_cheapest() -> None:
    """For one block, whose cost is that of the whole layer: all candidates tried by hand."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 16, generator=generator)
    q = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    root = factorize(q.T @ q, 0.01)
    assert root is not None
    factors = Factors(root, torch.zeros_like(weight))
    fp4 = torch.zeros(6, 1, dtype=torch.bool)
    t = weight.abs().max().item() / 600
    best = hessian.compensated(weight, factors, fp4, t, None)
    metric = root.double()

    def cost(codes: WeightCodes) -> Tensor:
        values = decode_e2m1(codes.fp4) * decode_e4m3(codes.scale).unsqueeze(-1) * t
        return ((values.squeeze(1).double() - weight) @ metric).square().sum(1)

    near = nearest_scale_codes(weight, t).int()
    for step in hessian.OFFSETS:
        other = hessian.compensated(weight, factors, fp4, t, None, offsets=[step])
        assert (other.scale.int() - near).unique().tolist() == [step]
        assert (cost(best) <= cost(other) * (1 + 1e-9)).all()
