"""Write tests/vectors/blocks.json: what every implementation of the arithmetic must reproduce.

    python scripts/make_vectors.py            write the file
    python scripts/make_vectors.py --check    regenerate and compare bytes; exit status 1 if not

The inputs are made from the bits of a seeded generator and integer arithmetic alone, so the file
is the same on every machine; the expected outputs are those of ``fgmp.formats``. Kinds of blocks
that random data would hardly contain (ties and their neighbours, thresholds equal to the score)
are constructed. ``tests/formats/test_vectors.py`` holds the file to an exact model of
docs/numerics.md that shares no code with the package.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fgmp.formats import activation
from fgmp.formats.activation import Site, multiplier
from fgmp.formats.codec import E2M1_MIDPOINTS, decode_e2m1, decode_e4m3
from fgmp.formats.spec import (
    BLOCK,
    E4M3,
    FP8_FACTOR,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
    SENSITIVITY_BITS,
    THRESHOLD_ALL_FP4,
    THRESHOLD_ALL_FP8,
    UNIT_BITS,
    UNIT_MAX,
)
from fgmp.formats.weight import quantize_weight, tensor_scale

TARGET = Path(__file__).parents[1] / "tests" / "vectors" / "blocks.json"

ABOUT = [
    "Blocks of 16 in FGMP arithmetic (docs/numerics.md): inputs and every intermediate result.",
    "Hexadecimal strings hold the bits of 16 elements, element 0 first, all of the same width:",
    "bf16 4 digits, fp32 8, E4M3 2, E2M1 1. A single fp32 value is 8 digits, a code 2.",
    "Sections map kinds of blocks to rows; a row is 'fields' in order. 'activation' is the site's",
    "rule 'difference' with scales 'max', 'leaves' the rule 'benefit' and the scales 'search'.",
    "Regenerate and compare: python scripts/make_vectors.py --check",
]
ACTIVATION_FIELDS = {
    "x": "input, bf16",
    "r": "multiplier of the site, fp32, at most 12 significant bits",
    "sensitivity": "E4M3 codes of the channels",
    "u": "fp32(x * r): exact unless it underflows or overflows; NaN is 7fc00000",
    "s": "E4M3 code of the FP4 block scale; null, as fp4 and S, for a block that is not finite",
    "fp4": "E2M1 codes",
    "fp8": "E4M3 codes; 7f where the input is not finite",
    "S": "the score, an integer below 2**60",
    "T": "T_site, -1 to 2**63 - 1",
    "flag": "1 if the block is FP8: S > T, or an element is not finite",
}
LEAF_FIELDS = {
    "x": "input, bf16, finite",
    "r": "multiplier of the site, fp32, at most 12 significant bits",
    "sensitivity": "E4M3 codes of the channels",
    "v": "6u in units of 2**-10 t, the integers that errors are measured from",
    "E8": "sum of g_int (q8 - v)**2",
    "E4max": "sum of g_int (q4 - v)**2 under scales 'max'",
    "E4": "the same under scales 'search', the least of four",
    "s": "E4M3 code of the scale that 'search' takes",
    "fp4": "E2M1 codes under it",
    "fp8": "E4M3 codes",
    "S": "the score of rule 'benefit' with 'search': max(0, E4 - E8)",
    "T": "T_site, -1 to 2**63 - 1",
    "flag": "1 if the block is FP8: S > T",
}
WEIGHT_FIELDS = {
    "x": "weight, fp32",
    "t": "tensor scale, fp32",
    "searched": "E4M3 code of the block scale if it was given, null if it is the nearest",
    "s": "E4M3 code of the FP4 block scale",
    "fp4": "E2M1 codes",
    "fp8": "E4M3 codes",
}


class Bits:
    """Random integers from getrandbits alone, whose stream Python keeps across versions."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def below(self, n: int) -> int:
        return self._random.getrandbits(32) * n >> 32

    def sign(self) -> int:
        return 1 - 2 * self.below(2)

    def octaves(self) -> int:
        """0 with probability 1/2, 1 with 1/4, and so on: the exponents of a typical tensor."""
        tail = self._random.getrandbits(31) | 1 << 31
        return (tail & -tail).bit_length() - 1

    def significand(self, bits: int) -> float:
        """1 to 2, with ``bits`` significant bits."""
        return 1 + self.below(1 << (bits - 1)) / (1 << (bits - 1))

    def multiplier(self, low: int = -6, high: int = 6) -> float:
        return self.significand(activation.MULTIPLIER_BITS) * 2.0 ** (low + self.below(high - low))

    def codes(self) -> Tensor:
        span = SCALE_MAX_CODE - SCALE_MIN_CODE + 1
        values = [SCALE_MIN_CODE + self.below(span) for _ in range(BLOCK)]
        return torch.tensor(values, dtype=torch.uint8)


Block = tuple[list[float], float]
"""16 bf16 values and r."""


def bf16(value: float, steps: int = 0) -> float:
    """The bf16 value nearest to ``value``, or ``steps`` further from zero."""
    bits = torch.tensor(abs(value)).bfloat16().view(torch.int16) + steps
    return bits.view(torch.bfloat16).item() * (-1 if value < 0 else 1)


def ordinary(bits: Bits) -> Iterator[Block]:
    """Blocks of a calibrated site, some near its largest value and some far below."""
    for _ in range(1100):
        amax = bf16(bits.significand(8) * 2.0 ** (bits.below(20) - 8))
        level = amax * 2.0 ** -min(bits.octaves(), 8)
        spread = [level / 2.0 ** bits.octaves() for _ in range(BLOCK)]
        yield [bits.sign() * bf16(s * bits.significand(8) / 2) for s in spread], multiplier(amax)


def fp4_ties(_: Bits) -> Iterator[Block]:
    """6u/s on every midpoint and its neighbours, for the scales that have such a u."""
    for code in range(SCALE_MIN_CODE, SCALE_MAX_CODE + 1):
        s = E4M3.magnitudes[code]
        for sign in (1, -1):
            ties = [midpoint * s / FP8_FACTOR for midpoint in E2M1_MIDPOINTS]
            if bf16(ties[0]) == ties[0]:  # s divisible by 3
                beside = [bf16(sign * tie, step) for tie in ties for step in (0, sign)]
                yield [s, *beside, 0.0], 1.0


def near_fp4_ties(bits: Bits) -> Iterator[Block]:
    """The same under an odd r, where 6u/s falls close to midpoints and not on them."""
    for index in range(3 * SCALE_MAX_CODE):
        r = bits.multiplier()
        s = E4M3.magnitudes[SCALE_MIN_CODE + index % SCALE_MAX_CODE]
        near = [bits.sign() * midpoint * s / FP8_FACTOR / r for midpoint in E2M1_MIDPOINTS]
        yield [bf16(s / r), *(bf16(v, d) for v in near for d in (0, bits.sign())), 0.0], r


def fp8_ties(bits: Bits) -> Iterator[Block]:
    """u halfway between two E4M3 values and beside it, inside the block and as its largest."""
    for low, high in zip(E4M3.magnitudes[:-1], E4M3.magnitudes[1:], strict=True):
        tie = (low + high) / 2
        largest = (tie, bf16(tie, -1), bf16(tie, 1))[bits.below(3)]
        inner = [bits.sign() * bf16(tie, -(i % 2)) for i in range(14)]
        yield [bits.sign() * largest, *inner, bits.sign() * low], 1.0


def zeros(bits: Bits) -> Iterator[Block]:
    """No magnitude at all, both zeros, and one lonely value."""
    for _ in range(24):
        r = bits.multiplier()
        signed = [bits.sign() * 0.0 for _ in range(BLOCK)]
        yield [0.0] * BLOCK, r
        yield signed, r
        yield [*signed[:7], bits.sign() * bf16(bits.significand(8) / r), *signed[8:]], r


def underflow(bits: Bits) -> Iterator[Block]:
    """Largest values about the smallest scale and the smallest code."""
    for index in range(120):
        level = E4M3.smallest * 2.0 ** (3 - index % 12)
        spread = [level * bits.significand(5) / 2.0 ** bits.octaves() for _ in range(BLOCK)]
        r = 1.0 if index % 2 else bits.multiplier()
        yield [bits.sign() * bf16(v / r) for v in spread], r


def subnormal(bits: Bits) -> Iterator[Block]:
    """bf16 subnormals beside normal values, and alone under the two extreme multipliers."""
    for index in range(60):
        tiny = [bits.sign() * bits.below(128) * 2.0**-133 for _ in range(BLOCK)]
        if index % 2:
            yield tiny, 2.0 ** (100 if index % 4 == 1 else -100)
        else:
            r = bits.multiplier()
            yield [*tiny[:8], *(bf16(bits.significand(8) / r) for _ in range(8))], r


def saturated(bits: Bits) -> Iterator[Block]:
    """u above 448: a little, by octaves, and beyond what fp32 holds."""
    for index in range(150):
        r = bits.multiplier()
        over = 448 * bits.significand(8) * 2.0 ** (index % 5 - 1) / r
        spread = [over / 2.0 ** bits.octaves() for _ in range(BLOCK)]
        yield [bits.sign() * bf16(v) for v in spread], r
        if index % 5 == 0:
            vast = [2.0 ** (127 - bits.octaves()) for _ in range(4)]
            yield [bits.sign() * v for v in (vast + spread)[:BLOCK]], bits.multiplier(1, 90)


def not_finite(bits: Bits) -> Iterator[Block]:
    """NaN and infinities, one or several."""
    for index in range(80):
        r = bits.multiplier()
        values = [bits.sign() * bf16(bits.significand(8) / r) for _ in range(BLOCK)]
        for _ in range(1 + index % 3):
            values[bits.below(BLOCK)] = (torch.inf, -torch.inf, torch.nan)[bits.below(3)]
        yield values, r


def far_apart(bits: Bits) -> Iterator[Block]:
    """FP4 and FP8 as different as they can be: with u = 372 and s = 448, by 512 t."""
    for index in range(40):
        low = 372.0 if index % 2 else bf16(372.0, -bits.below(3))
        yield [448.0, *(bits.sign() * low for _ in range(15))], 1.0


ACTIVATION_KINDS: tuple[Callable[[Bits], Iterator[Block]], ...] = (
    ordinary,
    fp4_ties,
    near_fp4_ties,
    fp8_ties,
    zeros,
    underflow,
    subnormal,
    saturated,
    not_finite,
    far_apart,
)


def activation_rows(kind: Callable[[Bits], Iterator[Block]], seed: int) -> Iterator[list[object]]:
    bits = Bits(seed)
    for index, (values, r) in enumerate(kind(bits)):
        x = torch.tensor(values).bfloat16()
        sensitivity = bits.codes()
        if kind is far_apart and index < 8:
            sensitivity = torch.full((BLOCK,), SCALE_MAX_CODE, dtype=torch.uint8)
        site = Site(r, sensitivity, 1.0, 0, "difference", "max")
        score = int(activation.quantize(x, site).score)
        site = replace(site, threshold=threshold(bits, score, index))
        codes = activation.quantize(x, site)
        finite = bool(x.isfinite().all())
        u = torch.where(x.isnan(), torch.nan, x.float() * r)
        yield [
            hexadecimal(x.view(torch.int16), 4),
            hexadecimal(torch.tensor([r]).view(torch.int32), 8),
            hexadecimal(sensitivity, 2),
            hexadecimal(u.view(torch.int32), 8),
            hexadecimal(codes.scale, 2) if finite else None,
            hexadecimal(codes.fp4, 1) if finite else None,
            hexadecimal(codes.fp8, 2),
            int(codes.score) if finite else None,
            site.threshold,
            int(codes.is_fp8),
        ]


def candidates(bits: Bits) -> Iterator[Block]:
    """Largest values of every scale code, and the rest spread so that each candidate wins."""
    for index in range(3 * SCALE_MAX_CODE):
        largest = E4M3.magnitudes[SCALE_MIN_CODE + index % SCALE_MAX_CODE]
        rest = (largest * (1 + bits.below(32)) / 32 for _ in range(BLOCK - 1))
        yield [bits.sign() * largest, *(bits.sign() * bf16(v) for v in rest)], 1.0


def equal_errors(bits: Bits) -> Iterator[Block]:
    """One value alone, or twice: often exact, or equally far off, under several scales."""
    for index in range(60):
        lonely = [0.0] * BLOCK
        lonely[bits.below(BLOCK)] = bits.sign() * E4M3.magnitudes[8 + 2 * index]
        if index % 3 == 0:
            lonely[bits.below(BLOCK)] = bits.sign() * E4M3.magnitudes[8 + 2 * index]
        yield lonely, 1.0


LEAF_KINDS = (ordinary, candidates, equal_errors, zeros, underflow, subnormal, saturated, far_apart)
_LEAF_STEP = {ordinary: 3, subnormal: 3}
"""Of some kinds every third block is enough."""


def leaf_rows(kind: Callable[[Bits], Iterator[Block]], seed: int) -> Iterator[list[object]]:
    bits = Bits(seed)
    for index, (values, r) in enumerate(kind(bits)):
        if index % _LEAF_STEP.get(kind, 1):
            continue
        x = torch.tensor(values).bfloat16()
        site = Site(r, bits.codes(), 1.0, 0, "benefit", "search")
        score = int(activation.quantize(x, site).score)
        limit = threshold(bits, score, index)
        codes = activation.quantize(x, replace(site, threshold=limit))
        largest = activation.quantize(x, replace(site, scales="max"))
        unit = FP8_FACTOR * 2**UNIT_BITS
        v = (x.double() * r * unit).round().clamp(-UNIT_MAX * 2**UNIT_BITS, UNIT_MAX * 2**UNIT_BITS)
        g = [int(E4M3.magnitude(c) * 2**SENSITIVITY_BITS) for c in site.sensitivity.tolist()]

        def error(units: Tensor, v: Tensor = v, g: list[int] = g) -> int:
            ints = (units.double() * 2**UNIT_BITS - v).long().tolist()
            return sum(w * d * d for w, d in zip(g, ints, strict=True))

        q8 = decode_e4m3(codes.fp8[0]) * FP8_FACTOR
        yield [
            hexadecimal(x.view(torch.int16), 4),
            hexadecimal(torch.tensor([r]).view(torch.int32), 8),
            hexadecimal(site.sensitivity, 2),
            [int(value) for value in v.tolist()],
            error(q8),
            error(decode_e2m1(largest.fp4[0]) * decode_e4m3(largest.scale)),
            error(decode_e2m1(codes.fp4[0]) * decode_e4m3(codes.scale)),
            hexadecimal(codes.scale, 2),
            hexadecimal(codes.fp4, 1),
            hexadecimal(codes.fp8, 2),
            score,
            limit,
            int(codes.is_fp8),
        ]


def threshold(bits: Bits, score: int, index: int) -> int:
    """Exactly the score, one below it, about it, anywhere, or one of the two ends."""
    choices = (
        score,
        score - 1,
        score + bits.sign() * (score >> 24),
        score + bits.sign() * (score >> 18 + bits.below(4)),
        bits.below(2**32) << bits.below(28),
        (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4)[bits.below(2)],
    )
    return min(max(choices[index % len(choices)], THRESHOLD_ALL_FP8), THRESHOLD_ALL_FP4)


def weight_rows(kind: str, seed: int) -> Iterator[list[object]]:
    bits = Bits(seed)
    for index in range(WEIGHT_KINDS[kind]):
        searched = None
        t = tensor_scale(bits.significand(24) * 2.0 ** (bits.below(12) - 8))
        level = 2688 * t / 2.0 ** (bits.octaves() + bits.octaves())
        values = [bits.significand(24) * level / 2.0 ** (1 + bits.octaves()) for _ in range(BLOCK)]
        if kind == "searched":
            searched = SCALE_MIN_CODE + bits.below(SCALE_MAX_CODE)
            level = E4M3.magnitudes[searched] * 6 * t
            values = [bits.significand(24) * level / 2.0 ** bits.octaves() for _ in values]
        elif kind == "ties":
            # Midpoints times s * t, exact where t is a power of two and otherwise rounded, and
            # the fp32 values on both sides.
            t = t if index % 2 else 2.0 ** (bits.below(20) - 16)
            s = E4M3.magnitudes[SCALE_MIN_CODE + 7 + bits.below(SCALE_MAX_CODE - 7)]
            step = (torch.tensor(s) * torch.tensor(t)).item()
            beside = [(m * step, bits.below(3) - 1) for m in (*E2M1_MIDPOINTS, *E2M1_MIDPOINTS)]
            values = [6 * step, *(fp32(v, d) for v, d in beside), 0.0]
        elif kind == "zero":
            values = [0.0] * BLOCK
            t = t if index % 2 else tensor_scale(0.0)
        elif kind == "underflow":
            values = [v / level * 6 * t * 2.0 ** -(6 + index % 8) for v in values]
        elif kind == "subnormal":
            t = tensor_scale(2.0 ** -(110 + index % 40))
            values = [bits.below(1 << 24) * 2.0**-149 for _ in values]
        x = torch.tensor([bits.sign() * v for v in values]).unsqueeze(0)
        given = None if searched is None else torch.tensor([[searched]], dtype=torch.uint8)
        codes = quantize_weight(x, t, given)
        yield [
            hexadecimal(x.view(torch.int32), 8),
            hexadecimal(torch.tensor([t]).view(torch.int32), 8),
            None if given is None else hexadecimal(given, 2),
            hexadecimal(codes.scale, 2),
            hexadecimal(codes.fp4, 1),
            hexadecimal(codes.fp8, 2),
        ]


WEIGHT_KINDS = {
    "ordinary": 150,
    "searched": 100,
    "ties": 150,
    "zero": 8,
    "underflow": 40,
    "subnormal": 40,
}


def fp32(value: float, steps: int) -> float:
    """``value``, an fp32 number, or its neighbour ``steps`` further from zero."""
    return (torch.tensor(value).view(torch.int32) + steps).view(torch.float32).item()


def hexadecimal(values: Tensor, digits: int) -> str:
    mask = (1 << 4 * digits) - 1
    return "".join(f"{value & mask:0{digits}x}" for value in values.flatten().tolist())


def render() -> str:
    """The file, a row a line."""
    sections = {
        "activation": (
            ACTIVATION_FIELDS,
            {kind.__name__: activation_rows(kind, i) for i, kind in enumerate(ACTIVATION_KINDS)},
        ),
        "leaves": (
            LEAF_FIELDS,
            {kind.__name__: leaf_rows(kind, 200 + i) for i, kind in enumerate(LEAF_KINDS)},
        ),
        "weight": (
            WEIGHT_FIELDS,
            {kind: weight_rows(kind, 100 + i) for i, kind in enumerate(WEIGHT_KINDS)},
        ),
    }
    lines = ["{", f'"about": {json.dumps(ABOUT, indent=1)}']
    for section, (fields, kinds) in sections.items():
        lines[-1] += ","
        lines += [f'"{section}": {{', f'"fields": {json.dumps(fields, indent=1)}']
        for kind, rows in kinds.items():
            lines[-1] += ","
            body = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
            lines += [f'"{kind}": [', body, "]"]
        lines.append("}")
    return "\n".join([*lines, "}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare with the file on disk")
    if parser.parse_args().check:
        same = TARGET.exists() and TARGET.read_text() == render()
        print(f"{TARGET}: {'unchanged' if same else 'differs from what the code makes now'}")
        return 0 if same else 1
    TARGET.write_text(render())
    print(f"{TARGET}: {TARGET.stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
