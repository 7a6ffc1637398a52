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
from fgmp.model.linear import sites, weight_holders
from fgmp.model.select import linearize, matrices
from fgmp.model.store import config_of
from fgmp.pack.planes import pack
from fgmp.quantization.install import Assignment, install
from fgmp.quantization.sharing import weights_by_scale
from fgmp.recipe import Recipe

UNIFORM = {"nvfp4": 1.0, "fp8": 0.0}
"""Fraction of FP4 blocks by the name of a uniform format."""


def uniform_assignment(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    shared: Mapping[str, str],
    fp4: float,
) -> Assignment:
    """Every block in FP4 (``fp4`` 1) or FP8 (0), with absmax scales.

    Args:
        weights: (N, K) by linear; a shared one under its first linear.
        sites: constants of the sites.
        linears_of: linears by the owner of their site.
        shared: linears that use the weight of another, and the name of that one, by name.
        fp4: fraction of FP4 blocks.
    """
    threshold = site_threshold(-torch.inf if fp4 == 0 else torch.inf, 1.0, 1.0)
    rule, scales = PAPER_QUANTIZER.rule, PAPER_QUANTIZER.scales
    constants = {
        owner: replace(site, threshold=threshold, rule=rule, scales=scales)
        for owner, site in sites.items()
    }
    packed = {}
    for names in weights_by_scale(linears_of, shared):
        t = group_scale(weights[name] for name in names)
        for name in names:
            codes = quantize_weight(weights[name], t)
            packed[name] = pack(codes, torch.full_like(codes.scale, fp4 == 0).bool())
    activations = ActivationAssignment(constants, dict.fromkeys(constants, fp4), fp4)
    return Assignment(packed, activations, dict(linears_of), shared=shared)


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
    config = config_of(quantized)
    linears_of = {owner: site.linears for owner, site in config.sites.items()}
    weights = {
        name: original.get_submodule(name).weight.detach()  # type: ignore[operator]
        for name in config.holders
    }
    constants = {owner: site.record for owner, site in sites(quantized).items()}
    fp4 = UNIFORM[format_name]
    assignment = uniform_assignment(weights, constants, linears_of, config.shared, fp4)
    recipe = Recipe(policy=format_name, fp4=fp4, clip="off")
    install(original, assignment, recipe, matrices(original))
    return original


def _require_same_shapes(original: nn.Module, quantized: nn.Module) -> None:
    shapes = {name: [*p.shape] for name, p in original.named_parameters()}
    expected = {name: [*p.shape] for name, p in quantized.named_parameters()}
    for name, linear in weight_holders(quantized).items():
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
