"""Planes hold every code bit exactly, and each rule of docs/format.md refuses what breaks it.

The expected bytes come from arithmetic on plain integers or were worked out by hand, never from
the code under test. That a weight has one encoding only is shown by fuzzing: whatever validates
is what ``pack`` makes of its own contents.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.errors import CheckpointError
from fgmp.formats.codec import to_blocks
from fgmp.formats.weight import WeightCodes, quantize_weight, tensor_scale
from fgmp.pack import planes
from fgmp.pack.planes import (
    MODES,
    PackedWeight,
    pack,
    packed_bytes,
    unpack,
    unpack_units,
    validate,
)

FORMAT_MD = Path(__file__).parents[2] / "docs" / "format.md"


def mask_of(mode: str, shape: torch.Size) -> torch.Tensor:
    """Every third block in a mixed weight, so that rows hold different counts."""
    if mode == "mixed":
        return torch.arange(shape.numel()).view(shape) % 3 == 0
    return torch.full(shape, mode == "fp8")


def a_weight(mode: str, n: int = 5, k: int = 172) -> tuple[WeightCodes, torch.Tensor]:
    """Codes of a random weight, ragged by default, and a mask."""
    x = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    codes = quantize_weight(x, tensor_scale(x.abs().max().item()))
    return codes, mask_of(mode, codes.scale.shape)


def a_packed(mode: str = "mixed") -> PackedWeight:
    return pack(*a_weight(mode))


def same_planes(a: PackedWeight, b: PackedWeight) -> bool:
    left, right = a.tensors(), b.tensors()
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )


def repacked(packed: PackedWeight) -> PackedWeight:
    """The planes that ``pack`` makes of the N x K codes that ``packed`` holds."""
    held = unpack(packed)
    wide = held.is_fp8.unsqueeze(-1)
    inner = to_blocks(held.codes.flatten(-2)[:, : packed.k])
    codes = WeightCodes(
        fp4=inner.where(~wide, 0),
        scale=held.scale.where(~held.is_fp8, 1),
        fp8=inner.where(wide, 0),
        t=packed.t.item(),
        k=packed.k,
    )
    return pack(codes, held.is_fp8)


@pytest.mark.parametrize(("n", "k"), [(5, 172), (1, 16), (3, 64)])
def test_bytes_are_known_before_packing(n: int, k: int) -> None:
    codes, _ = a_weight("mixed", n, k)
    blocks = codes.scale.numel()
    for fp8 in range(blocks + 1):
        mask = (torch.arange(blocks) < fp8).view(codes.scale.shape)
        assert packed_bytes(n, k, fp8) == pack(codes, mask).nbytes
    assert packed_bytes(n, k) == packed_bytes(n, k, blocks)


@pytest.mark.parametrize("k", [16, 32, 172, 160])
@pytest.mark.parametrize("mode", MODES)
def test_unpack_returns_what_was_packed(mode: str, k: int) -> None:
    codes, is_fp8 = a_weight(mode, k=k)
    packed = pack(codes, is_fp8)
    assert packed.mode == mode
    assert set(packed.tensors()) == {"shape", "t", *MODES[mode]}
    assert (packed.n, packed.k, packed.t.item()) == (5, k, codes.t)
    validate("w", packed)
    held = unpack(packed)
    assert torch.equal(held.is_fp8, is_fp8)
    assert torch.equal(held.codes, torch.where(is_fp8.unsqueeze(-1), codes.fp8, codes.fp4))
    assert torch.equal(held.scale, codes.scale.where(~is_fp8, 0x80))
    assert same_planes(repacked(packed), packed)


@pytest.mark.parametrize("mode", MODES)
def test_unpacked_values_are_those_of_the_codes_and_exact_in_bf16(mode: str) -> None:
    codes, is_fp8 = a_weight(mode)
    units = unpack_units(pack(codes, is_fp8))
    assert torch.equal(units, codes.units(is_fp8))
    assert torch.equal(units.bfloat16().float(), units)


@pytest.mark.parametrize("shift", [0, 1])
def test_every_fp8_code_survives_in_both_halves_of_a_byte(shift: int) -> None:
    every = torch.tensor([c for c in range(256) if c & 0x7F != 0x7F] + [0, 0], dtype=torch.uint8)
    fp8 = every.roll(shift).view(1, 16, 16)
    fp8 = torch.cat([fp8, torch.zeros(1, 1, 16, dtype=torch.uint8)], 1)
    is_fp8 = torch.tensor([[True] * 16 + [False]])  # the last block is FP4: mixed planes
    scale = torch.ones(1, 17, dtype=torch.uint8)
    packed = pack(
        WeightCodes(fp4=torch.zeros_like(fp8), scale=scale, fp8=fp8, t=1.0, k=272), is_fp8
    )
    validate("w", packed)
    assert torch.equal(unpack(packed).codes, fp8)
    numbers = fp8.flatten().tolist()
    sign_and_mantissa = [(c >> 7) * 8 + c % 8 for c in numbers]
    exponents = [c // 8 % 16 for c in numbers[:256]]
    assert packed.low is not None and packed.overflow is not None
    assert packed.low.flatten().tolist() == bytes_of(sign_and_mantissa)
    assert packed.overflow.flatten().tolist() == bytes_of(exponents)


def bytes_of(nibbles: list[int]) -> list[int]:
    """Bytes whose low half is the even element."""
    return [low + 16 * high for low, high in zip(nibbles[::2], nibbles[1::2], strict=True)]


def test_every_fp4_code_and_every_scale_survive() -> None:
    scale = torch.arange(0x01, 0x7F, dtype=torch.uint8).view(1, -1)
    fp4 = torch.arange(16, dtype=torch.uint8).expand(1, 126, 16).clone()
    codes = WeightCodes(fp4=fp4, scale=scale, fp8=torch.zeros_like(fp4), t=1.0, k=126 * 16)
    packed = pack(codes, torch.zeros(1, 126, dtype=torch.bool))
    validate("w", packed)
    assert packed.low is not None
    assert packed.low[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack(packed).codes, fp4)
    assert torch.equal(unpack(packed).scale, scale)
    e2m1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    signed = torch.tensor(e2m1 + [-v for v in e2m1])
    one = unpack_units(packed)[0, (0x38 - 1) * 16 :][:16]  # 0x38 is the scale 1.0
    assert torch.equal(one, signed)


# The example of docs/format.md, worked by hand there.
EXAMPLE = [6, -4, 3, -2.5, 1.5, 1, -0.5, 0.25, 0, -0.1, 5, 0.75, 3.5, -1.25, 2.2, 1.74]
EXAMPLE_FP4 = bytes.fromhex("E7 C5 23 09 80 26 A6 34")
EXAMPLE_FP8 = bytes.fromhex("38 B3 30 AD 28 23 9B 13 00 89 35 20 31 A5 2C 29")
EXAMPLE_LOW = bytes.fromhex("B0 D0 30 3B 90 05 D1 14")
EXAMPLE_OVERFLOW = bytes.fromhex("67 56 45 23 10 46 46 55")


def test_the_worked_example() -> None:
    codes = quantize_weight(torch.tensor([EXAMPLE + EXAMPLE]), t=1.0)
    packed = pack(codes, torch.tensor([[False, True]]))
    assert packed.low is not None and packed.scale is not None
    assert packed.overflow is not None and packed.row_ptr is not None
    assert bytes(packed.low.flatten().tolist()) == EXAMPLE_FP4 + EXAMPLE_LOW
    assert bytes(packed.scale.flatten().tolist()) == b"\x38\x80"
    assert bytes(packed.overflow.flatten().tolist()) == EXAMPLE_OVERFLOW
    assert packed.row_ptr.tolist() == [0, 1]
    dense = pack(codes, torch.tensor([[True, True]])).fp8
    assert dense is not None and bytes(dense.flatten().tolist()) == EXAMPLE_FP8 * 2


def test_the_document_shows_the_worked_example() -> None:
    text = FORMAT_MD.read_text()
    for example in (EXAMPLE_FP4, EXAMPLE_FP8, EXAMPLE_LOW, EXAMPLE_OVERFLOW):
        assert example.hex(" ").upper() in text
    assert "  ".join(str(v) for v in EXAMPLE[:8]) in re.sub(r" {2,}", "  ", text)


@pytest.mark.parametrize(("mode", "per_row"), [("fp4", 9 * 11), ("fp8", 176)])
def test_sizes_of_plain_modes(mode: str, per_row: int) -> None:
    assert a_packed(mode).nbytes == 5 * per_row + 16 + 4  # the shape and t


def test_size_of_a_mixed_weight_is_four_and_a_half_bits_and_four_an_fp8_value() -> None:
    packed = a_packed("mixed")
    blocks, fp8_blocks = 5 * 11, 19
    assert packed.nbytes == 9 * blocks + 8 * fp8_blocks + 4 * 6 + 16 + 4


def changed(
    plane: str, index: tuple[int, ...], value: int
) -> Callable[[PackedWeight], PackedWeight]:
    """One element of one plane overwritten."""

    def change(packed: PackedWeight) -> PackedWeight:
        tensor = packed.tensors()[plane].clone()
        tensor[index] = value
        return replace(packed, **{plane: tensor})

    return change


def with_plane(plane: str, edit: Callable[[torch.Tensor], torch.Tensor | None]):
    """One plane replaced by an edit of it."""
    return lambda packed: replace(packed, **{plane: edit(packed.tensors()[plane])})


def with_nan_in_first_block(packed: PackedWeight) -> PackedWeight:
    """Element 1 of block (0, 0), which is FP8, becomes 0xFF."""
    assert packed.low is not None and packed.overflow is not None
    low = changed("low", (0, 0), int(packed.low[0, 0]) | 0xF0)
    return changed("overflow", (0, 0), int(packed.overflow[0, 0]) | 0xF0)(low(packed))


def with_zero_block(packed: PackedWeight) -> PackedWeight:
    """Block (0, 1), which is FP4, becomes zeros of either sign but keeps its scale."""
    assert packed.low is not None
    low = packed.low.clone()
    low[0, 8:16] = 0x80
    return replace(packed, low=low)


RULES = {
    "planes-missing": (
        "mixed",
        with_plane("row_ptr", lambda _: None),
        r"w: planes must be low\+scale\+overflow\+row_ptr or low\+scale or fp8, "
        r"got low\+scale\+overflow",
    ),
    "planes-mingled": (
        "fp4",
        lambda p: replace(p, fp8=p.low),
        r"w: planes must be .*, got low\+scale\+fp8",
    ),
    "planes-none": ("fp8", with_plane("fp8", lambda _: None), r"w: planes must be .*, got $"),
    "shape-dtype": (
        "fp4",
        with_plane("shape", lambda s: s.int()),
        r"w_shape: must be torch.int64, got torch.int32",
    ),
    "shape-length": (
        "fp4",
        with_plane("shape", lambda s: s[:1]),
        r"w_shape: must have shape \[2\], got \[1\]",
    ),
    "shape-zero": ("fp8", changed("shape", (0,), 0), r"w_shape: must be positive, got \[0, 172\]"),
    "shape-negative": (
        "fp8",
        changed("shape", (1,), -16),
        r"w_shape: must be positive, got \[5, -16\]",
    ),
    "shape-untrue": (
        "mixed",
        changed("shape", (1,), 192),
        r"w_low: must have shape \[5, 96\], got \[5, 88\]",
    ),
    "t-dtype": (
        "fp4",
        with_plane("t", lambda t: t.double()),
        r"w_t: must be torch.float32, got torch.float64",
    ),
    "t-shape": (
        "fp4",
        with_plane("t", lambda t: t.view(1)),
        r"w_t: must have shape \[\], got \[1\]",
    ),
    "t-zero": ("fp8", changed("t", (), 0), r"w_t: must be a positive normal number, got 0.0"),
    "t-negative": ("fp8", with_plane("t", lambda t: -t), r"w_t: must be a positive normal .*got -"),
    "t-subnormal": (
        "fp4",
        with_plane("t", lambda t: t * 0 + 1e-39),
        r"w_t: must be .*, got 1.0000002153053333e-39",
    ),
    "t-infinite": ("fp4", with_plane("t", lambda t: t / 0), r"w_t: must be .*, got inf"),
    "t-nan": ("mixed", with_plane("t", lambda t: t * torch.nan), r"w_t: must be .*, got nan"),
    "fp8-dtype": (
        "fp8",
        with_plane("fp8", lambda c: c.view(torch.int8)),
        r"w_fp8: must be torch.uint8, got torch.int8",
    ),
    "fp8-shape": (
        "fp8",
        with_plane("fp8", lambda c: c[:, :172].contiguous()),
        r"w_fp8: must have shape \[5, 176\], got \[5, 172\]",
    ),
    "fp8-strides": (
        "fp8",
        with_plane("fp8", lambda c: c.T.contiguous().T),
        r"w_fp8: must be contiguous, got strides \(1, 5\)",
    ),
    "fp8-nan": (
        "fp8",
        changed("fp8", (2, 35), 0xFF),
        r"w: FP8 codes must not be NaN, got 0xFF at \[2, 2, 3\]",
    ),
    "fp8-padding": (
        "fp8",
        changed("fp8", (4, 175), 0x80),
        r"w: padding of the last block must be zero, got 0x80 at \[4, 15\]",
    ),
    "low-shape": (
        "fp4",
        with_plane("low", lambda c: c[:4]),
        r"w_low: must have shape \[5, 88\], got \[4, 88\]",
    ),
    "low-padding": (
        "fp4",
        changed("low", (1, 86), 0x30),
        r"w: padding of the last block must be zero, got 0x03 at \[1, 13\]",
    ),
    "scale-shape": (
        "mixed",
        with_plane("scale", lambda s: s[:, :-1].contiguous()),
        r"w_scale: must have shape \[5, 11\], got \[5, 10\]",
    ),
    "scale-zero": (
        "fp4",
        changed("scale", (3, 4), 0x00),
        r"w_scale: bytes must be 0x01 to 0x7E, or 0x80 for an FP8 block, got 0x00 at \[3, 4\]",
    ),
    "scale-nan": (
        "mixed",
        changed("scale", (0, 1), 0x7F),
        r"w_scale: bytes .* got 0x7F at \[0, 1\]",
    ),
    "scale-negative": ("mixed", changed("scale", (0, 1), 0x81), r"w_scale: bytes .* got 0x81"),
    "scale-flag": (
        "fp4",
        changed("scale", (1, 2), 0x80),
        r"w_scale: an all-FP4 weight has no byte 0x80, got 0x80 at \[1, 2\]",
    ),
    "zero-block": (
        "mixed",
        with_zero_block,
        r"w: an FP4 block of zeros must have the scale 0x01, got 0x[0-9A-F]{2} at \[0, 1\]",
    ),
    "mixed-without-fp8": (
        "mixed",
        with_plane("scale", lambda s: s.where(s != 0x80, 1)),
        r"w_scale: a mixed weight has 1 to 54 bytes 0x80, got 0",
    ),
    "mixed-without-fp4": (
        "mixed",
        with_plane("scale", lambda s: torch.full_like(s, 0x80)),
        r"w_scale: a mixed weight has 1 to 54 bytes 0x80, got 55",
    ),
    "row-ptr-dtype": (
        "mixed",
        with_plane("row_ptr", lambda r: r.long()),
        r"w_row_ptr: must be torch.int32, got torch.int64",
    ),
    "row-ptr-shape": (
        "mixed",
        with_plane("row_ptr", lambda r: r[1:]),
        r"w_row_ptr: must have shape \[6\], got \[5\]",
    ),
    "row-ptr-value": (
        "mixed",
        changed("row_ptr", (2,), 5),
        r"w_row_ptr: must count the bytes 0x80 of scale before each row, got 5 at \[2\]",
    ),
    "overflow-shape": (
        "mixed",
        with_plane("overflow", lambda o: o[:-1]),
        r"w_overflow: must have shape \[19, 8\], got \[18, 8\]",
    ),
    "overflow-nan": (
        "mixed",
        with_nan_in_first_block,
        r"w: FP8 codes must not be NaN, got 0xFF at \[0, 0, 1\]",
    ),
    "overflow-padding": (
        "mixed",
        # Blocks count row-major, so the FP8 block (4, 10) is number 54, the last of the plane.
        changed("overflow", (18, 7), 0x10),
        r"w: padding of the last block must be zero, got 0x08 at \[4, 15\]",
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_refuses_what_breaks_it(rule: str) -> None:
    mode, breaking, message = RULES[rule]
    whole = a_packed(mode)
    validate("w", whole)
    with pytest.raises(CheckpointError, match="^" + message):
        validate("w", breaking(whole))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_corrupt_bytes_are_refused_or_are_another_valid_weight(data: st.DataObject) -> None:
    packed = a_packed(data.draw(st.sampled_from(list(MODES))))
    plane = data.draw(st.sampled_from(list(packed.tensors())))
    raw = bytearray(packed.tensors()[plane].numpy().tobytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    whole = packed.tensors()[plane]
    broken = torch.frombuffer(raw, dtype=whole.dtype).view(whole.shape)
    corrupt = replace(packed, **{plane: broken})
    try:
        validate("w", corrupt)
    except CheckpointError:
        return
    assert same_planes(repacked(corrupt), corrupt)
    assert torch.equal(unpack_units(corrupt).bfloat16().float(), unpack_units(corrupt))


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_a_late_slice_is_checked_and_named(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checking goes slice by slice; what is wrong in the last one is found, at its own row."""
    monkeypatch.setattr(planes, "_CHECKED_ELEMENTS", 3 * 48)
    codes = quantize_weight(torch.randn(11, 40), 0.01)
    is_fp8 = torch.rand(codes.scale.shape, generator=torch.Generator().manual_seed(1)) < share
    packed = pack(codes, is_fp8)
    validate("w", packed)
    plane = packed.low if packed.fp8 is None else packed.fp8
    assert plane is not None
    plane[10, -1] = 0x11  # in the padding of the last block of the last row
    with pytest.raises(CheckpointError, match=r"padding of the last block must be zero, .*\[10, "):
        validate("w", packed)
