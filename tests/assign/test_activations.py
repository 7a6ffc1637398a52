"""Sites get thresholds that reach the fraction, together or each by itself, and say what came."""

import pytest
import torch

from fgmp.assign.activations import ActivationAssignment, assign_activations
from fgmp.assign.policy import POLICIES
from fgmp.formats.activation import Site, multiplier, scores, sensitivity_codes
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.sensitivity.histogram import ScoreHistogram, new_histogram

BLOCKS = 4


def a_site(seed: int, tokens: int, gradient: float) -> tuple[Site, torch.Tensor, ScoreHistogram]:
    """A site, the scores of its blocks, int64 (tokens, BLOCKS), and their histogram."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16 * BLOCKS, generator=g)
    codes, gamma = sensitivity_codes(torch.rand(16 * BLOCKS, generator=g) * gradient)
    site = Site(multiplier(x.abs().max().item()), codes, gamma, 0)
    histogram = new_histogram(site)
    histogram.add(scores(x, site))
    return site, scores(x, site), histogram


SITES = {"calm": a_site(0, 500, 1e-4), "busy": a_site(1, 1500, 1.0)}


def assigned(fraction: float, policy: str = "fisher") -> ActivationAssignment:
    return assign_activations(
        {name: site for name, (site, *_) in SITES.items()},
        {name: histogram for name, (*_, histogram) in SITES.items()},
        POLICIES[policy],
        fraction,
    )


def fp4_blocks(assignment: ActivationAssignment, name: str) -> int:
    """FP4 blocks by the definition: those whose score is at most the threshold."""
    return int((SITES[name][1] <= assignment.records[name].threshold).sum())


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_one_threshold_reaches_the_fraction_over_all_sites(fraction: float) -> None:
    assignment = assigned(fraction)
    blocks = {"calm": 500 * BLOCKS, "busy": 1500 * BLOCKS}
    counts = {name: fp4_blocks(assignment, name) for name in SITES}
    assert sum(counts.values()) / sum(blocks.values()) == pytest.approx(fraction, abs=0.005)
    assert assignment.fp4_fraction == pytest.approx(fraction, abs=0.005)
    for name, count in counts.items():
        assert assignment.fp4_fractions[name] == pytest.approx(count / blocks[name], abs=0.005)
    # Errors of the site with the smaller gradients harm less.
    assert assignment.fp4_fractions["calm"] > assignment.fp4_fractions["busy"] + 0.05


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_thresholds_of_each_site_reach_the_fraction_in_each(fraction: float) -> None:
    assignment = assigned(fraction, "fisher-per-layer")
    for name, (_, s, _) in SITES.items():
        assert fp4_blocks(assignment, name) / s.numel() == pytest.approx(fraction, abs=0.005)
        assert assignment.fp4_fractions[name] == pytest.approx(fraction, abs=0.005)


@pytest.mark.parametrize(
    ("fraction", "threshold"), [(0.0, THRESHOLD_ALL_FP8), (1.0, THRESHOLD_ALL_FP4)]
)
def test_the_ends_decide_for_every_score(fraction: float, threshold: int) -> None:
    assignment = assigned(fraction)
    assert {site.threshold for site in assignment.records.values()} == {threshold}
    assert assignment.fp4_fraction == fraction
    assert set(assignment.fp4_fractions.values()) == {fraction}


def test_only_thresholds_are_new() -> None:
    for name, site in assigned(0.5).records.items():
        before = SITES[name][0]
        assert site.threshold > 0
        for constant in ("r", "gamma", "rule", "scales"):
            assert getattr(site, constant) == getattr(before, constant)
        assert torch.equal(site.sensitivity, before.sensitivity)


def test_where_nothing_was_counted_the_requested_fraction_is_reported() -> None:
    site = SITES["calm"][0]
    empty = {"calm": new_histogram(site)}
    assignment = assign_activations({"calm": site}, empty, POLICIES["fisher"], 0.7)
    assert assignment.fp4_fraction == 0.7
