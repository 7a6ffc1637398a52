"""Shared by the hardware's tests: random blocks, weights and sites, and how to play them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fgmp.formats.activation import Site, multiplier, quantize
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.formats.spec import BLOCK, E4M3, FP8_BLOCK
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.rtl.lane import Lane
from fgmp.hardware.simulate import simulate
from fgmp.pack.planes import BlockCodes, PackedWeight, pack


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_blocks(n: int, share: float, seed: int) -> BlockCodes:
    """``n`` blocks, this share of them FP8, every code but NaN alike."""
    g = draw(seed)
    is_fp8 = torch.rand(n, generator=g) < share
    magnitude = torch.randint(E4M3.max_code + 1, (n, BLOCK), generator=g)
    fp8 = magnitude | torch.randint(2, (n, BLOCK), generator=g) << 7
    fp4 = torch.randint(16, (n, BLOCK), generator=g)
    codes = torch.where(is_fp8[:, None], fp8, fp4).to(torch.uint8)
    scale = torch.randint(1, E4M3.max_code + 1, (n,), generator=g)
    return BlockCodes(is_fp8, codes, torch.where(is_fp8, FP8_BLOCK, scale).to(torch.uint8))


def take(blocks: BlockCodes, index: Tensor) -> BlockCodes:
    return BlockCodes(blocks.is_fp8[index], blocks.codes[index], blocks.scale[index])


def port(blocks: BlockCodes, i: int, datapath: Datapath) -> dict[str, object]:
    """A block in the form of a lane's port."""
    fields: dict[str, object] = {"codes": blocks.codes[i].tolist()}
    if datapath.kind != "fp8":
        fields["scale"] = int(blocks.scale[i]) & 0x7F
    if datapath.kind == "mixed":
        fields["is_fp8"] = int(blocks.is_fp8[i])
    return fields


def signed(value: int, bits: int) -> int:
    return value - (value >> bits - 1 << bits)


def play_lane(
    lane: Lane, activation: BlockCodes, weight: BlockCodes, length: int, gaps: Sequence[int] = ()
) -> list[int]:
    """Totals of a lane that computes ``reuse`` dot products at a time, of ``length`` blocks each.

    Pair i is in slot ``i % reuse``; a weight block stays for ``reuse`` pairs. Before the pairs in
    ``gaps`` there is a cycle without a pair.
    """
    datapath, n = lane.datapath, len(activation.is_fp8)
    totals: list[int] = []

    async def bench(ctx):
        async def tick():
            await ctx.tick()
            if ctx.get(lane.done):
                totals.append(signed(ctx.get(lane.total), datapath.total_bits))

        for i in range(n):
            if i in gaps:
                ctx.set(lane.valid, 0)
                await tick()
            step = i // datapath.reuse
            ctx.set(lane.activation, port(activation, i, datapath))
            ctx.set(lane.weight, port(weight, i, datapath))
            ctx.set(lane.valid, 1)
            ctx.set(lane.new_weight, i % datapath.reuse == 0)
            ctx.set(lane.slot, i % datapath.reuse)
            ctx.set(lane.first, step % length == 0)
            ctx.set(lane.last, step % length == length - 1)
            await tick()
        ctx.set(lane.valid, 0)
        for _ in range(datapath.latency):
            await tick()

    simulate(lane, bench)
    return totals


def a_weight(n: int, k: int, fp8_share: float, seed: int) -> PackedWeight:
    g = draw(seed)
    w = torch.randn(n, k, generator=g) * 0.1
    codes = quantize_weight(w, tensor_scale(float(w.abs().max())))
    return pack(codes, torch.rand(codes.scale.shape, generator=g) < fp8_share)


def an_input(tokens: int, k: int, seed: int) -> Tensor:
    """Heavy-tailed activations, fp32 (tokens, K)."""
    g = draw(seed)
    return torch.randn(tokens, k, generator=g) * torch.randn(tokens, k, generator=g).exp()


def a_site(
    x: Tensor, fp8_share: float, seed: int, quantizer: QuantizerConfig = PAPER_QUANTIZER
) -> Site:
    """A site with about this share of the blocks of ``x`` in FP8.

    Values beyond nine tenths of the largest saturate.
    """
    rules = (quantizer.rule, quantizer.scales)
    sensitivity = torch.randint(1, 127, (x.shape[-1],), generator=draw(seed)).to(torch.uint8)
    finite = x.nan_to_num(0, 0, 0)
    r = multiplier(float(finite.abs().max()) * 0.9)
    score = quantize(finite, Site(r, sensitivity, 1.0, -1, *rules)).score.double()
    threshold = -1 if fp8_share == 1 else int(score.quantile(1 - fp8_share))
    return Site(r, sensitivity, 1.0, threshold, *rules)
