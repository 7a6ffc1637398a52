"""Groups of weights that share a scale or readers."""

from fgmp.quantization.sharing import (
    joined,
    readers,
    weights_by_readers,
    weights_by_scale,
)

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


def test_weights_are_grouped_by_the_sites_that_read_them() -> None:
    assert readers(LINEARS_OF, SHARED)["b"] == ["a", "d"]
    assert weights_by_readers(LINEARS_OF, SHARED) == [["a"], ["b"], ["c"], ["d"], ["f"]]
