"""Every step of ``Methods`` is the one that runs, and without any the product's run.

Each test quantizes a small model with one step replaced, and compares with what that step must do.
"""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.assign import compensate, frontier
from fgmp.assign.compensate import ScaleSearch, compensated
from fgmp.assign.impact import weight_impact
from fgmp.assign.methods import DEFAULT_METHODS, Methods
from fgmp.assign.scale_search import search_scale_codes
from fgmp.formats.weight import WeightCodes, nearest_scale_codes, quantize_weight
from fgmp.model.linear import mixed_linears
from fgmp.model.store import config_of


def quantized(tokens: Tensor, methods: Methods | None = None, **recipe: object) -> nn.Module:
    """The first layer of a small model, on three sequences."""
    recipe = {"clip": "on", "include": ("*.layers.0.*",), **recipe}
    options: dict[str, Any] = {} if methods is None else {"methods": methods}
    return fgmp.quantize(
        make_model("llama"), tokens[:3], Recipe(**recipe), held_out=tokens[:1], **options
    )


def masks(model: nn.Module) -> Tensor:
    return torch.cat([m.packed.is_fp8().flatten() for m in mixed_linears(model).values()])


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(plane, mixed_linears(other)[name].packed.tensors()[key])
        for name, linear in mixed_linears(one).items()
        for key, plane in linear.packed.tensors().items()
    )


def test_the_default_is_the_product(tokens: Tensor) -> None:
    assert Methods() == DEFAULT_METHODS
    assert Methods().search_scales is search_scale_codes
    assert Methods().compensate is compensated
    assert Methods().weight_score is None  # the score that belongs to the recipe's rule
    assert (Methods().damping, Methods().relief) == (compensate.DAMPING, frontier.RELIEF)
    explicit = Methods(
        weight_score=lambda codes, weight, f: weight_impact(codes, f),
        search_scales=lambda weight, f, t: search_scale_codes(weight, f, t),
        compensate=lambda *args: compensated(*args),
        damping=0.3,
        relief=0.4,
    )
    assert {field.name for field in fields(Methods)} == set(vars(explicit))
    # The score of the rule ``difference`` is weight_impact.
    budget = {"bits": 5.5, "rule": "difference"}
    assert same_weights(quantized(tokens, **budget), quantized(tokens, explicit, **budget))


def test_a_search_of_scales_takes_effect(tokens: Tensor) -> None:
    """In scoring and in compensation: all rounded to nearest is what ``clip: off`` does."""
    calls: list[tuple[torch.Size, torch.Size]] = []

    def nearest(weight: Tensor, sensitivity: Tensor, t: float) -> Tensor:
        calls.append((weight.shape, sensitivity.shape))
        return nearest_scale_codes(weight.float(), t)

    methods = Methods(search_scales=nearest)
    for in_turn in (False, True):
        calls.clear()
        model = quantized(tokens, methods, compensate=in_turn)
        assert all(one == other for one, other in calls)
        # Compensation chooses the scales of one block column at a time.
        assert any(shape[1] <= 16 for shape, _ in calls) == in_turn
        assert any(shape[1] > 16 for shape, _ in calls)
        assert same_weights(model, quantized(tokens, clip="off", compensate=in_turn))
        assert not same_weights(model, quantized(tokens, compensate=in_turn))
    calls.clear()
    quantized(tokens, methods, clip="off")
    assert calls == []


def test_a_score_of_weights_takes_effect(tokens: Tensor) -> None:
    """The blocks with the largest scores are FP8, whatever the score."""

    def size(codes: WeightCodes, weight: Tensor, sensitivity: Tensor) -> Tensor:
        padded = nn.functional.pad(weight, (0, -weight.shape[1] % 16))
        return padded.double().unflatten(-1, (-1, 16)).abs().sum(-1)

    model = quantized(tokens, Methods(weight_score=size), fp4=0.7, compensate=False)
    original = make_model("llama")
    scores = []
    for name in mixed_linears(model):
        weight = original.get_submodule(name).weight.detach()
        scores.append(size(None, weight, weight).flatten())  # type: ignore[arg-type]
    largest = torch.cat(scores).argsort(descending=True)[: int(masks(model).sum())]
    expected = torch.zeros_like(masks(model))
    expected[largest] = True
    assert torch.equal(masks(model), expected)
    assert not torch.equal(masks(quantized(tokens, fp4=0.7, compensate=False)), expected)


def test_a_compensation_takes_effect(tokens: Tensor) -> None:
    """One that only rounds gives what a run without compensation gives."""
    seen: list[Any] = []

    def rounds(
        weight: Tensor,
        factors: compensate.Factors,
        is_fp8: Tensor,
        t: float,
        sensitivity: Tensor | None,
        search: ScaleSearch = search_scale_codes,
    ) -> WeightCodes:
        seen.append(search)
        assert factors.root.shape == (weight.shape[1], weight.shape[1])
        assert is_fp8.shape[0] == weight.shape[0]
        scales = nearest_scale_codes(weight.float(), t)
        if sensitivity is not None:
            scales = search(weight, sensitivity, t)
        return quantize_weight(weight, t, scales)

    for clip in ("on", "off"):
        model = quantized(tokens, Methods(compensate=rounds), clip=clip)
        assert same_weights(model, quantized(tokens, clip=clip, compensate=False))
        assert not same_weights(model, quantized(tokens, clip=clip))
    assert len(seen) == 2 * len(mixed_linears(model)) and set(seen) == {search_scale_codes}


def test_damping_takes_effect(tokens: Tensor) -> None:
    """So strong that calibration says nothing, it leaves every weight rounded by itself."""
    plain = quantized(tokens, compensate=False)
    assert same_weights(quantized(tokens, Methods(damping=1e15)), plain)
    one, other = (quantized(tokens, Methods(damping=m)) for m in (0.3, 0.03))
    assert same_weights(one, quantized(tokens)) and not same_weights(other, one)


def test_relief_takes_effect(tokens: Tensor) -> None:
    """The less harm compensation leaves, the more of the FP4 falls to weights."""

    def fp4_share(methods: Methods | None = None, **recipe: object) -> float:
        model = quantized(tokens, methods, bits=5.5, clip="off", **recipe)
        return 1 - masks(model).double().mean().item()

    shares = [fp4_share(Methods(relief=relief)) for relief in (1.0, 0.4, 0.1)]
    assert shares[0] < shares[1] < shares[2]
    assert fp4_share() == shares[1]
    # Without compensation there is nothing that relieves.
    assert fp4_share(Methods(relief=0.1), compensate=False) == shares[0]


def test_methods_are_no_part_of_the_recipe(tokens: Tensor) -> None:
    methods = Methods(search_scales=partial(search_scale_codes))
    model, plain = (quantized(tokens, m, compensate=False) for m in (methods, None))
    assert config_of(model).recipe == config_of(plain).recipe
