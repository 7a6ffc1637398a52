"""An assignment is installed as it is, and the configuration counts what was installed."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fgmp import Recipe
from fgmp.assign.activations import ActivationAssignment
from fgmp.formats.activation import Site, multiplier
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.model.linear import MixedLinear, mixed_linears, sites
from fgmp.model.select import matrices
from fgmp.model.store import config_of, tensors_to_save
from fgmp.pack.planes import PackedWeight, pack
from fgmp.quantization.install import Assignment, install

SHAPES = {"left": (24, 40), "right": (8, 40), "out": (16, 32)}
LINEARS_OF = {"left": ["left", "right"], "out": ["out"]}


class Net(nn.Module):
    """Two linears that read one tensor, one after them, and one that stays as it is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(40)
        self.left, self.right = nn.Linear(40, 24), nn.Linear(40, 8, bias=False)
        self.out, self.last = nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(self.out(torch.cat([self.left(x), self.right(x)], -1)).relu())


def masks() -> dict[str, Tensor]:
    """Which weight blocks are FP8: all of the last linear's, some of the others'."""
    g = torch.Generator().manual_seed(1)
    shapes = {name: (n, -(-k // 16)) for name, (n, k) in SHAPES.items()}
    chosen = {name: torch.rand(shape, generator=g) < 0.3 for name, shape in shapes.items()}
    return {**chosen, "out": torch.ones_like(chosen["out"])}


def packed_weights(model: nn.Module) -> dict[str, PackedWeight]:
    packed = {}
    for name, mask in masks().items():
        weight = model.get_parameter(f"{name}.weight").detach()
        packed[name] = pack(quantize_weight(weight, tensor_scale(weight.abs().max().item())), mask)
    return packed


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def assignment(net: Net) -> Assignment:
    records = {
        owner: Site(multiplier(4.0), torch.full((k,), 0x38, dtype=torch.uint8), 1.0, threshold)
        for owner, k, threshold in (("left", 40, 1 << 40), ("out", 32, 7))
    }
    activations = ActivationAssignment(records, {"left": 0.75, "out": 0.25}, 0.5)
    return Assignment(
        packed_weights(net), activations, LINEARS_OF, {"norm.bias": torch.full((40,), 0.5)}
    )


def test_packed_linears_replace_the_models(net: Net, assignment: Assignment) -> None:
    before = copy.deepcopy(net)
    install(net, assignment, Recipe(), matrices(net))
    assert list(mixed_linears(net)) == ["left", "right", "out"]
    for name, linear in mixed_linears(net).items():
        assert all(
            torch.equal(plane, assignment.weights[name].tensors()[key])
            for key, plane in linear.packed.tensors().items()
        )
        bias = before.get_submodule(name).bias
        assert (linear.bias is None) == (bias is None)
        assert bias is None or torch.equal(linear.bias, bias)
    assert net.right.input_site is net.left.input_site  # one tensor is quantized once
    assert list(sites(net)) == ["left", "out"]
    for owner, site in sites(net).items():
        record = assignment.activations.records[owner]
        assert (site.record.r, site.record.threshold) == (record.r, record.threshold)
    assert torch.equal(net.norm.bias, torch.full((40,), 0.5))
    assert type(net.last) is nn.Linear and torch.equal(net.last.weight, before.last.weight)
    with torch.no_grad():
        x = torch.randn(5, 40)
        assert (net(x) - before(x)).abs().max() > 0


def test_a_replacement_changes_nothing_before_it_is_put(net: Net, assignment: Assignment) -> None:
    x = torch.randn(5, 40)
    before = net(x)
    replacement = assignment.replacement(net)
    assert torch.equal(net(x), before) and not mixed_linears(net)
    with torch.no_grad(), replacement.within(net):
        within = net(x)
        assert isinstance(net.left, MixedLinear)
    assert torch.equal(net(x), before)
    install(net, assignment, Recipe(), matrices(net))
    assert torch.equal(net(x), within)


def test_bits_count_every_byte_and_flag(assignment: Assignment) -> None:
    elements = sum(n * k for n, k in SHAPES.values())
    size = sum(t.nbytes for w in assignment.weights.values() for t in w.tensors().values())
    # Half of the activation blocks in FP4, and a flag for each block of 16.
    activations = 0.5 * 4.5 + 0.5 * 8 + 1 / 16
    assert assignment.bits == pytest.approx((8 * size / elements + activations) / 2)


def test_the_configuration_counts_what_was_installed(net: Net, assignment: Assignment) -> None:
    recipe = Recipe(fp4=0.6, clip="off")
    config = install(net, assignment, recipe, matrices(net))
    assert config is config_of(net) and config.recipe == recipe.to_dict()
    flags = torch.cat([mask.flatten() for mask in masks().values()])
    elements = sum(n * k for n, k in SHAPES.values())
    size = sum(weight.nbytes for weight in assignment.weights.values())
    assert config.result == {
        "fp4_weights": pytest.approx(1 - flags.double().mean().item()),
        "fp4_activations": 0.5,
        "bits_per_weight": 8 * size / elements,
        "tensor_bytes": sum(t.nbytes for t in tensors_to_save(net).values()),
        "quantized_share": elements / (elements + 16 * 4),
        "unquantized": ["last.weight"],
    }
    assert {owner: site.linears for owner, site in config.sites.items()} == LINEARS_OF
    assert {owner: site.fp4_fraction for owner, site in config.sites.items()} == {
        "left": 0.75,
        "out": 0.25,
    }
    for site in config.sites.values():
        assert (site.rule, site.scales) == ("benefit", "search")
