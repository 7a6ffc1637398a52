"""Whole linears through the array: bit for bit, for all shapes and with pauses on any stream."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from benches import a_site, a_weight, an_input, draw
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import power_codes
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.formats.spec import BLOCK
from fgmp.hardware.array import Array
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.image import ALIGNMENT, SECTIONS, LinearImage, normalised
from fgmp.hardware.rtl.unpack import Unpacker
from fgmp.hardware.run import feed, in_amaranth
from fgmp.hardware.simulate import simulate
from fgmp.hardware.verify import Layer, first_rows, mismatches
from fgmp.pack.planes import unpack, validate
from fgmp.pack.stream import from_image, to_image

SMALL = Array(
    datapath=Datapath(k_max=64, reuse=4),
    lanes=2,
    rows=2,
    outputs_max=32,
    quantizer=PAPER_QUANTIZER,
)


def a_layer(
    outputs: list[int],
    k: int,
    x: Tensor,
    *,
    weights: float,
    activations: float,
    seed: int,
    quantizer: QuantizerConfig = PAPER_QUANTIZER,
) -> Layer:
    """Linears of one site, every second with a bias; shares of FP8 blocks by side."""
    whole = a_weight(sum(outputs), k, weights, seed)
    linears, g = {}, draw(seed)
    for i, n in enumerate(outputs):
        bias = torch.randn(n, generator=g) if i % 2 else None
        linears[f"linear_{i}"] = (first_rows(whole, n), bias)
    return Layer("linear_0", a_site(x, activations, seed, quantizer), linears)


def run(array: Array, *jobs: tuple[Layer, Tensor]) -> list[dict[str, int]]:
    """Compare every output of every job; returns what the array counted."""
    outcomes = in_amaranth(array, [(layer.image, x) for layer, x in jobs])
    for (layer, x), outcome in zip(jobs, outcomes, strict=True):
        assert mismatches(outcome, layer.reference(x), x) == 0
    return [outcome.counters for outcome in outcomes]


def test_a_16_by_64_layer() -> None:
    """The default lanes and quantizer: four weight rows at a time, sixteen tokens."""
    array = Array(datapath=Datapath(k_max=64), lanes=4, outputs_max=16)
    x = an_input(16, 64, seed=1)
    layer = a_layer([16], 64, x, weights=0.3, activations=0.3, seed=1, quantizer=array.quantizer)
    array.require_rules("linear_0", layer.site)
    (counters,) = run(array, (layer, x))
    assert counters["working"] == array.cycles(16, 64, 16) == 256
    assert counters["activations"] == 0, "the quantizer caused a stall"


def test_linears_one_after_the_other() -> None:
    """Ragged N, K and tokens; several linears of a site; all FP8, all FP4 and mixed; values that
    are not finite; streams that run ahead of the linear that is computed."""
    xs = [an_input(t, k, seed) for seed, (t, k) in enumerate([(9, 40), (1, 16), (17, 64), (6, 50)])]
    xs[0][8, 3], xs[2][2, 7], xs[2][16, 63] = torch.nan, torch.inf, -torch.inf
    jobs = [
        (a_layer([5, 2], 40, xs[0], weights=0.5, activations=0.5, seed=2), xs[0]),
        (a_layer([3], 16, xs[1], weights=1.0, activations=1.0, seed=3), xs[1]),
        (a_layer([4, 1, 2], 64, xs[2], weights=0.3, activations=0.4, seed=4), xs[2]),
        (a_layer([1], 50, xs[3], weights=0.0, activations=0.0, seed=5), xs[3]),
    ]
    counted = run(SMALL, *jobs)
    for (layer, x), counters in zip(jobs, counted, strict=True):
        assert counters["working"] == SMALL.cycles(layer.image.n, layer.k, len(x))
        waits = ("first", "activations", "weights", "epilogue")
        rest = counters["cycles"] - counters["working"] - sum(counters[w] for w in waits)
        assert 0 <= rest < 60, "all but the pipeline's end is accounted for"


def test_an_array_for_powers_of_two() -> None:
    """Padding has no sensitivity, which is no power of two."""
    x = an_input(5, 40, seed=11)
    layer = a_layer([3], 40, x, weights=0.4, activations=0.4, seed=11)
    array = replace(SMALL, quantizer=replace(PAPER_QUANTIZER, sensitivities="powers"))
    with pytest.raises(InputError, match="sensitivities must be 'powers' for this array"):
        array.require_rules("linear_0", layer.site)
    codes = power_codes(layer.site.sensitivity)
    powers = replace(layer, site=replace(layer.site, sensitivity=codes))
    array.require_rules("linear_0", powers.site)
    SMALL.require_rules("linear_0", powers.site)
    run(array, (powers, x))
    # It reads no significands: with the site's original codes it decides otherwise.
    (outcome,) = in_amaranth(array, [(layer.image, x)])
    assert mismatches(outcome, layer.reference(x), x) > 0


def test_who_waits_for_whom() -> None:
    """One weight tile over many tokens leaves the lanes waiting for the quantizer; one group, for
    the epilogue. With N = rows * lanes the quantizer keeps up (docs/hardware.md)."""
    x = an_input(24, 64, seed=6)
    thin = a_layer([2], 64, x, weights=0.5, activations=0.5, seed=6)
    enough = a_layer([4], 64, x, weights=0.5, activations=0.5, seed=6)
    short = an_input(24, 16, seed=7)
    shallow = a_layer([16], 16, short, weights=0.5, activations=0.5, seed=7)
    counted = run(SMALL, (thin, x), (enough, x), (shallow, short))
    assert counted[0]["activations"] > 0
    assert counted[1]["activations"] <= SMALL.datapath.reuse, "a tile switch, not a backlog"
    assert counted[2]["epilogue"] > 0


def test_lanes_follow_the_quantizer_through_one_token() -> None:
    """A row of 16 blocks: the lanes begin long before its last is quantized."""
    array = Array(datapath=Datapath(k_max=256), lanes=2, outputs_max=4, quantizer=PAPER_QUANTIZER)
    x = an_input(1, 256, seed=13)
    layer = a_layer([2], 256, x, weights=0.3, activations=0.3, seed=13)
    (counters,) = run(array, (layer, x))
    weights = 2 * 16
    assert counters["cycles"] < weights + counters["working"] + 25


def test_image_is_the_packed_weight() -> None:
    """Rows of the linears of a site follow each other; padding and alignment are zero."""
    x = an_input(3, 40, seed=8)
    layer = a_layer([5, 2], 40, x, weights=0.5, activations=0.5, seed=8)
    image = layer.image
    content = from_image(image.flags + image.blocks, 7, 40)
    parts = [unpack(weight) for weight, _ in layer.linears.values()]
    assert torch.equal(content.is_fp8, torch.cat([p.is_fp8 for p in parts]))
    assert torch.equal(content.codes, torch.cat([p.codes for p in parts]))
    assert image.biases[:5].tolist() == [0.0] * 5 and image.biases[:5].signbit().all()
    sections = image.sections(x)
    assert list(sections) == list(SECTIONS)
    memory, at = image.memory(x), 0
    for part in sections.values():
        assert memory[at : at + len(part)] == part and at % ALIGNMENT == 0
        at += -(-len(part) // ALIGNMENT) * ALIGNMENT
    assert len(memory) == at
    header = [int.from_bytes(memory[i : i + 8], "little", signed=True) for i in range(0, 64, 8)]
    assert header[:3] == [7, 3, 3] and header[5] == layer.site.threshold
    assert header[3] * 2.0 ** (header[4] - 11) == layer.site.r
    assert header[6] * 2.0 ** (header[7] - 23) == image.scale


@pytest.mark.parametrize("value", [1.0, 448.0, 2.0**-149, 3 * 2.0**-149, 0.0])
def test_normalised(value: float) -> None:
    significand, exponent = normalised(value, 24)
    assert significand * 2.0 ** (exponent - 23) == value
    assert value == 0 or 2**23 <= significand < 2**24


def test_unpacker_gives_the_blocks_of_an_image() -> None:
    """Both formats in all orders, with pauses; an image that ends within a word and a byte."""
    weight = a_weight(5, 3 * BLOCK, 0.4, seed=9)
    content, top, received = from_image(to_image(weight), 5, 48), Unpacker(), []
    x = an_input(1, 48, seed=9)
    image = LinearImage.of("weight", a_site(x, 0.5, 9), [(weight, None)])
    streams = feed(SMALL, image, x).streams
    pauses = iter((torch.rand(3000, generator=draw(9)) < 0.3).tolist())

    def source(port: Any, items: list[int]) -> Any:
        async def bench(ctx: Any) -> None:
            for item in items * 2:
                while next(pauses):
                    await ctx.tick()
                ctx.set(port.payload.as_value(), item)
                ctx.set(port.valid, 1)
                async for *_, ready in ctx.tick().sample(port.ready):
                    if ready:
                        break
                ctx.set(port.valid, 0)

        return bench

    async def bench(ctx: Any) -> None:
        while len(received) < 30:
            ready = not next(pauses)
            ctx.set(top.output.ready, ready)
            ctx.set(top.restart, ready and len(received) % 15 == 14 and ctx.get(top.output.valid))
            *_, valid, payload = await ctx.tick().sample(top.output.valid, top.output.payload)
            if valid and ready:
                received.append(payload)

    flags, words = source(top.flags, streams["flags"]), source(top.words, streams["words"])
    simulate(top, bench, flags, words)
    for i, block in enumerate(received):
        row, group = divmod(i % 15, 3)
        assert bool(block.is_fp8) == bool(content.is_fp8[row, group])
        assert [int(c) for c in block.codes] == content.codes[row, group].tolist()
        assert int(block.scale) == (0 if block.is_fp8 else int(content.scale[row, group]))


def test_first_rows_are_a_weight() -> None:
    for share in (0.0, 0.4, 1.0):
        weight = a_weight(6, 40, share, seed=10)
        part = first_rows(weight, 4)
        assert torch.equal(unpack(part).codes, unpack(weight).codes[:4])
        if share != 0.4:
            validate("part", part)
    assert first_rows(weight, 9).n == 6


def test_refusals() -> None:
    def refuses(rule: str) -> Any:
        return pytest.raises(InputError, match=re.escape(rule))

    with refuses("q_proj: K must be at most 64 for this array, got 80; choose a larger k_max"):
        SMALL.require_fits("q_proj", 16, 80)
    with refuses("q_proj: N must be at most 32 for this array, got 33; choose a larger outputs"):
        SMALL.require_fits("q_proj", 33, 64)
    with refuses("array: lanes must be 1 or more, got 0"):
        Array(lanes=0)
    with refuses("array: kind must be 'mixed', got 'fp8'"):
        Array(datapath=Datapath(kind="fp8"))
    x = an_input(1, 16, seed=11)
    site, weight = a_site(x, 0.5, 11), a_weight(2, 16, 0.5, 11)
    for change, rule in (
        ({"r": 2.0**-101}, "x: the accelerator needs a multiplier from 2**-100 to 2**100"),
    ):
        with refuses(rule):
            LinearImage.of("x", type(site)(**{**vars(site), **change}), [(weight, None)])
    for change, rule in (
        ({"rule": "random"}, "x: rule must be 'difference' for this array, got 'random'"),
        ({"scales": "search"}, "x: scales must be 'max' for this array, got 'search'"),
    ):
        with refuses(rule):
            SMALL.require_rules("x", type(site)(**{**vars(site), **change}))
    with refuses(
        "quantizer: rule must be one with hardware (difference, benefit, truncated), got 'random'"
    ):
        Array(quantizer=QuantizerConfig("random"))
    with refuses("x: the accelerator needs finite biases"):
        LinearImage.of("x", site, [(weight, torch.tensor([1.0, torch.inf]))])
