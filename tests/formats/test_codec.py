"""Encoders and decoders, exhaustively: every code, every tie, the fp32 values on both sides."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.formats.codec import (
    E2M1_MIDPOINTS,
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    from_blocks,
    round_e2m1,
    to_blocks,
)

from . import model

TINY = 2.0**-149
MIDPOINTS_E2M1 = [(a + b) / 2 for a, b in zip(model.E2M1[:-1], model.E2M1[1:], strict=True)]
MIDPOINTS_E4M3 = [(a + b) / 2 for a, b in zip(model.E4M3[:-1], model.E4M3[1:], strict=True)]


def with_neighbours(values):
    """fp32 values, both fp32 neighbours of each, and the negatives of all."""
    values = torch.tensor([float(v) for v in values])
    below, above = (torch.nextafter(values, torch.tensor(e)) for e in (-torch.inf, torch.inf))
    values = torch.cat([below, values, above])
    return torch.cat([values, -values])


def encode_exactly(x, table, sign_bit):
    """The model's codes of fp32 ``x``; a value below zero has the sign bit, however small."""
    exact = [Fraction(v) for v in x.tolist()]
    return [model.signed(model.nearest(table, abs(v)), v, sign_bit) for v in exact]


@pytest.mark.parametrize("bits", [4, 8])
def test_decode_every_code(bits):
    table, decode = {4: (model.E2M1, decode_e2m1), 8: (model.E4M3, decode_e4m3)}[bits]
    decoded = decode(torch.arange(2**bits, dtype=torch.uint8))
    assert decoded.dtype == torch.float32
    for code, value in enumerate(decoded.tolist()):
        magnitude = code & (2 ** (bits - 1) - 1)
        if magnitude == len(table):
            assert value != value
        else:
            assert abs(value) == table[magnitude]
            assert (torch.tensor(value).signbit().item()) == (code != magnitude)


@pytest.mark.parametrize("bits", [4, 8])
def test_encode_inverts_decode(bits):
    """Every finite code but negative zero, which stands for a value that underflowed."""
    skipped = {4: (0x8,), 8: (0x80, 0x7F, 0xFF)}[bits]
    codes = torch.tensor([c for c in range(2**bits) if c not in skipped], dtype=torch.uint8)
    if bits == 4:
        assert torch.equal(encode_e2m1(decode_e2m1(codes), decode_e2m1(codes)), codes)
    else:
        assert torch.equal(encode_e4m3(decode_e4m3(codes)), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_encode_at_every_tie_and_beside(bits):
    table, midpoints = {4: (model.E2M1, MIDPOINTS_E2M1), 8: (model.E4M3, MIDPOINTS_E4M3)}[bits]
    top = table[-1]
    x = with_neighbours([*table, *midpoints, TINY, top * 17 / 16, top * 2, 2.0**127])
    codes = encode_e2m1(x, x) if bits == 4 else encode_e4m3(x)
    assert codes.tolist() == encode_exactly(x, table, 2 ** (bits - 1))


def test_e2m1_midpoints():
    assert list(E2M1_MIDPOINTS) == MIDPOINTS_E2M1


def test_encode_e4m3_of_every_bf16_value():
    """All 65,280 finite bf16 values, against the model."""
    bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.bfloat16).float()
    x = x[x.isfinite()]
    assert len(x) == 2 * 255 * 128
    # The model on the 32,640 magnitudes; the sign bit is checked apart.
    expected = torch.tensor(encode_exactly(x[x.signbit().logical_not()], model.E4M3, 0x80))
    codes = encode_e4m3(x).int()
    assert torch.equal(codes[~x.signbit()], expected.int())
    negative = codes[x.signbit()]
    assert torch.equal(negative & 0x7F, expected.int())
    assert torch.equal(negative >= 0x80, x[x.signbit()] < 0)


@settings(deadline=None)
@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_encode_any_fp32(value):
    x = torch.tensor([value])
    assert encode_e4m3(x).tolist() == encode_exactly(x, model.E4M3, 0x80)
    assert encode_e2m1(x, x).tolist() == encode_exactly(x, model.E2M1, 8)


def test_infinity_saturates_and_nan_stays():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -torch.nan])
    assert encode_e4m3(x).tolist() == [0x7E, 0xFE, 0x7F, 0x7F]
    assert encode_e2m1(x[:2], x[:2]).tolist() == [7, 15]
    assert round_e2m1(x[:2]).tolist() == [6, -6]
    assert round_e2m1(x[2:]).isnan().all()


def test_zero_has_one_code_and_small_negatives_keep_their_sign():
    zeros = torch.tensor([0.0, -0.0])
    assert encode_e4m3(zeros).tolist() == encode_e2m1(zeros, zeros).tolist() == [0, 0]
    small = torch.tensor([TINY, -TINY])
    assert encode_e4m3(small).tolist() == [0, 0x80]
    assert encode_e2m1(small, small).tolist() == [0, 8]


def test_sign_comes_from_the_value_represented():
    """A quotient may underflow to zero; the code still has the sign of what was divided."""
    zeros = torch.zeros(4)
    sign_of = torch.tensor([-1.0, 1.0, -0.0, -torch.inf])
    assert encode_e4m3(zeros, sign_of).tolist() == [0x80, 0, 0, 0x80]
    assert encode_e2m1(zeros, sign_of).tolist() == [8, 0, 0, 8]


def test_round_e2m1_is_decode_of_encode():
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.randn(1 << 16, generator=generator)
    exponents = torch.randint(-20, 20, (1 << 16,), generator=generator)
    x = torch.cat(
        [
            with_neighbours([*model.E2M1, *MIDPOINTS_E2M1, TINY, 2.0**-126, 7, 2.0**127]),
            torch.arange(-8, 8, 2.0**-12),
            mantissas * 2.0**exponents,
        ]
    )
    assert torch.equal(round_e2m1(x), decode_e2m1(encode_e2m1(x, x)))


@pytest.mark.parametrize("k", [1, 15, 16, 17, 172, 176])
def test_blocks_and_back(k):
    x = torch.arange(1.0, 3 * k + 1).view(3, k)
    blocks = to_blocks(x)
    assert blocks.shape == (3, -(-k // 16), 16)
    assert torch.equal(from_blocks(blocks, k), x)
    assert blocks.flatten(1)[:, k:].count_nonzero() == 0
    assert torch.equal(blocks[0, 0, : min(k, 16)], x[0, :16])
