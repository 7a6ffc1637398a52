"""Uniform baselines on a mixed model's sites, rounded to nearest.

All-FP8, all-NVFP4, or one of the two per site: whichever sites are named are FP8.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment
from fgmp.assign.weights import group_scale
from fgmp.errors import InputError
from fgmp.formats.activation import Site, site_threshold
from fgmp.formats.rules import PAPER_QUANTIZER
from fgmp.formats.spec import BLOCK
from fgmp.formats.weight import quantize_weight
from fgmp.model.linear import sites, weight_holders
from fgmp.model.select import linearize, matrices
from fgmp.model.store import config_of
from fgmp.pack.planes import pack
from fgmp.quantization.install import Assignment, install
from fgmp.quantization.sharing import readers, weights_by_scale
from fgmp.recipe import Recipe

UNIFORM = {"nvfp4": 1.0, "fp8": 0.0}
"""Fraction of FP4 blocks by the name of a uniform format."""


@dataclass(frozen=True)
class Template:
    """What a baseline takes from a mixed model, whose planes may be gone.

    Attributes:
        name: folder, hub name or type of the mixed model, for messages.
        linears_of: names of the linears that read a site's tensor, by the site's owner.
        shared: linears that use the weight of another, and the name of that one, by name.
        sites: constants of the sites, by owner.
        shapes: shapes of all parameters and quantized weights, by name.
        plane_bytes: bytes of the packed weights.
        policy: name of the policy that chose the formats.
    """

    name: str
    linears_of: dict[str, list[str]]
    shared: dict[str, str]
    sites: dict[str, Site]
    shapes: dict[str, list[int]]
    plane_bytes: int
    policy: str

    @classmethod
    def of(cls, quantized: nn.Module) -> "Template":
        """Template of a quantized model; refers to none of its planes."""
        config, holders = config_of(quantized), weight_holders(quantized)
        shapes = {name: [*p.shape] for name, p in quantized.named_parameters()}
        for name, linear in holders.items():
            shapes[f"{name}.weight"] = [linear.out_features, linear.in_features]
        return cls(
            name=_name(quantized),
            linears_of={owner: site.linears for owner, site in config.sites.items()},
            shared=dict(config.shared),
            sites={owner: site.record for owner, site in sites(quantized).items()},
            shapes=shapes,
            plane_bytes=sum(linear.packed.nbytes for linear in holders.values()),
            policy=str(config.recipe.get("policy")),
        )

    @property
    def holders(self) -> list[str]:
        """Names of the linears that have a packed weight of their own."""
        return [n for names in self.linears_of.values() for n in names if n not in self.shared]


def uniform_assignment(
    weights: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    shared: Mapping[str, str],
    fp8: Collection[str],
    packed_one: Callable[[str], None] = lambda name: None,
) -> Assignment:
    """One format per site, FP8 or FP4, with absmax scales.

    Args:
        weights: (N, K) by linear; a shared one under its first linear.
        sites: constants of the sites.
        linears_of: linears by the owner of their site.
        shared: linears that use the weight of another, and the name of that one, by name.
        fp8: owners of the FP8 sites. A weight that linears of several sites use is FP8 if one of
            these is.
        packed_one: called with the name of each weight once it is packed and not read again.
    """
    rule, scales = PAPER_QUANTIZER.rule, PAPER_QUANTIZER.scales
    thresholds = {
        is_fp8: site_threshold(-torch.inf if is_fp8 else torch.inf, 1.0, 1.0)
        for is_fp8 in (True, False)
    }
    constants = {
        owner: replace(site, threshold=thresholds[owner in fp8], rule=rule, scales=scales)
        for owner, site in sites.items()
    }
    packed = {}
    owners = readers(linears_of, shared)
    for names in weights_by_scale(linears_of, shared):
        t = group_scale(weights[name] for name in names)
        for name in names:
            codes = quantize_weight(weights[name], t)
            is_fp8 = any(owner in fp8 for owner in owners[name])
            packed[name] = pack(codes, torch.full_like(codes.scale, is_fp8).bool())
            packed_one(name)
    fractions = {owner: float(owner not in fp8) for owner in constants}
    blocks = {owner: -(-len(site.sensitivity) // BLOCK) for owner, site in constants.items()}
    overall = sum(fractions[o] * n for o, n in blocks.items()) / sum(blocks.values())
    activations = ActivationAssignment(constants, fractions, overall)
    return Assignment(packed, activations, dict(linears_of), shared=shared)


def uniform(original: nn.Module, quantized: nn.Module | Template, format_name: str) -> nn.Module:
    """Turn ``original``, in place, into an all-FP8 or all-NVFP4 model on ``quantized``'s sites.

    Args:
        original: the unquantized model. Each weight is freed once it is packed.
        quantized: supplies the linears, the sites and their activation scales.
        format_name: ``fp8`` or ``nvfp4``; stored as the recipe's policy.

    Raises:
        InputError: the two are not of one model, as far as names and shapes of parameters show.
    """
    template = quantized if isinstance(quantized, Template) else Template.of(quantized)
    fp4 = UNIFORM[format_name]
    recipe = Recipe(policy=format_name, fp4=fp4, clip="off")
    return one_format_per_site(original, template, () if fp4 else template.sites, recipe)


def one_format_per_site(
    original: nn.Module, template: Template, fp8: Collection[str], recipe: Recipe
) -> nn.Module:
    """Turn ``original``, in place, into a model with the named sites in FP8, all others in FP4.

    Args:
        original: the unquantized model. Each weight is freed once it is packed.
        template: supplies the linears, the sites and their activation scales.
        fp8: owners of the FP8 sites.
        recipe: stored with the model.

    Raises:
        InputError: the two are not of one model, as far as names and shapes of parameters show.
    """
    linearize(original)
    require_same_shapes(original, template)
    elements = matrices(original)
    linears = {name: original.get_submodule(name) for name in template.holders}
    weights: dict[str, Tensor] = {
        name: linear.weight.detach()  # type: ignore[operator]
        for name, linear in linears.items()
    }
    users = {name: [linears[name]] for name in linears}
    for name, holder in template.shared.items():
        users[holder].append(original.get_submodule(name))

    def free(name: str) -> None:
        empty = nn.Parameter(weights.pop(name).to("meta"), requires_grad=False)
        for linear in users[name]:
            linear.weight = empty

    assignment = uniform_assignment(
        weights, template.sites, template.linears_of, template.shared, fp8, free
    )
    install(original, assignment, recipe, elements)
    return original


def require_same_shapes(original: nn.Module, template: Template) -> None:
    """Check that a linearized model has the parameters of the template's.

    Raises:
        InputError: a parameter that only one of them has, or that differs in shape.
    """
    shapes = {name: [*p.shape] for name, p in original.named_parameters()}
    expected = template.shapes
    for name in expected | shapes:
        if expected.get(name) != shapes.get(name):
            raise InputError(
                f"{template.name}: not a quantized {_name(original)}: {name} must have the same "
                f"shape in both, got {expected.get(name, 'none')} and {shapes.get(name, 'none')}"
            )


def _name(model: nn.Module) -> str:
    return str(getattr(model, "name_or_path", "") or type(model).__name__)
