"""Uniform baselines: all-FP8 and all-NVFP4, rounded to nearest, on a mixed model's sites."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment
from fgmp.assign.weights import group_scale
from fgmp.errors import InputError
from fgmp.formats.activation import Site, site_threshold
from fgmp.formats.rules import PAPER_QUANTIZER
from fgmp.formats.weight import quantize_weight
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.select import linearize, matrices
from fgmp.model.store import config_of
from fgmp.pack.planes import pack
from fgmp.quantization.install import Assignment, install
from fgmp.recipe import Recipe

UNIFORM = {"nvfp4": 1.0, "fp8": 0.0}
"""Fraction of FP4 blocks by the name of a uniform format."""


def uniform_assignment(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    fp4: float,
) -> Assignment:
    """Every block in FP4 (``fp4`` 1) or FP8 (0), with absmax scales."""
    threshold = site_threshold(-torch.inf if fp4 == 0 else torch.inf, 1.0, 1.0)
    rule, scales = PAPER_QUANTIZER.rule, PAPER_QUANTIZER.scales
    constants = {
        owner: replace(site, threshold=threshold, rule=rule, scales=scales)
        for owner, site in sites.items()
    }
    packed = {}
    for names in linears_of.values():
        t = group_scale(weights[name] for name in names)
        for name in names:
            codes = quantize_weight(weights[name], t)
            packed[name] = pack(codes, torch.full_like(codes.scale, fp4 == 0).bool())
    activations = ActivationAssignment(constants, dict.fromkeys(constants, fp4), fp4)
    return Assignment(packed, activations, dict(linears_of))


def uniform(original: nn.Module, quantized: nn.Module, format_name: str) -> nn.Module:
    """Turn ``original``, in place, into an all-FP8 or all-NVFP4 model on ``quantized``'s sites.

    Args:
        original: the unquantized model.
        quantized: supplies the linears, the sites and their activation scales.
        format_name: ``fp8`` or ``nvfp4``; stored as the recipe's policy.

    Raises:
        InputError: the two are not of one model, as far as names and shapes of parameters show.
    """
    linearize(original)
    _require_same_shapes(original, quantized)
    linears_of = {owner: site.linears for owner, site in config_of(quantized).sites.items()}
    weights = {
        name: original.get_submodule(name).weight.detach()  # type: ignore[operator]
        for names in linears_of.values()
        for name in names
    }
    constants = {owner: site.record for owner, site in sites(quantized).items()}
    fp4 = UNIFORM[format_name]
    assignment = uniform_assignment(weights, constants, linears_of, fp4)
    recipe = Recipe(policy=format_name, fp4=fp4, clip="off")
    install(original, assignment, recipe, matrices(original))
    return original


def _require_same_shapes(original: nn.Module, quantized: nn.Module) -> None:
    shapes = {name: [*p.shape] for name, p in original.named_parameters()}
    expected = {name: [*p.shape] for name, p in quantized.named_parameters()}
    for name, linear in mixed_linears(quantized).items():
        expected[f"{name}.weight"] = [linear.out_features, linear.in_features]
    for name in expected | shapes:
        if expected.get(name) != shapes.get(name):
            first, second = (
                getattr(model, "name_or_path", "") or type(model).__name__
                for model in (quantized, original)
            )
            raise InputError(
                f"{first}: not a quantized {second}: {name} must have the same shape in both, got "
                f"{expected.get(name, 'none')} and {shapes.get(name, 'none')}"
            )
