"""Energy of serving a model: number of operations of each unit times energy per operation.

=========  ====================================================================================
lanes      every pair of blocks, in the unit that its two formats select
totals     every pair of blocks, with the lane's control
quantizer  every block of a site's activation once, however many linears read it
buffers    weight blocks once per ``reuse`` tokens of each row of lanes; activation blocks once
           per ``lanes`` outputs; bf16 outputs, written once and read once by the quantizer
dram       every weight once per pass
=========  ====================================================================================

Activations stay on the chip. Attention, norms, embeddings, the output head and the KV cache are
not counted: they are the same in all formats here. Energies of buffers and DRAM come from a table
with sources, ``energies.toml``.
"""

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fgmp.formats.spec import BLOCK, FLAG_BITS, FP4_BITS, FP8_BITS
from fgmp.hardware.silicon import OPERATIONS

LANES = 16
"""Lanes that share an activation block. Chosen; docs/energy.md, section 4."""

PREFILL = 2048
"""Tokens of a prefill. Chosen; docs/energy.md, section 5."""

QUANTIZER_LATENCY = 9
"""``rtl.ppu.latency`` of the default configuration, in cycles. That module needs Amaranth; a test
compares both."""

OUTPUT_BITS = 16
"""Bits per output of a linear: bf16."""

COMPONENTS = ("lanes", "totals", "quantizer", "buffers", "dram")


@dataclass(frozen=True)
class Entry:
    """A unit energy with its source."""

    value: float
    unit: str
    what: str
    node: str
    source: str

    def __str__(self) -> str:
        return f"{self.what}: {self.value:g} {self.unit} ({self.node}; {self.source})"


@cache
def energies() -> dict[str, Entry]:
    """The table ``energies.toml``, by name."""
    text = (Path(__file__).parent / "energies.toml").read_text()
    return {name: Entry(**row) for name, row in tomllib.loads(text).items()}


Mix = Mapping[tuple[bool, bool], float]
"""Shares of pairs of blocks by (activation is FP8, weight is FP8)."""


def independent(activation_fp4: float, weight_fp4: float) -> dict[tuple[bool, bool], float]:
    """The mix of two independent shares of FP4 blocks."""
    a, w = (
        {False: activation_fp4, True: 1 - activation_fp4},
        {False: weight_fp4, True: 1 - weight_fp4},
    )
    return {(i, j): a[i] * w[j] for i in a for j in w}


def unit_shares(mix: Mix) -> dict[str, float]:
    """The mix by the name of the unit, the activation's format first."""
    return {f"fp{8 if a else 4}xfp{8 if w else 4}": share for (a, w), share in mix.items()}


@dataclass(frozen=True)
class Work:
    """One linear.

    Attributes:
        name: name of the linear.
        site: the site it reads.
        n, k: output and input features.
        mix: fractions of its pairs of blocks, by formats.
        routed: share of the tokens that it computes; less than 1 for an expert of a mixture.
    """

    name: str
    site: str
    n: int
    k: int
    mix: Mix
    routed: float = 1.0

    @property
    def groups(self) -> int:
        """Blocks in a row."""
        return -(-self.k // BLOCK)

    def fp8_share(self, side: int) -> float:
        """Share of FP8 blocks; ``side`` is 0 for the activation, 1 for the weight."""
        return sum(share for flags, share in self.mix.items() if flags[side])


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Energies of a lane design, and how its lanes are fed.

    Attributes:
        name: name of the machine.
        fj_per_op: by unit, per operation of that unit; ``totals`` and ``control`` per operation of
            any.
        quantizer_fj: per block; 0 for an FP8 or FP4 machine, whose simpler quantizer was not
            measured.
        bits: per value in memory, FP4 and FP8, scales and flags included.
        lanes, rows, reuse: outputs at a time, tokens at a time, tokens per load of a weight block.
        latency: latency of the quantizer, in cycles.
    """

    name: str
    fj_per_op: Mapping[str, float]
    quantizer_fj: float
    bits: tuple[float, float]
    lanes: int
    rows: int
    reuse: int
    latency: int = QUANTIZER_LATENCY


def bits_of(kind: str) -> tuple[float, float]:
    """Bits per value in FP4 and in FP8 in the memories of a machine of this kind."""
    flag = FLAG_BITS if kind == "mixed" else 0.0
    return FP4_BITS + flag, FP8_BITS + flag


def serve(work: Iterable[Work], machine: Machine, tokens: int, passes: int = 1) -> dict[str, float]:
    """Energy in joules by component (:data:`COMPONENTS`).

    Args:
        work: the linears of one pass through the model. An expert with less than one token per
            pass is read in that share of the passes.
        machine: the machine.
        tokens: processed together: the prompt in prefill, the batch in decode.
        passes: number of passes.
    """
    table = energies()
    fj = dict.fromkeys(COMPONENTS, 0.0)
    sites: dict[str, Work] = {}
    for linear in work:
        seen = tokens * linear.routed
        operations = seen * linear.n * linear.groups * OPERATIONS
        for unit, share in unit_shares(linear.mix).items():
            if share:
                fj["lanes"] += share * operations * machine.fj_per_op[unit]
        common = machine.fj_per_op["totals"] + machine.fj_per_op["control"]
        fj["totals"] += operations * common
        fj["buffers"] += _buffer_bits(linear, machine, seen) * table["sram"].value
        weight_bits = linear.n * linear.groups * BLOCK * _mean_bits(linear, machine, 1)
        fj["dram"] += min(1.0, seen) * weight_bits * table["dram"].value
        sites[linear.site] = linear
    fj["quantizer"] = (
        sum(tokens * w.routed * w.groups for w in sites.values()) * machine.quantizer_fj
    )
    return {name: passes * value * 1e-15 for name, value in fj.items()}


def _mean_bits(linear: Work, machine: Machine, side: int) -> float:
    """Mean bits per value in memory."""
    wide = linear.fp8_share(side)
    return (1 - wide) * machine.bits[0] + wide * machine.bits[1]


def _buffer_bits(linear: Work, machine: Machine, tokens: float) -> float:
    """Bits that are read from and written to buffers."""
    pairs = tokens * linear.n * linear.groups
    reuse = min(machine.reuse * machine.rows, max(1.0, tokens))
    weights = pairs / reuse * BLOCK * _mean_bits(linear, machine, 1)
    activations = pairs / min(machine.lanes, linear.n) * BLOCK * _mean_bits(linear, machine, 0)
    return weights + activations + 2 * OUTPUT_BITS * tokens * linear.n


def cycles(work: Iterable[Work], machine: Machine, tokens: int, passes: int = 1) -> tuple[int, int]:
    """Cycles of work of the lanes, and cycles in which they wait for the quantizer.

    The quantizer outputs one block per cycle. It fills one activation tile while the lanes compute
    the previous one. The lanes therefore wait for

    - a site's first tile, except that they follow the quantizer through its last row;
    - later tiles, where the site's linears have fewer than ``rows * lanes`` outputs.
    """
    busy = waiting = 0.0
    consumers: dict[str, list[Work]] = {}
    for linear in work:
        consumers.setdefault(linear.site, []).append(linear)
    for linears in consumers.values():
        groups, seen = linears[0].groups, tokens * linears[0].routed
        whole = max(1, round(seen))
        tile = min(machine.rows * machine.reuse, whole)
        # An expert with less than one token per pass works in that share of the passes.
        tiles = -(-whole // tile) * min(1.0, seen)
        lanes = sum(-(-w.n // machine.lanes) for w in linears) * groups * -(-tile // machine.rows)
        quantizer = tile * groups
        busy += tiles * lanes
        first = (quantizer - groups + machine.latency) * min(1.0, seen)
        waiting += first + max(0.0, tiles - 1) * max(0, quantizer - lanes)
    return round(passes * busy), round(passes * waiting)


LLAMA_2_7B: dict[str, tuple[str, int, int]] = {
    "q_proj": ("attention", 4096, 4096),
    "k_proj": ("attention", 4096, 4096),
    "v_proj": ("attention", 4096, 4096),
    "o_proj": ("output", 4096, 4096),
    "gate_proj": ("mlp", 11008, 4096),
    "up_proj": ("mlp", 11008, 4096),
    "down_proj": ("down", 4096, 11008),
}
"""Linears of one of its 32 layers: site, N, K (arXiv 2307.09288)."""

LLAMA_2_7B_LAYERS = 32


def llama_2_7b(mix: Mix) -> list[Work]:
    """The linears of Llama-2-7B with one assumed mix; only its shapes are used."""
    return [
        Work(f"layers.{i}.{name}", f"layers.{i}.{site}", n, k, mix)
        for i in range(LLAMA_2_7B_LAYERS)
        for name, (site, n, k) in LLAMA_2_7B.items()
    ]


def diluted(saving_percent: float, overhead: float) -> float:
    """The saving with overhead: energy that is the same in all formats.

    Args:
        saving_percent: without overhead.
        overhead: energy of controllers, clock tree, wires and memories over that of the FP8 lane.
    """
    return saving_percent / (1 + overhead)


def buffer_overhead(machine: Machine, fp8_fj_per_op: float) -> float:
    """An overhead from a source: energy of buffers, with every block in FP8, over the FP8 lane's.

    Weight blocks are read once per ``reuse`` tokens of every row, activation blocks once per
    ``lanes`` outputs, in all formats.
    """
    bits = BLOCK * FP8_BITS * (1 / (machine.reuse * machine.rows) + 1 / machine.lanes)
    return bits * energies()["sram"].value / (fp8_fj_per_op * OPERATIONS)
