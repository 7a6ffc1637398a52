"""Lanes that differ in how they are built compute the same totals."""

import pytest
import torch
from random_layers import layer, row_of

from fgmp.hardware import stimulus
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.simulate import simulate
from fgmp.hardware.stimulus import Layer
from fgmp.pack.planes import BlockCodes

CYCLES = 200


def run(datapath: Datapath, linear: Layer) -> list[int]:
    """Totals that leave a lane while it is driven as one stream of the gate-level runs."""
    ports = stimulus.stimulate([linear], datapath, CYCLES)
    lane = datapath.create()
    totals = []

    async def bench(ctx) -> None:  # type: ignore[no-untyped-def]
        for cycle in range(CYCLES):
            for name, words in ports.items():
                port = getattr(lane, name)
                value = sum((int(w) & 1) << i for i, w in enumerate(words[cycle, :, 0]))
                ctx.set(port.as_value() if hasattr(port, "as_value") else port, value)
            await ctx.tick()
            if ctx.get(lane.done):
                totals.append(ctx.get(lane.total.as_signed()))

    simulate(lane, bench)
    return totals


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"addition": "complement"},
        {"shared": True},
        {"shared": True, "fp8_cuts": ("significands", "sums")},
        {"gated": False},
        {"shared": True, "gated": False, "cuts": ("significands", "products")},
    ],
    ids=str,
)
def test_every_total_is_exact(changed: dict[str, object]) -> None:
    datapath = Datapath(reuse=4, k_max=48, **changed)  # type: ignore[arg-type]
    linear = layer(0.5)
    expected = {
        int(total)
        for row in range(linear.weight.is_fp8.shape[0])
        for total in datapath.contributions(linear.activation, row_of(linear.weight, row)).sum(-1)
    }
    begun_before = datapath.reuse
    totals = run(datapath, linear)[begun_before:]
    assert len(totals) > 50
    assert set(totals) <= expected


def test_a_layer_all_in_fp4_has_its_values() -> None:
    """FP4 blocks stay as they are; an FP8 block becomes the nearest FP4 block to its values."""
    linear = layer(0.5)
    narrow = stimulus.all_fp4(linear)
    for before, after in (
        (linear.activation, narrow.activation),
        (linear.weight, narrow.weight),
    ):
        assert not after.is_fp8.any()
        fp4 = ~before.is_fp8
        assert torch.equal(after.codes[fp4], before.codes[fp4])
        assert torch.equal(after.scale[fp4], before.scale[fp4])
        assert ((after.scale >= 0x01) & (after.scale <= 0x7E)).all()


def test_the_mix_counts_pairs() -> None:
    """Against all pairs, one by one."""
    linear = layer(0.4)
    a, w = linear.activation.is_fp8, linear.weight.is_fp8
    both = (a[:, None] & w[None]).sum()
    mix = linear.mix()
    assert mix[True, True] == int(both)
    assert mix[True, False] == int((a[:, None] & ~w[None]).sum())
    assert sum(mix.values()) == linear.pairs == a.shape[0] * w.numel()
    only: BlockCodes = linear.activation
    assert only.is_fp8.shape == (32, 3)
