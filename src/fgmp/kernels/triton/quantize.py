"""Activations to codes, or to decoded values (docs/numerics.md, sections 3, 5, 7).

A program processes 64 adjacent blocks of one or a few rows; the per-channel sensitivities stay in
registers from row to row. One device function, :func:`_encode`, does the arithmetic; the two
kernels differ in what they store.

All errors are summed in int64, for every block. An fp32 estimate would need the integers too for
the few blocks near the threshold, and a GPU runs both sides of such a branch for all blocks.

In ``_encode`` and below, ``u`` and the integers are magnitudes. A code has the sign of x in both
formats, so the sign does not enter differences between formats.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import (
    BLOCK,
    E2M1,
    E4M3,
    FP8_BLOCK,
    FP8_FACTOR,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
    UNIT_BITS,
    UNIT_MAX,
)
from fgmp.kernels.check import require
from fgmp.kernels.triton import bits
from fgmp.kernels.triton.launch import launch


def implements(rule: str) -> bool:
    """Whether the Triton kernels implement a rule."""
    return rule in RULES and RULES[rule].triton


_GROUPS = 64
"""Blocks per row that a program processes: 2 KB of bf16, 8 elements per thread."""

_WARPS = 4

_ROWS = ((64, 1), (1024, 4), (1 << 62, 8))
"""(largest number of rows of the tensor, rows per program): first fill the GPU, then reuse the
sensitivities."""

_NAN_CODE = tl.constexpr(E4M3.nan_code)
_INFINITY = tl.constexpr(float("inf"))
_E2M1_SIGN = tl.constexpr(E2M1.sign_bit)
_E4M3_SIGN = tl.constexpr(E4M3.sign_bit)
_FP8_BLOCK = tl.constexpr(FP8_BLOCK)
_SCALE_MIN = tl.constexpr(SCALE_MIN_CODE)
_SCALE_MAX = tl.constexpr(SCALE_MAX_CODE)
_FACTOR = tl.constexpr(float(FP8_FACTOR))
_E4M3_MAX = tl.constexpr(E4M3.max)
_TO_UNITS = tl.constexpr(FP8_FACTOR * 2.0**UNIT_BITS)
_UNITS_MAX = tl.constexpr(UNIT_MAX * 2**UNIT_BITS)
_UNIT = tl.constexpr(2.0**-UNIT_BITS)
_Q8_UNITS = tl.constexpr(2 * FP8_FACTOR)  # 6 * e4m3 * 2**10 is 12 times E4M3's integer
_GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - (1 << 64))
_FIRST_MULTIPLIER = tl.constexpr((0x9E3779B97F4A7C15 | 1) & ((1 << 63) - 1))
_POSITIVE = tl.constexpr((1 << 63) - 1)
_HASH = tl.constexpr((1 << 60) - 1)


@triton.jit
def _error(a, b, sensitivity):
    """Sum of g_int (a - b)**2 over each block, in int64, (B, 16) to (B,); below 2**60."""
    difference = (a - b).to(tl.int64)
    return tl.sum(difference * difference * sensitivity, axis=1)


@triton.jit
def _hash(fp8):
    """Score of the rule ``random``, from FP8 codes with sign."""
    index = (tl.arange(0, bits.VALUES) + 1).to(tl.int64)
    multipliers = ((index * _GOLDEN) | 1) & _POSITIVE
    mixed = tl.sum(fp8.to(tl.int64) * multipliers[None, :], axis=1)
    mixed = (mixed ^ (mixed >> 31)) * _FIRST_MULTIPLIER
    return (mixed ^ (mixed >> 29)) & _HASH


@triton.jit
def _fp4(u, scale):
    """FP4 codes and q4, int32 (B, 16), for magnitudes ``u`` under E4M3 scale codes (B,)."""
    value = bits.e4m3_value(scale)[:, None]
    code = bits.encode_e2m1(tl.minimum(u, _E4M3_MAX) * _FACTOR, value)
    return code, bits.e2m1_integer(code) * bits.e4m3_integer(scale)[:, None]


@triton.jit
def _best_fp4(u, largest, target, sensitivity, OFFSETS: tl.constexpr, CHOICES: tl.constexpr):
    """FP4 codes, q4, scale code and error under the best of the scales ``largest`` + offset.

    Offsets descend, so of two equally good scales the larger comes first and stays. With one
    offset there is nothing to choose, and the compiler removes the unused errors.
    """
    scale = tl.minimum(tl.maximum(largest + OFFSETS[0], _SCALE_MIN), _SCALE_MAX)
    code, q4 = _fp4(u, scale)
    error = _error(q4, target, sensitivity)
    for i in tl.static_range(1, CHOICES):
        other = tl.minimum(tl.maximum(largest + OFFSETS[i], _SCALE_MIN), _SCALE_MAX)
        other_code, other_q4 = _fp4(u, other)
        other_error = _error(other_q4, target, sensitivity)
        better = other_error < error
        code = tl.where(better[:, None], other_code, code)
        q4 = tl.where(better[:, None], other_q4, q4)
        scale = tl.where(better, other, scale)
        error = tl.minimum(other_error, error)
    return code, q4, tl.where(tl.max(code, axis=1) == 0, _SCALE_MIN, scale), error


@triton.jit
def _encode(
    x, r, sensitivity, threshold, RULE: tl.constexpr, OFFSETS: tl.constexpr, CHOICES: tl.constexpr
):
    """Encode blocks in both formats and decide between them.

    Args:
        x: bf16 values in fp32, (B, 16).
        r: fp32 multiplier.
        sensitivity: integers of the per-channel sensitivities, int32 (B, 16).
        threshold: T_site, int64.

    Returns:
        Which elements of x are finite, bool (B, 16).
        FP4 codes, q4, FP8 codes and q8 without sign, int32 (B, 16) each; q4 and q8 are decoded
        values as multiples of 2**-10 t.
        E4M3 codes of the FP4 scales, int32 (B,).
        Which blocks are FP8, bool (B,).
    """
    finite = tl.abs(x) < _INFINITY
    u = tl.abs(tl.where(finite, x, 0.0) * r)
    code8, integer8 = bits.encode_e4m3(u)
    q8 = integer8 * _Q8_UNITS
    largest = tl.maximum(tl.max(code8, axis=1), _SCALE_MIN)
    target = bits.round_to_integer(tl.minimum(u * _TO_UNITS, _UNITS_MAX))
    code4, q4, scale, error4 = _best_fp4(u, largest, target, sensitivity, OFFSETS, CHOICES)
    if RULE == "random":
        score = _hash(code8 + (x < 0).to(tl.int32) * _E4M3_SIGN)
    elif RULE == "difference":
        score = _error(q4, q8, sensitivity)
    else:
        score = tl.maximum(error4 - _error(q8, target, sensitivity), 0)
    broken = tl.min(finite.to(tl.int32), axis=1) == 0
    return finite, code4, q4, code8, q8, scale, (score > threshold) | broken


@triton.jit
def _load_sensitivity(sensitivity_ptr, channel, k):
    code = tl.load(sensitivity_ptr + channel, mask=channel < k, other=0)
    return bits.e4m3_integer(code.to(tl.int32))


@triton.jit
def _channels(GROUPS: tl.constexpr):
    """Indices of the blocks that a program processes, (B,), and of their channels, (B, 16)."""
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    return group, group[:, None] * bits.VALUES + tl.arange(0, bits.VALUES)[None, :]


@triton.jit
def _codes_kernel(
    x_ptr,
    r_ptr,
    sensitivity_ptr,
    threshold_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    k,
    groups,
    RULE: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, channel = _channels(GROUPS)
    sensitivity = _load_sensitivity(sensitivity_ptr, channel, k)
    r, threshold = tl.load(r_ptr), tl.load(threshold_ptr)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        x = bits.load_rounded(x_ptr + row * k + channel, channel < k)
        finite, code4, _, code8, _, scale, is_fp8 = _encode(
            x, r, sensitivity, threshold, RULE, OFFSETS, CHOICES
        )
        negative = (x < 0).to(tl.int32)
        fp8 = tl.where(finite, code8 + negative * _E4M3_SIGN, _NAN_CODE)
        codes = tl.where(is_fp8[:, None], fp8, code4 + negative * _E2M1_SIGN)
        valid = group < groups
        offsets = row * groups * bits.VALUES + channel
        tl.store(codes_ptr + offsets, codes.to(tl.uint8), mask=valid[:, None])
        scale = tl.where(is_fp8, _FP8_BLOCK, scale)
        tl.store(scale_ptr + row * groups + group, scale.to(tl.uint8), mask=valid)


@triton.jit
def _units_kernel(
    x_ptr,
    r_ptr,
    sensitivity_ptr,
    threshold_ptr,
    units_ptr,
    is_fp8_ptr,
    rows,
    k,
    groups,
    RULE: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHOICES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    group, channel = _channels(GROUPS)
    sensitivity = _load_sensitivity(sensitivity_ptr, channel, k)
    r, threshold = tl.load(r_ptr), tl.load(threshold_ptr)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, rows)):
        offsets = row * k + channel
        x = bits.load_rounded(x_ptr + offsets, channel < k)
        finite, _, q4, _, q8, _, is_fp8 = _encode(
            x, r, sensitivity, threshold, RULE, OFFSETS, CHOICES
        )
        magnitude = tl.where(is_fp8[:, None], q8, q4).to(tl.float32) * _UNIT
        units = tl.where(finite, tl.where(x < 0, -magnitude, magnitude), float("nan"))
        bits.store_exact(units_ptr + offsets, units, channel < k)
        tl.store(is_fp8_ptr + row * groups + group, is_fp8.to(tl.uint8), mask=group < groups)


def quantize_activation(
    x: Tensor, r: Tensor, sensitivity: Tensor, threshold: Tensor, rule: str, scales: str = "max"
) -> tuple[Tensor, Tensor]:
    """Quantize an activation to codes and scale bytes; see ``kernels.ops``.

    Args:
        x: (..., K), any float dtype.
        r: multiplier, fp32 ().
        sensitivity: E4M3 codes, uint8 (K,).
        threshold: T_site, int64 ().
        rule: decision rule, one that :func:`implements` accepts.
        scales: candidates for FP4 block scales, a key of ``formats.rules.SCALES``.

    Returns:
        codes, uint8 (..., G, 16), E4M3 in FP8 blocks and E2M1 elsewhere;
        scale, uint8 (..., G), 0x80 for FP8 blocks.
    """
    *outer, k = x.shape
    groups = triton.cdiv(k, BLOCK)
    codes = torch.empty(*outer, groups, BLOCK, dtype=torch.uint8, device=x.device)
    scale = torch.empty(*outer, groups, dtype=torch.uint8, device=x.device)
    outputs = {"codes_ptr": codes, "scale_ptr": scale}
    _launch(_codes_kernel, x, r, sensitivity, threshold, rule, scales, outputs)
    return codes, scale


def fake_quantize_activation(
    x: Tensor, r: Tensor, sensitivity: Tensor, threshold: Tensor, rule: str, scales: str = "max"
) -> tuple[Tensor, Tensor]:
    """Decoded values of :func:`quantize_activation`; the same arguments.

    Returns:
        Units, bf16 (..., K), exact; which blocks are FP8, bool (..., G).
    """
    units = torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)
    groups = triton.cdiv(x.shape[-1], BLOCK)
    is_fp8 = torch.empty(*x.shape[:-1], groups, dtype=torch.bool, device=x.device)
    outputs = {"units_ptr": bits.as_stored(units), "is_fp8_ptr": is_fp8.view(torch.uint8)}
    _launch(_units_kernel, x, r, sensitivity, threshold, rule, scales, outputs)
    return units, is_fp8


def _launch(
    kernel: triton.JITFunction,
    x: Tensor,
    r: Tensor,
    sensitivity: Tensor,
    threshold: Tensor,
    rule: str,
    scales: str,
    outputs: dict[str, Tensor],
) -> None:
    implemented = ", ".join(filter(implements, RULES))
    require(implements(rule), "quantize", "rule", f"be one of {implemented}", rule)
    if x.numel() == 0:
        return
    k = x.shape[-1]
    rows, groups = x.numel() // k, triton.cdiv(k, BLOCK)
    rows_per_program = next(each for limit, each in _ROWS if rows <= limit)
    launch(
        kernel,
        (triton.cdiv(rows, rows_per_program), triton.cdiv(groups, _GROUPS)),
        on=x,
        x_ptr=bits.as_loaded(x.contiguous()),
        r_ptr=r,
        sensitivity_ptr=sensitivity,
        threshold_ptr=threshold,
        rows=rows,
        k=k,
        groups=groups,
        RULE=rule,
        OFFSETS=SCALES[scales],
        CHOICES=len(SCALES[scales]),
        ROWS=rows_per_program,
        GROUPS=_GROUPS,
        num_warps=_WARPS,
        **outputs,
    )
