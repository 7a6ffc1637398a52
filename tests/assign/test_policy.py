"""Policies differ in two facts only, and every one of them gives the share it was asked for."""

import math

import pytest
import torch

from fgmp.assign.impact import weight_benefit, weight_impact
from fgmp.assign.policy import (
    POLICIES,
    Policy,
    quantile,
    register,
    sensitivities,
    site_constants,
    weight_masks,
    weight_scores,
)
from fgmp.errors import InputError
from fgmp.formats.activation import multiplier, quantize, score_unit
from fgmp.formats.rules import QuantizerConfig
from fgmp.formats.weight import WeightCodes, quantize_weight, tensor_scale


def scores_of(*sizes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Distinct scores of layers of wildly different magnitude."""
    g = torch.Generator().manual_seed(seed)
    return {
        f"layer{i}": torch.rand(size, 7, generator=g, dtype=torch.float64) * 10.0**i
        for i, size in enumerate(sizes)
    }


def a_weight() -> tuple[WeightCodes, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    weight = torch.randn(8, 64, generator=g)
    fisher = torch.randn(8, 64, generator=g).exp()
    return quantize_weight(weight, tensor_scale(weight.abs().max().item())), fisher


def share_fp4(masks: dict[str, torch.Tensor]) -> float:
    return 1 - torch.cat([m.flatten() for m in masks.values()]).double().mean().item()


FRACTIONS = [0.0, 0.001, 0.1, 0.5, 0.7, 0.9, 0.999, 1.0]


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_a_global_threshold_keeps_exactly_the_fraction(fraction: float) -> None:
    scores = scores_of(31, 5, 12)
    masks, thresholds = weight_masks(POLICIES["fisher"], scores, fraction)
    count = 48 * 7
    assert share_fp4(masks) * count == pytest.approx(round(fraction * count), abs=1e-9)
    assert len(set(thresholds.values())) == 1
    for name, mask in masks.items():
        assert torch.equal(mask, scores[name] > thresholds[name])


@pytest.mark.parametrize("fraction", FRACTIONS)
def test_thresholds_of_each_layer_keep_the_fraction_in_each(fraction: float) -> None:
    scores = scores_of(31, 5, 12)
    masks, thresholds = weight_masks(POLICIES["fisher-per-layer"], scores, fraction)
    for name, mask in masks.items():
        blocks = mask.numel()
        assert int((~mask).sum()) == round(fraction * blocks)
        assert torch.equal(mask, scores[name] > thresholds[name])


def test_only_the_global_threshold_prefers_the_sensitive_layer() -> None:
    scores = scores_of(20, 20)
    masks, _ = weight_masks(POLICIES["fisher"], scores, 0.5)
    assert masks["layer1"].double().mean() > 0.8 > 0.2 > masks["layer0"].double().mean()
    masks, _ = weight_masks(POLICIES["fisher-per-layer"], scores, 0.5)
    assert masks["layer1"].double().mean() == masks["layer0"].double().mean() == 0.5


def test_quantile_is_the_score_that_the_share_does_not_exceed() -> None:
    scores = [torch.tensor([[5.0, 1.0]]).double(), torch.tensor([[4.0], [2.0], [3.0]]).double()]
    assert [quantile(scores, f) for f in (0.2, 0.4, 0.6, 0.8)] == [1, 2, 3, 4]
    assert quantile(scores, 0.09) == -math.inf and quantile(scores, 0.91) == math.inf


def test_quantile_is_the_score_of_that_rank() -> None:
    """Over signs, ties and magnitudes that no binning would tell apart."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(5000, generator=generator, dtype=torch.float64)
    wide = draw.sign() * draw.abs() ** 90
    scores = [wide[:3000].view(30, 100), wide[3000:], torch.zeros(700).double(), wide[:50]]
    flat = torch.cat([s.flatten() for s in scores])
    for share in (1e-3, 0.3, 0.5, 0.55, 0.7, 0.999):
        expected = torch.kthvalue(flat, round(share * len(flat))).values.item()
        assert quantile(scores, share) == expected


def test_equal_scores_fall_on_the_fp4_side_together() -> None:
    scores = {"a": torch.tensor([[0.0, 0.0, 0.0, 1.0]], dtype=torch.float64)}
    masks, _ = weight_masks(POLICIES["fisher"], scores, 0.25)
    assert masks["a"].tolist() == [[False, False, False, True]]


def test_scores_are_impacts_with_and_without_fisher() -> None:
    codes, fisher = a_weight()
    weight, g = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), torch.Generator()
    ones = torch.ones_like(fisher)

    def scores(policy: str, rule: str) -> torch.Tensor:
        return weight_scores(POLICIES[policy], rule, weight, codes.scale, codes.t, fisher, g)

    assert torch.equal(scores("fisher", "difference"), weight_impact(codes, fisher))
    assert torch.equal(scores("error", "difference"), weight_impact(codes, ones))
    assert torch.equal(scores("fisher", "benefit"), weight_benefit(codes, weight, fisher))
    assert torch.equal(scores("error", "benefit"), weight_benefit(codes, weight, ones))
    assert not torch.equal(scores("error", "difference"), scores("fisher", "difference"))
    assert not torch.equal(scores("fisher", "benefit"), scores("fisher", "difference"))


def test_a_score_of_the_callers_replaces_the_rules() -> None:
    codes, fisher = a_weight()
    weight, g = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)), torch.Generator()

    def score(codes: WeightCodes, weight: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return f.unflatten(-1, (-1, 16)).sum(-1).double()

    for name, expected in (("fisher", fisher), ("error", torch.ones_like(fisher))):
        policy = POLICIES[name]
        scores = weight_scores(policy, "benefit", weight, codes.scale, codes.t, fisher, g, score)
        assert torch.equal(scores, expected.unflatten(-1, (-1, 16)).sum(-1).double())
        assert torch.equal(sensitivities(policy, fisher), expected)
    # Arbitrary scores stay arbitrary.
    one, other = (
        weight_scores(
            POLICIES["random"],
            "benefit",
            weight,
            codes.scale,
            codes.t,
            fisher,
            torch.Generator().manual_seed(0),
            replacement,
        )
        for replacement in (None, score)
    )
    assert torch.equal(one, other)


def test_a_policy_is_registered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgmp.assign.policy.POLICIES", dict(POLICIES))
    register("error-per-layer", Policy(sensitivity="none", per_layer=True))
    with pytest.raises(InputError, match="policy 'fisher' exists already; choose another name"):
        register("fisher", Policy(sensitivity="none"))


def test_random_scores_are_uniform_and_follow_the_seed() -> None:
    codes, fisher = a_weight()
    first, second, other = (
        weight_scores(
            POLICIES["random"],
            "benefit",
            fisher,
            codes.scale,
            codes.t,
            fisher,
            torch.Generator().manual_seed(seed),
        )
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert first.shape == codes.scale.shape and first.dtype == torch.float64
    assert (first >= 0).all() and (first < 1).all()


@pytest.mark.parametrize(("name", "fraction"), [("fp8", 0.0), ("nvfp4", 1.0)])
def test_plain_formats_fix_the_fraction(name: str, fraction: float) -> None:
    policy = POLICIES[name]
    assert policy.fraction == fraction
    masks, _ = weight_masks(policy, scores_of(4), fraction)
    assert (masks["layer0"] == (name == "fp8")).all()


def test_a_fisher_site_keeps_the_gradients_of_its_channels() -> None:
    g2 = torch.tensor([448.0, 1.0, 0.0, 2.0] * 4)
    quantizer = QuantizerConfig("benefit", "search", "e4m3")
    site = site_constants(POLICIES["fisher"], quantizer, g2, amax=10.0, headroom=2.0)
    assert site.r == multiplier(20.0)
    assert (site.rule, site.scales, site.threshold) == ("benefit", "search", 0)
    assert site.gamma == 1.0
    assert site.sensitivity[:4].tolist() == [0x7E, 0x38, 0x01, 0x40]
    quantizer = QuantizerConfig("truncated", "max", "powers")
    powers = site_constants(POLICIES["fisher"], quantizer, g2, amax=10.0, headroom=2.0)
    assert (powers.rule, powers.scales) == ("truncated", "max")
    assert powers.sensitivity[:4].tolist() == [0x78, 0x38, 0x08, 0x40]
    assert powers.gamma == 1.0


def test_a_site_without_sensitivities_scores_the_squared_error() -> None:
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    quantizer = QuantizerConfig("difference", "max")
    site = site_constants(POLICIES["error"], quantizer, torch.rand(32), amax=4.0, headroom=1.0)
    codes = quantize(x, site)
    all_fp4 = torch.zeros_like(codes.is_fp8)
    q4 = type(codes)(codes.fp4, codes.scale, codes.fp8, codes.score, all_fp4).units(32)
    q8 = type(codes)(codes.fp4, codes.scale, codes.fp8, codes.score, ~all_fp4).units(32)
    squared = ((q4 - q8).double() * site.t).square().unflatten(-1, (-1, 16)).sum(-1)
    # gamma = fl32(1 / 448) times a sensitivity of 448: one fp32 rounding away from 1.
    result = codes.score.double() * score_unit(site)
    torch.testing.assert_close(result, squared, rtol=2.0**-23, atol=0)


@pytest.mark.parametrize("amax", [1e-6, 1.0, 1e6])
def test_random_sites_share_one_unit(amax: float) -> None:
    quantizer = QuantizerConfig("benefit", "max")
    site = site_constants(POLICIES["random"], quantizer, torch.rand(32), amax=amax, headroom=1.0)
    assert site.rule == "random"
    assert score_unit(site) == pytest.approx(1.0, rel=2.0**-23)
