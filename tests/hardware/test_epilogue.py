"""The epilogue is ``formats.linear``'s: every rounding, with subnormals, infinities and ties."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from benches import draw
from torch import Tensor

from fgmp.formats.linear import exact_linear
from fgmp.formats.spec import UNIT_BITS
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.image import normalised
from fgmp.hardware.rtl.epilogue import LATENCY, NO_BIAS, Epilogue
from fgmp.hardware.rtl.floats import QUIET_NAN
from fgmp.hardware.simulate import simulate

DATAPATH = Datapath()


def play(
    totals: list[int], biases: list[int], scale: float, finite: list[bool]
) -> tuple[list[int], list[int]]:
    """fp32 and bf16 bit patterns."""
    top, outputs = Epilogue(DATAPATH, tag_bits=8), []

    async def bench(ctx: Any) -> None:
        significand, exponent = normalised(scale, 24)
        ctx.set(top.scale, {"significand": significand, "exponent": exponent & 0x3FF})
        ctx.set(top.output.ready, 1)
        for i in range(len(totals) + LATENCY):
            if i < len(totals):
                total = totals[i] % 2**DATAPATH.total_bits
                item = {"total": total, "bias": biases[i], "finite": finite[i], "tag": i % 256}
                ctx.set(top.input.payload, item)
            ctx.set(top.input.valid, i < len(totals))
            await ctx.tick()
            if ctx.get(top.output.valid):
                outputs.append(ctx.get(top.output.payload))

    simulate(top, bench)
    assert [y["tag"] for y in outputs] == [i % 256 for i in range(len(totals))]
    return [y["fp32"] for y in outputs], [y["bf16"] for y in outputs]


def reference(totals: list[int], scale: float) -> Tensor:
    """fl32(fl32(A * 2**-20) * scale) by the reference: one activation of one, one weight."""
    # A = a * w with the total itself as a: a float64 that exact_linear multiplies exactly.
    a = torch.tensor(totals, dtype=torch.float64)[:, None] * 2.0 ** (-2 * UNIT_BITS)
    one = torch.ones(1, 1, dtype=torch.float64)
    return exact_linear(a * 2**UNIT_BITS, one * 2.0**-UNIT_BITS, scale, 1.0)[:, 0]


def bits(y: Tensor) -> list[int]:
    return (y.view(torch.int32).long() & 0xFFFF_FFFF).tolist()


def bf16_bits(y: Tensor) -> list[int]:
    return (y.to(torch.bfloat16).view(torch.int16).long() & 0xFFFF).tolist()


def interesting_totals() -> list[int]:
    """Ties of the first rounding with both neighbours at every length, and the extremes."""
    totals = [0, 1, -1, 2**53, DATAPATH.total_max, -DATAPATH.total_max]
    for shift in range(28):
        for significand in (2**23, 2**23 + 1, 2**24 - 1):
            tie = (2 * significand + 1) << shift
            totals += [tie - 1, tie, tie + 1, -tie]
    # exact_linear takes one product here, below 2**53; longer totals are the accelerator's tests.
    return [t for t in totals if abs(t) <= 2**53]


@pytest.mark.parametrize(
    "scale", [1.0, 0.0, 2.0**-149, 2.0**-130 * 1.7, 2.0**-126, 3e-20, 2.0**100 * 1.3, 3e38]
)
def test_scaling(scale: float) -> None:
    scale = float(np.float32(scale))
    totals = interesting_totals()
    fp32, bf16 = play(totals, [NO_BIAS] * len(totals), scale, [True] * len(totals))
    expected = reference(totals, scale)
    assert fp32 == bits(expected)
    assert bf16 == bf16_bits(expected)


def test_biases() -> None:
    """Cancellation to nothing and to the last bit, distant magnitudes, zeros of both signs."""
    g = draw(1)
    totals = [int(t) for t in torch.randint(-(2**50), 2**50, (400,), generator=g)]
    totals[:20] = [0] * 20
    scale = float(np.float32(1.23e-7))
    y = reference(totals, scale)
    near = -y * (1 + torch.randint(-3, 4, y.shape, generator=g) * 2.0**-23)
    far = y * torch.exp2(torch.randint(-60, 60, y.shape, generator=g).float())
    tiny = torch.randint(-5, 6, y.shape, generator=g) * 2.0**-149
    kind = torch.randint(4, y.shape, generator=g)
    bias = torch.stack([-y, near, far, tiny])[kind, torch.arange(len(y))]
    bias[:4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    fp32, bf16 = play(totals, bits(bias), scale, [True] * len(totals))
    assert fp32 == bits(y + bias)
    assert bf16 == bf16_bits(y + bias)


def test_no_bias_changes_nothing() -> None:
    """-0 is the neutral element: it keeps -0, which comes of a negative total that underflows."""
    fp32, _ = play([-1, 0, 1], [NO_BIAS] * 3, 2.0**-149, [True] * 3)
    assert fp32 == [0x8000_0000, 0, 0]
    assert math.copysign(1, reference([-1], 2.0**-149).item()) == -1


def test_rows_that_are_not_finite() -> None:
    fp32, bf16 = play([5, 7], [0, 0], 1.0, [False, True])
    assert fp32[0] == QUIET_NAN and bf16[0] == QUIET_NAN >> 16
    assert fp32[1] == bits(reference([7], 1.0))[0]
