"""The streamed image: the paper's size to the bit, and nothing but whole images is read.

A second writer, a loop over blocks in plain integers, says what the bytes must be.
"""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fgmp.errors import CheckpointError
from fgmp.formats.spec import stream_bits
from fgmp.formats.weight import WeightCodes, quantize_weight, tensor_scale
from fgmp.pack.planes import pack, unpack
from fgmp.pack.stream import from_image, image_bytes, to_image

FORMAT_MD = Path(__file__).parents[2] / "docs" / "format.md"
N, K = 5, 172
BLOCKS = 5 * 11
FLAG_BYTES = 7


def a_weight(share: float) -> tuple[WeightCodes, torch.Tensor]:
    """Codes, and a mask of FP8 blocks: the first ``share`` of a random order."""
    g = torch.Generator().manual_seed(2)
    x = torch.randn(N, K, generator=g)
    codes = quantize_weight(x, tensor_scale(x.abs().max().item()))
    order = torch.randperm(BLOCKS, generator=g).view(N, -1)
    return codes, order < round(share * BLOCKS)


def slow_image(codes: WeightCodes, is_fp8: torch.Tensor) -> bytes:
    """Section 5 of docs/format.md, one block after the other."""
    flags, body = 0, bytearray()
    for i, wide in enumerate(is_fp8.flatten().tolist()):
        row, block = divmod(i, is_fp8.shape[1])
        if wide:
            flags |= 1 << i
            body += bytes(codes.fp8[row, block].tolist())
        else:
            nibbles = codes.fp4[row, block].tolist()
            body.append(int(codes.scale[row, block]))
            body += bytes(nibbles[j] + 16 * nibbles[j + 1] for j in range(0, 16, 2))
    return flags.to_bytes(FLAG_BYTES, "little") + bytes(body)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.98, 1.0])
def test_image_holds_flags_and_blocks_in_order(share: float) -> None:
    codes, is_fp8 = a_weight(share)
    packed = pack(codes, is_fp8)
    image = to_image(packed)
    assert image == slow_image(codes, is_fp8)
    read, held = from_image(image, N, K), unpack(packed)
    assert torch.equal(read.is_fp8, held.is_fp8)
    assert torch.equal(read.codes, held.codes)
    assert torch.equal(read.scale, held.scale)


def test_the_worked_example() -> None:
    block = [6, -4, 3, -2.5, 1.5, 1, -0.5, 0.25, 0, -0.1, 5, 0.75, 3.5, -1.25, 2.2, 1.74]
    codes = quantize_weight(torch.tensor([block + block]), t=1.0)
    assert to_image(pack(codes, torch.tensor([[False, True]]))) == bytes.fromhex(
        "0238 E7 C5 23 09 80 26 A6 3438 B3 30 AD 28 23 9B 13 00 89 35 20 31 A5 2C 29"
    )


@pytest.mark.parametrize("fp8_blocks", [0, 1, 8, 30, 99, 100, 128])
def test_size_is_the_papers_up_to_the_last_flag_byte(fp8_blocks: int) -> None:
    blocks = 128  # whole flag bytes: no padding
    share = fp8_blocks / blocks
    paper = 4.5 * (1 - share) + 8 * share + 1 / 16
    assert image_bytes(blocks, fp8_blocks) * 8 == paper * blocks * 16
    assert stream_bits(1 - share) == pytest.approx(paper, rel=1e-15)
    for odd in range(1, 8):  # a few more FP4 blocks: only the last flag byte has unused bits
        exact = paper * blocks * 16 + odd * (9 * 8 + 1)
        assert 0 < image_bytes(blocks + odd, fp8_blocks) * 8 - exact < 8


def test_seventy_percent_fp4_is_the_papers_561_bits() -> None:
    assert image_bytes(1000, 300) * 8 / 16000 == pytest.approx(5.6125, abs=1e-9)


def an_image() -> bytearray:
    return bytearray(to_image(pack(*a_weight(0.3))))


def edited(edit: Callable[[bytearray], object]) -> bytes:
    image = an_image()
    edit(image)
    return bytes(image)


def put(at: int, value: int) -> Callable[[bytearray], None]:
    def edit(image: bytearray) -> None:
        image[at] = value

    return edit


def first_of(is_fp8: bool) -> tuple[int, int]:
    """Number and offset of the first block of a format."""
    flags = a_weight(0.3)[1].flatten().tolist()
    number = flags.index(is_fp8)
    return number, FLAG_BYTES + sum(16 if wide else 9 for wide in flags[:number])


FP4_AT, FP8_AT = first_of(False)[1], first_of(True)[1]
WHOLE = 7 + 9 * BLOCKS + 7 * 16  # 16 is 30% of 55 blocks, each 7 bytes longer than FP4

REFUSALS = {
    "empty": (lambda i: i.clear(), "image: 55 blocks need 7 flag bytes, got 0"),
    "flags-cut": (lambda i: i.__delitem__(slice(6, None)), "55 blocks need 7 flag bytes, got 6"),
    "body-cut": (lambda i: i.pop(), f"image: its flags call for {WHOLE} bytes, got {WHOLE - 1}"),
    "too-long": (lambda i: i.append(0), f"its flags call for {WHOLE} bytes, got {WHOLE + 1}"),
    "flag-flipped": (put(0, an_image()[0] ^ 1), "image: its flags call for [0-9]+ bytes, got"),
    "flag-padding": (
        put(6, an_image()[6] | 0x80),
        "image: bits after the last flag must be zero, got 0x[89A-F]",
    ),
    "scale-zero": (
        put(FP4_AT, 0),
        r"image: bytes must be 0x01 to 0x7E, or 0x80 for an FP8 block, got 0x00 at \[0, ",
    ),
    "scale-flag": (put(FP4_AT, 0x80), r"image: bytes must be .*, got 0x80 at \[0, "),
    "nan": (put(FP8_AT, 0x7F), r"image: FP8 codes must not be NaN, got 0x7F at \[0, "),
    "padding": (
        put(-1, 0x10),
        r"image: padding of the last block must be zero, got 0x[0-9]+ at \[4",
    ),
    "zero-block": (
        lambda i: i.__setitem__(slice(FP4_AT + 1, FP4_AT + 9), bytes(8)),
        "image: an FP4 block of zeros must have the scale 0x01, got",
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_broken_image_is_named(fault: str) -> None:
    edit, message = REFUSALS[fault]
    from_image(bytes(an_image()), N, K)
    with pytest.raises(CheckpointError) as raised:
        from_image(edited(edit), N, K)
    assert re.search(message, str(raised.value))


def test_every_flipped_bit_is_refused_or_is_another_image() -> None:
    whole = unpack(pack(*a_weight(0.3)))
    valid = 0
    for bit in range(8 * WHOLE):
        image = an_image_with(bit)
        try:
            read = from_image(image, N, K)
        except CheckpointError:
            continue
        valid += 1
        assert not torch.equal(read.codes, whole.codes) or not torch.equal(read.scale, whole.scale)
    assert 8 * (WHOLE - FLAG_BYTES) * 0.8 < valid < 8 * (WHOLE - FLAG_BYTES)  # few are caught


IMAGE = bytes(an_image())


def an_image_with(bit: int) -> bytes:
    flipped = bytearray(IMAGE)
    flipped[bit // 8] ^= 1 << bit % 8
    return bytes(flipped)
