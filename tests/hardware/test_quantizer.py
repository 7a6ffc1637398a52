"""The quantizer is ``formats.activation.quantize``: codes, scale, flag, and scores to the bit."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from benches import a_site, an_input, draw
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import Site, multiplier, power_codes, quantize
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.formats.spec import BLOCK, E2M1, E4M3, FP8_FACTOR, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.hardware.image import activation_words, normalised
from fgmp.hardware.rtl.ppu import LATENCY, SITE, Quantizer, latency
from fgmp.hardware.rtl.score import difference_bounds
from fgmp.hardware.simulate import simulate

Quantized = tuple[list[int], int, int, int]


def constants(r: float, threshold: int) -> dict[str, int]:
    significand, exponent = normalised(r, SITE["significand"].width)
    return {
        "significand": significand,
        "exponent": exponent & 0x1FF,
        "threshold": threshold % 2**64,
    }


def play(
    x: Tensor,
    sensitivity: Tensor,
    r: float,
    thresholds: list[int],
    config: QuantizerConfig = PAPER_QUANTIZER,
) -> list[Quantized]:
    """Blocks (n, 16), one per cycle; block i meets the sensitivities of row i and threshold i."""
    top, words, received = Quantizer(config), activation_words(x)[:, 0], []
    more = {"difference": 4, "benefit": 1, "truncated": 2}[config.rule]
    is_paper = (config.rule, config.scales) == ("difference", "max")
    assert top.latency == LATENCY + (0 if is_paper else more)

    async def bench(ctx: Any) -> None:
        ctx.set(top.output.ready, 1)
        for cycle in range(len(x) + top.latency):
            if cycle < len(x):
                ctx.set(top.input.payload.x, words[cycle].tolist())
                ctx.set(top.input.payload.sensitivity, sensitivity[cycle].tolist())
            ctx.set(top.input.valid, cycle < len(x))
            # The threshold is read one step before the last.
            judged = min(max(cycle - (top.latency - 1), 0), len(x) - 1)
            ctx.set(top.site, constants(r, thresholds[judged]))
            await ctx.tick()
            if ctx.get(top.output.valid):
                received.append(unpacked(ctx.get(top.output.payload)))
        assert ctx.get(top.input.ready)

    simulate(top, bench)
    return received


def unpacked(payload: Any) -> Quantized:
    codes = [int(c) for c in payload.block.codes]
    return codes, int(payload.block.scale), int(payload.block.is_fp8), int(payload.finite)


def reference(
    x: Tensor,
    sensitivity: Tensor,
    r: float,
    thresholds: list[int],
    config: QuantizerConfig = PAPER_QUANTIZER,
) -> list[Quantized]:
    blocks = []
    for i, threshold in enumerate(thresholds):
        q = quantize(x[i], a_record(r, sensitivity[i], threshold, config))
        wide = bool(q.is_fp8[0])
        codes = (q.fp8 if wide else q.fp4)[0].tolist()
        finite = int(x[i].to(torch.bfloat16).isfinite().all())
        blocks.append((codes, 0 if wide else int(q.scale[0]), int(wide), finite))
    return blocks


def a_record(r: float, sensitivity: Tensor, threshold: int, config: QuantizerConfig) -> Site:
    return Site(r, sensitivity, 1.0, threshold, config.rule, config.scales)


def blocks_of_all_kinds(n: int, r: float, seed: int) -> Tensor:
    """Blocks whose values lie anywhere, many of them on ties, a few of them not finite."""
    x = an_input(n, BLOCK, seed) * torch.exp2(torch.randint(-14, 3, (n, 1), generator=draw(seed)))
    x = (x * (E4M3.max / r)).to(torch.bfloat16)
    short = x.view(torch.int16) & ~0x1F  # three significant bits: ties of both formats
    x = torch.where(torch.rand(n, 1, generator=draw(seed + 1)) < 0.5, short.view(torch.bfloat16), x)
    x[0], x[1], x[2] = 0.0, -0.0, 2.0**-130
    x[3, 5], x[4, 0], x[5] = float("nan"), float("-inf"), float("inf")
    x[6] = torch.finfo(torch.bfloat16).max
    return x.float()


def check(n: int, r: float, config: QuantizerConfig) -> None:
    """Thresholds at every score and one below it decide by the last bit of S."""
    x = blocks_of_all_kinds(n, r, seed=int(r) % 7)
    sensitivity = torch.randint(1, 127, (n, BLOCK), generator=draw(9)).to(torch.uint8)
    if config.sensitivities == "powers":
        sensitivity = power_codes(sensitivity)
    ends = [THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4]
    thresholds = []
    for i in range(n):
        score = int(quantize(x[i], a_record(r, sensitivity[i], 0, config)).score[0])
        thresholds.append([score, max(score - 1, -1), *ends][i % 4])
    blocks = play(x, sensitivity, r, thresholds, config)
    assert blocks == reference(x, sensitivity, r, thresholds, config)


@pytest.mark.parametrize("r", [1.0, multiplier(3.7), multiplier(5e-4), 2.0**100, 2.0**-100])
def test_codes_and_decisions(r: float) -> None:
    check(48, r, PAPER_QUANTIZER)


@pytest.mark.parametrize(
    "config",
    [
        QuantizerConfig("benefit", "search"),
        QuantizerConfig("difference", "search"),
        QuantizerConfig("truncated", "search"),
        QuantizerConfig("benefit", "search", "powers"),
        QuantizerConfig("truncated", "search", "powers"),
    ],
    ids=str,
)
def test_searched_scales(config: QuantizerConfig) -> None:
    check(32, multiplier(3.7), config)


@pytest.mark.parametrize("scales", ["max", "search"])
def test_truncated_values_that_round_apart(scales: str) -> None:
    """About half a step v may round to nothing and q8, which was rounded before, to one step."""
    tops = torch.tensor([E4M3.magnitudes[c] for c in (0x7E, 0x7D, 0x79, 0x40, 0x38)])
    steps = torch.exp2(torch.tensor([5.0, 4.0, 5.0, -2.0, -3.0])) / FP8_FACTOR
    x = steps[:, None] / 2 * (1 + torch.arange(-12, 4) / 128)
    x[:, 0] = tops
    sensitivity = torch.full((len(x), BLOCK), 0x38, dtype=torch.uint8)
    config = QuantizerConfig("truncated", scales)
    sites = [a_record(1.0, g, 0, config) for g in sensitivity]
    thresholds = [int(quantize(row, site).score[0]) for row, site in zip(x, sites, strict=True)]
    blocks = play(x, sensitivity, 1.0, thresholds, config)
    assert blocks == reference(x, sensitivity, 1.0, thresholds, config)


@pytest.mark.parametrize("rule", ["benefit", "truncated"])
def test_rules_under_the_largest_scale(rule: str) -> None:
    check(32, 1.0, QuantizerConfig(rule, "max"))


def test_the_papers_rule_with_powers_of_two() -> None:
    check(32, 1.0, QuantizerConfig("difference", "max", "powers"))


def test_a_rule_without_hardware_is_refused() -> None:
    with pytest.raises(InputError, match=r"rule must be one with hardware .*, got 'random'"):
        latency(QuantizerConfig("random", "max"))


def test_every_e4m3_midpoint_and_its_neighbours() -> None:
    """u on each tie of E4M3, one bf16 step above and below it, with r = 1: 3 * 126 values."""
    grid = [Fraction(v) for v in E4M3.magnitudes]
    ties = [(a + b) / 2 for a, b in pairwise(grid)] + [Fraction(464)]
    bits = torch.tensor([float(t) for t in ties]).to(torch.bfloat16).view(torch.int16)
    x = torch.stack([bits - 1, bits, bits + 1], 1).flatten()
    x = torch.cat([x, x | -0x8000]).view(torch.bfloat16).float()
    x = torch.nn.functional.pad(x, (0, -len(x) % BLOCK)).view(-1, BLOCK)
    sensitivity = torch.full_like(x, 0x38, dtype=torch.uint8)
    for threshold in (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4):
        limits = [threshold] * len(x)
        assert play(x, sensitivity, 1.0, limits) == reference(x, sensitivity, 1.0, limits)


def test_back_pressure_and_the_sticky_flag() -> None:
    """Nothing is lost or repeated while either side pauses; the flag stays until it is cleared."""
    x = an_input(40, BLOCK, seed=3)
    x[7, 2] = float("nan")
    site = a_site(x, 0.5, seed=3)
    sensitivity = site.sensitivity.repeat(len(x), 1)
    top, received = Quantizer(PAPER_QUANTIZER), []
    pauses = iter((torch.rand(4000, generator=draw(4)) < 0.4).tolist())

    async def source(ctx: Any) -> None:
        for i, words in enumerate(activation_words(x)[:, 0]):
            while next(pauses):
                await ctx.tick()
            ctx.set(top.input.payload.x, words.tolist())
            ctx.set(top.input.payload.sensitivity, sensitivity[i].tolist())
            ctx.set(top.input.valid, 1)
            await until(ctx, top.input.ready)
            ctx.set(top.input.valid, 0)

    async def bench(ctx: Any) -> None:
        ctx.set(top.site, constants(site.r, site.threshold))
        while len(received) < len(x):
            ready = not next(pauses)
            ctx.set(top.output.ready, ready)
            *_, valid, payload = await ctx.tick().sample(top.output.valid, top.output.payload)
            if valid and ready:
                received.append(unpacked(payload))
        assert ctx.get(top.nonfinite)
        ctx.set(top.clear, 1)
        await ctx.tick()
        assert not ctx.get(top.nonfinite)

    simulate(top, bench, source)
    assert received == reference(x, sensitivity, site.r, [site.threshold] * len(x))


async def until(ctx: Any, condition: Any) -> None:
    async for *_, holds in ctx.tick().sample(condition):
        if holds:
            break


def test_difference_bounds_by_brute_force() -> None:
    """Values at all scales, codes and ties: the aligned difference is whole and within its bits."""
    bounds = difference_bounds()
    assert bounds.magnitude.bit_length() == 9, "as docs/hardware.md says"
    x = torch.arange(0, 448 * 512 + 1, 7, dtype=torch.float32) / 512
    for scale in range(1, E4M3.max_code + 1):
        s = E4M3.magnitudes[scale]
        u = x[x <= s]
        filled = torch.nn.functional.pad(u, (0, -len(u) % (BLOCK - 1))).view(-1, BLOCK - 1)
        block = torch.cat([filled, torch.full((len(filled), 1), s)], 1).to(torch.bfloat16)
        q = quantize(
            block.float(),
            a_record(1.0, torch.full((BLOCK,), 0x38, dtype=torch.uint8), 0, PAPER_QUANTIZER),
        )
        assert (q.scale == scale).all()
        e4m3 = torch.tensor([*E4M3.magnitudes, 0.0])[(q.fp8 & 0x7F).long()]
        e2m1 = torch.tensor(E2M1.magnitudes)[(q.fp4 & 7).long()]
        difference = ((e2m1 * s - FP8_FACTOR * e4m3).abs() * 1024).long()
        base = max(max(scale >> 3, 1) - 1 - 3, 0)
        near = e2m1 > 0
        assert (difference[near] % 2**base == 0).all()
        assert int((difference[near] >> base).max()) <= bounds.magnitude
