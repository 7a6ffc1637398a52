"""Replace a model's linears by packed linears and activation sites."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fgmp.errors import CheckpointError
from fgmp.formats.activation import Site
from fgmp.model.linear import ActivationSite, MixedLinear
from fgmp.model.select import linearize, replace_modules
from fgmp.pack.checkpoint import CheckpointConfig
from fgmp.pack.planes import PackedWeight
from fgmp.pack.reader import Reader


def packed_linears(
    model: nn.Module,
    weights: Mapping[str, PackedWeight],
    records: Mapping[str, Site],
    linears_of: Mapping[str, list[str]],
    shared: Mapping[str, str] | None = None,
) -> dict[str, MixedLinear]:
    """Build packed linears, by name, to replace those of a linearized model.

    Args:
        model: not changed; its linears may hold weights or be on the meta device.
        weights: packed weights by linear.
        records: constants by site.
        linears_of: names of the linears that read each site; the first one owns the site.
        shared: linears that have no weight of their own, and whose they use.
    """
    shared = shared or {}
    sites = {name: ActivationSite(records[name]) for name in linears_of}
    owners = {name: owner for owner, names in linears_of.items() for name in names}
    linears: dict[str, MixedLinear] = {}
    biases: dict[int, nn.Parameter] = {}
    for name in sorted(owners, key=lambda name: name in shared):  # holders first
        old, owner = model.get_submodule(name), owners[name]
        assert isinstance(old, nn.Linear | MixedLinear)
        weight = linears[shared[name]] if name in shared else weights[name]
        first = name == linears_of[owner][0]
        new = MixedLinear(weight, old.bias, sites[owner], owns_site=first)
        if old.bias is not None and new.bias is not None:
            new.bias = biases.setdefault(id(old.bias), new.bias)
        linears[name] = new.train(old.training)
    return {name: linears[name] for name in owners}


@dataclass(frozen=True)
class Replacement:
    """Changes that quantization makes to a linearized model: packed linears, parameter values.

    Attributes:
        linears: packed linears by name.
        values: new values of parameters that are not quantized, by their names in the model with
            packed linears; other parameters stay. Only the data of a parameter is replaced, so
            whoever shares the parameter sees the new value too.
    """

    linears: Mapping[str, nn.Module]
    values: Mapping[str, Tensor] = field(default_factory=dict)

    def put(self, model: nn.Module) -> None:
        """Change the model in place."""
        replace_modules(model, self.linears)
        for name, value in self.values.items():
            model.get_parameter(name).data = value

    @contextmanager
    def within(self, model: nn.Module) -> Iterator[None]:
        """Change the model within this context; it is restored on exit."""
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
    shared: Mapping[str, str] | None = None,
) -> None:
    """Replace linears of a linearized model in place; arguments as :func:`packed_linears`."""
    Replacement(packed_linears(model, weights, records, linears_of, shared)).put(model)
    untie_replaced(model)


def untie_replaced(model: nn.Module) -> None:
    """Forget which weights Transformers ties, where packed linears have replaced them.

    They are no parameters any more; packed linears share them by themselves.
    """
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in [name for name in tied if name not in parameters]:
        del tied[name]


def install_from(model: nn.Module, config: CheckpointConfig, reader: Reader) -> None:
    """Put the packed linears and sites of a checkpoint into a model, in place.

    Args:
        model: unquantized; its weights may be on the meta device.
        config: the checkpoint's configuration.
        reader: the checkpoint's tensors.

    Raises:
        CheckpointError: the checkpoint has a linear that the model lacks or has in another shape,
            holds a tensor that the model does not read, or breaks a rule of the format.
    """
    linearize(model)
    reader.require_listed(config.holders)
    weights: dict[str, PackedWeight] = {}
    records = {}
    with torch.device("cpu"):
        for owner, site in config.sites.items():
            records[owner], group = reader.group(owner, site, config.shared)
            for name, weight in group.items():
                _check_shape(model, name, weight)
            weights |= {n: weight for n, weight in group.items() if n not in config.shared}
        linears_of = {owner: site.linears for owner, site in config.sites.items()}
        install(model, weights, records, linears_of, config.shared)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    reader.require_only(name for name in model.state_dict() if name not in tied)


def _check_shape(model: nn.Module, name: str, packed: PackedWeight) -> None:
    try:
        linear = model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{name}: the model has no such layer") from error
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"{name}: must be a linear layer, got {type(linear).__name__}")
    expected, actual = (linear.out_features, linear.in_features), (packed.n, packed.k)
    if expected != actual:
        raise CheckpointError(
            f"{name}.weight_shape: must be {expected} for this model, got {actual}"
        )


def sharing_copy(model: nn.Module) -> nn.Module:
    """Copy the modules of a model, sharing its parameters and buffers.

    Layers of the copy can be replaced without changing the model; the other layers take no memory.
    """
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)
