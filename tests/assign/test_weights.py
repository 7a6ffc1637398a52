"""Weights are scaled, scored and packed site by site, each step by the definition it stands for."""

import pytest
import torch
from torch import Tensor

from fgmp.assign.compensate import compensated, factorize, factors_of
from fgmp.assign.impact import weight_benefit, weight_impact
from fgmp.assign.policy import POLICIES
from fgmp.assign.scale_search import search_scale_codes
from fgmp.assign.weights import ScoredWeights, group_scale, pack_weights, score_weights
from fgmp.formats.weight import nearest_scale_codes, quantize_weight, tensor_scale
from fgmp.pack.planes import pack
from fgmp.sensitivity.moments import add_moments, new_moments

GROUPS = [["q", "k"], ["out"]]


@pytest.fixture
def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"q": (16, 44), "k": (8, 44), "out": (12, 32)}
    return {name: torch.randn(*shape, generator=g) * 0.05 for name, shape in shapes.items()}


@pytest.fixture
def fisher(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {name: torch.randn(*w.shape, generator=g).exp() for name, w in weights.items()}


def same(a: ScoredWeights, b: ScoredWeights) -> bool:
    return a.t == b.t and all(
        torch.equal(x[name], y[name])
        for x, y in ((a.scales, b.scales), (a.scores, b.scores))
        for name in a.t | b.t
    )


def test_weights_of_one_site_share_a_tensor_scale(weights: dict[str, Tensor]) -> None:
    largest = max(weights[name].abs().max().item() for name in GROUPS[0])
    assert group_scale([weights["q"], weights["k"]]) == tensor_scale(largest)
    assert group_scale([weights["q"], weights["k"]]) != group_scale([weights["k"]])


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize(("rule", "policy"), [("benefit", "fisher"), ("difference", "error")])
def test_scales_and_scores_are_those_of_the_definitions(
    rule: str, policy: str, searched: bool, weights: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    advanced: list[int] = []
    scored = score_weights(
        weights,
        fisher,
        GROUPS,
        POLICIES[policy],
        rule=rule,
        clipped=searched,
        advance=lambda: advanced.append(1),
    )
    assert scored.clipped == searched and len(advanced) == 3
    for names in GROUPS:
        t = group_scale(weights[name] for name in names)
        for name in names:
            w = weights[name]
            f = fisher[name] if policy == "fisher" else torch.ones_like(w)
            scales = search_scale_codes(w, f, t) if searched else nearest_scale_codes(w, t)
            codes = quantize_weight(w, t, scales)
            score = weight_benefit(codes, w, f) if rule == "benefit" else weight_impact(codes, f)
            assert scored.t[name] == t
            assert torch.equal(scored.scales[name], scales)
            assert torch.equal(scored.scores[name], score)


def test_an_expert_that_no_token_reached_is_searched_with_equal_weights(
    weights: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    idle = {**fisher, "out": torch.zeros(12, 32)}
    scored = score_weights(weights, idle, GROUPS, POLICIES["fisher"], rule="benefit", clipped=True)
    ones = torch.ones(12, 32)
    expected = search_scale_codes(weights["out"], ones, scored.t["out"])
    assert torch.equal(scored.scales["out"], expected)
    assert not scored.scores["out"].any()


@pytest.mark.parametrize("policy", ["fisher", "random"])
def test_sites_scored_one_by_one_are_sites_scored_at_once(
    policy: str, weights: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    """With one generator throughout: what an interrupted run continues from."""
    whole = score_weights(
        weights,
        fisher,
        GROUPS,
        POLICIES[policy],
        rule="benefit",
        clipped=False,
        generator=torch.Generator().manual_seed(7),
    )
    generator = torch.Generator().manual_seed(7)
    parts = ScoredWeights({}, {}, {}, False)
    for names in GROUPS:
        part = score_weights(
            weights,
            fisher,
            [names],
            POLICIES[policy],
            rule="benefit",
            clipped=False,
            generator=generator,
        )
        parts.scales.update(part.scales)
        parts.scores.update(part.scores)
        parts.t.update(part.t)
    assert same(parts, whole)
    # Without a generator, it is one with seed 0.
    plain, seeded = (
        score_weights(
            weights,
            fisher,
            GROUPS,
            POLICIES[policy],
            rule="benefit",
            clipped=False,
            generator=source,
        )
        for source in (None, torch.Generator().manual_seed(0))
    )
    assert same(plain, seeded) and same(plain, whole) == (policy == "fisher")


@pytest.mark.parametrize("searched", [False, True])
@pytest.mark.parametrize("compensate", [False, True])
def test_packed_weights_are_rounded_or_compensated(
    compensate: bool, searched: bool, weights: dict[str, Tensor], fisher: dict[str, Tensor]
) -> None:
    policy = POLICIES["fisher"]
    scored = score_weights(weights, fisher, GROUPS, policy, rule="benefit", clipped=searched)
    g = torch.Generator().manual_seed(2)
    masks = {name: torch.rand(s.shape, generator=g) < 0.3 for name, s in scored.scores.items()}
    x = torch.randn(200, 44, generator=g) @ torch.randn(44, 44, generator=g)
    moments = {name: new_moments(k, x.device) for name, k in (("q", 44), ("out", 32))}
    add_moments(moments["q"], x, x.bfloat16())  # no token reaches the other site
    advanced: list[int] = []
    packed = pack_weights(
        weights,
        fisher,
        GROUPS,
        policy,
        scored,
        masks,
        moments if compensate else None,
        advance=lambda: advanced.append(1),
    )
    assert list(packed) == ["q", "k", "out"] and len(advanced) == 3
    root = factorize(moments["q"].h)
    assert root is not None
    for name, weight in weights.items():
        mask, t = masks[name], scored.t[name]
        codes = quantize_weight(weight, t, scored.scales[name])
        if compensate and name != "out":
            rounded = codes
            factors = factors_of(root, moments["q"].drift(name, weight))
            codes = compensated(weight, factors, mask, t, fisher[name] if searched else None)
            assert not torch.equal(codes.units(mask), rounded.units(mask))
        expected = pack(codes, mask).tensors()
        assert all(torch.equal(v, expected[key]) for key, v in packed[name].tensors().items())
