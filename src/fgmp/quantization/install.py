"""Install an assignment in the model, and describe it in the checkpoint's configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fgmp.assign.activations import ActivationAssignment
from fgmp.formats.spec import stream_bits
from fgmp.model.convert import Replacement, packed_linears, untie_replaced
from fgmp.model.linear import weight_holders
from fgmp.model.store import CONFIG_ATTRIBUTE, bytes_to_save
from fgmp.model.transformers import mark_quantized
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.pack.planes import PackedWeight
from fgmp.recipe import Recipe


@dataclass(frozen=True)
class Assignment:
    """Packed weights, thresholds and parameters of a quantized model, not yet installed.

    Attributes:
        weights: packed weights by linear.
        activations: site constants with thresholds.
        linears_of: names of the linears that read a site's tensor, by the site's owner.
        parameters: new values of parameters that are not quantized; see ``Replacement.values``.
        shared: linears that use the weight of another, and the name of that one, by name.
    """

    weights: dict[str, PackedWeight]
    activations: ActivationAssignment
    linears_of: dict[str, list[str]]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    shared: Mapping[str, str] = field(default_factory=dict)

    def replacement(self, model: nn.Module) -> Replacement:
        """The packed linears and parameters that replace the model's; not yet put in place."""
        sites = self.activations.records
        linears = packed_linears(model, self.weights, sites, self.linears_of, self.shared)
        return Replacement(linears, self.parameters)

    @property
    def bits(self) -> float:
        """Mean of bits per weight, every byte counted, and per activation value, flags counted."""
        packed = self.weights.values()
        weights = 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)
        return (weights + stream_bits(self.activations.fp4_fraction)) / 2


def install(
    model: nn.Module, assignment: Assignment, recipe: Recipe, matrices: Mapping[str, int]
) -> CheckpointConfig:
    """Put an assignment into a linearized model, in place; returns its configuration.

    Args:
        model: its linears are replaced; ``fgmp.model.store.config_of`` finds the configuration.
        assignment: the assignment to install.
        recipe: stored in the configuration.
        matrices: elements of every matmul parameter of the unquantized model, by name.
    """
    assignment.replacement(model).put(model)
    untie_replaced(model)
    activations = assignment.activations
    packed = weight_holders(model)
    elements = sum(m.packed.n * m.packed.k for m in packed.values())
    fp8 = sum(int(m.packed.is_fp8().sum()) for m in packed.values())
    blocks = sum(m.packed.is_fp8().numel() for m in packed.values())
    config = CheckpointConfig(
        sites={
            owner: SiteConfig(
                names,
                activations.records[owner].rule,
                activations.fp4_fractions[owner],
                activations.records[owner].scales,
            )
            for owner, names in assignment.linears_of.items()
        },
        shared=dict(assignment.shared),
        recipe=recipe.to_dict(),
        result={
            "fp4_weights": 1 - fp8 / blocks,
            "fp4_activations": activations.fp4_fraction,
            "bits_per_weight": 8 * sum(m.packed.nbytes for m in packed.values()) / elements,
            "tensor_bytes": sum(bytes_to_save(model).values()),
            "quantized_share": elements / sum(matrices.values()),
            "unquantized": sorted(n for n in matrices if n.removesuffix(".weight") not in packed),
        },
    )
    setattr(model, CONFIG_ATTRIBUTE, config)
    mark_quantized(model, config)
    return config
