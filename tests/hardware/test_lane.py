"""The lane in Amaranth's simulator: every E2M1 product, every selection, totals of all kinds."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import Out
from benches import play_lane, port, random_blocks, take

from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.hardware import yosys
from fgmp.hardware.datapath import CUTS, Datapath
from fgmp.hardware.rtl.lane import Lane
from fgmp.hardware.rtl.registers import Operands
from fgmp.hardware.rtl.verilog import ports, rtlil_text, verilog
from fgmp.hardware.simulate import simulate
from fgmp.pack.planes import BlockCodes

SHARES = {"mixed": 0.5, "fp8": 1.0, "fp4": 0.0}


def expected(lane: Lane, a: BlockCodes, w: BlockCodes, length: int) -> list[int]:
    each = lane.datapath.contributions(a, w)
    return each.view(-1, length, lane.datapath.reuse).sum(1).flatten().tolist()


@pytest.mark.parametrize("cuts", [(), ("sums", "scaled"), CUTS])
@pytest.mark.parametrize("kind", SHARES)
def test_totals(kind: str, cuts: tuple[str, ...]) -> None:
    """Dot products of five blocks in four slots, with idle cycles here and there."""
    lane = Datapath(kind=kind, cuts=cuts, reuse=4).create()
    a, w = (random_blocks(60, SHARES[kind], seed) for seed in (1, 2))
    w = take(w, torch.arange(60) // 4)
    assert play_lane(lane, a, w, 5, gaps=(1, 17, 18, 40)) == expected(lane, a, w, 5)


@pytest.mark.parametrize(
    "variant",
    [
        {"shared": True},
        {"gated": False},
        {"addition": "complement"},
        {"fp8_cuts": ("significands", "sums")},
    ],
)
def test_variants_compute_the_same(variant: dict[str, Any]) -> None:
    lane = Datapath(reuse=4, **variant).create()
    a, w = (random_blocks(60, 0.5, seed) for seed in (1, 2))
    w = take(w, torch.arange(60) // 4)
    assert play_lane(lane, a, w, 5, gaps=(1, 17, 18, 40)) == expected(lane, a, w, 5)


@pytest.mark.parametrize("kind", SHARES)
def test_a_total_may_have_one_block_and_no_partner(kind: str) -> None:
    lane = Datapath(kind=kind, reuse=1).create()
    a, w = (random_blocks(40, SHARES[kind], seed) for seed in (3, 4))
    assert play_lane(lane, a, w, 1) == expected(lane, a, w, 1)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_fp32_accumulator(share: float) -> None:
    """Bit for bit what rounding each contribution and each sum gives, and within its bound."""
    lane = Datapath(reuse=2, accumulator="fp32").create()
    length, u = 9, Fraction(1, 2**24)
    a, w = (random_blocks(10 * 2 * length, share, seed) for seed in (7, 8))
    w = take(w, torch.arange(180) // 2)
    each = lane.datapath.contributions(a, w).view(10, length, 2).transpose(1, 2)
    sums = lane.datapath.totals(each).flatten()
    totals = play_lane(lane, a, w, length)
    assert [t & 0xFFFF_FFFF for t in totals] == (
        sums.view(torch.int32).long() & 0xFFFF_FFFF
    ).tolist()
    for total, terms in zip(sums.tolist(), each.flatten(0, 1).tolist(), strict=True):
        bound = ((1 + u) ** length - 1) * sum(map(abs, terms))
        assert abs(Fraction(total) - sum(terms)) <= bound


def extremes(code_a: int, code_w: int, is_fp8: tuple[bool, bool]) -> tuple[BlockCodes, BlockCodes]:
    """A block of sixteen equal codes on either side, under the largest scale."""
    return tuple(
        BlockCodes(
            torch.tensor([fp8]),
            torch.full((1, BLOCK), code, dtype=torch.uint8),
            torch.tensor([FP8_BLOCK if fp8 else 0x7E], dtype=torch.uint8),
        )
        for code, fp8 in zip((code_a, code_w), is_fp8, strict=True)
    )


@pytest.mark.parametrize("signs", [(0, 0), (0, 1), (1, 1)])
@pytest.mark.parametrize("is_fp8", [(a, w) for a in (False, True) for w in (False, True)])
def test_largest_products(is_fp8: tuple[bool, bool], signs: tuple[int, int]) -> None:
    """Every width is used to its end: no carry and no sign is lost in a total of k_max products."""
    lane = Datapath(k_max=64, reuse=1).create()
    codes = [
        (0x7E if fp8 else 0x7) + sign * (0x80 if fp8 else 0x8)
        for fp8, sign in zip(is_fp8, signs, strict=True)
    ]
    a, w = (take(side, torch.zeros(4, dtype=torch.long)) for side in extremes(*codes, is_fp8))
    (total,) = play_lane(lane, a, w, 4)
    assert abs(total) == lane.datapath.total_max
    assert (total < 0) == (signs[0] != signs[1])


def test_every_e2m1_product() -> None:
    """All 256 pairs of codes, each alone in its block and each place of a block in turn."""
    pairs = torch.arange(256)
    place = pairs % BLOCK
    sides = []
    for codes in (pairs // 16, pairs % 16):
        block = torch.zeros(256, BLOCK, dtype=torch.uint8)
        block[pairs, place] = codes.to(torch.uint8)
        scale = torch.full((256,), 0x38, dtype=torch.uint8)
        sides.append(BlockCodes(torch.zeros(256, dtype=torch.bool), block, scale))
    lane = Datapath(kind="fp4", reuse=1, k_max=16).create()
    totals = play_lane(lane, *sides, 1)
    value = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12])
    one = 2**9  # the scale 1, code 0x38, in units of 2**-9
    assert totals == (value[pairs // 16] * value[pairs % 16] * one * one).tolist()


@pytest.mark.parametrize("shared", [False, True])
def test_only_the_selected_unit_moves(shared: bool) -> None:
    """All transitions between two pairs of flags, with and without a new weight, and idleness.

    Operand registers are watched: those of a unit change only in the cycle after its flags came
    with ``valid``, and then hold what came.
    """
    lane = Datapath(reuse=4, shared=shared).create()
    kinds = [(a, w) for a in (0, 1) for w in (0, 1)]
    # An Eulerian tour of the complete graph on four kinds: all 16 transitions.
    tour = [0, 0, 1, 1, 2, 2, 3, 3, 0, 2, 0, 3, 1, 3, 2, 1, 0]
    sides, computes = (lane.activation, lane.weight), lane.datapath.computes
    steps = [(kinds[i], new) for new in (1, 0) for i in tour] + [(None, 1)] * 3
    a, w = (random_blocks(len(steps), 0, seed) for seed in (5, 6))

    async def bench(ctx: Any) -> None:
        before = None
        for i, (kind, new) in enumerate(steps):
            shown = port(a, i, lane.datapath), port(w, i, lane.datapath)
            for side, fields, flag in zip(sides, shown, kind or (0, 0), strict=True):
                ctx.set(side, fields | {"is_fp8": flag})
            ctx.set(lane.valid, kind is not None)
            ctx.set(lane.new_weight, new)
            await ctx.tick()
            held = {n: (ctx.get(o.activation_held), ctx.get(o.weight_held), ctx.get(o.held))
                    for n, o in lane.operands.items()}  # fmt: skip
            pair = kind and f"fp{8 if kind[0] else 4}xfp{8 if kind[1] else 4}"
            chosen = next((u.name for u in lane.datapath.units if pair in computes(u)), None)
            assert [n for n, (_, _, moved) in held.items() if moved] == ([chosen] if chosen else [])
            if before is not None:
                for n in held:
                    assert n == chosen or held[n][:2] == before[n][:2], f"{n} moved in step {i}"
            if chosen:
                # Where the sides are exchanged, the activation is held on the weight's.
                codes = held[chosen][0 if chosen == pair else 1]["codes"]
                mask = 0xFF if kind[0] else 0xF
                assert [int(c) for c in codes] == [c & mask for c in a.codes[i].tolist()]
            before = held

    simulate(lane, bench)


class HoldProperty(wiring.Component):
    """Free inputs into the operand registers, and whether they ever moved without ``load``."""

    def __init__(self) -> None:
        self.operands = Operands(Datapath().units[1])
        members = {
            f"free_{name}": wiring.In(member.shape)
            for name, member in self.operands.signature.members.items()
            if member.flow == wiring.In
        }
        super().__init__({**members, "violated": Out(1)})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.submodules.operands = operands = self.operands
        past_load, past = Signal(init=1), Signal(256)
        held = wiring_bits(operands)
        for name in self.signature.members:
            if name.startswith("free_"):
                m.d.comb += getattr(operands, name.removeprefix("free_")).eq(getattr(self, name))
        m.d.sync += [past_load.eq(operands.load), past.eq(held)]
        m.d.comb += self.violated.eq(Mux(past_load, 0, past[: len(held)] != held))
        return m


def wiring_bits(operands: Operands) -> Any:
    from amaranth.hdl import Cat

    return Cat(operands.activation_held, operands.weight_held)


def test_gating_is_proved() -> None:
    """By induction over all states and inputs: without ``load`` no operand bit changes."""
    text = rtlil_text(HoldProperty(), "hold")
    proof = "sat -tempinduct -prove violated 0 -set rst 0 -seq 1 -verify hold"
    prepare = "proc; flatten; opt -full; async2sync; dffunmap"
    yosys.run(f"read_rtlil <<end_of_rtlil\n{text}\nend_of_rtlil\n{prepare}\n{proof}\n")


def test_verilog_ports_are_plain() -> None:
    """One unsigned vector per port: OpenSTA refuses others."""
    lane = Datapath(k_max=16, reuse=2).create()
    listed = ports(lane)
    text = verilog(rtlil_text(lane, "lane"))
    for p in listed:
        range_ = f"[{p.bits - 1}:0] " if p.bits > 1 else ""
        assert f"  {p.direction} {range_}{p.name};" in text
    assert "input signed" not in text and "output signed" not in text
