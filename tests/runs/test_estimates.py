"""The estimates of ``runs/estimates.py``, and their comparison in ``runs/sensitivity.py``."""

from pathlib import Path

import estimates
import pytest
import rows
import sensitivity
import torch
from setting import Setting
from tiny_setting import tiny_setting
from torch import Tensor, nn

from fgmp.model.linear import mixed_linears
from fgmp.model.losses import sampled_label_loss


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return tiny_setting(tmp_path)


def test_squares_by_sequence_are_the_exact_fisher_information(setting: Setting) -> None:
    exact = setting.calibrated()
    summed = estimates.summed(setting, estimates.square_by_sequence)
    for name, f in summed.weights.items():
        tolerance = 1e-6 * f.max().item()
        assert torch.allclose(exact.weights[name], f, rtol=1e-4, atol=tolerance)
    assert summed.predictions == exact.predictions == 8 * 23
    assert list(summed.sites) == list(exact.sites)


def test_squares_by_token_take_one_token_at_a_time(setting: Setting) -> None:
    """Spelt out with autograd for one linear: a backward pass per token's output gradient."""
    model, linears = setting.linearized()
    name, linear = next(iter(linears.items()))
    squares = torch.zeros_like(linear.weight)
    calls: list[tuple[Tensor, Tensor]] = []

    def note(_: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        calls.append((args[0].detach(), out))

    linear.register_forward_hook(note)
    for sample in setting.text.samples:
        total, _ = sampled_label_loss(model, sample)
        x, y = calls[-1]
        (gradient,) = torch.autograd.grad(total, y)
        for token in range(len(sample)):
            squares += torch.outer(gradient[0, token], x[0, token]).square()
    by_token = estimates.by_token(setting)
    expected = squares / by_token.predictions
    assert torch.allclose(by_token.weights[name], expected, rtol=1e-4, atol=1e-6 * expected.max())


def test_estimates_rank_blocks_like_the_exact_one(setting: Setting) -> None:
    agreements = sensitivity.correlations(setting)
    assert list(agreements) == ["exact, half of the text", *estimates.ESTIMATES]
    for label, agreement in agreements.items():
        assert 0.3 < agreement["spearman"] < 1, label


def test_each_estimate_makes_another_row(setting: Setting) -> None:
    plain = mixed_linears(setting.quantized(fp4=0.7))

    def differs(model: nn.Module) -> bool:
        other = mixed_linears(model)
        return any(
            not torch.equal(plain[name].packed.is_fp8(), other[name].packed.is_fp8())
            for name in plain
        )

    for label in ("by token", "at the quantized point"):
        assert differs(rows.ABLATIONS[f"ours 70%, Fisher {label}"](setting)), label
    assert not differs(rows.ROWS["ours 70%"](setting))


def test_ranges_are_those_of_the_original(setting: Setting) -> None:
    """At the quantized point only sensitivities are new."""
    point, exact = estimates.quantized_point(setting), setting.calibrated()
    for name, site in exact.sites.items():
        assert point.sites[name].amax == site.amax and point.sites[name].tokens == site.tokens
        assert not torch.equal(point.sites[name].g2, site.g2)


def test_rank_correlation_averages_ties() -> None:
    a, b = torch.tensor([1.0, 2.0, 2.0, 9.0]), torch.tensor([0.0, 5.0, 7.0, 6.0])
    # Ranks 1, 2.5, 2.5, 4 and 1, 2, 4, 3: covariance 3 of 4.5 and 5.
    assert sensitivity.spearman(a, b) == pytest.approx(3 / (4.5 * 5) ** 0.5)
    assert sensitivity.spearman(a, -a) == pytest.approx(-1)


def test_memory_of_a_large_model() -> None:
    sizes = sensitivity.memory_of_70b()
    assert sizes["quantized_parameters_billions"] == pytest.approx(68.45, abs=0.01)
    assert sizes["fisher, exact_gb"] == pytest.approx(273.8, abs=0.1)
    assert sizes["fisher, factored_gb"] < 0.06
