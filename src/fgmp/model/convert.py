"""Put packed weights and sites into a model, in place of its linears."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fgmp.errors import CheckpointError
from fgmp.formats.activation import Site
from fgmp.model.linear import ActivationSite, MixedLinear
from fgmp.model.select import linearize, replace_module
from fgmp.pack.checkpoint import CheckpointConfig, Reader
from fgmp.pack.planes import PackedWeight


def packed_linears(
    model: nn.Module,
    weights: Mapping[str, PackedWeight],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
) -> dict[str, MixedLinear]:
    """Packed linears by name, ready to replace those of a linearized model.

    Args:
        model: its linears may be empty (meta) or hold weights; they stay where they are.
        weights: by linear.
        records: by site.
        linears_of: names of the linears that read a site; the first one owns it.
    """
    made = {}
    for site_name, names in linears_of.items():
        site = ActivationSite(records[site_name])
        for position, name in enumerate(names):
            old = model.get_submodule(name)
            assert isinstance(old, nn.Linear | MixedLinear)
            new = MixedLinear(weights[name], old.bias, site, owns_site=position == 0)
            made[name] = new.train(old.training)
    return made


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Put modules where their names say, in place."""
    for name, module in modules.items():
        replace_module(model, name, module)


def with_parameters(
    model: nn.Module, linears: Mapping[str, MixedLinear], values: Mapping[str, Tensor]
) -> dict[str, nn.Module]:
    """``linears`` and copies of other modules, with new values of parameters.

    Args:
        model: an unquantized, linearized model; stays as it is. Parameters that its modules share
            the copies share, too.
        linears: packed ones, by name; new values of their biases are set in place.
        values: by the name of a parameter that is not quantized.
    """
    old = {name: model.get_parameter(name) for name in values}
    new = {id(p): nn.Parameter(values[n], requires_grad=p.requires_grad) for n, p in old.items()}
    made: dict[str, nn.Module] = dict(linears)
    for name, module in model.named_modules():
        changed = {key: new[id(p)] for key, p in module._parameters.items() if id(p) in new}
        if not changed:
            continue
        if name in linears:
            linears[name].bias = changed["bias"]
            changed["bias"].requires_grad_(False)
        else:
            made[name] = copy.copy(module)
            made[name]._parameters = module._parameters | changed
    return made


def install(
    model: nn.Module,
    weights: Mapping[str, PackedWeight],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
) -> None:
    """Replace linears of a linearized model by packed ones, in place; see above."""
    put(model, packed_linears(model, weights, records, linears_of))


def install_from(model: nn.Module, config: CheckpointConfig, reader: Reader) -> None:
    """Give an empty model the packed linears and sites of a checkpoint.

    Raises:
        CheckpointError: the checkpoint names a linear that the model lacks or has in another
            shape, or breaks a rule of the format.
    """
    linearize(model)
    reader.require_listed(config.linears)
    weights: dict[str, PackedWeight] = {}
    records = {}
    with torch.device("cpu"):
        for owner, site in config.sites.items():
            records[owner], group = reader.group(owner, site)
            for name, weight in group.items():
                _check_shape(model, name, weight)
            weights |= group
        install(model, weights, records, {o: s.linears for o, s in config.sites.items()})


def _check_shape(model: nn.Module, name: str, packed: PackedWeight) -> None:
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{name}: the model has no such layer") from error
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{name}: must be a linear layer, got {type(linear).__name__}")
    wanted, found = (linear.out_features, linear.in_features), (packed.n, packed.k)
    if wanted != found:
        raise CheckpointError(f"{name}.weight_shape: must be {wanted} for this model, got {found}")
