"""Which format every site gets, and what is refused."""

import pytest
import torch
from torch import nn

from fgmp import InputError
from fgmp.export.plan import plan, require_options
from fgmp.formats.activation import Site
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import quantize_weight
from fgmp.model.linear import ActivationSite, MixedLinear, mixed_linears, sites
from fgmp.pack.planes import pack

ALL = {"fp4": THRESHOLD_ALL_FP4, "fp8": THRESHOLD_ALL_FP8, "mixed": 1000}


def model(*layers: tuple[str, list[int]], k: int = 32) -> nn.Module:
    """Sites ``s0``, ``s1``: the mode of activations, and FP8 blocks of four of every linear."""
    root = nn.Module()
    for i, (activations, counts) in enumerate(layers):
        site = ActivationSite(Site(1.0, torch.full((k,), 0x38).byte(), 1.0, ALL[activations]))
        for j, count in enumerate(counts):
            codes = quantize_weight(torch.randn(2, k), 0.01)
            is_fp8 = torch.arange(4).reshape(2, 2) < count
            linear = MixedLinear(pack(codes, is_fp8), None, site, owns_site=j == 0)
            root.add_module(f"s{i}l{j}", linear)
    return root


def modes_of(root: nn.Module, mixed: str | None = None, **obstacles: str) -> dict[str, str]:
    linears = mixed_linears(root)
    linears_of = {owner: [n for n in linears if n[:2] == owner[:2]] for owner in sites(root)}
    return plan(linears, sites(root), linears_of, obstacles, "compressed-tensors", mixed).modes


def test_uniform_checkpoints_keep_their_format() -> None:
    for mixed in (None, "per-layer"):
        assert set(modes_of(model(("fp4", [0, 0]), ("fp4", [0])), mixed).values()) == {"fp4"}
        assert set(modes_of(model(("fp8", [4, 4]), ("fp8", [4])), mixed).values()) == {"fp8"}


@pytest.mark.parametrize(
    ("layers", "first"),
    [
        ([("fp4", [0, 1])], "s0l1.weight: has FP4 and FP8 blocks"),
        ([("mixed", [0, 0])], "s0l0.input_site: has FP4 and FP8 blocks"),
        ([("fp8", [0])], "s0l0.input_site: has all FP8, others all FP4"),
        ([("fp4", [0]), ("fp8", [4])], "s1l0.weight: has all FP8, others all FP4"),
    ],
)
def test_mixed_checkpoints_are_refused(layers: list[tuple[str, list[int]]], first: str) -> None:
    with pytest.raises(InputError, match=f"{first}.*--to dense, or .* --mixed per-layer") as error:
        modes_of(model(*layers))
    assert "\n" not in str(error.value)


def test_the_majority_of_a_site_decides() -> None:
    root = model(("mixed", [4, 0]), ("mixed", [4, 1]), ("mixed", [3]), ("fp8", [0]))
    # Half of the blocks, as in s0, is not more than half.
    expected = {"s0l0": "fp4", "s0l1": "fp4", "s1l0": "fp8", "s1l1": "fp8"}
    assert modes_of(root, "per-layer") == {**expected, "s2l0": "fp8", "s3l0": "fp4"}


def test_k_must_fit() -> None:
    message = r"s0l0.weight: K must be a multiple of 16 .* got 30; choose --to dense"
    with pytest.raises(InputError, match=message):
        modes_of(model(("fp4", [0]), k=30))
    assert modes_of(model(("fp8", [4]), k=30)) == {"s0l0": "fp8"}


def test_obstacles_are_named() -> None:
    with pytest.raises(InputError, match="s0l0: compressed-tensors cannot represent it: because"):
        modes_of(model(("fp4", [0])), s0l0="because")


def test_options() -> None:
    for target in ("compressed-tensors", "modelopt", "dense"):
        require_options(target, None)
    require_options("compressed-tensors", "per-layer")
    for target, mixed, message in (
        ("gguf", None, "to must be one of compressed-tensors, modelopt, dense, got 'gguf'"),
        ("compressed-tensors", "yes", "mixed must be per-layer, got 'yes'"),
        ("modelopt", "per-layer", "needs the target compressed-tensors, got modelopt"),
        ("dense", "per-layer", "needs the target compressed-tensors, got dense"),
    ):
        with pytest.raises(InputError, match=message):
            require_options(target, mixed)
