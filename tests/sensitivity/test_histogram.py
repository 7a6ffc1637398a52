"""A histogram's thresholds reach the requested fraction, counted block by block.

The judge is always ``quantize``, the definition: thresholds come out of histograms, then every
block is decided exactly and counted.
"""

import math
from dataclasses import replace

import pytest
import torch

from fgmp.formats.activation import (
    Site,
    multiplier,
    quantize,
    score_unit,
    scores,
    sensitivity_codes,
    site_threshold,
)
from fgmp.sensitivity.histogram import (
    ScoreHistogram,
    achieved_fraction,
    global_threshold,
    new_histogram,
)

TOLERANCE = 0.002
"""0.2 points. A bin is 2**-8 wide and a site's scores spread over many octaves, so a bin holds
under 0.3% of them and the even spread inside it errs by a fraction of that."""


def a_site(seed: int, scale: float, gradient: float, k: int = 172) -> tuple[torch.Tensor, Site]:
    """(600, K) heavy-tailed activations of a given size, and their site."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(600, k, generator=g) * torch.randn(k, generator=g).exp() * scale
    codes, gamma = sensitivity_codes(torch.randn(k, generator=g).mul(2).exp() * gradient)
    r = multiplier(x.abs().max().item())
    return x, Site(r, codes, gamma, 0, rule="difference", scales="max")


def histogram_of(x: torch.Tensor, site: Site) -> ScoreHistogram:
    histogram = new_histogram(site)
    for part in x.split(250):
        histogram.add(scores(part, site))
    return histogram


def decided(x: torch.Tensor, site: Site, threshold: float) -> torch.Tensor:
    """Which blocks are FP4 under a global threshold, by the definition."""
    t_site = site_threshold(threshold, site.r, site.gamma)
    return ~quantize(x, replace(site, threshold=t_site)).is_fp8


@pytest.mark.parametrize("scales", ["max", "search"])
@pytest.mark.parametrize("rule", ["difference", "benefit", "random"])
def test_what_is_counted_is_what_quantize_compares(rule: str, scales: str) -> None:
    x, base = a_site(8, 1.0, 1e-6)
    x[:5], x[5:10] = 0, x[5:10] * 1e-9  # zeros, and blocks that underflow
    site = replace(base, rule=rule, scales=scales)
    assert torch.equal(scores(x, site), quantize(x, site).score)
    x[7, 20] = torch.inf
    assert scores(x, site)[7].tolist().index(2**63 - 1) == 1


@pytest.mark.parametrize("fraction", [0.01, 0.3, 0.7, 0.9, 0.99])
def test_one_site_reaches_the_fraction(fraction: float) -> None:
    x, site = a_site(0, 1.0, 1e-6)
    histogram = histogram_of(x, site)
    threshold = global_threshold([histogram], fraction)
    reached = decided(x, site, threshold).double().mean().item()
    assert reached == pytest.approx(fraction, abs=TOLERANCE)
    t_site = site_threshold(threshold, site.r, site.gamma)
    assert achieved_fraction(histogram, t_site) == pytest.approx(reached, abs=TOLERANCE)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "gradients",
    [
        pytest.param((1e18, 1e-6, 1e-24), id="scores of like worth"),
        pytest.param((1e18, 1e-21, 1e-9), id="scores worlds apart"),
    ],
)
def test_one_threshold_serves_many_sites(gradients: tuple[float, ...], fraction: float) -> None:
    sizes = (1e-12, 1.0, 1e9)
    sites = [a_site(i, *pair) for i, pair in enumerate(zip(sizes, gradients, strict=True))]
    threshold = global_threshold([histogram_of(*s) for s in sites], fraction)
    is_fp4 = torch.cat([decided(*s, threshold) for s in sites])
    assert is_fp4.double().mean().item() == pytest.approx(fraction, abs=TOLERANCE)


def test_a_global_threshold_gives_fp8_to_the_site_that_matters() -> None:
    calm, loud = a_site(1, 1.0, 1e-12), a_site(1, 1.0, 1e-6)
    threshold = global_threshold([histogram_of(*calm), histogram_of(*loud)], 0.5)
    assert decided(*calm, threshold).double().mean() > 0.95
    assert decided(*loud, threshold).double().mean() < 0.05


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_units_at_the_ends_of_fp32(scale: float) -> None:
    x, site = a_site(4, scale, 1e-6)
    threshold = global_threshold([histogram_of(x, site)], 0.7)
    is_fp4 = decided(x, site, threshold).double().mean().item()
    if scale > 1:
        assert is_fp4 == pytest.approx(0.7, abs=TOLERANCE)
    else:  # r is clamped at 2**100, so everything underflows to zeros, which are always FP4
        assert is_fp4 >= 0.7 - TOLERANCE


def test_random_scores_are_uniform_so_their_threshold_is_the_fraction() -> None:
    x, base = a_site(5, 1.0, 1.0)
    site = replace(base, gamma=1.0, rule="random")
    histogram = histogram_of(x, site)
    # 6,600 draws: the empirical 70% quantile is within 4 standard errors of 0.7 * 2**60.
    threshold = global_threshold([histogram], 0.7) / score_unit(site)
    assert threshold / 2**60 == pytest.approx(0.7, abs=4 * math.sqrt(0.21 / 6600))


@pytest.mark.parametrize(("fraction", "end"), [(0.0, -torch.inf), (1.0, torch.inf)])
def test_the_ends_decide_for_every_block(fraction: float, end: float) -> None:
    x, site = a_site(0, 1.0, 1e-6)
    x[:100] = 0
    threshold = global_threshold([histogram_of(x, site)], fraction)
    assert threshold == end
    assert (decided(x, site, threshold) == (fraction == 1)).all()


def test_zeros_are_fp4_even_where_fewer_were_asked_for() -> None:
    x, site = a_site(0, 1.0, 1e-6)
    x[:300] = 0  # half of the blocks score 0: no threshold can split them
    histogram = histogram_of(x, site)
    assert histogram.count_up_to(0.0) == 300 * 11
    is_fp4 = decided(x, site, global_threshold([histogram], 0.3))
    assert is_fp4[:300].all()
    assert is_fp4[300:].double().mean() < TOLERANCE
    is_fp4 = decided(x, site, global_threshold([histogram], 0.7))
    assert is_fp4.double().mean().item() == pytest.approx(0.7, abs=TOLERANCE)


def test_sites_without_gradient_count_as_fp4() -> None:
    (x, site), (idle, _) = a_site(0, 1.0, 1e-6), a_site(1, 1.0, 1.0)
    codes, gamma = sensitivity_codes(torch.zeros(172))
    r = multiplier(idle.abs().max().item())
    dead = Site(r, codes, gamma, 0, rule="difference", scales="max")
    histograms = [histogram_of(x, site), histogram_of(idle, dead)]
    threshold = global_threshold(histograms, 0.7)
    assert decided(idle, dead, threshold).all()
    assert decided(x, site, threshold).double().mean().item() == pytest.approx(0.4, abs=TOLERANCE)


def test_empty_and_all_dead_histograms_have_a_threshold() -> None:
    assert math.isfinite(global_threshold([ScoreHistogram(0.0), ScoreHistogram(1.0)], 0.7))
    assert achieved_fraction(ScoreHistogram(1.0), 5) == 0
    dead = ScoreHistogram(0.0)
    dead.add(torch.tensor([0.0, 1.0, 2.0**59]))
    assert math.isfinite(global_threshold([dead], 0.7))


def test_count_up_to_against_exact_counts() -> None:
    g = torch.Generator().manual_seed(6)
    values = (torch.randn(200_000, generator=g, dtype=torch.float64) * 8).exp2().mul(2**30).floor()
    values.clamp_(max=2.0**60)
    histogram = ScoreHistogram(1.0)
    histogram.add(values)
    assert histogram.total == 200_000
    for exponent in range(0, 60, 3):
        edge = float(2**exponent)
        # A bin's lower edge: exact but for scores equal to it, which lie in the bin above.
        assert histogram.count_up_to(edge) == (values < edge).sum()
        inside = edge * (1 + 0.37 / 256)
        assert abs(histogram.count_up_to(inside) - (values <= inside).sum()) < 0.0005 * 200_000
    assert histogram.count_up_to(-1.0) == 0
    assert histogram.count_up_to(2.0**63 - 1) == 200_000
    assert histogram.count_up_to(math.inf) == 200_000


def test_adding_in_parts_is_adding_at_once() -> None:
    x, site = a_site(7, 1.0, 1e-6)
    whole = new_histogram(site)
    whole.add(scores(x.view(3, 200, -1), site))
    whole.add(scores(x[:0], site))
    assert torch.equal(whole.counts, histogram_of(x, site).counts)


def test_occupied_bins_stand_for_all_scores() -> None:
    """Losses are within 2**-8 of the scores that they stand for; zeros stay zero."""
    values = torch.tensor([0, 0, 1, 3, 1000, 123_456_789])
    histogram = ScoreHistogram(unit=0.25)
    histogram.add(values)
    losses, counts = histogram.occupied()
    assert counts.tolist() == [2, 1, 1, 1, 1]
    assert losses[0] == 0
    torch.testing.assert_close(losses[1:], 0.25 * values[2:].double(), rtol=2**-8, atol=0)
