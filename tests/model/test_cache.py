"""A packed KV cache gives back fake-quantized keys and values, and holds the planes alone."""

import copy

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig

import fgmp
from fgmp.errors import InputError
from fgmp.evaluation.perplexity import next_token_log_probabilities
from fgmp.formats.activation import fake_quantize
from fgmp.formats.codec import decode_e4m3
from fgmp.formats.spec import FP8_BLOCK
from fgmp.model.cache import PackedCache, PackedLayer, packed_cache

KINDS = ("fp8", "nvfp4", "mixed")


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return make_model("llama")


def a_cache(model: nn.Module, kind: str, tokens: Tensor) -> PackedCache:
    return packed_cache(model, tokens[:, :16], kind)


def some_states(
    batch: int = 3, length: int = 7, seed: int = 0, **kind: torch.dtype
) -> list[Tensor]:
    """Keys and values, (B, 2, T, 16): two heads, magnitudes apart by channel."""
    g = torch.Generator().manual_seed(seed)
    loud = torch.logspace(-2, 0.5, 16)
    return [(torch.randn(batch, 2, length, 16, generator=g) * loud).to(**kind) for _ in range(2)]


def fake_quantized(layer: PackedLayer, states: list[Tensor]) -> list[Tensor]:
    """What docs/numerics.md makes of keys and values, by the reference."""
    found = []
    for site, x in zip(layer._sites, states, strict=True):
        rows = x.transpose(1, 2).flatten(2)
        units, _ = fake_quantize(rows, site.record)
        found.append(
            (units * site.record.t).view(*rows.shape[:2], 2, 16).transpose(1, 2).to(x.dtype)
        )
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_reads_are_fake_quantization(
    kind: str, dtype: torch.dtype, llama: nn.Module, tokens: Tensor
) -> None:
    layer = a_cache(llama, kind, tokens).layers[1]
    keys, values = some_states(dtype=dtype)
    # In pieces, as a prompt and then tokens come: what is stored never changes.
    for piece in (slice(0, 4), slice(4, 5), slice(5, 7)):
        read = layer.update(keys[:, :, piece], values[:, :, piece])
    for got, wanted in zip(read, fake_quantized(layer, [keys, values]), strict=True):
        assert got.dtype == dtype and got.is_contiguous() and torch.equal(got, wanted)
    whole = a_cache(llama, kind, tokens).layers[1]
    whole.update(keys, values)
    for one, other in zip(layer.packed, whole.packed, strict=True):
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(t, other.tensors()[name]) for name, t in one.tensors().items())
    if kind == "mixed":
        flags = torch.cat([p.is_fp8().flatten() for p in layer.packed])
        assert flags.any() and not flags.all()


def test_bytes(llama: nn.Module, tokens: Tensor) -> None:
    """8 bits a value, 4.5, or in between: flags of FP8 blocks, and a counter a row."""
    blocks, rows, constants = 2 * 21 * 2, 2 * 21, 2 * (16 + 4)
    held = {}
    for kind in KINDS:
        layer = a_cache(llama, kind, tokens).layers[0]
        layer.update(*some_states())
        assert layer.nbytes == sum(t.nbytes for p in layer.packed for t in p.tensors().values())
        assert not isinstance(layer.keys, Tensor) and not isinstance(layer.values, Tensor)
        held[kind] = layer
    assert held["fp8"].nbytes == 16 * blocks + constants
    assert held["nvfp4"].nbytes == 9 * blocks + constants
    wide = sum(int((p.scale == FP8_BLOCK).sum()) for p in held["mixed"].packed)
    assert 0 < wide < blocks
    assert held["mixed"].nbytes == 9 * blocks + 8 * wide + 4 * (rows + 2) + constants


def test_one_threshold_for_all(llama: nn.Module, tokens: Tensor) -> None:
    cache = packed_cache(llama, tokens, "mixed", fp4=0.6)
    with torch.no_grad():
        llama(input_ids=tokens, past_key_values=cache, use_cache=True)
    packed = [p.is_fp8() for layer in cache.layers for p in layer.packed]
    shares = [float((~flags).double().mean()) for flags in packed]
    # Later layers read what the cache changed before them, so not exactly the calibrated share.
    assert float((~torch.cat(packed)).double().mean()) == pytest.approx(0.6, abs=0.02)
    assert max(shares) - min(shares) > 0.05
    limits = {
        site.record.threshold * site.record.t**2 * site.record.gamma
        for layer in cache.layers
        for site in layer._sites
    }
    # Each site holds it as an integer in its own unit, which floors it.
    assert max(limits) == pytest.approx(min(limits), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_beams_and_rollbacks(kind: str, llama: nn.Module, tokens: Tensor) -> None:
    cache = a_cache(llama, kind, tokens)
    for layer in cache.layers:
        layer.update(*some_states())
    layer = cache.layers[0]
    keys, values = layer.read()
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    assert torch.equal(layer.read()[0], keys[order]) and torch.equal(layer.read()[1], values[order])
    cache.batch_repeat_interleave(2)
    assert torch.equal(layer.read()[0], keys[order].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([5, 1]))
    assert torch.equal(layer.read()[1], values[[0, 2]])
    before = cache.nbytes
    cache.crop(-3)
    assert cache.get_seq_length() == 4 and cache.nbytes < before
    assert torch.equal(layer.read()[1], values[[0, 2]][:, :, :4])
    more = some_states(batch=2, length=2, seed=5)
    read = layer.update(*more)
    assert torch.equal(read[0][:, :, 4:], fake_quantized(layer, more)[0])
    cache.crop(-99)
    assert cache.get_seq_length() == 0 and cache.nbytes == 0
    cache.reset()
    assert cache.bytes_per_token == 0 and layer.update(*more)[0].shape == (2, 2, 2, 16)
    cache.crop(-2)
    assert layer.update(*some_states(batch=5))[0].shape == (5, 2, 7, 16)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "qwen3"])
def test_generate(family: str, tokens: Tensor) -> None:
    """An FP8 cache moves logits by less than FP8 moves keys, and greedy text seldom."""
    model = make_model(family)
    cache = a_cache(model, "fp8", tokens)
    exact = next_token_log_probabilities(model, tokens[:2])
    near = next_token_log_probabilities(model, tokens[:2], cache)
    assert not torch.equal(exact, near)
    assert (exact - near).abs().max() < 0.1 * (exact.max() - exact.min())
    cache.reset()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    made = model.generate(tokens[:1, :8], past_key_values=cache, **options)
    assert made.shape == (1, 14) and cache.get_seq_length() == 13
    # The same tokens, all at once: what generating saw is what evaluating sees.
    fresh = next_token_log_probabilities(model, made, a_cache(model, "fp8", tokens))
    assert torch.equal(fresh[0, 7:].argmax(-1), made[0, 8:])
    cache.reset()
    beams = model.generate(tokens[:2, :8], past_key_values=cache, num_beams=3, **options)
    assert beams.shape == (2, 14)


def test_sensitivities_pass_packed_linears(tokens: Tensor) -> None:
    """Gradients at keys and values: autograd's, or straight through a packed model's linears."""
    model = make_model("llama")
    sites = [site.record for site in a_cache(model, "mixed", tokens).layers[0]._sites]
    cache = DynamicCache(config=model.config)
    sample = tokens[:1, :16]
    logits = model(input_ids=sample, past_key_values=cache, use_cache=True).logits[0, :-1]
    values = cache.layers[0].values
    loss = -logits.log_softmax(-1).gather(-1, sample[0, 1:, None]).sum()
    (gradient,) = torch.autograd.grad(loss, values)
    wanted = gradient.square().sum((0, 2)).flatten() / 15
    alone = packed_cache(model, sample, "mixed").layers[0]._sites[1].record
    found = decode_e4m3(alone.sensitivity) * alone.gamma
    # Sensitivities are E4M3 codes: half a unit of three bits off, below the normal ones more.
    assert torch.allclose(found, wanted, rtol=2**-4, atol=2**-10 * alone.gamma)
    assert all(p.grad is None for p in model.parameters())

    packed = fgmp.quantize(model, tokens, fgmp.Recipe(fp4=0.0, policy="fp8", clip="off"))
    before = packed(input_ids=sample, use_cache=False).logits
    again = [site.record for site in a_cache(packed, "mixed", tokens).layers[0]._sites]
    for one, other in zip(sites, again, strict=True):
        near = [decode_e4m3(s.sensitivity).double() * s.gamma for s in (one, other)]
        assert torch.corrcoef(torch.stack(near))[0, 1] > 0.98
    assert torch.equal(packed(input_ids=sample, use_cache=False).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_goes_on_training(kind: str, tokens: Tensor) -> None:
    model = make_model("llama").train()
    model.get_submodule("model.layers.0").eval()
    before = [module.training for module in model.modules()]
    a_cache(model, kind, tokens)
    assert [module.training for module in model.modules()] == before


def test_a_cache_can_be_copied(llama: nn.Module, tokens: Tensor) -> None:
    cache = a_cache(llama, "mixed", tokens)
    cache.layers[0].update(*some_states())
    twin = copy.deepcopy(cache)
    twin.layers[0].update(*some_states(seed=1))
    assert (cache.get_seq_length(), twin.get_seq_length()) == (7, 14)


def test_refusals(llama: nn.Module, tokens: Tensor) -> None:
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    narrow = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4))
    sliding = AutoModelForCausalLM.from_config(
        MistralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, sliding_window=8)
    )
    cases = [
        (narrow, "fp8", 0.7, r"head size that is a multiple of 16, got 8 \(keys of layer 0\)"),
        (sliding, "fp8", 0.7, "whole context in every layer, got DynamicSlidingWindowLayer in"),
        (llama, "int4", 0.7, "one of fp8, nvfp4, mixed, got 'int4'"),
        (llama, "mixed", 1.0, "fraction of FP4 between 0 and 1, got 1.0"),
    ]
    for model, kind, fp4, message in cases:
        with pytest.raises(InputError, match=message):
            packed_cache(model, tokens, kind, fp4)
    for wrong in (tokens[:0], tokens[0], tokens[:, :1]):
        with pytest.raises(InputError, match=r"windows \(B, L\) of at least 2 tokens, got shape"):
            packed_cache(llama, wrong, "fp8")
    broken = make_model("llama")
    broken.get_submodule("model.layers.1.self_attn.v_proj").weight.data[0, 0] = torch.inf
    with pytest.raises(InputError, match="values of layer 1 are not finite"):
        packed_cache(broken, tokens, "fp8")
    layer = a_cache(llama, "nvfp4", tokens).layers[0]
    keys, values = some_states()
    keys[0, 0, 0, 0] = torch.inf
    with pytest.raises(InputError, match="must be finite to be kept in NVFP4"):
        layer.update(keys, values)
    mixed = a_cache(llama, "fp8", tokens).layers[0]
    mixed.update(*some_states())
    with pytest.raises(InputError, match=r"\(3, 2, 16\), got \(2, 2, 16\); reset it first"):
        mixed.update(*some_states(batch=2))
    with pytest.raises(InputError, match="cannot be offloaded"):
        layer.offload()
    with pytest.raises(InputError, match="crop takes minus the tokens"):
        layer.crop(3)
