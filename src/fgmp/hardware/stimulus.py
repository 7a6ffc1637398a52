"""Input of a lane while it runs a linear of a real model.

A lane keeps a weight block for ``reuse`` tokens, then takes the next block of the same row: the
order of a weight-stationary array. Formats therefore interleave as in the model, and a unit that
is not selected holds its last operands. Averages over isolated units or over noise would miss
both.

A stream is one lane's ports over consecutive cycles, from a random place in a random linear on; 64
streams run in parallel in the bits of a word (see ``gates``). A linear's probability is
proportional to its number of pairs of blocks.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import MULTIPLIER_BITS, ActivationCodes, Site
from fgmp.formats.codec import E2M1_MIDPOINTS, decode_e4m3, encode_e4m3, to_blocks
from fgmp.formats.spec import BLOCK, E2M1, E4M3, FP8_BLOCK, FP8_FACTOR
from fgmp.formats.weight import quantize_weight
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.gates import Words
from fgmp.pack.planes import BlockCodes

Bits = NDArray[Any]
"""Integers, or zeros and ones with the low bit first in the last axis."""

STREAMS = 64
"""Streams per word."""

_EXPONENT_BITS = 9
"""``rtl.encode.EXPONENT_BITS``, the width of exponents of multipliers; that module needs Amaranth.
"""


@dataclass(frozen=True, eq=False)
class Layer:
    """The operands of one linear.

    Attributes:
        name: name of the linear.
        activation: blocks (M, G) for M tokens.
        weight: blocks (N, G).
        activation_fp8, weight_fp8: codes of the same tensors with every block in FP8, for an
            FP8-only lane, uint8 (M, G, 16) and (N, G, 16).
    """

    name: str
    activation: BlockCodes
    weight: BlockCodes
    activation_fp8: Tensor
    weight_fp8: Tensor

    @property
    def pairs(self) -> int:
        """Pairs of blocks that the linear multiplies."""
        return self.activation.is_fp8.numel() * self.weight.is_fp8.shape[0]

    def mix(self) -> dict[tuple[bool, bool], int]:
        """Number of pairs by (activation is FP8, weight is FP8), counted block by block."""
        a8 = self.activation.is_fp8.sum(0).double()
        w8 = self.weight.is_fp8.sum(0).double()
        m, n = self.activation.is_fp8.shape[0], self.weight.is_fp8.shape[0]
        return {
            (a, w): int(((a8 if a else m - a8) * (w8 if w else n - w8)).sum())
            for a in (False, True)
            for w in (False, True)
        }


def activation_blocks(codes: ActivationCodes) -> BlockCodes:
    """Blocks (M, G) of a quantized activation, in the form of a weight's."""
    wide = codes.is_fp8.unsqueeze(-1)
    scale = torch.where(codes.is_fp8, torch.full_like(codes.scale, FP8_BLOCK), codes.scale)
    return BlockCodes(codes.is_fp8, torch.where(wide, codes.fp8, codes.fp4), scale)


def layer(name: str, activation: ActivationCodes, weight: BlockCodes) -> Layer:
    """The operands of a linear of a checkpoint.

    A checkpoint has no FP8 codes of its FP4 weights. They are drawn: the code of a value uniform
    over those that round to the FP4 code. The nearest codes of decoded values would have fewer
    significand bits set than those of a real weight.
    """
    wide = weight.is_fp8.unsqueeze(-1)
    return Layer(
        name,
        activation_blocks(activation),
        weight,
        activation.fp8,
        torch.where(wide, weight.codes, _drawn_fp8(weight)),
    )


def _drawn_fp8(blocks: BlockCodes) -> Tensor:
    """FP8 codes, uint8 (..., 16), of random values that round to the FP4 codes."""
    ends = torch.tensor([0.0, *E2M1_MIDPOINTS, E2M1.max])
    code = blocks.codes & 0x7
    low, high = (ends.index_select(0, code.flatten().int() + i).view(code.shape) for i in (0, 1))
    generator = torch.Generator().manual_seed(0)
    magnitude = low + (high - low) * torch.rand(code.shape, generator=generator)
    scale = decode_e4m3(blocks.scale & 0x7F).unsqueeze(-1)
    sign = 1 - 2 * (blocks.codes >> 3 & 1).float()
    return encode_e4m3(sign * magnitude * scale / FP8_FACTOR)


def all_fp4(layer: Layer) -> Layer:
    """The same linear with every block in FP4; FP8 blocks are quantized from their values."""
    return replace(
        layer,
        activation=_narrowed(layer.activation),
        weight=_narrowed(layer.weight),
    )


def _narrowed(blocks: BlockCodes) -> BlockCodes:
    """The blocks with every FP8 block in FP4."""
    units = decode_e4m3(blocks.codes) * FP8_FACTOR
    again = quantize_weight(units.flatten(-2), 1.0)
    wide = blocks.is_fp8
    return BlockCodes(
        torch.zeros_like(wide),
        torch.where(wide.unsqueeze(-1), again.fp4, blocks.codes),
        torch.where(wide, again.scale, blocks.scale),
    )


def stimulate(
    layers: list[Layer], datapath: Datapath, cycles: int, seed: int = 0
) -> dict[str, Words]:
    """Words (cycles, bits, 1) for every port of ``Lane``.

    Args:
        layers: operands of the model's linears.
        datapath: its ``kind`` decides which codes are at the ports. A lane for FP4 alone reads only
            E2M1 codes, so its layers must be all FP4.
        cycles: length of each stream.
        seed: random seed of the choice of linears, rows and tokens.

    Raises:
        InputError: no linear has ``reuse`` tokens.
    """
    reuse = datapath.reuse
    usable = [layer for layer in layers if layer.activation.is_fp8.shape[0] >= reuse]
    if not usable:
        raise InputError(f"operand streams need a linear of at least {reuse} tokens, got none")
    rng = np.random.default_rng(seed)
    weights = np.array([layer.pairs for layer in usable], dtype=float)
    chosen = rng.choice(len(usable), size=STREAMS, p=weights / weights.sum())
    ports: dict[str, list[Bits]] = {}
    for index in chosen:
        for port, bits in _stream(usable[index], datapath, cycles, rng).items():
            ports.setdefault(port, []).append(bits)
    return _words(ports)


def _stream(
    layer: Layer, datapath: Datapath, cycles: int, rng: np.random.Generator
) -> dict[str, Bits]:
    """Ports of one lane: bits (cycles, width), low bit first."""
    reuse = datapath.reuse
    tokens, blocks = layer.activation.is_fp8.shape
    rows = layer.weight.is_fp8.shape[0]
    tiles = tokens // reuse
    # The place in the linear's order (tile, row, block, token), wrapping at its end.
    total = tiles * rows * blocks * reuse
    place = (int(rng.integers(total // reuse)) * reuse + np.arange(cycles)) % total
    slot = place % reuse
    block = place // reuse % blocks
    row = place // (reuse * blocks) % rows
    token = place // (reuse * blocks * rows) * reuse + slot
    one = np.ones(cycles, dtype=np.uint8)
    return {
        "activation": _block_bits(
            layer.activation,
            layer.activation_fp8,
            datapath,
            torch.tensor(token),
            torch.tensor(block),
        ),
        "weight": _block_bits(
            layer.weight, layer.weight_fp8, datapath, torch.tensor(row), torch.tensor(block)
        ),
        "valid": one[:, None],
        "new_weight": (slot == 0)[:, None],
        "slot": _bits(slot, max((reuse - 1).bit_length(), 0)),
        "first": (block == 0)[:, None],
        "last": (block == blocks - 1)[:, None],
    }


def _block_bits(
    blocks: BlockCodes, fp8: Tensor, datapath: Datapath, row: Tensor, block: Tensor
) -> Bits:
    """Blocks in the order of ``rtl.lane.block_layout``: codes, then scale and flag where needed."""
    if datapath.formats == (E4M3,):
        return _bits(fp8[row, block].numpy(), E4M3.bits).reshape(len(row), -1)
    is_fp8 = blocks.is_fp8[row, block].numpy()
    width = max(fmt.bits for fmt in datapath.formats)
    parts = [_bits(blocks.codes[row, block].numpy(), width).reshape(len(row), BLOCK * width)]
    parts.append(_bits(blocks.scale[row, block].numpy(), E4M3.bits - 1))
    if datapath.formats != (E2M1,):
        parts.append(is_fp8[:, None])
    return np.concatenate(parts, axis=1)


def _bits(values: Bits, width: int) -> Bits:
    """Bits of integers, (...) to (..., width), low bit first."""
    return (values[..., None].astype(np.uint32) >> np.arange(width, dtype=np.uint32)) & 1


@dataclass(frozen=True, eq=False)
class SiteInput:
    """Input of one site's quantizer: bf16 values (M, K) and the site's record."""

    x: Tensor
    site: Site


def stimulate_quantizer(sites: list[SiteInput], cycles: int, seed: int = 0) -> dict[str, Words]:
    """Words (cycles, bits, 1) for every port of ``Quantizer``: one block per cycle, K fastest.

    Each stream stays at one site. A site's probability is proportional to its number of blocks.
    """
    rng = np.random.default_rng(seed)
    weights = np.array([s.x.numel() for s in sites], dtype=float)
    chosen = rng.choice(len(sites), size=STREAMS, p=weights / weights.sum())
    ports: dict[str, list[Bits]] = {}
    for index in chosen:
        for port, bits in _quantizer_stream(sites[index], cycles, rng).items():
            ports.setdefault(port, []).append(bits)
    return _words(ports)


def _quantizer_stream(source: SiteInput, cycles: int, rng: np.random.Generator) -> dict[str, Bits]:
    """Ports of a quantizer: bits (cycles, width), low bit first."""
    blocks = to_blocks(source.x.to(torch.bfloat16).float()).to(torch.bfloat16)
    tokens, groups, _ = blocks.shape
    place = (int(rng.integers(tokens * groups)) + np.arange(cycles)) % (tokens * groups)
    values = blocks.view(torch.int16).numpy().reshape(-1, BLOCK)[place].astype(np.uint16)
    sensitivity = to_blocks(source.site.sensitivity.float()).byte().numpy()[place % groups]
    significand, exponent = _multiplier_parts(source.site.r)
    constants = np.concatenate(
        [
            _integer_bits(significand, MULTIPLIER_BITS),
            _integer_bits(exponent, _EXPONENT_BITS),
            _integer_bits(source.site.threshold, 64),
        ]
    )
    one = np.ones((cycles, 1), dtype=np.uint8)
    return {
        "input__payload": np.concatenate(
            [
                _bits(values, 16).reshape(cycles, -1),
                _bits(sensitivity, E4M3.bits - 1).reshape(cycles, -1),
            ],
            axis=1,
        ),
        "input__valid": one,
        "output__ready": one,
        "site": np.broadcast_to(constants, (cycles, len(constants))),
        "clear": 0 * one,
    }


def _multiplier_parts(r: float) -> tuple[int, int]:
    """r = significand * 2**(exponent - 11), the significand's first of 12 bits set."""
    fraction, exponent = math.frexp(r)
    return int(fraction * 2**MULTIPLIER_BITS), exponent - 1


def _integer_bits(value: int, width: int) -> Bits:
    return np.array([value >> i & 1 for i in range(width)], dtype=np.uint8)


def _words(ports: dict[str, list[Bits]]) -> dict[str, Words]:
    """Words (cycles, width, 1) of :data:`STREAMS` streams of bits (cycles, width), by port."""
    weight = np.uint64(1) << np.arange(STREAMS, dtype=np.uint64)
    return {
        port: (np.stack(bits, -1).astype(np.uint64) * weight).sum(-1, dtype=np.uint64)[..., None]
        for port, bits in ports.items()
    }
