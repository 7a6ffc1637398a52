"""Which linears a layer of vLLM consists of, and what is refused."""

import pytest

from fgmp.errors import CheckpointError
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig
from fgmp.serving.linears import Linears

JOINED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


def linears(**sites: list[str]) -> Linears:
    """Sites by owner, with dots written as two underscores."""
    configs = {
        owner.replace("__", "."): SiteConfig(names, "benefit", 0.7, "max")
        for owner, names in sites.items()
    }
    return Linears(CheckpointConfig(configs), ["a.o_proj.weight", "norm.weight"])


def test_a_joined_layer() -> None:
    names = ["a.q_proj", "a.k_proj", "a.v_proj"]
    some = linears(a__q_proj=names, a__down_proj=["a.down_proj"])
    parts = some.take("a.qkv_proj", JOINED)
    assert parts is not None and (parts.linears, parts.owner) == (tuple(names), "a.q_proj")
    with pytest.raises(CheckpointError, match=r"a.down_proj: no layer of vLLM's model takes"):
        some.require_all_taken()
    parts = some.take("a.down_proj", JOINED)
    assert parts is not None and parts.linears == ("a.down_proj",)
    some.require_all_taken()
    assert not some.mark_read(parts)


def test_a_linear_that_is_stored_joined() -> None:
    parts = linears(a__qkv_proj=["a.qkv_proj"]).take("a.qkv_proj", JOINED)
    assert parts is not None and parts.linears == ("a.qkv_proj",)


def test_renamed_modules() -> None:
    some = linears(a__mlp__w=["a.mlp.w"])
    some.rename(lambda name: name.replace("a.", "model.b."))
    some.rename(lambda name: name.replace(".mlp.", ".moe."))
    parts = some.take("model.b.moe.w", {})
    assert parts is not None and parts.linears == ("a.mlp.w",)
    some.require_weight("model.b.o_proj", {})


def test_what_is_not_quantized_must_be_stored() -> None:
    some = linears(a__q_proj=["a.q_proj"])
    assert some.take("a.o_proj", JOINED) is None
    some.require_weight("a.o_proj", JOINED)
    with pytest.raises(CheckpointError, match=r"a.gate_up_proj: vLLM needs a.gate_proj"):
        some.require_weight("a.gate_up_proj", JOINED)


def test_partly_quantized_layers_are_refused() -> None:
    some = linears(a__q_proj=["a.q_proj", "a.k_proj"])
    with pytest.raises(CheckpointError, match=r"all of q_proj, k_proj, v_proj .* a.v_proj is not"):
        some.take("a.qkv_proj", JOINED)


def test_layers_of_two_sites_are_refused() -> None:
    some = linears(a__gate_proj=["a.gate_proj"], a__up_proj=["a.up_proj"])
    with pytest.raises(CheckpointError, match=r"must read one site.* got a.gate_proj, a.up_proj"):
        some.take("a.gate_up_proj", JOINED)
