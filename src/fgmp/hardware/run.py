"""A linear through the accelerator, in either simulator.

Streams are fed from the sections of the memory image, and results are collected by row and column,
as a memory controller would do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from fgmp.formats.spec import E4M3
from fgmp.hardware.array import Array
from fgmp.hardware.image import LinearImage, activation_words
from fgmp.hardware.simulate import simulate

if TYPE_CHECKING:
    from fgmp.hardware.verilator import Model

Words = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Outcome:
    """Results of one linear.

    Attributes:
        fp32: bit patterns, uint32 (tokens, N).
        bf16: bit patterns, uint16 (tokens, N).
        counters: counters of ``rtl.accelerator``, by name.
        nonfinite: the sticky flag.
    """

    fp32: Words
    bf16: npt.NDArray[np.uint16]
    counters: dict[str, int]
    nonfinite: bool


STREAMS = ("sensitivities", "biases", "activations", "flags", "words")
"""Ports of the streams that enter the accelerator."""


@dataclass(frozen=True)
class Feed:
    """Constants of a linear, and the items of every stream as integers."""

    constants: dict[str, int]
    streams: dict[str, list[int]]


def feed(array: Array, image: LinearImage, x: Tensor) -> Feed:
    """Inputs of the accelerator for the activations ``x`` (tokens, K)."""
    passes = -(-len(x) // array.tile_rows)
    flags, blocks = image.flags, image.blocks + bytes(-len(image.blocks) % 16)
    words = [int.from_bytes(blocks[i : i + 16], "little") for i in range(0, len(blocks), 16)]
    code_bits = E4M3.bits - 1
    return Feed(
        constants=image.constants(len(x)),
        streams={
            "sensitivities": [
                sum(int(code) << code_bits * i for i, code in enumerate(block))
                for block in image.sensitivities()
            ],
            "biases": [int(b) for b in image.biases.numpy().view(np.uint32)],
            "activations": [
                int.from_bytes(block.tobytes(), "little")
                for block in activation_words(x).reshape(-1, 16)
            ],
            "flags": _marked(list(flags), 8) * passes,
            "words": _marked(words, 128) * passes,
        },
    )


def _marked(items: list[int], bits: int) -> list[int]:
    """Items of ``bits`` bits with one more bit, which marks the last item."""
    return [*items[:-1], items[-1] | 1 << bits]


def in_amaranth(
    array: Array,
    jobs: Sequence[tuple[LinearImage, Tensor]],
    done: Callable[[], None] = lambda: None,
) -> list[Outcome]:
    """Run linears one after the other in Amaranth's simulator.

    Args:
        array: parameters of the accelerator.
        jobs: linears, each with its activations (tokens, K).
        done: called after each linear.
    """
    from fgmp.hardware.rtl.accelerator import Accelerator

    top = Accelerator(array)
    feeds = [feed(array, image, x) for image, x in jobs]
    outcomes: list[Outcome] = []

    def source(name: str) -> Any:
        async def bench(ctx: Any) -> None:
            port = getattr(top, name)
            for item in chain.from_iterable(fed.streams[name] for fed in feeds):
                ctx.set(_whole(port.payload), item)
                ctx.set(port.valid, 1)
                async for *_, ready in ctx.tick().sample(port.ready):
                    if ready:
                        break
            ctx.set(port.valid, 0)

        return bench

    async def linear(ctx: Any, fed: Feed, results: int) -> list[int]:
        for name, value in _configuration(fed.constants).items():
            ctx.set(_whole(getattr(top, name)), value)
        ctx.set(top.start, 1)
        await ctx.tick()
        ctx.set(top.start, 0)
        item = ctx.tick().sample(_whole(top.results.payload))
        items = [(await item.until(top.results.valid))[0] for _ in range(results)]
        await ctx.tick()
        assert not ctx.get(top.busy), "the last result ends the linear"
        return items

    async def bench(ctx: Any) -> None:
        ctx.set(top.results.ready, 1)
        for (image, x), fed in zip(jobs, feeds, strict=True):
            items = await linear(ctx, fed, results_of(array, image, len(x)))
            counters = {name: ctx.get(top.counters[name]) for name in _counters()}
            placed = _placed(array, image, len(x), items)
            outcomes.append(Outcome(*placed, counters, bool(ctx.get(top.nonfinite))))
            done()

    simulate(top, bench, *(source(name) for name in STREAMS))
    return outcomes


def in_verilator(
    model: "Model", array: Array, image: LinearImage, x: Tensor, pause: float = 0.0, seed: int = 1
) -> Outcome:
    """Run one linear in a Verilator model of the same array.

    Args:
        model: the compiled array.
        array: its parameters.
        image, x: the linear and its activations (tokens, K).
        pause: probability per cycle that a side of a stream pauses.
        seed: random seed of the pauses.
    """
    fed = feed(array, image, x)
    row = model.inputs.rows(1)
    for name, value in _configuration(fed.constants).items():
        view = model.inputs.of(row, name)
        view[:] = np.frombuffer(value.to_bytes(view.shape[1], "little"), dtype=np.uint8)
    begin = row.copy()
    model.inputs.of(begin, "start")[:] = 1
    model.cycles(begin)
    widths = {name: model.inputs.places[f"{name}__payload"][1] for name in fed.streams}
    items = {
        name: np.frombuffer(
            b"".join(item.to_bytes(widths[name], "little") for item in stream), dtype=np.uint8
        ).reshape(-1, widths[name])
        for name, stream in fed.streams.items()
    }
    sinks = {"results": results_of(array, image, len(x))}
    received, last = model.streams(row, items, sinks, pause, seed)
    results = [int.from_bytes(item.tobytes(), "little") for item in received["results"]]
    fp32, bf16 = _placed(array, image, len(x), results)
    counters = int.from_bytes(model.outputs.of(last, "counters").tobytes(), "little")
    named = {name: counters >> 32 * i & 0xFFFF_FFFF for i, name in enumerate(_counters())}
    return Outcome(fp32, bf16, named, bool(model.outputs.of(last, "nonfinite")[0, 0]))


def results_of(array: Array, image: LinearImage, tokens: int) -> int:
    """Number of items of the result stream."""
    return image.n * -(-tokens // array.rows)


def _counters() -> list[str]:
    """Names of the accelerator's counters."""
    from fgmp.hardware.rtl.accelerator import COUNTERS

    return [name for name, _ in COUNTERS]


def _configuration(constants: dict[str, int]) -> dict[str, int]:
    """The header's fields, packed for the ports."""
    from fgmp.hardware.rtl.epilogue import SCALE
    from fgmp.hardware.rtl.ppu import SITE
    from fgmp.hardware.rtl.tiles import SHAPE

    c = constants
    site = {"significand": c["r_significand"], "exponent": c["r_exponent"]} | c
    scale = {"significand": c["scale_significand"], "exponent": c["scale_exponent"]}
    ports = {"shape": (SHAPE, c), "site": (SITE, site), "scale": (SCALE, scale)}
    return {
        port: sum((values[n] & (1 << f.width) - 1) << f.offset for n, f in layout)
        for port, (layout, values) in ports.items()
    }


def _placed(
    array: Array, image: LinearImage, tokens: int, items: list[int]
) -> tuple[Words, npt.NDArray[np.uint16]]:
    """Results as fp32 and bf16 matrices, without rows beyond the last token."""
    from fgmp.hardware.rtl.accelerator import results_layout
    from fgmp.hardware.rtl.tiles import SIZE_BITS

    mask = (1 << SIZE_BITS) - 1
    at = results_layout(array)["values"].offset
    fp32 = np.zeros((tokens, image.n), dtype=np.uint32)
    bf16 = np.zeros((tokens, image.n), dtype=np.uint16)
    for item in items:
        first, column = item & mask, item >> SIZE_BITS & mask
        for row in range(first, min(first + array.rows, tokens)):
            value = item >> at + 48 * (row - first)
            fp32[row, column] = value & 0xFFFF_FFFF
            bf16[row, column] = value >> 32 & 0xFFFF
    return fp32, bf16


def _whole(value: Any) -> Any:
    """A port as one number, with or without fields."""
    return value.as_value() if hasattr(value, "as_value") else value
