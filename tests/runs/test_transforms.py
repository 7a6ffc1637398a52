"""The transforms of ``runs/transforms.py`` leave a model's function alone."""

import pytest
import torch
import transforms
from conftest import make_model
from torch import Tensor, nn

from fgmp.errors import InputError


def a_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A Llama with two query heads per value head, tied embeddings and channels of all sizes."""
    model = make_model("llama").requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            generator = torch.Generator().manual_seed(len(name))
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 3 + 0.1)
        elif "v_proj" in name or "up_proj" in name:
            parameter.mul_(torch.logspace(-1, 1, len(parameter)).roll(7).unsqueeze(-1))
    return model.to(dtype)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


def changed(model: nn.Module, weight: str) -> bool:
    return not torch.equal(model.get_parameter(weight).float(), a_model().get_parameter(weight))


READERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
"""A reader of each seam."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_migration_is_exact(dtype: torch.dtype, tokens: Tensor) -> None:
    """To the bit: products with powers of two round nothing, and sums see the same terms."""
    original = a_model(dtype)
    before = logits(original, tokens)
    moved = transforms.migrate(a_model(dtype), tokens, (transforms.smoothquant(0.5),))
    assert torch.equal(logits(moved, tokens), before)
    for name in READERS:
        weight = moved.get_parameter(f"model.layers.1.{name}.weight").float()
        ratio = weight / original.get_parameter(f"model.layers.1.{name}.weight").float()
        assert (ratio == ratio[0]).all() and len(ratio[0].unique()) > 1
        assert (ratio[0].log2() % 1 == 0).all()


def test_the_candidate_of_least_error_is_taken(tokens: Tensor) -> None:
    taken = transforms.migrate(a_model(), tokens)
    original = a_model()
    seams = list(transforms.seams(original))
    inputs = transforms.seam_inputs(original, seams, tokens)
    better = 0
    for seam, x, after in zip(seams, inputs, transforms.seams(taken), strict=True):
        one = torch.ones(x.shape[1])
        s = after.readers[0].weight[0] / seam.readers[0].weight[0]
        migrated, unchanged = (transforms.output_error(seam, x, scale) for scale in (s, one))
        assert migrated <= unchanged
        better += migrated < unchanged
    assert better > 0
    same = transforms.migrate(a_model(), tokens, transforms.CANDIDATES[:1])
    assert not any(changed(same, f"model.layers.0.{name}.weight") for name in READERS)


@pytest.mark.parametrize("change", ["reorder", "rotate", "rotate_blocks"])
def test_orders_and_rotations(change: str, tokens: Tensor) -> None:
    """To what rounding and another order of summation leave: some 2**-20 of logits near 10."""
    before = logits(a_model(), tokens)
    after = getattr(transforms, change)(a_model(), tokens)
    assert (logits(after, tokens) - before).abs().max() < 1e-4
    for name in READERS[:3]:
        assert changed(after, f"model.layers.1.{name}.weight")


def test_rotations_are_orthogonal() -> None:
    for width, block, span in ((96, None, 32), (96, 16, 16), (8, 16, 8), (172, 16, 4)):
        r = transforms.rotation(width, block, seed=0)
        assert torch.allclose(r @ r.T, torch.eye(width, dtype=torch.float64), atol=1e-12)
        assert ((r != 0).sum(0) == span).all()


def test_sorting_puts_like_channels_together(tokens: Tensor) -> None:
    """The input of a down projection comes out in order of g^2 x^2."""
    model = transforms.reorder(a_model(), tokens)
    inputs = transforms.seam_inputs(model, list(transforms.seams(model)), tokens)
    sites = transforms.calibrate(model, transforms.quantizable(model), tokens).sites.values()
    (g2,) = (s.g2 for s in sites if s.linears == ["model.layers.1.mlp.down_proj"])
    harm = g2 * inputs[7].square().mean(0)
    assert (harm[1:] >= harm[:-1] * (1 - 1e-3)).all()


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="need a model of type llama, got gpt_neox"):
        list(transforms.seams(make_model("gpt_neox")))
