"""Bytes and scales of other formats, compared with compressed-tensors' own packer and reader."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fgmp.export.layouts import LAYOUTS, compressed_tensors, modelopt
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.pack.planes import PackedWeight, pack, unpack_units

pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.compressors.naive_quantized import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

R = torch.tensor(1.75)
ROUNDINGS = 3 * 2.0**-24
"""Relative error of a value: the reciprocal of t, the quotient of scales, and the product."""


def packed(mode: str, k: int = 64) -> PackedWeight:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, k, generator=generator) * 0.02
    weight[5, 16:32] = 0.0
    weight[6, 32:48] *= -1e-9
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    return pack(codes, torch.full_like(codes.scale, mode == "fp8").bool())


def scheme(mode: str) -> QuantizationScheme:
    config = LAYOUTS["compressed-tensors"].configuration({"x": mode}, [])
    return QuantizationConfig(**config).config_groups["group_0"]


def values(weight: PackedWeight) -> Tensor:
    return unpack_units(weight) * weight.t


def test_nvfp4_bytes_are_those_of_the_packer() -> None:
    weight = packed("fp4")
    tensors = compressed_tensors(weight, R)
    scale = tensors["weight_scale"]
    assert scale.dtype == torch.float8_e4m3fn and torch.equal(scale.view(torch.uint8), weight.scale)
    # The packer takes E2M1 values, and writes a negative zero as zero.
    units = unpack_units(weight)
    elements = units / scale.float().repeat_interleave(16, -1)
    theirs = pack_fp4_to_uint8(elements + 0.0)
    ours = tensors["weight_packed"]
    for shift in (0, 4):
        mine, other = ours >> shift & 0xF, theirs >> shift & 0xF
        assert torch.equal(torch.where(mine == 8, 0, mine), torch.where(other == 8, 0, other))
    # Their compressor chooses the same codes from our values and scales.
    state = {
        "weight": values(weight),
        "weight_scale": scale.float(),
        "weight_global_scale": tensors["weight_global_scale"],
    }
    compressed = NVFP4PackedCompressor.compress(state, scheme("fp4"))["weight_packed"]
    for shift in (0, 4):
        mine, other = ours >> shift & 0xF, compressed >> shift & 0xF
        assert torch.equal(torch.where(mine == 8, 0, mine), torch.where(other == 8, 0, other))


def test_nvfp4_is_read_as_our_values() -> None:
    weight = packed("fp4")
    state: Any = compressed_tensors(weight, R)
    assert {n: (t.dtype, list(t.shape)) for n, t in state.items()} == {
        "weight_packed": (torch.uint8, [32, 32]),
        "weight_scale": (torch.float8_e4m3fn, [32, 4]),
        "weight_global_scale": (torch.float32, [1]),
        "input_global_scale": (torch.float32, [1]),
    }
    state = {**state, "weight_scale": state["weight_scale"].float()}
    decoded = NVFP4PackedCompressor.decompress(state, scheme("fp4"))["weight"].float()
    expected = values(weight)
    # Their reader computes in bf16: three roundings to eight bits.
    assert torch.allclose(decoded, expected, rtol=3 * 2.0**-8, atol=0)
    assert not decoded[5, 16:32].any() and not decoded[6, 32:48].any()


def by_hand(elements: Tensor, scale: Tensor, tensor_scale: Tensor) -> Tensor:
    """e2m1 * s * scale from packed nibbles, in float64."""
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    nibbles = torch.stack([elements & 0xF, elements >> 4], -1).flatten(-2)
    magnitudes = grid[(nibbles & 7).long()] * torch.where(nibbles > 7, -1.0, 1.0)
    return magnitudes * scale.double().repeat_interleave(16, -1) * tensor_scale.double()


def test_directions_of_the_scales() -> None:
    weight = packed("fp4")
    ct, mo = compressed_tensors(weight, R), modelopt(weight, R)
    expected = values(weight).double()
    close = {"rtol": ROUNDINGS, "atol": 0}
    read = by_hand(ct["weight_packed"], ct["weight_scale"], 1 / ct["weight_global_scale"])
    assert torch.allclose(read, expected, **close)
    read = by_hand(mo["weight"], mo["weight_scale"], mo["weight_scale_2"])
    assert torch.allclose(read, expected, **close)
    assert ct["input_global_scale"].item() == 6 * R.item()
    assert mo["input_scale"].item() == pytest.approx(1 / (6 * R.item()), rel=2.0**-24)
    assert mo["input_scale"].shape == mo["weight_scale_2"].shape == ()
    assert torch.equal(mo["weight"], ct["weight_packed"])


@pytest.mark.parametrize("k", [64, 60])
def test_fp8_is_read_as_our_values(k: int) -> None:
    weight = packed("fp8", k)
    for name, layout in LAYOUTS.items():
        state: Any = layout.tensors(weight, R)
        assert state.keys() == {"weight", "weight_scale", "input_scale"}
        assert state["weight"].dtype == torch.float8_e4m3fn and state["weight"].shape == (32, k)
        read = state["weight"].float() * state["weight_scale"]
        # Two orders of rounding: e4m3 * fl32(6 t), and fl32(6 e4m3) * t.
        assert torch.allclose(read, values(weight), rtol=2 * 2.0**-24, atol=0)
        assert state["input_scale"].item() == pytest.approx(1 / R.item(), rel=2 * 2.0**-24)
        if name == "compressed-tensors":
            theirs = FloatQuantizationCompressor.decompress(dict(state), scheme("fp8"))["weight"]
            assert torch.allclose(theirs.float(), values(weight), rtol=2 * 2.0**-8, atol=0)
            again = FloatQuantizationCompressor.compress(
                {**state, "weight": values(weight)}, scheme("fp8")
            )["weight"]
            # Negative zeros are their zeros, too; no other byte differs.
            assert torch.equal(again.float(), state["weight"].float())


def test_configurations() -> None:
    ct, mo = LAYOUTS["compressed-tensors"], LAYOUTS["modelopt"]
    fp4 = ct.configuration({"a": "fp4", "b": "fp4"}, ["lm_head"])
    assert fp4["format"] == "nvfp4-pack-quantized" and fp4["ignore"] == ["lm_head"]
    assert [g["targets"] for g in fp4["config_groups"].values()] == [["Linear"]]
    assert ct.configuration({"a": "fp8"}, [])["format"] == "float-quantized"
    mixed = ct.configuration({"a": "fp8", "b": "fp4", "c": "fp8"}, [])
    assert mixed["format"] == "mixed-precision"
    assert [(g["targets"], g["format"]) for g in mixed["config_groups"].values()] == [
        (["b"], "nvfp4-pack-quantized"),
        (["a", "c"], "float-quantized"),
    ]
    QuantizationConfig(**mixed)
    assert ct.files({"a": "fp4"}, []) == {}
    config = mo.configuration({"a": "fp4"}, ["lm_head"])
    assert (config["quant_method"], config["quant_algo"]) == ("modelopt", "NVFP4")
    assert (config["group_size"], config["ignore"]) == (16, ["lm_head"])
    quantization = mo.files({"a": "fp8"}, ["lm_head"])["hf_quant_config.json"]["quantization"]
    assert quantization == {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": None,
        "exclude_modules": ["lm_head"],
    }
