"""Activations and the decision: every claim of sections 3 to 5, exhausted where it is finite."""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fgmp.formats import activation
from fgmp.formats.activation import (
    Site,
    fake_quantize,
    fl32,
    is_multiplier,
    multiplier,
    power_codes,
    quantize,
    saturated,
    score_unit,
    scores,
    sensitivity_codes,
    site_threshold,
)
from fgmp.formats.codec import decode_e4m3, encode_e2m1
from fgmp.formats.rules import SCALES
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8

from . import model

MIDPOINTS = [(a + b) / 2 for a, b in zip(model.E2M1[:-1], model.E2M1[1:], strict=True)]
RULES = ("difference", "benefit", "random")
LEAVES = [(rule, scales) for rule in RULES for scales in SCALES]

positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False, width=32)


def random_codes(k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 127, (k,), dtype=torch.uint8, generator=generator)


def heavy_tailed(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    exponents = 2 * torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator) * torch.exp2(exponents)


def a_site(k, *, threshold=0, r=3.5, rule="difference", scales="max", seed=0):
    return Site(r, random_codes(k, seed), 1.0, threshold, rule, scales)


def check_against_model(x, site):
    """Every field of ``quantize`` of finite (B, 16), block by block."""
    codes = quantize(x, site)
    sensitivity = site.sensitivity.tolist()
    for b, block in enumerate(x.bfloat16().tolist()):
        exact, r = [Fraction(v) for v in block], Fraction(site.r)
        searched = sensitivity if site.scales == "search" else None
        s, fp4, fp8 = model.activation_block(exact, r, searched)
        assert codes.scale[b].item() == s
        assert codes.fp4[b, 0].tolist() == fp4
        assert codes.fp8[b, 0].tolist() == fp8
        if site.rule == "benefit":
            score = model.benefit(s, fp4, fp8, [v * r for v in exact], sensitivity)
        else:
            score = model.score(s, fp4, fp8, sensitivity)
        assert codes.score[b].item() == score
        assert codes.is_fp8[b].item() == (score > site.threshold)


@pytest.mark.parametrize("scales", SCALES)
def test_truncated_in_rationals(scales):
    """Codes, scale and S by the text of docs/numerics.md, at amplitudes of all scales; and the
    fast twin and calibration's scores agree."""
    generator = torch.Generator().manual_seed(5)
    x = heavy_tailed(120, 16) * torch.exp2(torch.randint(-14, 4, (120, 1), generator=generator))
    site = a_site(16, rule="truncated", scales=scales)
    codes, sensitivity = quantize(x, site), [int(model.E4M3[c] * 512) for c in site.sensitivity]
    for b, block in enumerate(x.bfloat16().tolist()):
        u = [Fraction(v) * Fraction(site.r) for v in block]
        fp8 = codes.fp8[b, 0].tolist()
        largest = max(1, *(code & 127 for code in fp8))
        tried = sorted({min(max(largest + o, 1), 126) for o in SCALES[scales]}, reverse=True)
        step = 2 ** (max(tried[-1] >> 3, 1) - 1)
        most = 2688 * 2**11
        v = [in_steps(min(int(12 * abs(w) * 2**10), most), step, w < 0) for w in u]
        q8 = [in_steps(int(12 * model.E4M3[c & 127] * 2**10), step, c > 127) for c in fp8]

        def error(codes, scale, v=v):
            q4 = [model.E2M1[c & 7] * (-1 if c & 8 else 1) * model.E4M3[scale] for c in codes]
            d = [q * 2**10 - w for q, w in zip(q4, v, strict=True)]
            return sum(g * e**2 for g, e in zip(sensitivity, d, strict=True))

        fp4 = {s: model.fp4_under(s, u) for s in tried}
        best = min(tried, key=lambda s: error(fp4[s], s))  # of equals the first, the larger
        worst = sum(g * (a - c) ** 2 for g, a, c in zip(sensitivity, q8, v, strict=True))
        assert codes.score[b].item() == max(0, error(fp4[best], best) - worst)
        assert codes.fp4[b, 0].tolist() == fp4[best]
        assert codes.scale[b].item() == (best if any(c & 7 for c in fp4[best]) else 1)
    median = replace(site, threshold=int(codes.score.median()))
    units, is_fp8 = fake_quantize(x, median)
    assert torch.equal(is_fp8, quantize(x, median).is_fp8) and 0 < is_fp8.sum() < is_fp8.numel()
    assert torch.equal(units, quantize(x, median).units(16))
    assert torch.equal(scores(x, site), codes.score.double())


def in_steps(halves, step, negative):
    """Halves to the nearest multiple of ``step`` whole ones, away from zero in the middle."""
    nearest = (Fraction(halves, 2 * step) + Fraction(1, 2)).__floor__() * step
    return -nearest if negative else nearest


def test_power_codes_are_the_nearest_powers():
    codes = torch.arange(1, 127, dtype=torch.uint8)
    powers = [Fraction(2) ** e for e in range(-6, 9)]
    for code, found in zip(codes.tolist(), power_codes(codes).tolist(), strict=True):
        value = model.E4M3[code]
        assert model.E4M3[found] == min(powers, key=lambda p: (abs(p - value), -p))
        assert found & 7 == 0
    assert torch.equal(power_codes(power_codes(codes)), power_codes(codes))


# fl32, the multiplier and the tensor scale


@given(st.fractions(max_denominator=10**30).filter(lambda q: abs(q) < 2**100))
@settings(deadline=None)
def test_fl32_of_any_rational(q):
    assert fl32(q) == model.fl32(q)


@pytest.mark.parametrize("middle", [1 + Fraction(1, 2**24), 1 + Fraction(3, 2**24)])
@pytest.mark.parametrize("offset", [-1, 0, 1])
def test_fl32_rounds_once(middle, offset):
    """2**-70 off an fp32 midpoint is lost in float64: rounding twice goes to the wrong side."""
    q = middle + Fraction(offset, 2**70)
    assert fl32(q) == model.fl32(q)
    assert fl32(-q) == -model.fl32(q)


def bits_of(r):
    """Significant bits of a positive rational with a power of two below."""
    return (r.numerator // (r.numerator & -r.numerator)).bit_length()


@given(positive)
@settings(deadline=None)
def test_multiplier_is_the_largest_of_12_bits(amax):
    r = Fraction(multiplier(amax))
    assert bits_of(r) <= 12
    assert is_multiplier(float(r))
    assert Fraction(1, 2**100) <= r <= 2**100
    exact = Fraction(448) / Fraction(amax)
    if exact < Fraction(1, 2**100):
        assert r == Fraction(1, 2**100)
        return
    assert r <= exact
    if r < 2**100:
        exponent = r.numerator.bit_length() - r.denominator.bit_length()
        exponent -= r < Fraction(2) ** exponent
        assert r + Fraction(2) ** (exponent - 11) > exact  # the next larger value of 12 bits


@pytest.mark.parametrize(
    ("amax", "r"),
    [
        (0.0, 1.0),
        (448.0, 1.0),
        (1.0, 448.0),
        (3.0, 149.3125),  # 448 / 3 = 2389.33 / 16, and 2389 has 12 bits
        (2.0**-133, 2.0**100),
        (5e-324, 2.0**100),
        (2.0**120, 2.0**-100),
    ],
)
def test_multiplier_by_hand(amax, r):
    assert multiplier(amax) == r


def test_is_multiplier():
    assert all(map(is_multiplier, (1.0, 4095.0, 4095 * 2.0**-100, 2.0**100, 2.0**-100)))
    assert not any(map(is_multiplier, (4097.0, 0.0, -1.0, torch.inf, torch.nan, 0.1)))


@given(positive)
@settings(deadline=None)
def test_tensor_scale_is_fl32_of_1_over_6r(amax):
    r = multiplier(amax)
    assert Site(r, torch.empty(0), 1.0, 0).t == model.fl32(1 / (6 * Fraction(r)))


def test_headroom_is_the_room_before_saturation():
    """With r from 1.5 amax nothing up to 1.5 amax saturates, and 1.51 amax does."""
    amax = 3.0
    site = replace(a_site(16), r=multiplier(1.5 * amax))
    x = torch.zeros(3, 16)
    x[0, 0], x[1, 0], x[2, 0] = amax, -1.5 * amax, 1.51 * amax
    assert saturated(x[:2], site) == 0
    assert saturated(x, site) == 1
    assert saturated(torch.full((2, 16), torch.inf), site) == 32
    assert saturated(torch.tensor([448.0, 450.0]), replace(site, r=1.0)) == 1


# Exactness of the products, and the one division


def test_products_are_exact():
    """u = x r and 6u: all 128 bf16 significands times all 2,048 multipliers of 12 bits."""
    x = torch.arange(128, 256).float().view(-1, 1)
    r = torch.arange(2048, 4096).float()
    u = x * r
    assert torch.equal(u.double(), x.double() * r.double())
    assert torch.equal((6 * u).double(), 6 * u.double())


def test_seven_compares_are_the_division():
    """6u/s by one IEEE division gives the code that 6|u| against midpoint * s gives exactly.

    u has 20 bits, s four, and a power of two changes neither side, so all significands of u,
    the eight of s and the octaves of the quotient from 2**-3 to 2**3 are all cases there are.
    Below, both give 0; above, both give 7.
    """
    six_u = 6 * torch.arange(2**19, 2**20)
    midpoints = torch.tensor([int(4 * m) for m in MIDPOINTS])
    for s in range(8, 16):
        for octave in range(-3, 3):
            # The quotient six_u / (s << shift) is about 2**octave.
            shift = 19 - octave
            bounds = midpoints * (s << shift)
            exact = torch.searchsorted(bounds, 4 * six_u)  # midpoints strictly below
            on_tie = bounds[exact.clamp(max=6)] == 4 * six_u
            exact += on_tie & (exact % 2 == 1)  # a tie goes to the even code
            quotient = six_u.float() / torch.tensor(float(s << shift))
            codes = encode_e2m1(quotient, quotient)
            assert torch.equal(codes.long(), exact), (s, octave)


# The decision


def highest(s):
    """The largest u, up to saturation, whose FP8 code is s."""
    return model.E4M3[-1] if s == 126 else (model.E4M3[s] + model.E4M3[s + 1]) / 2


def scale_choices():
    """(code of the largest magnitude, scale code) under ``search``."""
    for largest in range(1, 127):
        yield from ((largest, min(max(largest + d, 1), 126)) for d in SCALES["search"])


def reachable_pairs(largest, s):
    """(e2m1, e4m3) that one u can have when the block's largest has code ``largest``, under s."""
    scale = model.E4M3[s]
    for high in range(largest + 1):
        # u that round to code high, as a closed interval; the closure only adds pairs.
        low_u = (model.E4M3[high] + model.E4M3[max(high - 1, 0)]) / 2
        high_u = highest(high)
        first = model.nearest(model.E2M1, 6 * low_u / scale)
        last = model.nearest(model.E2M1, 6 * high_u / scale)
        yield from ((low, high) for low in range(first, last + 1))


def test_bounds_of_the_decision():
    """Over all scales and reachable pairs: |q4 - q8| <= 2**19, attained, and S < 2**60."""
    largest = max(
        abs(model.E2M1[low] * model.E4M3[s] - 6 * model.E4M3[high]) * 2**10
        for largest, s in scale_choices()
        for low, high in reachable_pairs(largest, s)
    )
    assert largest == 2**19
    g_max = 448 * 2**9
    assert 16 * g_max * largest**2 < 2**60


def test_bounds_of_the_errors():
    """|q4 - v| <= 448 * 2**10 under every scale tried, |q8 - v| <= 96 * 2**10: errors < 2**60.

    Between two rounding points q is constant and v rises with u, so the ends of those stretches
    hold the extremes.
    """
    worst4 = max(
        abs(value * model.E4M3[s] * 2**10 - model.target(u))
        for largest, s in scale_choices()
        for value, first, last in zip(
            model.E2M1, (0, *MIDPOINTS), (*MIDPOINTS, Fraction(10**9)), strict=True
        )
        if first * model.E4M3[s] / 6 <= highest(largest)
        for u in (first * model.E4M3[s] / 6, min(last * model.E4M3[s] / 6, highest(largest)))
    )
    assert worst4 == 448 * 2**10 < 2**19
    edges = [(a + b) / 2 for a, b in zip(model.E4M3[:-1], model.E4M3[1:], strict=True)]
    worst8 = max(
        abs(6 * value * 2**10 - model.target(u))
        for value, first, last in zip(
            model.E4M3, (0, *edges), (*edges, Fraction(10**9)), strict=True
        )
        for u in (first, last)
    )
    assert worst8 == 96 * 2**10
    assert 16 * 448 * 2**9 * worst4**2 < 2**60


def test_the_largest_score():
    """u = 372 under s = 448 is a difference of 512 t, in 15 places at once."""
    x = torch.tensor([[448.0] + 15 * [372.0]])
    site = Site(1.0, torch.full((16,), 0x7E, dtype=torch.uint8), 1.0, 0, "difference", "max")
    assert quantize(x, site).score.item() == 15 * 448 * 2**9 * 2**38
    check_against_model(x, site)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("rule", ["difference", "benefit"])
@pytest.mark.parametrize("scale", [1e-6, 0.1, 1.0, 30.0, 1e4])
def test_quantize_against_the_model(scale, rule, scales):
    """Blocks that underflow, ordinary ones and ones that saturate."""
    x = heavy_tailed(60, 16, seed=1) * scale
    r = 2.0625 if scale < 1 else 7.375
    check_against_model(x, a_site(16, r=r, threshold=10**13, rule=rule, scales=scales))


@pytest.mark.parametrize("scales", SCALES)
def test_the_smallest_and_largest_scales_against_the_model(scales):
    """Blocks on a grid about 2**-9 and about 448, where candidates meet the ends of the codes."""
    g = torch.Generator().manual_seed(12)
    low = torch.randint(-24, 25, (80, 16), generator=g) * 2.0**-12
    high = torch.randint(-30, 31, (80, 16), generator=g) * 16.0
    for x in (low, high):
        check_against_model(x, a_site(16, r=1.0, rule="benefit", scales=scales))


def test_every_candidate_is_chosen_somewhere():
    site = a_site(16, rule="benefit", scales="search")
    x = heavy_tailed(2000, 16, seed=13)
    searched = quantize(x, site)
    largest = quantize(x, replace(site, scales="max")).scale.int()
    assert set((searched.scale.int() - largest).flatten().tolist()) == set(SCALES["search"])


def test_search_never_errs_more_and_equal_errors_take_the_larger_scale():
    """6, 3 and 0 are exact under s and s / 2; every code of such a block is tried by hand."""
    x = torch.tensor([[4.0, 2.0, 1.0, 0.0] * 4]) * 16 / 6
    site = a_site(16, r=1.0, rule="benefit", scales="search")
    codes = quantize(x.bfloat16().float(), site)
    # u is not exact in bf16, so the largest is: 4 * 16 / 6 = 10.667 -> E4M3 11, and 16 = 11 + 4.
    assert decode_e4m3(codes.scale).item() == 16
    tie = torch.tensor([[8.0] + [0.0] * 15])  # 8 is 6 s of s = 8/6 .. exact only as 4 * 12
    assert decode_e4m3(quantize(tie, site).scale).item() == 12
    x = heavy_tailed(500, 16, seed=14)
    kept = [quantize(x, replace(site, scales=scales)) for scales in ("max", "search")]
    u = [[Fraction(v) for v in block] for block in x.bfloat16().tolist()]
    better = 0
    for b, values in enumerate(u):
        errors = [
            model.error(c.scale[b].item(), c.fp4[b, 0].tolist(), values, site.sensitivity.tolist())
            for c in kept
        ]
        assert errors[1] <= errors[0]
        better += errors[1] < errors[0]
    assert better > 200


def test_benefit_is_zero_where_fp8_does_not_help():
    """u = 2/3 of s = 10 is 4 in FP4 but for bf16's rounding, and 6.5 in FP8: FP8 would be worse.

    Under ``difference`` such a block is among the first to become FP8.
    """
    x = torch.tensor([[10.0] + [20 / 3] * 15])
    site = a_site(16, r=1.0, rule="benefit")
    assert quantize(x, site).score.item() == 0
    assert quantize(x, replace(site, rule="difference")).score.item() > 0
    assert not quantize(x, site).is_fp8.any()
    assert quantize(x, replace(site, threshold=THRESHOLD_ALL_FP8)).is_fp8.all()
    check_against_model(x, site)


def test_input_is_rounded_to_bf16_first():
    x = heavy_tailed(200, 16, seed=2)
    site = a_site(16)
    fp32, bf16 = quantize(x, site), quantize(x.bfloat16(), site)
    assert torch.equal(fp32.fp4, bf16.fp4)
    assert torch.equal(fp32.score, bf16.score)
    assert not torch.equal(x, x.bfloat16().float())
    # A tie of FP8 that is none in fp32: 17 + 2**-20 rounds to 17, halfway from 16 to 18.
    assert quantize(torch.full((1, 16), 17 + 2**-19), replace(site, r=1.0)).fp8[0, 0, 0] == 0x58


def codes_equal(a, b):
    return all(torch.equal(getattr(a, f), getattr(b, f)) for f in vars(a))


@pytest.mark.parametrize(("rule", "scales"), LEAVES)
@pytest.mark.parametrize("k", [16, 172, 256])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_fake_quantize_is_quantize(rule, scales, k, share):
    """Values and flags, at thresholds that some scores equal or miss by one."""
    x = heavy_tailed(3, 50, k, seed=k)
    site = a_site(k, rule=rule, scales=scales, r=5.5)
    ranked = quantize(x, site).score.flatten().sort().values
    middle = ranked[int(share * (len(ranked) - 1))].item()
    ends = (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4)
    for threshold in (middle - 1, middle, middle + 1, *ends):
        if threshold < THRESHOLD_ALL_FP8:
            continue
        exact = quantize(x, replace(site, threshold=threshold))
        units, is_fp8 = fake_quantize(x, replace(site, threshold=threshold))
        assert torch.equal(is_fp8, exact.score > threshold)
        assert torch.equal(is_fp8, exact.is_fp8)
        assert torch.equal(units, exact.units(k))
        assert units.shape == x.shape


@pytest.mark.parametrize(("rule", "scales"), LEAVES)
def test_fake_quantize_of_small_and_large_blocks(rule, scales):
    """Largest values from far below the smallest scale to far above 448, a block an octave."""
    levels = torch.exp2(torch.arange(-20.0, 20.0)).view(-1, 1)
    x = torch.rand(40, 16, generator=torch.Generator().manual_seed(11)) * levels
    for threshold in (0, 10**6, 10**10, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8):
        site = a_site(16, r=1.0, threshold=threshold, rule=rule, scales=scales)
        exact = quantize(x, site)
        units, is_fp8 = fake_quantize(x, site)
        assert torch.equal(units, exact.units(16))
        assert torch.equal(is_fp8, exact.is_fp8)


@pytest.mark.parametrize(("rule", "scales"), LEAVES[:4])
def test_fake_quantize_at_every_score(rule, scales, monkeypatch):
    """A block alone is FP4 under T = S and FP8 under T = S - 1, whatever fp32 makes of it."""
    x = heavy_tailed(300, 16, seed=3)
    site = a_site(16, rule=rule, scales=scales)
    flipped = 0
    for block, score in zip(x, quantize(x, site).score.flatten().tolist(), strict=True):
        for threshold, expected in ((score, False), (score - 1, True)):
            _, is_fp8 = fake_quantize(block, replace(site, threshold=threshold))
            assert is_fp8.item() == expected
            with monkeypatch.context() as patch:
                patch.setattr(activation, "_ESTIMATE_BAND", -1.0)
                _, estimated = fake_quantize(block, replace(site, threshold=threshold))
            flipped += estimated.item() != expected
    assert flipped > 50  # the estimate alone would have decided these wrongly


def test_estimate_is_within_its_band():
    """Derived: below 2**-19 of S. 16 terms of two roundings, 15 additions."""
    x = heavy_tailed(2000, 16, seed=4) * 20
    x[0] = torch.tensor([448.0] + 15 * [372.0])
    site = a_site(16, r=1.0)
    u, amax = activation._multiplied(x, site)
    difference = activation._fp8_units(u) - activation._fp4_units(u, amax)
    estimates = activation._estimate(difference, activation._sensitivities(site)).flatten().tolist()
    exact = quantize(x, site).score.flatten().tolist()
    for estimate, score in zip(estimates, exact, strict=True):
        assert abs(Fraction(estimate) - score) * 2**19 <= score
    assert max(exact) > 2**53  # where float64 itself would round
    assert sum(e != s for e, s in zip(estimates, exact, strict=True)) > 500


def test_ragged_blocks_ignore_the_padding():
    """K = 172: the last block has 12 values, and the 4 missing count as zero."""
    x = heavy_tailed(20, 172, seed=5)
    site = a_site(172, threshold=10**14)
    padded_site = replace(site, sensitivity=torch.cat([site.sensitivity, random_codes(4)]))
    ragged = quantize(x, site)
    padded = quantize(torch.nn.functional.pad(x, (0, 4)), padded_site)
    assert codes_equal(ragged, padded)
    assert ragged.units(172).shape == (20, 172)
    assert torch.equal(scores(x, site), scores(torch.nn.functional.pad(x, (0, 4)), padded_site))


@given(st.floats(0, 1e30), positive, st.floats(0, 2.0**127, width=32))
@settings(deadline=None)
def test_site_threshold_is_exact(threshold, amax, gamma):
    """T_site by rationals; S > T_site says for every integer S what S t^2 gamma 2^-29 > T says."""
    assume(gamma > 0)
    r = multiplier(amax)
    found = site_threshold(threshold, r, gamma)
    t = model.fl32(1 / (6 * Fraction(r)))
    unit = t**2 * Fraction(gamma) / 2**29
    assert found == min(Fraction(threshold) // unit, 2**63 - 1)
    if found < 2**63 - 1:
        assert found * unit <= Fraction(threshold) < (found + 1) * unit


def test_site_threshold_at_its_ends():
    assert site_threshold(-torch.inf, 1.0, 1.0) == site_threshold(-1e-300, 1.0, 1.0) == -1
    assert site_threshold(torch.inf, 1.0, 1.0) == site_threshold(1e300, 1.0, 1.0) == 2**63 - 1
    assert site_threshold(0.0, 1.0, 1.0) == 0
    # No gradient: every score is zero, more than a negative threshold and no other.
    assert site_threshold(-1e-300, 1.0, 0.0) == -1
    assert site_threshold(0.0, 1.0, 0.0) == 2**63 - 1


def test_score_unit():
    """t**2 gamma 2**-29 in float64: four roundings."""
    site = Site(7.375, random_codes(16), 0.37, 0)
    exact = Fraction(site.t) ** 2 * Fraction(site.gamma) / 2**29
    assert score_unit(site) == pytest.approx(float(exact), rel=4 * 2.0**-53)


# Sensitivities


def test_sensitivity_codes_round_to_nearest():
    """The model decides wherever g2 / gamma is not within 2**-20 of a tie."""
    g2 = torch.exp2(torch.rand(2000, generator=torch.Generator().manual_seed(6)) * 30 - 40)
    codes, gamma = sensitivity_codes(g2)
    assert gamma == model.fl32(Fraction(g2.max().item()) / 448)
    for value, code in zip(g2.tolist(), codes.tolist(), strict=True):
        ratio = Fraction(value) / Fraction(gamma)
        near = {model.nearest(model.E4M3, ratio * (1 + d)) for d in (-Fraction(1, 2**20), 0)}
        assert code in {max(1, c) for c in near}
    assert codes[g2.argmax()].item() == 0x7E
    assert (codes == 1).sum() > 100  # 2**-30 of the largest is floored


def test_sensitivity_without_gradient():
    codes, gamma = sensitivity_codes(torch.zeros(20))
    assert gamma == 0.0
    assert codes.tolist() == [1] * 20


def test_one_channel_with_gradient():
    codes, gamma = sensitivity_codes(torch.tensor([0.0, 3.0, 0.0]))
    assert codes.tolist() == [1, 0x7E, 1]
    assert gamma == model.fl32(Fraction(3, 448))


# Edges


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(("rule", "scales"), LEAVES)
@pytest.mark.parametrize("threshold", [-1, 0, 10**14, 2**63 - 1])
def test_non_finite_elements_make_an_fp8_block(bad, rule, scales, threshold):
    """The block is FP8 whatever the threshold, its broken element NaN; other blocks are not."""
    x = heavy_tailed(4, 40, seed=7)
    site = a_site(40, threshold=threshold, rule=rule, scales=scales)
    clean, clean_flags = fake_quantize(x, site)
    x[2, 17] = bad
    codes = quantize(x, site)
    units, is_fp8 = fake_quantize(x, site)
    assert is_fp8[2, 1]
    assert codes.fp8[2, 1, 1] == 0x7F
    assert codes.score[2, 1] == 2**63 - 1
    assert units.isnan().nonzero().tolist() == [[2, 17]]
    assert torch.equal(units.isnan(), codes.units(40).isnan())
    assert torch.equal(units.nan_to_num(nan=0.0), codes.units(40).nan_to_num(nan=0.0))
    untouched = torch.ones_like(is_fp8)
    untouched[2, 1] = False
    assert torch.equal(is_fp8[untouched], clean_flags[untouched])
    assert torch.equal(units[[0, 1, 3]], clean[[0, 1, 3]])
    # The healthy elements of the broken block are FP8 of what they were.
    as_fp8, _ = fake_quantize(x, replace(site, threshold=THRESHOLD_ALL_FP8))
    assert torch.equal(units[2, 18:32], as_fp8[2, 18:32])


def test_an_fp32_value_beyond_bf16_is_not_finite():
    """3.4e38 is finite in fp32 and rounds to infinity in bf16."""
    codes = quantize(torch.tensor([3.4e38] + [0.0] * 15), a_site(16))
    assert codes.is_fp8.all()
    assert codes.fp8[0, 0] == 0x7F


def test_overflowing_products_saturate():
    """x * r beyond fp32 is infinite there and 448 in both formats, hence a score of its rest."""
    x = torch.tensor([[2.0**127, -(2.0**127), 2.0**100] + [0.0] * 13])
    site = a_site(16, r=2.0**60)
    check_against_model(x, site)
    units, is_fp8 = fake_quantize(x, site)
    assert units[0, :3].tolist() == [2688, -2688, 2688]
    assert not is_fp8.any()


def test_underflowing_products_keep_the_sign_of_x():
    """x * r is minus zero in fp32, which is not below zero; the code's sign is that of x."""
    x = torch.tensor([[-(2.0**-100), 2.0**-100] * 8])
    site = a_site(16, r=2.0**-100)
    check_against_model(x, site)
    assert quantize(x, site).fp8[0, 0, :2].tolist() == [0x80, 0]


@pytest.mark.parametrize(("rule", "scales"), LEAVES[:4])
def test_saturated_values_are_equal_in_both_formats(rule, scales):
    x = torch.tensor([[1e6, -1e6] * 8])
    assert quantize(x, a_site(16, r=1.0, rule=rule, scales=scales)).score.item() == 0
    assert saturated(x, a_site(16, r=1.0)).item() == 16


@pytest.mark.parametrize("scales", SCALES)
def test_zero_blocks(scales):
    x = torch.zeros(2, 16)
    x[1] = -0.0
    codes = quantize(x, a_site(16, threshold=0, scales=scales))
    assert codes.scale.tolist() == [[1], [1]]
    assert not codes.fp4.any()
    assert not codes.fp8.any()
    assert not codes.is_fp8.any()
    assert quantize(x, a_site(16, threshold=-1)).is_fp8.all()


def test_empty_input():
    units, is_fp8 = fake_quantize(torch.zeros(0, 32), a_site(32))
    assert units.shape == (0, 32)
    assert is_fp8.shape == (0, 2)


def test_decoded_scale_codes_are_the_largest_fp8_code():
    """The FP4 scale costs no second rounding: it is the FP8 code of the largest magnitude."""
    codes = quantize(heavy_tailed(1000, 16, seed=10), a_site(16))
    largest = (codes.fp8 & 0x7F).amax(-1).clamp(min=1)
    assert torch.equal(codes.scale, largest)
    assert decode_e4m3(codes.scale).min() > 0
