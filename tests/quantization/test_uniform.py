"""Baselines of one format are the paper's arithmetic on the mixed model's sites."""

import pytest
import torch
from conftest import FAMILIES, make_model
from small_runs import quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fgmp import InputError
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.store import config_of
from fgmp.quantization.uniform import uniform


@pytest.mark.parametrize(("name", "fp4"), [("fp8", 0.0), ("nvfp4", 1.0)])
def test_uniform_baselines(name: str, fp4: float, tokens: Tensor) -> None:
    mixed = quantized(tokens)
    base = uniform(make_model("llama"), mixed, name)
    assert base.training == mixed.training
    assert {m.packed.mode for m in mixed_linears(base).values()} == {name.removeprefix("nv")}
    assert list(sites(base)) == list(sites(mixed))
    for owner, site in sites(base).items():
        assert site.record.r == sites(mixed)[owner].record.r
        assert site.record.threshold == (THRESHOLD_ALL_FP4 if fp4 else THRESHOLD_ALL_FP8)
        assert (site.record.rule, site.record.scales) == ("difference", "max")
        assert (sites(mixed)[owner].rule, sites(mixed)[owner].scales) == ("benefit", "search")
    assert config_of(base).recipe["policy"] == name
    result = config_of(base).result
    assert (result["fp4_weights"], result["fp4_activations"]) == (fp4, fp4)
    for linear, other in zip(
        mixed_linears(base).values(), mixed_linears(mixed).values(), strict=True
    ):
        assert linear.packed.t == other.packed.t
    asked = quantized(tokens, policy=name, rule="difference", scales="max", compensate=False)
    for key, linear in mixed_linears(asked).items():
        assert torch.equal(linear.weight, mixed_linears(base)[key].weight)
    with torch.no_grad():
        assert torch.equal(base(input_ids=tokens).logits, asked(input_ids=tokens).logits)


def test_baselines_are_of_the_model_that_was_quantized(tokens: Tensor) -> None:
    """Also where all that the checkpoint knows is there, and the model has more layers."""
    mixed = quantized(tokens)
    config = FAMILIES["llama"]()
    config.num_hidden_layers = 3
    longer = AutoModelForCausalLM.from_config(config)
    message = "LlamaForCausalLM: not a quantized LlamaForCausalLM: model.layers.2.* got none and"
    with pytest.raises(InputError, match=message):
        uniform(longer, mixed, "fp8")


def test_mixed_lies_between_its_baselines(tokens: Tensor) -> None:
    """Nearer to the original than NVFP4, not as near as FP8: mean squared logit errors.

    Compensated it is nearer than FP8 on the tokens that it was compensated on.
    """
    mixed = quantized(tokens, compensate=False)
    models: dict[str, nn.Module] = {
        "fp8": uniform(make_model("llama"), mixed, "fp8"),
        "fgmp": mixed,
        "nvfp4": uniform(make_model("llama"), mixed, "nvfp4"),
    }
    with torch.no_grad():
        expected = make_model("llama")(input_ids=tokens).logits
        errors = {
            name: (model(input_ids=tokens).logits - expected).square().mean().item()
            for name, model in models.items()
        }
    assert errors["fp8"] < errors["fgmp"] < errors["nvfp4"]
    fewer = quantized(tokens, fp4=0.3, compensate=False)
    with torch.no_grad():
        assert (fewer(input_ids=tokens).logits - expected).square().mean() < errors["fgmp"]
