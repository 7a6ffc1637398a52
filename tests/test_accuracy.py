"""The harness of ``runs/accuracy.py`` and its baselines, each against its rule spelt out."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import accuracy
import baselines
import hessian
import pytest
import sensitivity
import torch
from conftest import make_model
from rich.console import Console
from torch import Tensor, nn

from fgmp.assign.compensate import compensated, factorize
from fgmp.data import choose_windows
from fgmp.errors import InputError
from fgmp.formats.codec import decode_e2m1, decode_e4m3
from fgmp.formats.spec import E2M1, E4M3, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import WeightCodes, nearest_scale_codes
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.store import config_of
from fgmp.pack.planes import pack, packed_bytes
from fgmp.sensitivity.moments import Moments, add_moments, new_moments


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(accuracy, "load_model", lambda name: make_model(name))
    stream = torch.randint(128, (400,), generator=torch.Generator().manual_seed(1))
    text = choose_windows(stream, samples=8, seq_len=24, seed=0)
    quiet = Console(quiet=True)
    return accuracy.Setting("llama", text, 24, 0, tmp_path / "state.safetensors", quiet)


def windows() -> Tensor:
    return torch.randint(128, (6, 24), generator=torch.Generator().manual_seed(2))


def measured(model: nn.Module) -> Any:
    return accuracy.measure(model, accuracy.Original(make_model("llama"), windows()), windows())


def test_the_original_is_what_its_head_puts_out() -> None:
    """Log-probabilities come anew from kept inputs, the same bits; a cap after the head is told."""
    model = make_model("llama")
    wanted = [accuracy.logits_of(model, batch) for batch in accuracy.batches(windows())]
    original = accuracy.Original(model, windows())
    for _ in range(2):
        found = list(original)
        assert len(found) == len(wanted)
        assert all(
            torch.equal(x, y) and not x.requires_grad for x, y in zip(found, wanted, strict=True)
        )
    assert torch.equal(original.losses, accuracy.loss_of(torch.cat(wanted), windows()))
    assert not model.get_output_embeddings()._forward_pre_hooks
    capped = make_model("llama")
    head = capped.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: 30 * torch.tanh(out / 30))
    with pytest.raises(InputError, match=r"^LlamaForCausalLM: logits must be what its head puts"):
        accuracy.Original(capped, windows())


def test_rows_are_made_and_ordered(setting: Any) -> None:
    names = ("fp8", "nvfp4", "paper 70%", "nvfp4, GPTQ", "nvfp4, four over six", "70% by channel")
    found = {name: [measured(accuracy.ROWS[name](setting))] for name in names}
    original = accuracy.loss_of(accuracy.logits_of(make_model("llama"), windows()), windows())
    rows = {row["name"]: row for row in accuracy.rows_of(found, original, 23)}
    assert rows["fp8"]["kl_gap_recovered_percent"] == 100
    assert rows["nvfp4"]["kl_gap_recovered_percent"] == 0
    for name, row in rows.items():
        low, high = row["kl_gap_recovered_ci95"]
        assert low <= row["kl_gap_recovered_percent"] <= high
        assert row["kl_gap_recovered_by_seed"] == pytest.approx([row["kl_gap_recovered_percent"]])
        assert (row["fp4_activations"] == 1) == name.startswith("nvfp4")
    assert rows["paper 70%"]["kl"] < rows["nvfp4, GPTQ"]["kl"] < rows["nvfp4"]["kl"]
    assert 4.5 <= rows["nvfp4, four over six"]["bits_per_weight"] < 4.6
    assert 5 < rows["70% by channel"]["bits_per_weight"] < 6.5


def test_gptq_takes_the_inputs_that_its_own_layers_make(setting: Any) -> None:
    model, original = baselines.gptq(setting), make_model("llama")
    linears = mixed_linears(model)
    moments = {n: new_moments(m.in_features, torch.device("cpu")) for n, m in linears.items()}
    for name, linear in linears.items():

        def add(linear: Any, args: tuple[Tensor], found: Moments = moments[name]) -> None:
            q = linear.input_site(args[0]).float() * linear.input_site.record.t
            add_moments(found, q, q)

        linear.register_forward_pre_hook(add)
    with torch.no_grad():
        for sample in setting.text.samples:
            model(input_ids=sample[None])
    for name, linear in linears.items():
        w, h = original.get_submodule(name).weight.detach(), moments[name].h
        factors = factorize(Moments(h, h.clone()), baselines.GPTQ_DAMPING)
        fp4 = torch.zeros_like(linear.packed.is_fp8())
        assert not linear.packed.is_fp8().any()
        codes = compensated(w, factors, fp4, linear.packed.t.item(), torch.ones_like(w))
        assert torch.equal(pack(codes, fp4).low, linear.packed.low), name


def test_rows_of_a_patched_row_take_nothing_from_another(setting: Any) -> None:
    """Their recipes are one, which is all that a kept stage could tell them by: none is kept."""
    wanted = accuracy.ROWS["ours 100%"](setting)
    patched, left = hessian.compensated, [5]

    def stopped(*args: Any) -> WeightCodes:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return patched(*args)

    with mock.patch.object(hessian, "compensated", stopped), pytest.raises(KeyboardInterrupt):
        accuracy.ABLATIONS["ours 100%, local Hessian"](setting)
    found = mixed_linears(accuracy.ROWS["ours 100%"](setting))
    for name, linear in mixed_linears(wanted).items():
        assert torch.equal(linear.packed.low, found[name].packed.low)


def test_rows_are_compared_on_the_seeds_they_share() -> None:
    def row(*means: float) -> list[Any]:
        noise = torch.linspace(-0.1, 0.1, 50, dtype=torch.float64)
        return [accuracy.Measured(10 + noise, 10 * (m + noise), 5.0, 0.5, "x") for m in means]

    found = {
        "fp8": row(1.0, 2.0),
        "nvfp4": row(5.0, 10.0),
        "ours 100%": row(2.0, 4.0),
        "nvfp4, GPTQ": row(3.0),
    }
    rows = {r["name"]: r for r in accuracy.rows_of(found, torch.full((50,), 9.0).double(), 10)}
    assert rows["ours 100%"]["seeds"] == 2
    assert rows["ours 100%"]["kl_gap_recovered_by_seed"] == pytest.approx([75, 75])
    assert rows["nvfp4, GPTQ"]["kl_gap_recovered_percent"] == pytest.approx(50)
    over = rows["ours 100%"]["kl_gap_recovered_points_over"]["nvfp4, GPTQ"]
    assert over["points"] == pytest.approx(25)
    # Noise that both rows share cancels: a difference of means alone would not be this certain.
    assert over["ci95"] == pytest.approx([25, 25])


def test_intervals_cover_windows_and_calibrations() -> None:
    def row(*means: float) -> list[Any]:
        noise = torch.linspace(-0.1, 0.1, 50, dtype=torch.float64)
        return [accuracy.Measured(10 + noise, 10 * (m + noise), 5.0, 0.5, "x") for m in means]

    found = {
        "fp8": row(1.0, 1.0, 1.0),
        "nvfp4": row(5.0, 5.0, 5.0),
        "ours 70%": row(2.0, 2.0, 2.0),
        "ours 90%": row(1.0, 2.0, 3.0),
        "paper 80%": row(3.0),
    }
    rows = {r["name"]: r for r in accuracy.rows_of(found, torch.full((50,), 9.0).double(), 10)}
    same, apart, once = (rows[n] for n in ("ours 70%", "ours 90%", "paper 80%"))
    assert same["kl_gap_recovered_percent"] == apart["kl_gap_recovered_percent"] == 75
    # Noise is the same in all rows, so that windows alone leave a share as it is.
    assert same["kl_gap_recovered_ci95"] == pytest.approx([75, 75])
    assert once["kl_gap_recovered_ci95"] == pytest.approx([50, 50])
    # Of 27 equally likely draws of three calibrations one takes the first or last throughout.
    assert apart["kl_gap_recovered_ci95"] == pytest.approx([50, 100])


def test_autoquantize_is_the_best_choice_under_its_budget(setting: Any) -> None:
    parts = baselines.Parts(setting)
    scores = baselines.layer_scores(parts, setting.text.samples)
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


def test_four_over_six_takes_the_better_scale(setting: Any) -> None:
    model = baselines.four_over_six(setting)
    site = next(iter(sites(model).values()))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    units = site._quantize(x).float()
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


def test_our_bits_are_counted_with_the_row_counters(setting: Any) -> None:
    model = baselines.at_bits(setting, 5.999)  # which no whole number of blocks comes to
    # Of weights this small some are all FP4 or all FP8, and need no row counters.
    assert 5.85 < accuracy.weight_bits(model) <= 5.999
    packed = [linear.packed for linear in mixed_linears(model).values()]
    wide = sum(int(p.is_fp8().sum()) for p in packed)
    were_all_mixed = sum(packed_bytes(p.n, p.k, 1) for p in packed) + 8 * (wide - len(packed))
    room = 5.999 / 8 * sum(p.n * p.k for p in packed) - were_all_mixed
    assert 0 <= room < 8  # not another block


def test_estimates_of_the_sensitivities(setting: Any) -> None:
    exact = sensitivity.calibrated(setting)
    whole = sensitivity.from_gradients(lambda x, g: (g.T @ x).square(), setting)
    for name, f in whole.items():
        assert torch.allclose(exact[name], f, rtol=1e-4, atol=1e-6 * f.max().item())
    found = sensitivity.correlations(setting)
    assert list(found) == ["exact, half of the text", *sensitivity.ESTIMATES]
    for label, agreement in found.items():
        assert 0.3 < agreement["spearman"] < 1, label
    # Each of them makes a row, and another one than the exact F_w makes.
    plain = mixed_linears(setting.quantized(fp4=0.7))
    for label in ("by token", "at the quantized point"):
        other = mixed_linears(sensitivity.estimated(setting, label, fp4=0.7))
        assert any(
            not torch.equal(plain[name].packed.is_fp8(), other[name].packed.is_fp8())
            for name in plain
        ), label


def test_rank_correlation_averages_ties() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 7.0, 6.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: covariance 3 of 4.5 and 5.
    assert sensitivity.spearman(a, b) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert sensitivity.spearman(a, -a) == pytest.approx(-1)


def test_memory_of_a_large_model() -> None:
    found = sensitivity.memory_of_70b()
    assert found["quantized_parameters_billions"] == pytest.approx(68.45, abs=0.01)
    assert found["fisher, exact_gb"] == pytest.approx(273.8, abs=0.1)
    assert found["fisher, factored_gb"] < 0.06


def test_headroom_ends_saturation(setting: Any) -> None:
    import headroom

    setting.text = replace(setting.text, samples=setting.text.samples[:, :8])
    setting.seq_len = 8
    needed = headroom.largest_over_calibrated(setting, windows())
    assert needed > 1
    rows = headroom.rows_of(setting, windows(), (1.0, 1.5 * needed))
    assert [(r["length"], r["headroom"] == 1) for r in rows] == [
        (8, True),
        (8, False),
        (24, True),
        (24, False),
    ]
    assert rows[2]["largest_over_calibrated"] == needed
    assert rows[2]["saturated_per_million"] > 0 and rows[3]["saturated_per_million"] == 0
    assert rows[2]["kl_over_plain"] == 0 and rows[2]["kl_over_plain_ci95"] == [0, 0]
    assert rows[3]["kl"] - rows[2]["kl"] == pytest.approx(rows[3]["kl_over_plain"])


def test_scales_by_the_local_hessian_are_the_cheapest() -> None:
    """Of one block, whose cost is then that of the whole layer: all candidates tried by hand."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(6, 16, generator=generator)
    q = torch.randn(64, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    factors = factorize(Moments(q.T @ q, q.T @ q), 0.01)
    assert factors is not None
    fp4 = torch.zeros(6, 1, dtype=torch.bool)
    t = weight.abs().max().item() / 600
    found = hessian.compensated(weight, factors, fp4, t, None)
    metric = torch.linalg.inv(factors.spread)

    def cost(codes: WeightCodes) -> Tensor:
        values = decode_e2m1(codes.fp4) * decode_e4m3(codes.scale).unsqueeze(-1) * t
        return ((values.squeeze(1).double() - weight) @ metric).square().sum(1)

    near = nearest_scale_codes(weight, t).int()
    for step in hessian.REACH:
        with mock.patch.object(hessian, "REACH", [step]):
            other = hessian.compensated(weight, factors, fp4, t, None)
        assert (other.scale.int() - near).unique().tolist() == [step]
        assert (cost(found) <= cost(other) * (1 + 1e-9)).all()
