"""The hardware against the definition in bulk, by Verilator: the figures of docs/hardware.md.

    python runs/rtl.py units [--vectors N] [--json FILE]           minutes a unit
    python runs/rtl.py stalls [--json FILE]                        minutes
    python runs/rtl.py model DIR --data TEXT [--json FILE]         minutes

``units`` plays all directed and N random vectors through each dot-product unit of the lane, the two
baseline lanes, the quantizers and the epilogue. ``stalls`` runs linears with as many outputs as
the quantizer needs to keep up, and with half and twice as many. ``model`` runs a whole quantized
model on real text, whose linears are computed by the simulated array, layer after layer. Every
output of every linear is compared with ``exact_linear`` on the same input. Each layer reads the
hardware's own outputs of the previous one, in bf16.

Needs Verilator: apt-get install verilator.
"""

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from provenance import provenance
from torch import Tensor

from fgmp import evaluation_windows
from fgmp.formats.activation import Site, multiplier, power_codes, quantize
from fgmp.formats.codec import E2M1_MIDPOINTS
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.formats.spec import BLOCK, E4M3, FP8_BLOCK, FP8_FACTOR
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.hardware.array import Array
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.image import normalised
from fgmp.hardware.rtl import epilogue, ppu
from fgmp.hardware.run import in_verilator
from fgmp.hardware.silicon import MIXED
from fgmp.hardware.verify import Layer, mismatches
from fgmp.hardware.verilator import Model
from fgmp.model.linear import MixedLinear, mixed_linears, sites
from fgmp.model.source import load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.pack.planes import BlockCodes, pack

CHUNK = 1 << 17
QUIET = 0x7FC0_0000
Drawer = np.random.Generator


def packed(fields: list[tuple[np.ndarray, int]], width: int) -> np.ndarray:
    """Fields of so many bits, the first lowest, as rows of ``width`` bytes."""
    bits = []
    for values, n in fields:
        words = np.ascontiguousarray(values)
        as_bytes = words.view(np.uint8).reshape(*words.shape, words.itemsize)
        each = np.unpackbits(as_bytes, axis=-1, bitorder="little")[..., :n]
        bits.append(each.reshape(len(words), -1))
    rows = np.packbits(np.concatenate(bits, axis=1), axis=1, bitorder="little")
    return np.pad(rows, ((0, 0), (0, width - rows.shape[1])))


def blocks_of(codes: np.ndarray, scale: np.ndarray, is_fp8: np.ndarray) -> BlockCodes:
    scale = np.where(is_fp8, FP8_BLOCK, scale).astype(np.uint8)
    return BlockCodes(*(torch.from_numpy(a) for a in (is_fp8, codes, scale)))


def random_side(n: int, is_fp8: np.ndarray, draw: Drawer) -> BlockCodes:
    """Blocks of the given formats: uniform codes, codes of one exponent, or mostly zeros."""
    codes = draw.integers(256, size=(n, BLOCK), dtype=np.uint8)
    kind = draw.integers(4, size=(n, 1))
    narrow = codes & 0x87 | draw.integers(16, size=(n, 1), dtype=np.uint8) << 3
    codes = np.where(kind == 1, narrow, codes)
    codes = np.where((kind == 2) & (draw.random((n, BLOCK)) < 0.8), 0, codes)
    codes = np.where((codes & 0x7F == 0x7F) & is_fp8[:, None], 0x7E, codes)
    codes = np.where(is_fp8[:, None], codes, codes & 0xF).astype(np.uint8)
    return blocks_of(codes, draw.integers(1, 127, size=n), is_fp8)


def directed(fp8: tuple[bool, bool]) -> Iterator[tuple[BlockCodes, BlockCodes]]:
    """Every pair of codes alone in a block, in a place that moves; every pair of block scales,
    under sixteen largest codes of either sign."""
    counts = [256 if wide else 16 for wide in fp8]
    left, right = (g.reshape(-1) for g in np.meshgrid(*map(np.arange, counts), indexing="ij"))
    place = np.arange(len(left)) * 7 % BLOCK
    sides = []
    for codes, wide in zip((left, right), fp8, strict=True):
        block = np.zeros((len(codes), BLOCK), dtype=np.uint8)
        block[np.arange(len(codes)), place] = codes
        sides.append(blocks_of(block, np.full(len(codes), 0x38), np.full(len(codes), wide)))
    yield sides[0], sides[1]
    scales = [g.reshape(-1) for g in np.meshgrid(np.arange(1, 127), np.arange(1, 127))]
    for negative in ((False, False), (False, True)):
        sides = []
        for scale, wide, minus in zip(scales, fp8, negative, strict=True):
            code = (0x7E if wide else 0x7) + minus * (0x80 if wide else 0x8)
            block = np.full((len(scale), BLOCK), code, dtype=np.uint8)
            sides.append(blocks_of(block, scale, np.full(len(scale), wide)))
        yield sides[0], sides[1]


def lane_rows(model: Model, datapath: Datapath, pairs: tuple[BlockCodes, BlockCodes]) -> np.ndarray:
    n = len(pairs[0].is_fp8)
    rows = model.inputs.rows(n)
    for name, side in zip(("activation", "weight"), pairs, strict=True):
        bits = max(fmt.bits for fmt in datapath.formats)
        fields = [(side.codes.numpy(), bits)]
        if datapath.kind != "fp8":
            fields.append((side.scale.numpy() & 0x7F, 7))
        if datapath.kind == "mixed":
            fields.append((side.is_fp8.numpy(), 1))
        model.inputs.of(rows, name)[:] = packed(fields, model.inputs.places[name][1])
    model.inputs.of(rows, "valid")[:] = 1
    return rows


def totals_of(model: Model, datapath: Datapath, rows: np.ndarray) -> np.ndarray:
    """Totals in the order in which they were done, int64."""
    idle = model.inputs.rows(datapath.latency)
    out = model.cycles(np.concatenate([rows, idle]))
    total = np.ascontiguousarray(model.outputs.of(out, "total")).view(np.int64)[:, 0]
    done = model.outputs.of(out, "done")[:, 0] == 1
    unused = 64 - datapath.total_bits
    return total[done] << unused >> unused


def check_pairs(model: Model, datapath: Datapath, pairs: tuple[BlockCodes, BlockCodes]) -> int:
    """Each pair a dot product of its own, with a new weight and in the next slot."""
    rows = lane_rows(model, datapath, pairs)
    for name in ("new_weight", "first", "last"):
        model.inputs.of(rows, name)[:] = 1
    model.inputs.of(rows, "slot")[:, 0] = np.arange(len(rows)) % datapath.reuse
    expected = datapath.contributions(*pairs).numpy()
    return int((totals_of(model, datapath, rows) != expected).sum())


def check_mixture(model: Model, datapath: Datapath, n: int, draw: Drawer) -> int:
    """Formats at random, weights that stay, dot products of eight blocks in every slot."""
    reuse, length = datapath.reuse, 8
    n -= n % (reuse * length)
    a = random_side(n, draw.random(n) < 0.5, draw)
    few = random_side(n // reuse, draw.random(n // reuse) < 0.5, draw)
    w = BlockCodes(*(t.repeat_interleave(reuse, 0) for t in (few.is_fp8, few.codes, few.scale)))
    rows = lane_rows(model, datapath, (a, w))
    i = np.arange(n)
    model.inputs.of(rows, "new_weight")[:, 0] = i % reuse == 0
    model.inputs.of(rows, "slot")[:, 0] = i % reuse
    model.inputs.of(rows, "first")[:, 0] = i // reuse % length == 0
    model.inputs.of(rows, "last")[:, 0] = i // reuse % length == length - 1
    each = datapath.contributions(a, w).view(-1, length, reuse)
    return int((totals_of(model, datapath, rows) != each.sum(1).flatten().numpy()).sum())


LANES = {
    "four units": Datapath(),
    "shared mixed unit": MIXED,
    "FP8 alone": Datapath(kind="fp8"),
    "FP4 alone": Datapath(kind="fp4"),
}


def run_lane(datapath: Datapath, vectors: int, folder: Path) -> dict[str, Any]:
    model, draw, counts = Model(datapath.create(), folder), np.random.default_rng(1), {}
    for activation, weight in itertools.product(datapath.formats, repeat=2):
        fp8 = (activation is E4M3, weight is E4M3)
        wrong = count = 0
        for pairs in directed(fp8):
            wrong += check_pairs(model, datapath, pairs)
            count += len(pairs[0].is_fp8)
        drawn = 0
        while drawn < vectors:
            n = min(CHUNK, vectors - drawn)
            sides = [random_side(n, np.full(n, wide), draw) for wide in fp8]
            wrong += check_pairs(model, datapath, (sides[0], sides[1]))
            drawn += n
        name = f"fp{activation.bits}xfp{weight.bits}"
        counts[name] = {"directed": count, "random": drawn, "mismatches": wrong}
    if datapath.kind == "mixed":
        wrong = drawn = 0
        while drawn < vectors:
            wrong += check_mixture(model, datapath, CHUNK, draw)
            drawn += CHUNK
        counts["interleaved"] = {"directed": 0, "random": drawn, "mismatches": wrong}
    return counts


def quantizer_values(n: int, r: float, draw: Drawer) -> Tensor:
    """bf16 blocks (n, 16): heavy-tailed, many on ties, some any bit pattern at all."""
    exponent = draw.integers(-16, 4, size=(n, 1)) + draw.standard_normal(
        (n, BLOCK)
    ) * draw.integers(0, 4, size=(n, 1))
    x = torch.from_numpy(draw.standard_normal((n, BLOCK)) * np.exp2(exponent) * (112 / r))
    words = x.to(torch.bfloat16).view(torch.int16)
    words[: n // 8] = torch.from_numpy(draw.integers(-(2**15), 2**15, size=(n // 8, BLOCK))).short()
    words[n // 8 : n // 2] &= ~0x1F
    return words.view(torch.bfloat16)


def directed_values() -> Iterator[Tensor]:
    """Directed bf16 blocks for the quantizers, under a multiplier of 1:

    - every tie of E4M3 and both its bf16 neighbours, of either sign;
    - under every scale, every tie of E2M1 and its neighbours;
    - values about half a step of the rule ``truncated``, where v and q8 may round apart;
    - zeros, subnormals, the largest values, values that are not finite.
    """
    grid = torch.tensor([*E4M3.magnitudes, 480.0], dtype=torch.float64)
    yield in_blocks(neighbours((grid[:-1] + grid[1:]) / 2))
    middles = torch.tensor(E2M1_MIDPOINTS, dtype=torch.float64) / FP8_FACTOR
    for scale in E4M3.magnitudes[1:]:
        near = neighbours(middles * scale).view(-1, 14).repeat_interleave(2, 0)
        near[::2] = near[::2].flip(1)
        top = torch.full((len(near), 2), scale, dtype=torch.bfloat16)
        yield torch.cat([near, top], 1)
    steps = torch.exp2(torch.arange(-9.0, 6.0)) / FP8_FACTOR  # the last bit of a scale, in u
    near = steps[:, None] / 2 * (1 + torch.arange(-10, 4) / 128)
    for scale in E4M3.magnitudes[1:]:
        top = torch.full((len(near), 2), scale)
        yield torch.cat([near, top], 1).clamp(max=scale).to(torch.bfloat16)
    edges = torch.tensor([0.0, -0.0, 2.0**-133, 2.0**-126, 2.0**-10, 464.0, 3.3e38, torch.inf])
    edges = torch.cat([edges, -edges, torch.tensor([torch.nan])]).to(torch.bfloat16)
    pairs = torch.cartesian_prod(edges.view(torch.int16), edges.view(torch.int16))
    yield pairs.repeat(1, BLOCK // 2).view(torch.bfloat16)


def neighbours(values: Tensor) -> Tensor:
    """Values as bf16, what is beside them, and the negatives."""
    bits = values.to(torch.bfloat16).view(torch.int16)
    near = torch.stack([bits - 1, bits, bits + 1], -1).flatten()
    return torch.cat([near, near | -0x8000]).view(torch.bfloat16)


def in_blocks(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)


def check_quantizer(
    model: Model, config: QuantizerConfig, x: Tensor, r: float, draw: Drawer
) -> int:
    n = len(x)
    sensitivity = torch.from_numpy(draw.integers(1, 127, size=(n, BLOCK)).astype(np.uint8))
    if config.sensitivities == "powers":
        sensitivity = power_codes(sensitivity)
    site = Site(r, sensitivity.flatten(), 1.0, -1, config.rule, config.scales)
    q = quantize(x.reshape(1, -1), site)
    latency = ppu.latency(config)
    finite = x.isfinite().all(-1)
    score, kind = q.score[0], torch.from_numpy(draw.integers(5, size=n))
    ends = torch.tensor([-1, 2**63 - 1])
    limit = torch.where(kind < 2, ends[kind.clamp(max=1)], (score - (kind - 3)).clamp(min=-1))
    limit = torch.where(finite, limit, ends[kind % 2])
    wide = (score > limit) | ~finite
    codes = torch.where(wide[:, None], q.fp8[0], q.fp4[0]).numpy()
    scale = np.where(wide, 0, q.scale[0])
    rows = model.inputs.rows(n + latency)
    field = model.inputs.of
    words = x.view(torch.int16).numpy()
    width = model.inputs.places["input__payload"][1]
    field(rows, "input__payload")[:n] = packed([(words, 16), (sensitivity.numpy(), 7)], width)
    field(rows, "input__valid")[:n] = 1
    field(rows, "output__ready")[:] = 1
    significand, exponent = normalised(r, 12)
    # The threshold is read in the last step but one of each block.
    limits = np.full(n + latency, -1, dtype=np.int64)
    limits[latency - 1 : latency - 1 + n] = limit.numpy()
    same = np.ones(len(rows), dtype=np.int64)
    fields = [(same * significand, 12), (same * (exponent & 0x1FF), 9)]
    fields.append((limits.view(np.uint64), 64))
    field(rows, "site")[:] = packed(fields, model.inputs.places["site"][1])
    out = model.cycles(rows)
    valid = model.outputs.of(out, "output__valid")[:, 0] == 1
    payload = model.outputs.of(out, "output__payload")[valid]
    if len(payload) != n:
        return n
    same_codes = (payload[:, :16] == codes).all(1)
    same_rest = payload[:, 16] == (scale | wide.numpy() << 7)
    return int((~(same_codes & same_rest & (payload[:, 17] & 1 == finite.numpy()))).sum())


QUANTIZERS = {
    "the paper's": PAPER_QUANTIZER,
    "default": QuantizerConfig(),
    "default, powers of two": QuantizerConfig(sensitivities="powers"),
    "truncated": QuantizerConfig("truncated"),
    "truncated, powers of two": QuantizerConfig("truncated", sensitivities="powers"),
}


def run_quantizer(config: QuantizerConfig, vectors: int, folder: Path) -> dict[str, Any]:
    """Thresholds are the scores themselves, one more and one less, and the two ends, at random."""
    model, draw = Model(ppu.Quantizer(config), folder), np.random.default_rng(2)
    multipliers = [1.0, multiplier(3.7), multiplier(5e-4), multiplier(9e20), 2.0**100, 2.0**-100]
    wrong = drawn = 0
    directed_blocks = torch.cat(list(directed_values()))
    for _ in range(8):  # each block meets several thresholds
        wrong += check_quantizer(model, config, directed_blocks, 1.0, draw)
    while drawn < vectors:
        n = min(CHUNK // 2, vectors - drawn)
        r = multipliers[drawn // (CHUNK // 2) % 6]
        wrong += check_quantizer(model, config, quantizer_values(n, r, draw), r, draw)
        drawn += n
    count = 8 * len(directed_blocks)
    return {"quantizer": {"directed": count, "random": drawn, "mismatches": wrong}}


def directed_totals() -> np.ndarray:
    """Ties of the first rounding at every length with both neighbours, and the extremes."""
    ties = [
        (2 * significand + 1 << shift) + beside
        for shift in range(33)
        for significand in (2**23, 2**23 + 1, 2**24 - 1)
        for beside in (-1, 0, 1)
    ]
    ends = [0, 1, 2**24, 2**53, Datapath().total_max]
    return np.array([sign * t for t in ties + ends for sign in (1, -1)], dtype=np.int64)


def random_totals(n: int, draw: Drawer) -> np.ndarray:
    """Totals of all lengths, many on and beside ties."""
    magnitude = draw.integers(2**57, size=n) >> draw.integers(57, size=n)
    ties = (2 * draw.integers(2**23, 2**24, size=n) + 1 << draw.integers(33, size=n)) + (
        draw.integers(-1, 2, size=n)
    )
    magnitude = np.where(draw.random(n) < 0.4, ties, magnitude)
    return np.where(draw.random(n) < 0.5, -magnitude, magnitude)


POWERS = (0, -20, -140, -148, -125, 100, 127, -60)
"""Exponents of the epilogue's scales: subnormal, large, and between."""


def check_epilogue(
    model: Model, datapath: Datapath, total: np.ndarray, power: int, draw: Drawer
) -> int:
    """Biases that cancel all or nearly all, or are anything."""
    n = len(total)
    scale = np.float32(np.ldexp(draw.random() + 0.5, power))
    # A cast of int64 to float32 rounds once, and so does each float32 operation.
    with np.errstate(all="ignore"):
        y = torch.from_numpy(total.astype(np.float32) * np.float32(2.0**-20) * scale)
        near = -y.numpy() * (1 + 2.0**-23 * draw.integers(-3, 4, size=n)).astype(np.float32)
        far = (draw.standard_normal(n) * np.exp2(draw.integers(-149, 120, size=n))).astype("f4")
    bias = np.choose(draw.integers(4, size=n), [np.float32(-0.0), -y.numpy(), near, far])
    bias = np.where(np.isfinite(bias), bias, np.float32(-0.0)).astype(np.float32)
    finite = draw.random(n) < 0.99
    expected = torch.where(torch.from_numpy(finite), y + torch.from_numpy(bias), torch.nan)
    rows = model.inputs.rows(n + epilogue.LATENCY)
    field = model.inputs.of
    fields = [(total.view(np.uint64), datapath.total_bits), (bias.view(np.uint32), 32), (finite, 1)]
    width = model.inputs.places["input__payload"][1]
    field(rows, "input__payload")[:n] = packed(fields, width)
    field(rows, "input__valid")[:n] = 1
    field(rows, "output__ready")[:] = 1
    significand, exponent = normalised(float(scale), 24)
    word = (significand | (exponent & 0x3FF) << 24).to_bytes(8, "little")
    field(rows, "scale")[:] = np.frombuffer(word, dtype=np.uint8)
    out = model.cycles(rows)
    valid = model.outputs.of(out, "output__valid")[:, 0] == 1
    payload = np.ascontiguousarray(model.outputs.of(out, "output__payload")[valid])
    fp32 = payload[:, :4].copy().view(np.uint32)[:, 0]
    bf16 = payload[:, 4:6].copy().view(np.uint16)[:, 0]
    nan = expected.isnan().numpy()
    same = fp32 == np.where(nan, QUIET, expected.view(torch.int32).numpy().view(np.uint32))
    narrow = expected.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    return int((~(same & (bf16 == np.where(nan, QUIET >> 16, narrow)))).sum())


def run_epilogue(vectors: int, folder: Path) -> dict[str, Any]:
    datapath, draw = Datapath(), np.random.default_rng(3)
    model = Model(epilogue.Epilogue(datapath), folder)
    wrong = drawn = 0
    for power in POWERS * 4:  # four draws of biases each
        wrong += check_epilogue(model, datapath, directed_totals(), power, draw)
    while drawn < vectors:
        n = min(CHUNK, vectors - drawn)
        power = int(draw.choice(POWERS))
        wrong += check_epilogue(model, datapath, random_totals(n, draw), power, draw)
        drawn += n
    count = 4 * len(POWERS) * len(directed_totals())
    return {"epilogue": {"directed": count, "random": drawn, "mismatches": wrong}}


def run_units(vectors: int, only: str) -> dict[str, Any]:
    """All units whose name contains ``only``."""
    results: dict[str, Any] = {"vectors": vectors, "units": {}}
    runs: dict[str, Callable[[int, Path], dict[str, Any]]] = {
        **{name: partial(run_lane, datapath) for name, datapath in LANES.items()},
        **{f"{name} rules": partial(run_quantizer, config) for name, config in QUANTIZERS.items()},
        "output": run_epilogue,
    }
    if not any(only in name for name in runs):
        raise SystemExit(f"no unit has {only!r} in its name; there are {', '.join(runs)}")
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, run) in enumerate(runs.items()):
            if only in name:
                rows = run(vectors, Path(folder) / str(i))
                results["units"] |= {f"{unit}, {name}": row for unit, row in rows.items()}
                print(name, rows, file=sys.stderr, flush=True)
    return results


STALLED = Array(datapath=Datapath(k_max=256, shared=True), lanes=2, rows=16, outputs_max=64)


def run_stalls(tokens: int) -> dict[str, Any]:
    """Linears of half, just and twice the N = rows * lanes that the quantizer needs to keep up.

    ``stalls_percent`` are cycles in which the lanes waited for quantized blocks, the first tile's
    included.
    """
    array, k, g = STALLED, STALLED.datapath.k_max, torch.Generator().manual_seed(0)
    x = torch.randn(tokens, k, generator=g)
    sensitivity = torch.randint(1, 127, (k,), generator=g).to(torch.uint8)
    linears = []
    with tempfile.TemporaryDirectory() as folder:
        model = Model(array.create(), Path(folder))
        for n in (array.rows * array.lanes * i // 2 for i in (1, 2, 4)):
            w = torch.randn(n, k, generator=g)
            codes = quantize_weight(w, tensor_scale(float(w.abs().max())))
            weight = pack(codes, torch.rand(codes.scale.shape, generator=g) < 0.3)
            r = multiplier(float(x.abs().max()))
            config = array.quantizer
            site = Site(r, sensitivity, 1.0, 2**40, config.rule, config.scales)
            layer = Layer("random", site, {"random": (weight, None)})
            outcome = in_verilator(model, array, layer.image, x)
            waited = outcome.counters["first"] + outcome.counters["activations"]
            linears.append(
                {
                    "n": n,
                    "mismatches": mismatches(outcome, layer.reference(x), x),
                    **outcome.counters,
                    "stalls_percent": 100 * waited / outcome.counters["cycles"],
                }
            )
            print(linears[-1], file=sys.stderr, flush=True)
    facts = {"lanes": array.lanes, "rows": array.rows, "reuse": array.datapath.reuse}
    return {"tokens": tokens, "k": k, "array": facts, "linears": linears}


class Simulated:
    """A model whose packed linears are computed by the simulated array."""

    def __init__(self, checkpoint: Path, array: Array, model: Model) -> None:
        self.network, self.array, self.model = load_model(str(checkpoint)), array, model
        self.facts = {"linears": 0, "vectors": 0, "mismatches": 0}
        self.cycles: dict[str, int] = {}
        linears = mixed_linears(self.network)
        for owner, site in config_of(self.network).sites.items():
            group = {name: linears[name] for name in site.linears}
            layer = self._layer(owner, group)
            array.require_fits(owner, layer.image.n, layer.k)
            memory: dict[str, Any] = {}
            for name, linear in group.items():
                linear.forward = self._forward(name, layer, memory)  # type: ignore[method-assign]

    def _layer(self, owner: str, group: dict[str, MixedLinear]) -> Layer:
        site = group[owner].input_site.record
        return Layer(owner, site, {name: (m.packed, m.bias) for name, m in group.items()})

    def _forward(self, name: str, layer: Layer, memory: dict[str, Any]) -> Any:
        def forward(x: Tensor) -> Tensor:
            if memory.get("input") is not x:
                memory["input"], memory["parts"] = x, self._run(layer, x)
            part: Tensor = memory["parts"][name]
            return part.view(*x.shape[:-1], -1).to(x.dtype)

        return forward

    def _run(self, layer: Layer, x: Tensor) -> dict[str, Tensor]:
        rows = x.reshape(-1, layer.k)
        outcome = in_verilator(self.model, self.array, layer.image, rows)
        self.facts["linears"] += len(layer.linears)
        self.facts["vectors"] += outcome.fp32.size
        self.facts["mismatches"] += mismatches(outcome, layer.reference(rows), rows)
        for counter, value in outcome.counters.items():
            self.cycles[counter] = self.cycles.get(counter, 0) + value
        whole = torch.from_numpy(outcome.bf16.view(np.int16)).view(torch.bfloat16)
        widths = [weight.n for weight, _ in layer.linears.values()]
        return dict(zip(layer.linears, whole.split(widths, -1), strict=True))


def exact_model(checkpoint: Path) -> torch.nn.Module:
    """The model with linears by definition: ``quantize`` and ``exact_linear``."""
    network = load_model(str(checkpoint))
    for name, linear in mixed_linears(network).items():
        layer = Layer(name, linear.input_site.record, {name: (linear.packed, linear.bias)})
        linear.forward = partial(_exactly, layer)  # type: ignore[method-assign]
    return network


def _exactly(layer: Layer, x: Tensor) -> Tensor:
    return layer.reference(x.reshape(-1, layer.k)).view(*x.shape[:-1], -1).to(x.dtype)


def loss_of(network: torch.nn.Module, window: Tensor) -> float:
    """Mean loss in nats of the window's tokens."""
    with torch.no_grad():
        logits = network(input_ids=window).logits.float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:]).item()


def run_model(checkpoint: Path, data: str, tokens: int) -> dict[str, Any]:
    record = next(iter(sites(load_model(str(checkpoint))).values())).record
    config = QuantizerConfig(record.rule, record.scales)
    datapath = replace(MIXED, k_max=1024)
    array = Array(datapath=datapath, lanes=4, rows=1, outputs_max=2048, quantizer=config)
    window = evaluation_windows(data, load_tokenizer(str(checkpoint)), tokens, bos=False)[:1]
    with tempfile.TemporaryDirectory() as folder:
        simulated = Simulated(checkpoint, array, Model(array.create(), Path(folder)))
        loss = loss_of(simulated.network, window)
    cycles = simulated.cycles
    return {
        "checkpoint": checkpoint.name,
        "tokens": int(window.numel()),
        "array": {
            "lanes": array.lanes,
            "rows": array.rows,
            "reuse": array.datapath.reuse,
            "shared": array.datapath.shared,
            "rule": config.rule,
            "scales": config.scales,
        },
        **simulated.facts,
        "cycles": cycles,
        "ppu_stall_percent": 100 * cycles["activations"] / cycles["cycles"],
        "loss": loss,
        "loss_with_exact_linear": loss_of(exact_model(checkpoint), window),
        "loss_in_software": loss_of(load_model(str(checkpoint)), window),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    units = commands.add_parser("units")
    units.add_argument("--vectors", type=int, default=10_000_000)
    units.add_argument("--only", default="", help="units whose name contains this")
    stalls = commands.add_parser("stalls")
    stalls.add_argument("--tokens", type=int, default=4096)
    model = commands.add_parser("model")
    model.add_argument("checkpoint", type=Path)
    model.add_argument("--data", required=True)
    model.add_argument("--tokens", type=int, default=256)
    for each in (units, stalls, model):
        each.add_argument("--json", type=Path)
    args = parser.parse_args()
    begin = time.perf_counter()
    if args.command == "units":
        results = run_units(args.vectors, args.only)
    elif args.command == "stalls":
        results = run_stalls(args.tokens)
    else:
        results = run_model(args.checkpoint, args.data, args.tokens)
    results["seconds"] = round(time.perf_counter() - begin)
    results |= provenance()
    print(json.dumps(results, indent=1))
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
