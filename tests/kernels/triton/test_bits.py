"""Device functions against the codec, exhausted where the domain is finite.

What runs is the function itself, under a kernel that only loads and stores: on a GPU where there
is one, else in Triton's interpreter.
"""

import pytest
import torch
import triton
import triton.language as tl

from fgmp.formats.codec import E2M1_MIDPOINTS, decode_e4m3, encode_e2m1, encode_e4m3
from fgmp.formats.spec import E2M1, E4M3
from fgmp.kernels.triton import bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LANES = 4096


@triton.jit
def encode_e4m3_kernel(x_ptr, code_ptr, integer_ptr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    code, integer = bits.encode_e4m3(tl.load(x_ptr + at))
    tl.store(code_ptr + at, code)
    tl.store(integer_ptr + at, integer)


@triton.jit
def decode_e4m3_kernel(code_ptr, integer_ptr, value_ptr, LANES: tl.constexpr):
    at = tl.arange(0, LANES)
    code = tl.load(code_ptr + at)
    tl.store(integer_ptr + at, bits.e4m3_integer(code))
    tl.store(value_ptr + at, bits.e4m3_value(code))


@triton.jit
def encode_e2m1_kernel(x_ptr, scale_ptr, code_ptr, integer_ptr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    code = bits.encode_e2m1(tl.load(x_ptr + at), tl.load(scale_ptr + at))
    tl.store(code_ptr + at, code)
    tl.store(integer_ptr + at, bits.e2m1_integer(code))


@triton.jit
def round_kernel(x_ptr, bits_ptr, integer_ptr, LANES: tl.constexpr):
    at = tl.program_id(0) * LANES + tl.arange(0, LANES)
    x = tl.load(x_ptr + at)
    tl.store(bits_ptr + at, bits.bf16_bits(x))
    tl.store(integer_ptr + at, bits.round_to_integer(tl.minimum(tl.abs(x), 2752512.0)))


def run(kernel, inputs, outputs):
    """Outputs of the given dtypes for 1-d inputs of one length, padded to whole programs."""
    length = len(inputs[0])
    programs = -(-length // LANES)
    padded = [torch.nn.functional.pad(x, (0, programs * LANES - length)) for x in inputs]
    results = [torch.empty(programs * LANES, dtype=d, device=DEVICE) for d in outputs]
    arguments = [*(x.to(DEVICE) for x in padded), *results]
    kernel[(programs,)](*arguments, LANES=LANES, enable_fp_fusion=False)
    return [r[:length].cpu() for r in results]


def with_neighbours(x):
    """fp32 values and the next ones on either side."""
    return torch.cat([x, x.nextafter(torch.tensor(torch.inf)), x.nextafter(torch.tensor(0.0))])


def positive_bf16():
    """All that is not NaN, infinity included."""
    return (torch.arange(0x7F81, dtype=torch.int32) << 16).view(torch.float32)


def test_encode_e4m3_at_every_midpoint_and_every_bf16_value():
    magnitudes = torch.tensor(E4M3.magnitudes)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    edges = torch.tensor([464.0, 480.0, 1e-40, 2.0**-149])
    x = torch.cat([with_neighbours(torch.cat([magnitudes, middles, edges])), positive_bf16()])
    code, integer = run(encode_e4m3_kernel, [x], [torch.int32] * 2)
    assert torch.equal(code.byte(), encode_e4m3(x))
    assert torch.equal(integer * E4M3.smallest, decode_e4m3(encode_e4m3(x)))


def test_decode_e4m3_of_every_code():
    codes = torch.arange(E4M3.nan_code, dtype=torch.int32)
    integer, value = run(decode_e4m3_kernel, [codes], [torch.int32, torch.float32])
    assert torch.equal(value, torch.tensor(E4M3.magnitudes))
    assert torch.equal(integer * E4M3.smallest, value)


def test_encode_e2m1_at_every_tie_of_every_scale():
    """Products of 6 bits around midpoint * scale: the exact tie and both fp32 neighbours."""
    scales = torch.tensor(E4M3.magnitudes[1:])
    points = torch.tensor([*E2M1_MIDPOINTS, *E2M1.magnitudes, 7.0])
    x = with_neighbours((scales[:, None] * points).flatten())
    scale = scales.repeat_interleave(len(points)).repeat(3)
    code, integer = run(encode_e2m1_kernel, [x, scale], [torch.int32] * 2)
    assert torch.equal(code.byte(), encode_e2m1(x / scale, x))
    assert torch.equal(integer / 2, torch.tensor(E2M1.magnitudes)[code])


def test_rounding_to_bf16_and_to_integers():
    """Every high half of an fp32 value over low halves at, beside and far from the tie."""
    high = torch.arange(1 << 16, dtype=torch.int64) << 16
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    x = (high[:, None] | low).flatten().to(torch.int32).view(torch.float32)
    rounded, integer = run(round_kernel, [x], [torch.int32] * 2)
    expected = x.to(torch.bfloat16)
    real = ~x.isnan()
    assert torch.equal(rounded[real].to(torch.int16), expected.view(torch.int16)[real])
    assert (rounded[~real] == 0x7FC0).all()
    assert torch.equal(integer[real], x[real].abs().clamp(max=2752512).round().int())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_as_loaded_keeps_what_rounds_to_the_same_bf16(dtype):
    x = torch.tensor([1.0, 1 + 2.0**-8, -3.3e-4, 65000.0], dtype=dtype)
    loaded = bits.as_loaded(x)
    back = loaded.view(torch.bfloat16) if loaded.dtype == torch.int16 else loaded
    assert torch.equal(back.to(torch.bfloat16), x.to(torch.bfloat16))
