"""A recipe refuses everything out of range by name, and survives its own file format."""

import re
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from fgmp.assign import policy as policies
from fgmp.assign.policy import POLICIES, Policy
from fgmp.errors import InputError
from fgmp.recipe import BUDGETS, CLIP_CHOICES, PAPER, Recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fp4": -0.01}, "recipe: fp4 must be a fraction from 0 to 1, got -0.01"),
        ({"fp4": 70}, "recipe: fp4 must be a fraction from 0 to 1, got 70"),
        ({"fp4": "70%"}, "recipe: fp4 must be a fraction from 0 to 1, got '70%'"),
        ({"fp4": True}, "recipe: fp4 must be a fraction from 0 to 1, got True"),
        ({"fp4": None}, "recipe: fp4 must be a fraction from 0 to 1, got None"),
        ({"fp4": float("nan")}, "recipe: fp4 must be a fraction from 0 to 1, got nan"),
        (
            {"fp4_activations": 1.5},
            "recipe: fp4_activations must be a fraction from 0 to 1, got 1.5",
        ),
        (
            {"policy": "best"},
            "recipe: policy must be one of fisher, fisher-per-layer, error, random, fp8, nvfp4, "
            "got 'best'",
        ),
        ({"bits": 4.4}, "recipe: bits must be from 4.5 (all FP4) to 8 (all FP8), got 4.4"),
        ({"bits": 8.1}, "recipe: bits must be from 4.5 (all FP4) to 8 (all FP8), got 8.1"),
        ({"bits": "5"}, "recipe: bits must be from 4.5 (all FP4) to 8 (all FP8), got '5'"),
        (
            {"bits": 5.4, "policy": "random"},
            "recipe: bits needs policy fisher, whose scores of weights and activations are "
            "comparable, got 'random'",
        ),
        ({"fisher": "kfac"}, "recipe: fisher must be exact or factored, got 'kfac'"),
        ({"labels": "drawn"}, "recipe: labels must be model or text, got 'drawn'"),
        ({"fisher": None}, "recipe: fisher must be exact or factored, got None"),
        ({"max_bytes": 0}, "recipe: max_bytes must be a number of bytes, got 0"),
        ({"max_bytes": 1.5e6}, "recipe: max_bytes must be a number of bytes, got 1500000.0"),
        ({"max_bytes": True}, "recipe: max_bytes must be a number of bytes, got True"),
        ({"max_increase": -1}, "recipe: max_increase must be a percentage of 0 or more, got -1"),
        (
            {"max_increase": float("inf")},
            "recipe: max_increase must be a percentage of 0 or more, got inf",
        ),
        ({"max_increase": "x"}, "recipe: max_increase must be a percentage of 0 or more, got 'x'"),
        (
            {"max_energy": 0},
            "recipe: max_energy must be a percentage above 0 and at most 100, got 0",
        ),
        (
            {"max_energy": 101},
            "recipe: max_energy must be a percentage above 0 and at most 100, got 101",
        ),
        (
            {"bits": 5, "max_energy": 80},
            "recipe: set only one of fp4, bits, max_bytes, max_increase, max_energy; "
            "got bits and max_energy",
        ),
        (
            {"fp4": 0.9, "max_bytes": 10},
            "recipe: set only one of fp4, bits, max_bytes, max_increase, max_energy; "
            "got fp4 and max_bytes",
        ),
        (
            {"fp4_activations": 0.7, "bits": 5},
            "recipe: set only one of fp4, bits, max_bytes, max_increase, max_energy; "
            "got fp4_activations and bits",
        ),
        (
            {"fp4": 0.5, "fp4_activations": 0.7, "bits": 5},
            "recipe: set only one of fp4, bits, max_bytes, max_increase, max_energy; "
            "got fp4 and fp4_activations and bits",
        ),
        (
            {"max_bytes": 10, "policy": "error"},
            "recipe: max_bytes needs policy fisher, whose scores of weights and activations are "
            "comparable, got 'error'",
        ),
        ({"rule": "best"}, "recipe: rule must be difference, benefit or truncated, got 'best'"),
        ({"scales": 4}, "recipe: scales must be max or search, got 4"),
        (
            {"sensitivities": "e5m2"},
            "recipe: sensitivities must be e4m3 or powers, got 'e5m2'",
        ),
        (
            {"sensitivities": "powers", "policy": "error"},
            "recipe: sensitivities powers needs policy fisher or fisher-per-layer, got 'error'",
        ),
        ({"compensate": "on"}, "recipe: compensate must be true or false, got 'on'"),
        ({"clip": "maybe"}, "recipe: clip must be auto, on or off, got 'maybe'"),
        ({"clip": True}, "recipe: clip must be auto, on or off, got True"),
        ({"samples": 0}, "recipe: samples must be an integer of at least 1, got 0"),
        ({"samples": 1.5}, "recipe: samples must be an integer of at least 1, got 1.5"),
        ({"samples": True}, "recipe: samples must be an integer of at least 1, got True"),
        ({"seq_len": 1}, "recipe: seq_len must be an integer of at least 2, got 1"),
        ({"seed": -1}, "recipe: seed must be an integer of at least 0, got -1"),
        ({"headroom": 0.5}, "recipe: headroom must be from 1 to 1024, got 0.5"),
        ({"headroom": 1025}, "recipe: headroom must be from 1 to 1024, got 1025"),
        ({"headroom": "2"}, "recipe: headroom must be from 1 to 1024, got '2'"),
        ({"include": "*"}, "recipe: include must be a list of name patterns, got '*'"),
        ({"include": None}, "recipe: include must be a list of name patterns, got None"),
        ({"exclude": [1]}, "recipe: exclude must be a list of name patterns, got [1]"),
        ({"exclude": {"a": 1}}, "recipe: exclude must be a list of name patterns, got {'a': 1}"),
    ],
)
def test_values_out_of_range_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        Recipe(**values)


def test_the_ends_of_every_range_are_inside() -> None:
    Recipe(fp4=0, fp4_activations=1, samples=1, seq_len=2, seed=0, headroom=1)
    Recipe(fp4=1, fp4_activations=0.0, headroom=1024)
    for policy in POLICIES:
        for clip in CLIP_CHOICES:
            Recipe(policy=policy, clip=clip)


def test_names_are_those_of_the_registries() -> None:
    policies.register("mine", policies.Policy(sensitivity="none"))
    try:
        assert Recipe(policy="mine").policy == "mine"
    finally:
        del POLICIES["mine"]
    with pytest.raises(InputError, match=r"policy must be one of fisher, .*, got 'mine'"):
        Recipe(policy="mine")


def test_activations_follow_weights_unless_told() -> None:
    assert Recipe(fp4=0.9).activation_fraction == 0.9
    assert Recipe(fp4=0.9, fp4_activations=0.0).activation_fraction == 0.0


def test_a_recipe_is_final() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe().fp4 = 0.5  # type: ignore[misc]


def test_the_defaults_are_the_documented_ones() -> None:
    found = {key: getattr(Recipe(), key) for key in ("fp4", "tune", *PAPER)}
    assert found == {
        "fp4": 0.7,
        "tune": 0,
        "labels": "model",
        "rule": "benefit",
        "scales": "search",
        "compensate": True,
    }


EVERYTHING = Recipe(
    fp4=0.9,
    fp4_activations=0.5,
    policy="fisher-per-layer",
    fisher="factored",
    labels="text",
    rule="difference",
    scales="max",
    sensitivities="powers",
    clip="on",
    compensate=False,
    tune=2,
    samples=3,
    seq_len=64,
    seed=7,
    headroom=2.0,
    include=("*", "lm_head"),
    exclude=("*.down_proj",),
)


@pytest.mark.parametrize(
    "recipe", [Recipe(), EVERYTHING, Recipe(bits=5.4)], ids=["default", "everything", "budget"]
)
def test_yaml_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    """A budget's file has the default share beside it, so the two may stand together."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe.to_dict()))
    assert Recipe.from_yaml(file) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    assert list(recipe.to_dict()) == [field.name for field in fields(Recipe)]


def test_everything_differs_from_the_default() -> None:
    default = Recipe().to_dict()
    same = [key for key, value in EVERYTHING.to_dict().items() if value == default[key]]
    assert same == list(BUDGETS)  # which exclude shares, and go with the default policy alone


def from_text(tmp_path: Path, text: str) -> Recipe:
    file = tmp_path / "r.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    return Recipe.from_yaml(file)


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    assert from_text(tmp_path, "# nothing\n") == Recipe()


@pytest.mark.parametrize("clip", CLIP_CHOICES)
def test_clip_may_be_written_bare(tmp_path: Path, clip: str) -> None:
    # YAML 1.1 takes a bare on or off for a boolean.
    assert from_text(tmp_path, f"clip: {clip}\n").clip == clip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fp5: 0.7\n", r"recipe .*r\.yaml: unknown key 'fp5'; the keys are fp4, fp4_activations, "),
        ("1: 2\n", r"recipe .*r\.yaml: unknown key 1; the keys are fp4, "),
        ("- fp4\n", r"recipe .*r\.yaml: must be a mapping, got list$"),
        ("0.7\n", r"recipe .*r\.yaml: must be a mapping, got float$"),
        ("fp4: [\n", r"recipe .*r\.yaml: not YAML: "),
        ("fp4: \udcff\n", r"recipe .*r\.yaml: not YAML: 'utf-8' codec can't decode"),
        ("fp4: 2\n", "recipe: fp4 must be a fraction from 0 to 1, got 2$"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match="^" + message):
        from_text(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml: No such file or directory$"):
        Recipe.from_yaml(tmp_path / "none.yaml")
    with pytest.raises(InputError, match=r"Is a directory$"):
        Recipe.from_yaml(tmp_path)


@pytest.mark.parametrize(
    ("text", "size"),
    [("700", 700), ("700k", 700_000), ("4.5M", 4_500_000), ("3G", 3 * 10**9), ("1.2MB", 1_200_000)],
)
def test_sizes_are_read(text: str, size: int, tmp_path: Path) -> None:
    assert Recipe().with_options({"max_bytes": text}).max_bytes == size
    assert from_text(tmp_path, f"max_bytes: {text}\n").max_bytes == size


@pytest.mark.parametrize("text", ["1%", "1", "1.0 %"])
def test_percentages_are_read(text: str, tmp_path: Path) -> None:
    for name in ("max_increase", "max_energy"):
        assert getattr(Recipe().with_options({name: text}), name) == 1.0
        assert getattr(from_text(tmp_path, f"{name}: {text}\n"), name) == 1.0


@pytest.mark.parametrize("text", ["4T", "M", "-3k", "1e6", "4 M", ""])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match=f"max_bytes must be a number of bytes, .* got {text!r}"):
        Recipe().with_options({"max_bytes": text})


def test_an_option_replaces_the_file_s_amount() -> None:
    file = Recipe(bits=5.4, seed=3)
    assert file.with_options({"max_energy": "80%"}) == Recipe(max_energy=80.0, seed=3)
    assert file.with_options({"fp4": 0.5}) == Recipe(fp4=0.5, seed=3)
    assert file.with_options({"seed": 4}) == Recipe(bits=5.4, seed=4)
    shares = Recipe(fp4=0.5, fp4_activations=0.4)
    assert shares.with_options({"bits": 5.0}) == Recipe(bits=5.0)
    assert shares.with_options({"fp4": 0.6}) == Recipe(fp4=0.6, fp4_activations=0.4)
    with pytest.raises(InputError, match=r"set only one of fp4, bits, .* got fp4 and max_bytes"):
        Recipe().with_options({"fp4": 0.7, "max_bytes": "3M"})
    with pytest.raises(
        InputError, match=r"set only one of fp4, bits, .* got fp4_activations and bits"
    ):
        file.with_options({"fp4_activations": 0.5})


def test_a_registered_policy_of_fisher_scores_takes_budgets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(POLICIES, "mine", Policy(sensitivity="fisher"))
    assert Recipe(policy="mine", bits=5.4, sensitivities="powers").budget == "bits"
    with pytest.raises(InputError, match="bits needs policy fisher"):
        Recipe(policy="fisher-per-layer", bits=5.4)
