"""The FP4 half of a weight is NVFP4: byte for byte what two other packages make of it.

The three agree on the tensor scale amax / 2688, on E4M3 block scales to nearest and on E2M1 codes
to nearest even, and differ in the order of the fp32 operations: fgmp divides by s t,
compressed-tensors by s / (1 / t), torchao multiplies by (1 / t) / s. Orders show at ties and
within an ulp of them, which fp32 Gaussians do not hit, and at blocks that round to a scale of
zero, for which each has a rule of its own. Written against compressed-tensors 0.20 and torchao
0.18.
"""

import pytest
import torch

from fgmp.formats.weight import quantize_weight, tensor_scale

pytest.importorskip("compressed_tensors")
pytest.importorskip("torchao")

from compressed_tensors.compressors import NVFP4PackedCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4A16
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale


def by_fgmp(weight):
    """(tensor scale, block scale bytes (N, G), E2M1 codes (N, K / 2), the even element low)."""
    t = tensor_scale(weight.abs().max().item())
    codes = quantize_weight(weight, t)
    elements = codes.fp4.flatten(-2)
    return t, codes.scale, elements[:, 0::2] | elements[:, 1::2] << 4


def by_compressed_tensors(weight):
    arguments = NVFP4A16["weights"]
    inverse = generate_gparam(weight.min(), weight.max())
    blocks = weight.unflatten(-1, (-1, 16))
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), arguments, inverse)
    packed = NVFP4PackedCompressor.compress(
        {"weight": weight, "weight_scale": scale, "weight_global_scale": inverse},
        QuantizationScheme(targets=["Linear"], weights=arguments),
    )
    scale = packed["weight_scale"].view(torch.uint8)
    return 1 / inverse.item(), scale, packed["weight_packed"]


def by_torchao(weight):
    t = per_tensor_amax_to_scale(weight.abs().max())
    scale, packed = nvfp4_quantize(weight, per_tensor_scale=t)
    return t.item(), scale.view(torch.uint8), packed


PEERS = {"compressed-tensors": by_compressed_tensors, "torchao": by_torchao}


def gaussian(seed, level):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.exp2(torch.randn(256, 1, generator=generator))  # so that block scales vary
    return torch.randn(256, 512, generator=generator) * rows * level


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(("seed", "level"), [(0, 1.0), (1, 0.02), (2, 3e-5), (3, 700.0)])
def test_codes_and_scales_are_theirs(peer, seed, level):
    weight = gaussian(seed, level)
    t, scale, codes = by_fgmp(weight)
    their_t, their_scale, their_codes = PEERS[peer](weight)
    assert their_t == pytest.approx(t, rel=2 * 2.0**-24)  # one rounding, or two by the reciprocal
    assert torch.equal(their_scale, scale)
    assert torch.equal(their_codes, codes)
    # The data is a fair sample: all codes, many scales, and none below torchao's smallest, 2**-6.
    assert len(codes.unique()) == 256
    assert len(scale.unique()) > 30
    assert scale.min() > 0x08


def test_zero_blocks_differ_in_the_scale_byte():
    """All-zero blocks: every package writes zero codes, and each another scale beside them."""
    weight = gaussian(4, 1.0)
    weight[:, 32:48] = 0.0
    scales = {}
    for name, quantize in {"fgmp": by_fgmp, **PEERS}.items():
        _, scale, codes = quantize(weight)
        assert not codes[:, 16:24].any()
        (scales[name],) = scale[:, 2].unique().tolist()
    assert scales == {"fgmp": 0x01, "compressed-tensors": 0x20, "torchao": 0x08}


def test_torchao_differs_at_ties():
    """On m s t and just above, m a midpoint, a product with a reciprocal rounds elsewhere."""
    t = tensor_scale(1.1)
    step = torch.tensor(t) * 64.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]) * step
    above = ties.nextafter(torch.tensor(torch.inf))
    weight = torch.zeros(2, 16)
    weight[0, 0] = 1.1
    weight[1, :15] = torch.cat([step.view(1) * 6, ties, above])
    _, scale, codes = by_fgmp(weight)
    _, their_scale, their_codes = by_torchao(weight)
    assert torch.equal(scale[1], their_scale[1])
    assert not torch.equal(codes[1], their_codes[1])
