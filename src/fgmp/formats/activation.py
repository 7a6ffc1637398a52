"""Activations to codes, online (docs/numerics.md, sections 3 to 5).

    x  is rounded to bf16 first
    u  = x * r                        exact in fp32: 8 bits times 12
    FP8 code = E4M3(u)                value 6 * e4m3 * t        with t = fl32(1 / (6 r))
    s  = the FP8 code of max |u|      at least 2**-9; or the best of four about it
    FP4 code = E2M1(6 u / s)          value e2m1 * s * t
    S  = sum g_int * (q4 - q8)**2     by the paper's rule: an integer of at most 60 bits
    the block is FP8  <=>  S > T_site

q4 and q8 are the decoded values as integer multiples of 2**-10 * t, g_int the sensitivity as a
multiple of 2**-9. Sums of floats depend on their order, so machines would disagree on a
floating-point S. They agree on integers, and likewise on the errors that choose among scales: sums
of g_int (q4 - v)**2, with v = 6 u rounded to the same grid.

*Units*, here and in all packages that use this one, are decoded values over their tensor scale t:
e2m1 * s or 6 * e4m3. They are exact in bf16.

:func:`quantize` is the definition. :func:`fake_quantize` returns the same values faster: it decides
on fp32 estimates where that is provably safe, and on the integers elsewhere.
"""

import math
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
from fgmp.formats.rules import (
    PAPER_QUANTIZER,
    RULES,
    SCALES,
    Integers,
    QuantizerConfig,
    weighted_squares,
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


@dataclass(frozen=True)
class Site:
    """Constants for quantizing one activation tensor; a checkpoint stores them.

    Attributes:
        r: multiplier from :func:`multiplier`, an fp32 value of 12 significant bits.
        sensitivity: per-channel sensitivities, E4M3 codes, uint8 (K,), 0x01 to 0x7E.
        gamma: loss per squared activation for a sensitivity of 1, an fp32 value.
        threshold: T_site, -1 to 2**63 - 1.
        rule: decision rule, a key of ``formats.rules.RULES``.
        scales: candidates for FP4 block scales, a key of ``formats.rules.SCALES``.
    """

    r: float
    sensitivity: Tensor
    gamma: float
    threshold: int
    rule: str = QuantizerConfig.rule
    scales: str = QuantizerConfig.scales

    @property
    def t(self) -> float:
        """The tensor scale fl32(1 / (6 r))."""
        return fl32(1 / (FP8_FACTOR * Fraction(self.r)))


def fl32(x: Fraction | float) -> float:
    """Round ``x`` once to fp32."""
    # float() rounds a Fraction to 53 bits first, and the cast to fp32 rounds again. Near an fp32
    # midpoint the result can be a neighbour of the right one, so both neighbours are compared too.
    near = torch.tensor(float(x), dtype=torch.float32)
    neighbours = [torch.nextafter(near, near.new_tensor(e)).item() for e in (-torch.inf, torch.inf)]
    candidates = [near.item(), *(e for e in neighbours if abs(e) != torch.inf)]
    exact = Fraction(x)
    return min(candidates, key=lambda c: abs(Fraction(c) - exact))


def multiplier(amax: float) -> float:
    """Multiplier r of a site: the largest value of 12 significant bits with r * amax <= 448.

    It is clamped to [2**-100, 2**100], and is 1 where ``amax`` is 0, as at a site that calibration
    never reached. ``amax`` includes any headroom.
    """
    if amax == 0:
        return 1.0
    exact = min(Fraction(E4M3.max) / Fraction(amax), Fraction(_MULTIPLIER_LIMIT))
    exponent = exact.numerator.bit_length() - exact.denominator.bit_length() - MULTIPLIER_BITS + 1
    step = Fraction(2) ** exponent
    while exact / step >= 2**MULTIPLIER_BITS:
        step *= 2
    while exact / step < 2 ** (MULTIPLIER_BITS - 1):
        step /= 2
    r = float(exact // step * step)
    return max(r, 1 / _MULTIPLIER_LIMIT)


def sensitivity_codes(g2: Tensor) -> tuple[Tensor, float]:
    """Encode mean squared gradients per channel as sensitivities: g2 is about e4m3 * gamma.

    Args:
        g2: non-negative, fp32 or wider, (K,).

    Returns:
        codes: E4M3(g2 / gamma), at least 0x01, uint8 (K,).
        gamma: fl32(max(g2) / 448); 0 where no gradient ever arrived.
    """
    gamma = fl32(g2.max().item() / E4M3.max)
    if gamma == 0:
        return torch.full(g2.shape, SCALE_MIN_CODE, dtype=torch.uint8, device=g2.device), 0.0
    codes = encode_e4m3((g2.double() / gamma).float())
    return codes.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE), gamma


def power_codes(codes: Tensor) -> Tensor:
    """Round sensitivity codes, uint8, to powers of two from 2**-6 to 2**8; ties go to the larger.

    The three low bits of the result are zero: hardware shifts instead of multiplying.
    """
    one = 1 << E4M3.mantissa_bits
    largest = SCALE_MAX_CODE & -one
    return ((codes.int() + one // 2) & -one).clamp(one, largest).to(torch.uint8)


def site_threshold(threshold: float, r: float, gamma: float) -> int:
    """Integer threshold T_site of a site for a global threshold, by exact rationals.

    Args:
        threshold: loss, on the scale of the weight scores; below zero makes every block FP8, inf
            every block FP4. At a site without gradient (gamma 0) every score stands for a loss of
            0, which exceeds no threshold of zero or more.
        r, gamma: constants of the site.
    """
    if threshold < 0:
        return THRESHOLD_ALL_FP8
    if threshold == torch.inf or gamma == 0:
        return THRESHOLD_ALL_FP4
    t = Fraction(Site(r, torch.empty(0), gamma, 0).t)
    scaled: Fraction = Fraction(threshold) * 2**SCORE_BITS / (t * t * Fraction(gamma))
    return min(max(math.floor(scaled), THRESHOLD_ALL_FP8), THRESHOLD_ALL_FP4)


def score_unit(site: Site) -> float:
    """Loss that one count of S stands for: t**2 * gamma * 2**-29."""
    return site.t**2 * site.gamma * 2.0**-SCORE_BITS


@dataclass(frozen=True)
class ActivationCodes:
    """Codes of an activation tensor in both formats, with the decision for each block.

    Attributes:
        fp4: E2M1 codes, uint8 (..., G, 16).
        scale: E4M3 codes of the FP4 block scales, uint8 (..., G).
        fp8: E4M3 codes, uint8 (..., G, 16); 0x7F where the input was not finite.
        score: S, int64 (..., G); the largest int64 for a block that is not finite.
        is_fp8: which blocks are FP8, bool (..., G).
    """

    fp4: Tensor
    scale: Tensor
    fp8: Tensor
    score: Tensor
    is_fp8: Tensor

    def units(self, k: int) -> Tensor:
        """Quantized tensor in units of t, fp32 (..., k)."""
        fp4 = decode_e2m1(self.fp4) * decode_e4m3(self.scale).unsqueeze(-1)
        fp8 = decode_e4m3(self.fp8) * FP8_FACTOR
        return from_blocks(torch.where(self.is_fp8.unsqueeze(-1), fp8, fp4), k)


def quantize(x: Tensor, site: Site) -> ActivationCodes:
    """Quantize an activation; slow, and the definition that every kernel reproduces.

    Args:
        x: (..., K), any float dtype; rounded to bf16 first.
        site: constants of this tensor.
    """
    return _quantize_blocks(to_blocks(x.to(torch.bfloat16).float()), _sensitivities(site), site)


def _quantize_blocks(x: Tensor, sensitivity: Tensor, site: Site) -> ActivationCodes:
    """:func:`quantize` for bf16 values in fp32, (..., 16), and g_int, broadcastable with them."""
    finite = x.isfinite()
    u = torch.where(finite, x, 0.0) * site.r
    fp8 = encode_e4m3(u, x)
    nearest = encode_e4m3(u.abs().amax(-1)).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE)
    v, g = _target_units(u).mul(2**UNIT_BITS).long(), sensitivity.long()
    q8 = (decode_e4m3(fp8) * FP8_FACTOR * 2**UNIT_BITS).long()
    if RULES[site.rule].truncated:
        shift = _lowest_shift(nearest, SCALES[site.scales])
        v, q8 = _in_units(_halves(u), shift), _in_units(2 * q8, shift)
    fp4, scale, q4 = _best_fp4(u, x, v, g, nearest, SCALES[site.scales])
    score = RULES[site.rule].score(Integers(q4, q8, v, g, fp8))
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
    """FP4 codes, scale code and q4 under the scale of least error; ties go to the larger scale."""
    candidates = []
    for offset in offsets:
        scale = (nearest.int() + offset).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE).to(torch.uint8)
        step = decode_e4m3(scale).unsqueeze(-1)
        fp4 = encode_e2m1(FP8_FACTOR * u / step, x)
        candidates.append((fp4, scale, (decode_e2m1(fp4) * step * 2**UNIT_BITS).long()))
    fp4, scale, q4 = candidates[0]
    least = weighted_squares(q4 - v, g)
    for other_fp4, other_scale, other_q4 in candidates[1:]:
        error = weighted_squares(other_q4 - v, g)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, other_scale, scale)
        fp4 = torch.where(better.unsqueeze(-1), other_fp4, fp4)
        q4 = torch.where(better.unsqueeze(-1), other_q4, q4)
    zero = (fp4 & (E2M1.sign_bit - 1) == 0).all(-1)
    return fp4, torch.where(zero, torch.full_like(scale, SCALE_MIN_CODE), scale), q4


def fake_quantize(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Values and decisions of :func:`quantize`, without the codes; faster.

    Returns:
        units: the quantized tensor over t, fp32 (..., K), exact in bf16.
        is_fp8: which blocks are FP8, bool (..., G).
    """
    k = x.shape[-1]
    if not RULES[site.rule].estimated:
        exact = quantize(x, site)
        return exact.units(k), exact.is_fp8
    if (site.rule, site.scales) != (PAPER_QUANTIZER.rule, PAPER_QUANTIZER.scales):
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
        is_fp8[unsure] = weighted_squares(integer, sensitivity.long()[block]) > site.threshold
    return from_blocks(torch.where(is_fp8.unsqueeze(-1), fp8, fp4), k), is_fp8


def _fake_quantize_chunks(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """:func:`fake_quantize` for any estimated rule and any scales, in pieces that fit in caches."""
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
    """FP4 and FP8 units (..., 16), an estimate of S, and which blocks integers must decide, (...).

    A block is in doubt if its two best scales, or its S and the threshold, are closer together
    than the error of the estimates.
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
        candidate = round_e2m1(six_u / scale).mul_(scale)
        error = _estimate(candidate - v, sensitivity)
        doubt |= (error - least).abs() < error * _ESTIMATE_BAND
        better = error < least
        least = torch.where(better, error, least)
        fp4 = torch.where(better.unsqueeze(-1), candidate, fp4)
    if site.rule == "benefit":
        fp8_error = _estimate(fp8 - v, sensitivity)
        score, magnitude = least - fp8_error, least + fp8_error
    else:
        score = magnitude = _estimate(fp4 - fp8, sensitivity)
    doubt |= (score - site.threshold).abs() <= magnitude * _ESTIMATE_BAND
    return fp4, fp8, score.clamp_(min=0), doubt


def scores(x: Tensor, site: Site) -> Tensor:
    """S of every block, int64 (..., G), as :func:`quantize` computes it; calibration counts them.

    Works in pieces that fit in caches.
    """
    rows = to_blocks(x.to(torch.bfloat16).float().reshape(-1, x.shape[-1]))
    sensitivity = _sensitivities(site)
    pieces = rows.split(max(1, _CHUNK_ELEMENTS // max(1, x.shape[-1])))
    piece_scores = [_quantize_blocks(piece, sensitivity, site).score for piece in pieces]
    return torch.cat(piece_scores).view(*x.shape[:-1], len(sensitivity))


def _multiplied(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """u, fp32 (..., G, 16), and the largest magnitude per block, (..., G, 1)."""
    u = to_blocks(x.to(torch.bfloat16).float()) * site.r
    return u, u.abs().amax(-1, keepdim=True)


def _fp8_units(u: Tensor) -> Tensor:
    clamped = u.clamp(-E4M3.max, E4M3.max)
    return clamped.to(torch.float8_e4m3fn).float().mul_(FP8_FACTOR)


def _fp4_units(u: Tensor, amax: Tensor) -> Tensor:
    """Values in FP4, in units of t; overwrites ``u`` and ``amax`` to save a pass over memory."""
    scale = amax.clamp_(max=E4M3.max).to(torch.float8_e4m3fn).float().clamp_(min=E4M3.smallest)
    return round_e2m1(u.mul_(FP8_FACTOR).div_(scale)).mul_(scale)


def _estimate(difference: Tensor, sensitivity: Tensor) -> Tensor:
    """Estimate of S in fp32 arithmetic, as float64; relative error below _ESTIMATE_BAND / 2."""
    return (difference.square() * (sensitivity * 2.0 ** (2 * UNIT_BITS))).sum(-1).double()


def saturated(x: Tensor, site: Site) -> Tensor:
    """Number of elements of ``x`` beyond the largest FP8 value, an int64 scalar."""
    return (x.to(torch.bfloat16).float().abs() * site.r > E4M3.max).sum()


def is_multiplier(r: float) -> bool:
    """Whether ``r`` is positive, finite and has at most 12 significant bits."""
    if not 0 < r < float("inf"):
        return False
    numerator = Fraction(r).numerator
    odd_part = numerator // (numerator & -numerator)
    return odd_part.bit_length() <= MULTIPLIER_BITS


def _sensitivities(site: Site) -> Tensor:
    """g_int, fp32 (G, 16): sensitivities as multiples of 2**-9, zero in the padding."""
    return to_blocks(decode_e4m3(site.sensitivity) * 2.0**SENSITIVITY_BITS)


def _target_units(u: Tensor) -> Tensor:
    """v in units of t, fp32: 6 u to nearest even in steps of 2**-10, within the formats' range."""
    grid = float(2**UNIT_BITS)
    return (u * (FP8_FACTOR * grid)).clamp_(-UNIT_MAX * grid, UNIT_MAX * grid).round_().div_(grid)


def _lowest_shift(nearest: Tensor, offsets: tuple[int, ...]) -> Tensor:
    """Exponent of the smallest candidate scale's last bit, relative to 2**-9: int64 (..., 1)."""
    lowest = (nearest.long() + min(offsets)).clamp(min=SCALE_MIN_CODE)
    return ((lowest >> E4M3.mantissa_bits).clamp(min=1) - 1).unsqueeze(-1)


def _halves(u: Tensor) -> Tensor:
    """6 u as multiples of 2**-11 * t, int64: rounded towards zero, within the formats' range."""
    half = float(2 ** (UNIT_BITS + 1))
    return (u * (FP8_FACTOR * half)).clamp_(-UNIT_MAX * half, UNIT_MAX * half).long()


def _in_units(halves: Tensor, shift: Tensor) -> Tensor:
    """Multiples of 2**-11 * t rounded to multiples of 2**(shift - 10) * t, ties away from zero.

    The result counts steps of 2**-10 * t.
    """
    nearest = halves.abs() + (1 << shift) >> shift + 1
    return halves.sign() * (nearest << shift)
