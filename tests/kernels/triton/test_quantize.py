"""The activation quantizer equals the reference in every code, scale, flag and value.

The golden vectors go through the arithmetic itself, each block with its own multiplier and
threshold; everything else goes through the launch functions. On a GPU where there is one, else
in Triton's interpreter.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from fgmp.errors import InputError
from fgmp.formats.activation import Site, multiplier, quantize
from fgmp.formats.codec import decode_e4m3, to_blocks
from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import FP8_BLOCK, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.kernels.triton import bits
from fgmp.kernels.triton.quantize import (
    _encode,
    fake_quantize_activation,
    implements,
    quantize_activation,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# NumPy, in which the interpreter computes, remarks on what IEEE defines and the edges are about.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")

KNOWN = [rule for rule in RULES if implements(rule)]
VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "blocks.json").read_text())


def a_site(k, *, r=3.5, threshold=2**36, rule="difference", scales="max", seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(1, 127, (k,), dtype=torch.uint8, generator=generator)
    return Site(r, codes, 1.0, threshold, rule, scales)


def heavy_tailed(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(
        2 * torch.randn(shape, generator=generator)
    )


def run(x, site):
    """(codes, scale, units, is_fp8) of both launch functions, on the CPU."""
    tensors = [
        x,
        torch.tensor(site.r, dtype=torch.float32),
        site.sensitivity,
        torch.tensor(site.threshold),
    ]
    arguments = [*(t.to(DEVICE) for t in tensors), site.rule, site.scales]
    results = [*quantize_activation(*arguments), *fake_quantize_activation(*arguments)]
    return [result.cpu() for result in results]


def check(x, site):
    """Both launch functions against the definition."""
    expected = quantize(x, site)
    codes, scale, units, is_fp8 = run(x, site)
    wide = expected.is_fp8.unsqueeze(-1)
    assert torch.equal(is_fp8, expected.is_fp8)
    assert torch.equal(codes, torch.where(wide, expected.fp8, expected.fp4))
    assert torch.equal(scale, expected.scale.where(~expected.is_fp8, FP8_BLOCK))
    values = expected.units(x.shape[-1])
    assert units.dtype == torch.bfloat16
    assert torch.equal(units.isnan(), values.isnan())
    real = ~values.isnan()  # signs of zero included
    assert torch.equal(units.float()[real].view(torch.int32), values[real].view(torch.int32))


# Golden vectors


@triton.jit
def encode_kernel(
    x_ptr,
    r_ptr,
    sensitivity_ptr,
    threshold_ptr,
    code4_ptr,
    code8_ptr,
    scale_ptr,
    is_fp8_ptr,
    blocks,
    RULE: tl.constexpr,
    OFFSETS: tl.constexpr,
    CHOICES: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    here = block < blocks
    at = block[:, None] * bits.VALUES + tl.arange(0, bits.VALUES)[None, :]
    x = bits.load_rounded(x_ptr + at, here[:, None])
    r = tl.load(r_ptr + block, mask=here, other=1.0)
    threshold = tl.load(threshold_ptr + block, mask=here, other=0)
    sensitivity = tl.load(sensitivity_ptr + at, mask=here[:, None], other=0).to(tl.int32)
    _, code4, _, code8, _, scale, is_fp8 = _encode(
        x, r[:, None], bits.e4m3_integer(sensitivity), threshold, RULE, OFFSETS, CHOICES
    )
    tl.store(code4_ptr + at, code4, mask=here[:, None])
    tl.store(code8_ptr + at, code8, mask=here[:, None])
    tl.store(scale_ptr + block, scale, mask=here)
    tl.store(is_fp8_ptr + block, is_fp8.to(tl.int32), mask=here)


def section(name):
    """Rows of a section as dicts."""
    fields = list(VECTORS[name]["fields"])
    kinds = [rows for kind, rows in VECTORS[name].items() if kind != "fields"]
    return [dict(zip(fields, row, strict=True)) for rows in kinds for row in rows]


def numbers(texts, digits):
    return [[int(t[i : i + digits], 16) for i in range(0, len(t), digits)] for t in texts]


@pytest.mark.parametrize(
    ("name", "rule", "scales"),
    [("activation", "difference", "max"), ("leaves", "benefit", "search")],
)
def test_golden_vectors(name, rule, scales):
    rows = section(name)
    x = torch.tensor(
        np.array(numbers([row["x"] for row in rows], 4), dtype=np.uint16).view(np.int16)
    )
    r = torch.tensor([int(row["r"], 16) for row in rows], dtype=torch.int32).view(torch.float32)
    sensitivity = torch.tensor(numbers([row["sensitivity"] for row in rows], 2), dtype=torch.uint8)
    threshold = torch.tensor([row["T"] for row in rows])
    shapes = [x.shape, x.shape, (len(rows),), (len(rows),)]
    outputs = [torch.empty(shape, dtype=torch.int32, device=DEVICE) for shape in shapes]
    encode_kernel[(triton.cdiv(len(rows), 512),)](
        *(t.to(DEVICE) for t in (x, r, sensitivity, threshold)),
        *outputs,
        len(rows),
        RULE=rule,
        OFFSETS=SCALES[scales],
        CHOICES=len(SCALES[scales]),
        BLOCKS=512,
        enable_fp_fusion=False,
    )
    code4, code8, scale, is_fp8 = (t.cpu() for t in outputs)
    finite = torch.tensor([row["fp4"] is not None for row in rows])
    assert finite.sum() > 1000
    assert torch.equal(is_fp8, torch.tensor([row["flag"] for row in rows], dtype=torch.int32))
    kept = [row for row in rows if row["fp4"] is not None]
    # A code's sign is that of x, which the kernels add when they store.
    assert (code4[finite] == torch.tensor(numbers([row["fp4"] for row in kept], 1)) % 8).all()
    assert (code8[finite] == torch.tensor(numbers([row["fp8"] for row in kept], 2)) % 128).all()
    assert (scale[finite] == torch.tensor([int(row["s"], 16) for row in kept])).all()


# Launch functions


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("rule", KNOWN)
def test_every_rule_with_every_scale(rule, scales):
    x = heavy_tailed(3, 2, 100)
    site = a_site(100, rule=rule, scales=scales)
    median = int(quantize(x, site).score.flatten().median())
    check(x, replace(site, threshold=median))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_input_type(dtype):
    check(heavy_tailed(4, 48).to(dtype), a_site(48))


@pytest.mark.parametrize(
    "shape", [(1, 1), (16,), (5, 17), (70, 32), (1, 1025), (0, 32), (2, 0, 16)]
)
def test_shapes(shape):
    check(heavy_tailed(*shape), a_site(shape[-1]))


def test_a_rule_that_the_kernels_do_not_know_is_refused():
    site = a_site(16, rule="truncated")
    r, threshold = torch.tensor(site.r), torch.tensor(site.threshold)
    with pytest.raises(InputError, match="rule must be one of difference, benefit, random"):
        quantize_activation(heavy_tailed(1, 16), r, site.sensitivity, threshold, "truncated")


def test_rows_that_are_not_contiguous():
    check(heavy_tailed(64, 6).T, a_site(64))


@pytest.mark.parametrize("rule", KNOWN)
def test_thresholds_at_the_score(rule):
    """S - 1 makes the block FP8 and S does not; the two ends decide for every block."""
    x = heavy_tailed(3, 16, seed=3)
    site = a_site(16, rule=rule, seed=3)
    for score in quantize(x, site).score.flatten().tolist():
        for threshold in (score - 1, score):
            check(x, replace(site, threshold=threshold))
    for threshold in (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4):
        check(x, replace(site, threshold=threshold))
        assert run(x, replace(site, threshold=threshold))[3].all() == (threshold < 0)


@pytest.mark.parametrize("scales", SCALES)
def test_edges(scales):
    """Zeros of both signs, underflow, subnormals, saturation and what is not finite."""
    x = heavy_tailed(9, 16, seed=4)
    x[0] = 0.0
    x[1] = -0.0
    x[2] = torch.linspace(-(2.0**-10), 2.0**-10, 16)
    x[3] *= 2.0**-133
    x[4] *= 2.0**120
    x[5, 3], x[5, 4] = torch.nan, -1e-30
    x[6, 0], x[6, 15] = torch.inf, -torch.inf
    x[7] = torch.nan
    x[8] = torch.finfo(torch.float32).max  # infinite in bf16
    for r in (1.0, 2.0**100, 2.0**-100, 4095 * 2.0**-11):
        check(x, a_site(16, r=r, threshold=0, scales=scales))
    check(x, a_site(16, threshold=THRESHOLD_ALL_FP4, scales=scales))


@given(
    st.binary(min_size=64, max_size=64),
    st.floats(min_value=2.0**-120, max_value=2.0**120),
    st.sampled_from(KNOWN),
    st.sampled_from(list(SCALES)),
    st.integers(THRESHOLD_ALL_FP8, 2**60),
)
@settings(deadline=None, max_examples=20)
def test_any_bits(data, amax, rule, scales, threshold):
    """Two blocks of arbitrary bf16 bits, on scales that fit them and on others."""
    x = torch.frombuffer(bytearray(data), dtype=torch.bfloat16).view(2, 16)
    check(x, a_site(16, r=multiplier(amax), threshold=threshold, rule=rule, scales=scales))


def test_codes_decode_to_the_units():
    """The two functions agree with each other by way of the codec alone."""
    x = heavy_tailed(6, 64, seed=5)
    codes, scale, units, is_fp8 = run(x, a_site(64, threshold=2**45))
    fp8 = decode_e4m3(codes) * 6
    assert torch.equal(to_blocks(units.float())[is_fp8], fp8[is_fp8])
    assert torch.equal(scale == FP8_BLOCK, is_fp8)
    assert 0 < is_fp8.sum() < is_fp8.numel()
