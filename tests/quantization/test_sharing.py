"""Groups of weights that share a scale or readers, and moments of all uses of a weight."""

import torch

from fgmp.quantization.sharing import (
    joined,
    readers,
    summed_moments,
    weights_by_readers,
    weights_by_scale,
)
from fgmp.sensitivity.moments import Moments

LINEARS_OF = {"a": ["a", "b"], "c": ["c"], "d": ["d", "e"], "f": ["f"]}
SHARED = {"e": "b"}
"""Linear e has the weight of b, so the sites a and d have one tensor scale."""


def test_sets_that_overlap_are_joined_in_order() -> None:
    assert joined([]) == []
    assert joined(["ab", "c", "de"]) == [["a", "b"], ["c"], ["d", "e"]]
    connected = [sorted(group) for group in joined(["ab", "c", "de", "eb"])]
    assert connected == [["a", "b", "d", "e"], ["c"]]
    assert [sorted(group) for group in joined(["a", "b", "c", "cb", "ba"])] == [["a", "b", "c"]]


def test_a_model_that_shares_nothing_has_one_group_per_site() -> None:
    groups = list(LINEARS_OF.values())
    assert weights_by_scale(LINEARS_OF, {}) == weights_by_readers(LINEARS_OF, {}) == groups
    assert readers(LINEARS_OF, {})["e"] == ["d"]


def test_sites_with_a_shared_weight_have_one_scale() -> None:
    groups = [sorted(group) for group in weights_by_scale(LINEARS_OF, SHARED)]
    assert sorted(groups) == [["a", "b", "d"], ["c"], ["f"]]


def test_a_shared_weight_has_the_moments_of_all_its_readers() -> None:
    assert readers(LINEARS_OF, SHARED)["b"] == ["a", "d"]
    assert weights_by_readers(LINEARS_OF, SHARED) == [["a"], ["b"], ["c"], ["d"], ["f"]]
    moments = {
        owner: Moments(torch.full((2, 2), float(i)), torch.full((2, 2), 10.0 * i))
        for i, owner in enumerate(LINEARS_OF, 1)
    }
    summed = summed_moments(moments, LINEARS_OF, SHARED)
    assert {name: (m.h[0, 0].item(), m.c[0, 0].item()) for name, m in summed.items()} == {
        "a": (1, 10),
        "b": (1 + 3, 10 + 30),
        "c": (2, 20),
        "d": (3, 30),
        "f": (4, 40),
    }
