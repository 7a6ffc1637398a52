"""tests/vectors/blocks.json: every row follows from the exact model, and the file is current.

The vectors are what other implementations are checked with, so they are themselves checked by
one that shares nothing with the package, and must contain the cases that matter.
"""

import json
from fractions import Fraction
from pathlib import Path

import make_vectors
import pytest

from . import model

ROOT = Path(__file__).parents[2]
PATH = ROOT / "tests" / "vectors" / "blocks.json"
FILE = json.loads(PATH.read_text())


def rows(section):
    """(kind, row as a dict) of one section."""
    fields = list(FILE[section]["fields"])
    for kind, block_rows in FILE[section].items():
        if kind != "fields":
            for row in block_rows:
                yield kind, dict(zip(fields, row, strict=True))


def numbers(text, digits):
    return [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]


ACTIVATIONS = list(rows("activation"))
LEAVES = list(rows("leaves"))
WEIGHTS = list(rows("weight"))
KINDS = sorted({kind for kind, _ in ACTIVATIONS})


def parse(row):
    """(bits of x, values of x with None where not finite, r, sensitivity codes)."""
    bits = numbers(row["x"], 4)
    values = [model.float_of_bits(b, 16) for b in bits]
    return bits, values, model.float_of_bits(int(row["r"], 16), 32), numbers(row["sensitivity"], 2)


@pytest.mark.parametrize("kind", KINDS)
def test_activation_rows(kind):
    for row in (row for k, row in ACTIVATIONS if k == kind):
        bits, x, r, sensitivity = parse(row)
        assert len(x) == len(sensitivity) == 16
        # A block with an element that is not finite: the others as if that were zero.
        finite = None not in x
        scale, fp4, fp8 = model.activation_block([v or Fraction(0) for v in x], r)
        fp8 = [0x7F if v is None else code for v, code in zip(x, fp8, strict=True)]
        assert numbers(row["fp8"], 2) == fp8
        if finite:
            assert int(row["s"], 16) == scale
            assert numbers(row["fp4"], 1) == fp4
            assert row["S"] == model.score(scale, fp4, fp8, sensitivity)
            assert row["flag"] == (row["S"] > row["T"])
        else:
            assert row["s"] is row["fp4"] is row["S"] is None
            assert row["flag"] == 1
        for u, v, b in zip(numbers(row["u"], 8), x, bits, strict=True):
            if v is not None:
                assert u == model.bits_of_float(v * r) | (b & 0x8000) << 16
            else:
                assert u == (0x7FC0_0000 if b & 0x7F else b << 16)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in WEIGHTS}))
def test_weight_rows(kind):
    for row in (row for k, row in WEIGHTS if k == kind):
        x = [model.float_of_bits(b, 32) for b in numbers(row["x"], 8)]
        t = model.float_of_bits(int(row["t"], 16), 32)
        searched = None if row["searched"] is None else int(row["searched"], 16)
        scale, fp4, fp8 = model.weight_block(x, t, searched)
        assert int(row["s"], 16) == scale
        assert numbers(row["fp4"], 1) == fp4
        assert numbers(row["fp8"], 2) == fp8


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in LEAVES}))
def test_leaf_rows(kind):
    for row in (row for k, row in LEAVES if k == kind):
        _, x, r, sensitivity = parse(row)
        u = [v * r for v in x]
        assert row["v"] == [model.target(value) for value in u]
        largest, fp4_largest, _ = model.activation_block(x, r)
        scale, fp4, fp8 = model.activation_block(x, r, sensitivity)
        assert int(row["s"], 16) == scale
        assert numbers(row["fp4"], 1) == fp4
        assert numbers(row["fp8"], 2) == fp8
        assert row["E8"] == model.error(None, fp8, u, sensitivity)
        assert row["E4max"] == model.error(largest, fp4_largest, u, sensitivity)
        assert row["E4"] == model.error(scale, fp4, u, sensitivity)
        assert row["S"] == model.benefit(scale, fp4, fp8, u, sensitivity)
        assert row["flag"] == (row["S"] > row["T"])


def test_the_leaves_that_matter_are_there():
    """Every candidate wins, ties between scales happen, and FP8 is the worse one now and then."""
    offsets, ties = {}, 0
    for _, row in LEAVES:
        _, x, r, sensitivity = parse(row)
        u = [v * r for v in x]
        largest, _, _ = model.activation_block(x, r)
        by_scale = {
            s: model.error(s, model.fp4_under(s, u), u, sensitivity)
            for s in {min(max(largest + d, 1), 126) for d in (-1, 0, 4, 5)}
        }
        won = int(row["s"], 16) - largest
        offsets[won] = offsets.get(won, 0) + 1
        ties += list(by_scale.values()).count(row["E4"]) > 1 and row["E4"] > 0
    assert all(offsets[d] > 50 for d in (-1, 0, 4, 5))
    assert ties > 5
    assert sum(row["E4"] < row["E8"] for _, row in LEAVES) > 20
    assert sum(0 < row["S"] == row["T"] for _, row in LEAVES) > 50
    assert {-1, 2**63 - 1} <= {row["T"] for _, row in LEAVES}
    assert len(LEAVES) >= 1000


def test_the_cases_that_matter_are_there():
    finite = [row for _, row in ACTIVATIONS if row["S"] is not None]
    assert len(ACTIVATIONS) >= 2000
    assert len(WEIGHTS) >= 400
    for difference in (0, 1):  # thresholds at which the decision turns
        assert sum(0 < row["S"] == row["T"] + difference for row in finite) > 300
    assert {-1, 2**63 - 1} <= {row["T"] for row in finite}
    assert {row["s"] for row in finite} >= {f"{code:02x}" for code in range(1, 127)}
    assert {c for row in finite for c in row["fp4"]} == set("0123456789abcdef")
    codes = {c for _, row in ACTIVATIONS for c in numbers(row["fp8"], 2)}
    assert codes == set(range(256)) - {0xFF}
    assert max(row["S"] for row in finite) == 15 * 448 * 2**9 * 2**38
    assert sum(row["S"] is None for _, row in ACTIVATIONS) >= 50
    assert sum(int(row["x"], 16) == 0 for row in finite) >= 10


def test_ties_are_there():
    """Exact ties of 6u/s and of u, counted by distance."""
    fp4_ties = fp8_ties = 0
    midpoints = {(a + b) / 2 for a, b in zip(model.E2M1[:-1], model.E2M1[1:], strict=True)}
    fp8_midpoints = {(a + b) / 2 for a, b in zip(model.E4M3[:-1], model.E4M3[1:], strict=True)}
    for _, row in ACTIVATIONS:
        if row["S"] is None:
            continue
        _, x, r, _ = parse(row)
        scale = model.E4M3[int(row["s"], 16)]
        fp4_ties += sum(6 * abs(v) * r / scale in midpoints for v in x)
        fp8_ties += sum(abs(v) * r in fp8_midpoints for v in x)
    assert fp4_ties > 500
    assert fp8_ties > 500


def test_regenerating_gives_the_same_bytes():
    assert make_vectors.render() == PATH.read_text()
    assert PATH.stat().st_size < 1_500_000
