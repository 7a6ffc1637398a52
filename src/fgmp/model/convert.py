"""Put packed weights and sites into a model, in place of its linears."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

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


@dataclass(frozen=True)
class Replacement:
    """What an unquantized, linearized model becomes: packed linears, and values of parameters.

    Attributes:
        linears: by name.
        values: of parameters that are not quantized, by the names these have once the linears are
            there; the rest keep theirs. A parameter takes the tensor itself and stays the object it
            is, so what shares the parameter or holds on to its module sees the value, too.
    """

    linears: Mapping[str, nn.Module]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def put(self, model: nn.Module) -> None:
        """Change the model, in place."""
        for name, linear in self.linears.items():
            replace_module(model, name, linear)
        for name, value in self.values.items():
            model.get_parameter(name).data = value

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Change the model for a while."""
        linears = {name: model.get_submodule(name) for name in self.linears}
        values: dict[str, Tensor] = {}
        try:
            Replacement(self.linears).put(model)
            values |= {name: model.get_parameter(name).data for name in self.values}
            Replacement({}, self.values).put(model)
            yield
        finally:
            Replacement({}, values).put(model)
            Replacement(linears).put(model)


def install(
    model: nn.Module,
    weights: Mapping[str, PackedWeight],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
) -> None:
    """Replace linears of a linearized model by packed ones, in place; see above."""
    Replacement(packed_linears(model, weights, records, linears_of)).put(model)


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
