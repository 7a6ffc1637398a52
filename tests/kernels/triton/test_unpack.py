"""Unpacking equals the reference bit for bit: every mode, every code under every scale."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.formats.weight import WeightCodes, quantize_weight, tensor_scale
from fgmp.kernels.triton.unpack import unpack_weight
from fgmp.pack.planes import MODES, PackedWeight, pack, unpack_units

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# NumPy, in which the interpreter computes, remarks on int32 products that wrap around.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def on_device(packed):
    planes = (packed.low, packed.scale, packed.overflow, packed.row_ptr, packed.fp8)
    return [None if plane is None else plane.to(DEVICE) for plane in planes]


def check(packed, dtype=torch.bfloat16):
    units = unpack_weight(*on_device(packed), packed.k, dtype).cpu()
    assert units.dtype == dtype
    expected = unpack_units(packed)
    assert torch.equal(units.float().view(torch.int32), expected.view(torch.int32))


def a_packed(n, k, share, seed=0):
    """A random weight with about this share of FP8 blocks, all of them for 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    codes = quantize_weight(x, tensor_scale(x.abs().max().item()))
    return pack(codes, torch.rand(codes.scale.shape, generator=generator) < share)


def every_code(mode):
    """A row for each scale, with a block of all FP4 codes and 16 of all FP8 codes but NaN."""
    rows, blocks = 126, 17
    fp8 = torch.arange(256).where(torch.arange(256) % 128 != 127, 0).byte()
    codes = WeightCodes(
        fp4=torch.arange(16, dtype=torch.uint8).expand(rows, blocks, 16).clone(),
        scale=torch.arange(1, 127, dtype=torch.uint8)[:, None].expand(rows, blocks).clone(),
        fp8=torch.cat([fp8, fp8[:16]]).view(blocks, 16).expand(rows, blocks, 16).clone(),
        t=1.0,
        k=16 * blocks,
    )
    is_fp8 = {"fp4": False, "fp8": True}.get(mode)
    if is_fp8 is None:
        return pack(codes, (torch.arange(blocks) > 0).expand(rows, blocks))
    return pack(codes, torch.full((rows, blocks), is_fp8))


@pytest.mark.parametrize("mode", MODES)
def test_every_code_under_every_scale(mode):
    packed = every_code(mode)
    assert packed.mode == mode
    check(packed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0, 0.1, 0.5, 1])
def test_every_type_at_any_share(share, dtype):
    check(a_packed(9, 176, share), dtype)


@pytest.mark.parametrize("shape", [(1, 16), (3, 7), (8, 512), (17, 1040), (2, 1009)])
def test_shapes(shape):
    check(a_packed(*shape, share=0.4))


def test_rows_with_and_without_fp8_blocks():
    """Counts of 0, of all, and of one block at either end, over more than one tile of K."""
    x = torch.randn(4, 1024, generator=torch.Generator().manual_seed(2))
    codes = quantize_weight(x, tensor_scale(x.abs().max().item()))
    is_fp8 = torch.zeros(4, 64, dtype=torch.bool)
    is_fp8[1], is_fp8[2, 0], is_fp8[3, -1] = True, True, True
    check(pack(codes, is_fp8))


@given(st.integers(1, 12), st.integers(1, 80), st.floats(0, 1), st.integers(0, 2**32))
@settings(deadline=None, max_examples=20)
def test_any_weight(n, k, share, seed):
    check(a_packed(n, k, share, seed))


def test_planes_that_begin_between_words():
    """Views into one buffer, as a memory-mapped file gives them."""
    packed = a_packed(3, 48, 0.5)
    buffer = torch.zeros(packed.low.numel() + 1, dtype=torch.uint8)
    buffer[1:] = packed.low.flatten()
    moved = {**packed.tensors(), "low": buffer[1:].view(packed.low.shape)}
    check(PackedWeight(**moved))


def test_a_short_overflow_plane_is_not_read_beyond_its_end():
    """What lies behind it in memory is not used: the missing nibbles count as zero."""
    packed = a_packed(4, 64, 0.5)
    missing = packed.overflow.clone()
    missing[1:] = 0
    expected = unpack_units(PackedWeight(**{**packed.tensors(), "overflow": missing}))
    low, scale, overflow, row_ptr, fp8 = on_device(packed)
    short = low, scale, overflow[:1], row_ptr, fp8
    assert torch.equal(unpack_weight(*short, packed.k, torch.float32).cpu(), expected)
