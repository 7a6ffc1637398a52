"""The records of the formats say what OCP's tables say, and every derived constant follows."""

from fractions import Fraction

import pytest

from fgmp.formats import spec
from fgmp.formats.spec import E2M1, E4M3

from . import model


def test_magnitudes_are_those_typed_out():
    assert list(E2M1.magnitudes) == model.E2M1
    assert list(E4M3.magnitudes) == model.E4M3
    assert len(E2M1.magnitudes) == 8
    assert len(E4M3.magnitudes) == 127


def test_magnitudes_by_fields():
    # OCP 8-bit formats, table 1; OCP microscaling formats, table 5.
    assert (E4M3.max, E4M3.max_code, E4M3.smallest, E4M3.nan_code) == (448, 0x7E, 2**-9, 0x7F)
    assert (E2M1.max, E2M1.max_code, E2M1.smallest) == (6, 7, 0.5)
    assert (E4M3.bits, E4M3.sign_bit, E2M1.bits, E2M1.sign_bit) == (8, 0x80, 4, 8)
    assert E4M3.magnitude(0x08) == Fraction(1, 64)  # smallest normal


def test_e2m1_has_no_nan():
    with pytest.raises(ValueError, match="E2M1 has no NaN"):
        _ = E2M1.nan_code


def test_derived_constants():
    assert spec.FP8_FACTOR == 6
    assert spec.UNIT_MAX == 2688
    assert spec.SCORE_BITS == 29
    assert (spec.SCALE_MIN_CODE, spec.SCALE_MAX_CODE, spec.FP8_BLOCK) == (0x01, 0x7E, 0x80)
    assert (spec.THRESHOLD_ALL_FP8, spec.THRESHOLD_ALL_FP4) == (model.ALL_FP8, model.ALL_FP4)


def test_decoded_values_are_integers_in_the_unit():
    """2**-10 is the largest power of two of which every FP4 and FP8 value is a multiple."""
    values = [e * s for e in model.E2M1 for s in model.E4M3] + [6 * e for e in model.E4M3]
    assert all((v * 2**spec.UNIT_BITS).denominator == 1 for v in values)
    assert any((v * 2 ** (spec.UNIT_BITS - 1)).denominator == 2 for v in values)
    assert max(values) == spec.UNIT_MAX


def test_stream_bits():
    """A block: 16 nibbles and a scale byte, or 16 bytes; and one flag bit."""
    assert spec.stream_bits(1.0) * 16 == 16 * 4 + 8 + 1
    assert spec.stream_bits(0.0) * 16 == 16 * 8 + 1
    assert spec.stream_bits(0.7) == pytest.approx(5.6125, rel=1e-15)  # 3 roundings of float64
