"""Small quantized models, and their blocks and bytes counted by the definition.

Weights are counted block by block in the packed planes. Activations are counted by running the
resulting sites over the activations of the unquantized model.
"""

import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.formats.activation import quantize as quantize_activation
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.losses import causal_lm_loss
from fgmp.model.select import linearize
from fgmp.model.store import tensors_to_save

POINTS = 0.01


def quantized(tokens: Tensor, family: str = "llama", **recipe: object) -> nn.Module:
    """A small model quantized with scales rounded to nearest, unless ``recipe`` says otherwise."""
    return fgmp.quantize(make_model(family), tokens, Recipe(**{"clip": "off", **recipe}))


def weight_blocks(model: nn.Module) -> tuple[int, int]:
    """FP4 blocks and all blocks of all weights."""
    flags = [m.packed.is_fp8() for m in mixed_linears(model).values()]
    return sum(int((~f).sum()) for f in flags), sum(f.numel() for f in flags)


def weight_masks(model: nn.Module) -> Tensor:
    """Which weight blocks are FP8, of all weights in one row."""
    return torch.cat([m.packed.is_fp8().flatten() for m in mixed_linears(model).values()])


@torch.no_grad()
def activation_blocks(model: nn.Module, family: str, tokens: Tensor) -> dict[str, list[int]]:
    """FP4 blocks and all blocks, by site, of the unquantized model's activations."""
    original = make_model(family)
    linearize(original)
    counts = {owner: [0, 0] for owner in sites(model)}
    for owner, site in sites(model).items():

        def count(_: nn.Module, args: tuple[Tensor], owner: str = owner, site=site) -> None:
            is_fp8 = quantize_activation(args[0], site.record).is_fp8
            counts[owner][0] += int((~is_fp8).sum())
            counts[owner][1] += is_fp8.numel()

        original.get_submodule(owner).register_forward_pre_hook(count)
    for sample in tokens:
        original(input_ids=sample[None])
    return counts


def share(counts: dict[str, list[int]]) -> float:
    """Share of FP4 blocks over all sites."""
    return sum(c[0] for c in counts.values()) / sum(c[1] for c in counts.values())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that saving would write."""
    return sum(t.nbytes for t in tensors_to_save(model).values())


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    """Nats per prediction."""
    return sum(causal_lm_loss(model, t)[0].item() for t in tokens) / tokens[:, 1:].numel()


@torch.no_grad()
def likely_tokens(tokens: Tensor, family: str = "llama") -> Tensor:
    """Windows that start as ``tokens`` do and continue as the model itself finds most likely.

    On these a random model cannot become better by chance, only worse.
    """
    model, likely = make_model(family), tokens.clone()
    for i in range(1, likely.shape[1]):
        logits = model(input_ids=likely[:, :i]).logits
        likely[:, i] = logits[:, -1].argmax(-1)
    return likely


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bits in every tensor."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(b[name], a[name]) for name in a)
