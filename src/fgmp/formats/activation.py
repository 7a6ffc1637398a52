"""Activations to codes, online (docs/numerics.md, sections 3 to 5).

    x  is rounded to bf16 first
    u  = x * r                        exact in fp32: 8 bits times 12
    FP8 code = E4M3(u)                value 6 * e4m3 * t        with t = fl32(1 / (6 r))
    s  = the FP8 code of max |u|      at least 2**-9; or the best of four about it
    FP4 code = E2M1(6 u / s)          value e2m1 * s * t
    S  = sum g_int * (q4 - q8)**2     an exact integer of at most 60 bits
    the block is FP8  <=>  S > T_site

q4 and q8 are the decoded values in units of 2**-10 * t, g_int the sensitivity in units of
2**-9. Sums of floats depend on their order, so no two machines would agree on a float S; the
integer one they do. So they do on the errors that choose among scales, sums of g_int (q4 - v)**2
with v = 6 u rounded to that unit. :func:`quantize` is the definition. :func:`fake_quantize`
returns the same values faster: it decides on fp32 estimates where that is provably safe and on
the integers elsewhere.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from fgmp.formats.codec import (
    decode_e2m1,
    decode_e4m3,
    encode_e2m1,
    encode_e4m3,
    from_blocks,
    round_e2m1,
    to_blocks,
)
from fgmp.formats.spec import (
    BLOCK,
    E2M1,
    E4M3,
    FP8_FACTOR,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
    SCORE_BITS,
    SENSITIVITY_BITS,
    THRESHOLD_ALL_FP4,
    THRESHOLD_ALL_FP8,
    UNIT_BITS,
    UNIT_MAX,
)

MULTIPLIER_BITS = 12
"""Significant bits of r, so that r times a bf16 value is exact in fp32."""

_MULTIPLIER_LIMIT = 2.0**100

# The fp32 estimate of S sums 16 non-negative terms that carry two roundings each, over at most
# 15 additions: its relative error is below (1 + 2**-24)**17 - 1 < 2**-19. Twice that is the band.
_ESTIMATE_BAND = 2.0**-18

_CHUNK_ELEMENTS = 1 << 16

SCALES: dict[str, tuple[int, ...]] = {"max": (0,), "search": (5, 4, 0, -1)}
"""Candidates for an FP4 block scale by name, as offsets from the FP8 code of the block's largest
magnitude, the largest first. ``max`` is the paper's. In ``search``, four and five codes up are
about 1.5 times the scale, which puts the largest value at 4 instead of 6 (Four Over Six, arXiv
2512.02010), and one down clips it a little; these four have nine tenths of what all 126 gain."""


@dataclass(frozen=True)
class Site:
    """What quantizing one activation tensor needs; constants of a checkpoint.

    Attributes:
        r: multiplier from :func:`multiplier`, an fp32 value of 12 significant bits.
        sensitivity: E4M3 codes, uint8 (K,), 0x01 to 0x7E.
        gamma: fp32 value of a sensitivity of 1, in the loss's unit over the activation's squared.
        threshold: T_site, -1 to 2**63 - 1.
        rule: what S is, a key of :data:`RULES`.
        scales: what FP4 block scales are chosen from, a key of :data:`SCALES`.
    """

    r: float
    sensitivity: Tensor
    gamma: float
    threshold: int
    rule: str = "difference"
    scales: str = "max"

    @property
    def t(self) -> float:
        """The tensor scale fl32(1 / (6 r))."""
        return fl32(1 / (FP8_FACTOR * Fraction(self.r)))


def fl32(x: Fraction | float) -> float:
    """``x`` rounded once to fp32."""
    # float() rounds a Fraction to 53 bits first; a double rounding would need x within 2**-53 of
    # an fp32 midpoint, which fl32 below repairs by looking at both neighbours exactly.
    near = torch.tensor(float(x), dtype=torch.float32)
    ends = [torch.nextafter(near, near.new_tensor(e)).item() for e in (-torch.inf, torch.inf)]
    candidates = [near.item(), *(e for e in ends if abs(e) != torch.inf)]
    exact = Fraction(x)
    return min(candidates, key=lambda c: abs(Fraction(c) - exact))


def multiplier(amax: float) -> float:
    """r: the largest value of 12 significant bits with r * amax <= 448.

    Clamped to [2**-100, 2**100]; 1 where ``amax`` is 0, a site that calibration never reached.
    ``amax`` includes whatever headroom the caller wants.
    """
    if amax == 0:
        return 1.0
    exact = min(Fraction(E4M3.max) / Fraction(amax), Fraction(_MULTIPLIER_LIMIT))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length() - MULTIPLIER_BITS + 1
    unit = Fraction(2) ** exponent
    while exact / unit >= 2**MULTIPLIER_BITS:
        unit *= 2
    while exact / unit < 2 ** (MULTIPLIER_BITS - 1):
        unit /= 2
    r = float(exact // unit * unit)
    return max(r, 1 / _MULTIPLIER_LIMIT)


def sensitivity_codes(g2: Tensor) -> tuple[Tensor, float]:
    """Mean squared gradients a channel to (codes, gamma): g2 is about e4m3 * gamma.

    Args:
        g2: non-negative fp32 or wider, (K,).

    Returns:
        codes, uint8 (K,), E4M3(g2 / gamma) floored at 0x01; gamma = fl32(max(g2) / 448), 0 where
        no gradient ever arrived.
    """
    gamma = fl32(g2.max().item() / E4M3.max)
    if gamma == 0:
        return torch.full(g2.shape, SCALE_MIN_CODE, dtype=torch.uint8, device=g2.device), 0.0
    codes = encode_e4m3((g2.double() / gamma).float())
    return codes.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE), gamma


def power_codes(codes: Tensor) -> Tensor:
    """Sensitivity codes, uint8, to the nearest power of two from 2**-6 to 2**8, the larger of two.

    Their three low bits are zero: hardware shifts where it would multiply.
    """
    one = 1 << E4M3.mantissa_bits
    largest = SCALE_MAX_CODE & -one
    return ((codes.int() + one // 2) & -one).clamp(one, largest).to(torch.uint8)


def site_threshold(threshold: float, r: float, gamma: float) -> int:
    """T_site: the global threshold in the site's integer unit, by exact rationals.

    ``threshold`` is in the unit of the scores; below zero means all FP8 and inf all FP4. A site
    without gradient (gamma 0) has only scores of zero, which exceed no threshold of zero or more.
    """
    if threshold < 0:
        return THRESHOLD_ALL_FP8
    if threshold == torch.inf or gamma == 0:
        return THRESHOLD_ALL_FP4
    t = Fraction(Site(r, torch.empty(0), gamma, 0).t)
    scaled: Fraction = Fraction(threshold) * 2**SCORE_BITS / (t * t * Fraction(gamma))
    return min(max(math.floor(scaled), THRESHOLD_ALL_FP8), THRESHOLD_ALL_FP4)


def score_unit(site: Site) -> float:
    """What one count of S is worth, in the loss's unit: t**2 * gamma * 2**-29."""
    return site.t**2 * site.gamma * 2.0**-SCORE_BITS


@dataclass(frozen=True)
class ActivationCodes:
    """One activation tensor in both formats, with the decision.

    Attributes:
        fp4: E2M1 codes, uint8 (..., G, 16).
        scale: E4M3 codes of the FP4 block scales, uint8 (..., G).
        fp8: E4M3 codes, uint8 (..., G, 16); 0x7F where the input was not finite.
        score: S, int64 (..., G); the largest int64 for a block that is not finite.
        is_fp8: the decision, bool (..., G).
    """

    fp4: Tensor
    scale: Tensor
    fp8: Tensor
    score: Tensor
    is_fp8: Tensor

    def units(self, k: int) -> Tensor:
        """The quantized tensor in units of t, fp32 (..., k)."""
        fp4 = decode_e2m1(self.fp4) * decode_e4m3(self.scale).unsqueeze(-1)
        fp8 = decode_e4m3(self.fp8) * FP8_FACTOR
        return from_blocks(torch.where(self.is_fp8.unsqueeze(-1), fp8, fp4), k)


def quantize(x: Tensor, site: Site) -> ActivationCodes:
    """Quantize an activation: the definition, slow and obvious.

    Args:
        x: (..., K), any float dtype; rounded to bf16 first.
        site: the record of this tensor.
    """
    return _quantize_blocks(to_blocks(x.to(torch.bfloat16).float()), _sensitivities(site), site)


def _quantize_blocks(x: Tensor, sensitivity: Tensor, site: Site) -> ActivationCodes:
    """:func:`quantize` of bf16 values in fp32, (..., 16), and g_int that broadcasts with them."""
    finite = x.isfinite()
    u = torch.where(finite, x, 0.0) * site.r
    fp8 = encode_e4m3(u, x)
    nearest = encode_e4m3(u.abs().amax(-1)).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)
    v, g = _target_units(u).mul(2**UNIT_BITS).long(), sensitivity.long()
    q8 = (decode_e4m3(fp8) * FP8_FACTOR * 2**UNIT_BITS).long()
    if site.rule == TRUNCATED:
        shift = _lowest_shift(nearest, SCALES[site.scales])
        v, q8 = _in_units(_halves(u), shift), _in_units(2 * q8, shift)
    fp4, scale, q4 = _best_fp4(u, x, v, g, nearest, SCALES[site.scales])
    score = RULES[site.rule](Integers(q4, q8, v, g, fp8))
    broken = ~finite.all(-1)
    return ActivationCodes(
        fp4=fp4,
        scale=scale,
        fp8=torch.where(finite, fp8, torch.full_like(fp8, E4M3.nan_code)),
        score=torch.where(broken, torch.full_like(score, THRESHOLD_ALL_FP4), score),
        is_fp8=(score > site.threshold) | broken,
    )


def _best_fp4(
    u: Tensor, x: Tensor, v: Tensor, g: Tensor, nearest: Tensor, offsets: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """FP4 codes, their scale's code and q4 under the scale of least error, the larger of equals."""
    tried = []
    for offset in offsets:
        scale = (nearest.int() + offset).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).to(torch.uint8)
        step = decode_e4m3(scale).unsqueeze(-1)
        fp4 = encode_e2m1(FP8_FACTOR * u / step, x)
        tried.append((fp4, scale, (decode_e2m1(fp4) * step * 2**UNIT_BITS).long()))
    fp4, scale, q4 = tried[0]
    least = _squared(q4 - v, g)
    for other_fp4, other_scale, other_q4 in tried[1:]:
        error = _squared(other_q4 - v, g)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other_scale, scale)
        fp4 = torch.where(better.unsqueeze(-1), other_fp4, fp4)
        q4 = torch.where(better.unsqueeze(-1), other_q4, q4)
    zero = (fp4 & (E2M1.sign_bit - 1) == 0).all(-1)
    return fp4, torch.where(zero, torch.full_like(scale, SCALE_MIN_CODE), scale), q4


def fake_quantize(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """The values and flags of :func:`quantize`, without the codes.

    Returns:
        units, fp32 (..., K), exact in bf16: the quantized tensor over t;
        is_fp8, bool (..., G).
    """
    k = x.shape[-1]
    if site.rule not in _SQUARED_RULES:
        exact = quantize(x, site)
        return exact.units(k), exact.is_fp8
    if (site.rule, site.scales) != ("difference", "max"):
        return _fake_quantize_chunks(x, site)
    u, amax = _multiplied(x, site)
    if not amax.isfinite().all():
        exact = quantize(x, site)
        return exact.units(k), exact.is_fp8
    fp8 = _fp8_units(u)
    if site.threshold == THRESHOLD_ALL_FP8:
        return from_blocks(fp8, k), torch.ones_like(amax[..., 0], dtype=torch.bool)
    fp4 = _fp4_units(u, amax)
    if site.threshold == THRESHOLD_ALL_FP4:
        return from_blocks(fp4, k), torch.zeros_like(amax[..., 0], dtype=torch.bool)
    difference = fp4 - fp8
    sensitivity = _sensitivities(site)
    estimate = _estimate(difference, sensitivity)
    is_fp8 = estimate > site.threshold
    unsure = (estimate - site.threshold).abs() <= estimate * _ESTIMATE_BAND
    if unsure.any():
        rows, block = unsure.nonzero()[:, :-1], unsure.nonzero()[:, -1]
        integer = (difference[(*rows.unbind(-1), block)] * 2**UNIT_BITS).long()
        is_fp8[unsure] = _squared(integer, sensitivity.long()[block]) > site.threshold
    return from_blocks(torch.where(is_fp8.unsqueeze(-1), fp8, fp4), k), is_fp8


def _fake_quantize_chunks(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize` for any rule of squares and any scales, in pieces that caches hold."""
    k = x.shape[-1]
    sensitivity = _sensitivities(site)
    units, flags = [], []
    for rows in x.reshape(-1, k).split(max(1, _CHUNK_ELEMENTS // max(1, k))):
        blocks = to_blocks(rows.to(torch.bfloat16).float())
        fp4, fp8, score, doubt = _estimated_blocks(blocks, sensitivity, site)
        is_fp8 = score > site.threshold
        value = torch.where(is_fp8.unsqueeze(-1), fp8, fp4)
        unsure = doubt | ~blocks.isfinite().all(-1)
        if unsure.any():
            weights = sensitivity.expand(blocks.shape)[unsure]
            exact = _quantize_blocks(blocks[unsure].unsqueeze(1), weights.unsqueeze(1), site)
            is_fp8[unsure] = exact.is_fp8.squeeze(1)
            value[unsure] = exact.units(BLOCK)
        units.append(from_blocks(value, k))
        flags.append(is_fp8)
    shape = x.shape[:-1]
    return torch.cat(units).view(*shape, k), torch.cat(flags).view(*shape, -1)


def _estimated_blocks(
    x: Tensor, sensitivity: Tensor, site: Site
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """FP4 and FP8 units (..., 16), S in floating point, and where integers must decide, (...).

    Doubtful is a block whose two best scales, or whose S and threshold, lie closer than the
    estimates are good to.
    """
    u = x * site.r
    fp8, v = _fp8_units(u), _target_units(u)
    nearest = encode_e4m3(u.abs().amax(-1)).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).int()
    six_u = u.mul_(FP8_FACTOR)
    fp4, least = u, torch.tensor(torch.inf, dtype=torch.float64)
    doubt = torch.zeros(nearest.shape, dtype=torch.bool, device=x.device)
    for offset in SCALES[site.scales]:
        code = (nearest + offset).clamp_(SCALE_MIN_CODE, SCALE_MAX_CODE)
        scale = decode_e4m3(code).unsqueeze(-1)
        tried = round_e2m1(six_u / scale).mul_(scale)
        error = _estimate(tried - v, sensitivity)
        doubt |= (error - least).abs() < error * _ESTIMATE_BAND
        better = error < least
        least = torch.where(better, error, least)
        fp4 = torch.where(better.unsqueeze(-1), tried, fp4)
    if site.rule == "benefit":
        best = _estimate(fp8 - v, sensitivity)
        score, size = least - best, least + best
    else:
        score = size = _estimate(fp4 - fp8, sensitivity)
    doubt |= (score - site.threshold).abs() <= size * _ESTIMATE_BAND
    return fp4, fp8, score.clamp_(min=0), doubt


def scores(x: Tensor, site: Site) -> Tensor:
    """S of :func:`quantize`, int64 (..., G): what calibration counts. In pieces for the caches."""
    rows = to_blocks(x.to(torch.bfloat16).float().reshape(-1, x.shape[-1]))
    sensitivity = _sensitivities(site)
    pieces = rows.split(max(1, _CHUNK_ELEMENTS // max(1, x.shape[-1])))
    found = [_quantize_blocks(piece, sensitivity, site).score for piece in pieces]
    return torch.cat(found).view(*x.shape[:-1], len(sensitivity))


def _multiplied(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """u, fp32 (..., G, 16), and its largest magnitudes, (..., G, 1)."""
    u = to_blocks(x.to(torch.bfloat16).float()) * site.r
    return u, u.abs().amax(-1, keepdim=True)


def _fp8_units(u: Tensor) -> Tensor:
    clamped = u.clamp(-E4M3.max, E4M3.max)
    return clamped.to(torch.float8_e4m3fn).float().mul_(FP8_FACTOR)


def _fp4_units(u: Tensor, amax: Tensor) -> Tensor:
    """Consumes ``u`` and ``amax``: a pass over memory less."""
    scale = amax.clamp_(max=E4M3.max).to(torch.float8_e4m3fn).float().clamp_(min=E4M3.smallest)
    return round_e2m1(u.mul_(FP8_FACTOR).div_(scale)).mul_(scale)


def _estimate(difference: Tensor, sensitivity: Tensor) -> Tensor:
    """S in fp32 arithmetic, returned as float64; within half of _ESTIMATE_BAND of the integer."""
    return (difference.square() * (sensitivity * 2.0 ** (2 * UNIT_BITS))).sum(-1).double()


def saturated(x: Tensor, site: Site) -> Tensor:
    """How many elements of ``x`` exceed the largest FP8 value; int64 scalar."""
    return (x.to(torch.bfloat16).float().abs() * site.r > E4M3.max).sum()


def is_multiplier(r: float) -> bool:
    """Whether ``r`` is positive, finite and has at most 12 significant bits."""
    if not 0 < r < float("inf"):
        return False
    numerator = Fraction(r).numerator
    odd_part = numerator // (numerator & -numerator)
    return odd_part.bit_length() <= MULTIPLIER_BITS


def _sensitivities(site: Site) -> Tensor:
    """g_int, fp32 (G, 16): sensitivities in units of 2**-9, zero in the padding."""
    return to_blocks(decode_e4m3(site.sensitivity) * 2.0**SENSITIVITY_BITS)


def _target_units(u: Tensor) -> Tensor:
    """v in units of t, fp32: 6 u to nearest even in steps of 2**-10, clamped to what has codes."""
    unit = float(2**UNIT_BITS)
    return (u * (FP8_FACTOR * unit)).clamp_(-UNIT_MAX * unit, UNIT_MAX * unit).round_().div_(unit)


def _lowest_shift(nearest: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """How many twos the least scale that is tried has over 2**-9, int64 (..., 1)."""
    lowest = (nearest.long() + min(offsets)).clamp(min=SCALE_MIN_CODE)
    return ((lowest >> E4M3.mantissa_bits).clamp(min=1) - 1).unsqueeze(-1)


def _halves(u: Tensor) -> Tensor:
    """6 u in halves of 2**-10 * t, towards zero and clamped to what has codes; int64."""
    half = float(2 ** (UNIT_BITS + 1))
    return (u * (FP8_FACTOR * half)).clamp_(-UNIT_MAX * half, UNIT_MAX * half).long()


def _in_units(halves: Tensor, shift: Tensor) -> Tensor:
    """Halves to nearest in steps of ``2**shift`` whole units, away from zero in the middle."""
    nearest = halves.abs() + (1 << shift) >> shift + 1
    return halves.sign() * (nearest << shift)


@dataclass(frozen=True)
class Integers:
    """Blocks in units of 2**-10 * t: what rules compute S from.

    Attributes:
        q4, q8, v: decoded FP4 and FP8 values and 6 u, int64 (..., 16).
        g: g_int, int64, broadcastable with them.
        fp8: E4M3 codes, uint8 (..., 16).
    """

    q4: Tensor
    q8: Tensor
    v: Tensor
    g: Tensor
    fp8: Tensor


def _squared(difference: Tensor, g: Tensor) -> Tensor:
    """sum g_int d**2 of a block; int64 (..., 16), broadcastable, to (...). Below 2**60."""
    return (difference.square() * g).sum(-1)


def _difference(x: Integers) -> Tensor:
    return _squared(x.q4 - x.q8, x.g)


def _benefit(x: Integers) -> Tensor:
    return (_squared(x.q4 - x.v, x.g) - _squared(x.q8 - x.v, x.g)).clamp(min=0)


def _arbitrary(x: Integers) -> Tensor:
    """A hash of the block's FP8 codes, uniform over 0 to 2**60 - 1: a choice without reason."""
    multipliers = torch.tensor(_HASH_MULTIPLIERS, device=x.fp8.device)
    mixed = (x.fp8.long() * multipliers).sum(-1)
    mixed = (mixed ^ (mixed >> 31)) * _HASH_MULTIPLIERS[0]
    return (mixed ^ (mixed >> 29)) & (2**60 - 1)


# Odd 63-bit constants: fractional parts of the golden ratio's multiples.
_HASH_MULTIPLIERS = [(i * 0x9E3779B97F4A7C15 | 1) & (2**63 - 1) for i in range(1, BLOCK + 1)]

TRUNCATED = "truncated"

RULES: dict[str, Callable[[Integers], Tensor]] = {
    "difference": _difference,
    "benefit": _benefit,
    TRUNCATED: _benefit,
    "random": _arbitrary,
}
"""Scores by name: blocks to S, int64 (...), 0 to 2**60 - 1.

``difference`` is the paper's. ``benefit`` is how much FP8 lowers the weighted error, 0 where it
does not; ``truncated`` is the same for narrow hardware, of values in steps of the last bit of the
least scale tried; ``random`` exists to compare with."""

_SQUARED_RULES = ("difference", "benefit")
