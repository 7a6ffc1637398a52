"""The C++ kernels of every instruction set at hand against the definitions, by bits."""

import json
import platform
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fgmp.formats.activation import Site, multiplier, quantize
from fgmp.formats.linear import error_bound, exact_linear
from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import E4M3, FP8_BLOCK, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels.cpu import build, library
from fgmp.kernels.cpu.library import INSTRUCTION_SETS, Kernels
from fgmp.pack.planes import PackedWeight, pack, unpack_units

from ..cases import MODES, packed, planes, site, tokens

VECTORS = json.loads((Path(__file__).parents[2] / "vectors" / "blocks.json").read_text())


SETS = Kernels(instruction_set="portable").supported
INTEGER_SETS = [name for name in SETS if name not in ("portable", "avx512")]


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return Kernels(instruction_set=request.param)


def test_they_are_compiled_where_the_tests_run() -> None:
    assert SETS[:1] == ["portable"]
    x86 = ["portable", "avx2", "avxvnni", "avx512vnni", "avx512"]
    assert list(build.instruction_sets("x86_64")) == x86
    assert list(build.instruction_sets("aarch64")) == ["portable", "dotprod"]
    best = library.kernels()
    assert best is not None and best.instruction_set == SETS[-1]
    if platform.machine() == "x86_64":
        missing = set(INSTRUCTION_SETS) - set(SETS)
        assert "dotprod" in missing
        for name in missing:
            with pytest.raises(ValueError, match=f"this processor has no {name}"):
                Kernels(instruction_set=name)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equality that tells -0 from 0 and takes any NaN for another."""
    integers = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[a.dtype]
    nan = a.isnan() & b.isnan()
    return bool(((a.view(integers) == b.view(integers)) | nan).all()) and a.dtype == b.dtype


def expect_definition(kernels: Kernels, x: Tensor, record: Site) -> None:
    """Codes, scales, flags and units of ``x`` are those of formats.activation.quantize."""
    wanted = quantize(x, record)
    codes, scale = kernels.quantize(x, record)
    assert torch.equal(scale == FP8_BLOCK, wanted.is_fp8)
    marker = torch.full_like(scale, FP8_BLOCK)
    assert torch.equal(scale, torch.where(wanted.is_fp8, marker, wanted.scale))
    assert torch.equal(codes, torch.where(wanted.is_fp8.unsqueeze(-1), wanted.fp8, wanted.fp4))
    assert torch.equal(kernels.scores(x, record), wanted.score)
    units, flags = kernels.fake_quantize(x, record)
    assert torch.equal(flags, wanted.is_fp8)
    assert same_bits(units, signed(wanted.units(x.shape[1]), x).to(torch.bfloat16))


def signed(units: Tensor, x: Tensor) -> Tensor:
    """Zeros with the sign of x: as codes, +-0 of x is code 0; as values the sign is free."""
    return torch.where(units == 0, torch.zeros_like(units).copysign(x.float()), units)


def words(text: str, digits: int) -> list[int]:
    return [int(text[i : i + digits], 16) for i in range(0, len(text), digits)]


@pytest.mark.parametrize("section", ["activation", "leaves"])
def test_golden_vectors(kernels: Kernels, section: str) -> None:
    rule, scales = ("difference", "max") if section == "activation" else ("benefit", "search")
    fields = list(VECTORS[section]["fields"])
    checked = 0
    for kind, rows in VECTORS[section].items():
        for values in rows if kind != "fields" else []:
            row = dict(zip(fields, values, strict=True))
            bits = torch.tensor(words(row["x"], 4), dtype=torch.int32).to(torch.int16)
            r = torch.tensor(int(row["r"], 16), dtype=torch.int64).to(torch.int32)
            sensitivity = torch.tensor(words(row["sensitivity"], 2), dtype=torch.uint8)
            record = Site(r.view(torch.float32).item(), sensitivity, 1.0, row["T"], rule, scales)
            codes, scale = kernels.quantize(bits.view(torch.bfloat16)[None], record)
            assert (scale.item() == FP8_BLOCK) == bool(row["flag"]), (kind, row)
            expected = row["fp8"] if row["flag"] else row["fp4"]
            assert codes[0, 0].tolist() == words(expected, 2 if row["flag"] else 1), (kind, row)
            if not row["flag"]:
                assert scale.item() == int(row["s"], 16)
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("rule", sorted(filter(library.implements, RULES)))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [16, 40, 208])
def test_quantizers(kernels: Kernels, k: int, dtype: torch.dtype, rule: str, scales: str) -> None:
    x = tokens(12, k).to(dtype)
    x[1, 3], x[2, 5], x[3, 7] = torch.nan, torch.inf, -torch.inf
    record = site(k, rule, scales)
    exact = quantize(x, record).score.flatten()
    at = int(exact[exact < 2**62].sort().values[len(exact) // 3])  # S = T, and S = T + 1
    for threshold in (record.threshold, at, at - 1, THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4, 0):
        settled = Site(record.r, record.sensitivity, record.gamma, threshold, rule, scales)
        expect_definition(kernels, x, settled)


@pytest.mark.parametrize("scales", SCALES)
def test_every_bf16_value(kernels: Kernels, scales: str) -> None:
    """All 65,536 of them, alone in a block and among neighbours, at multipliers that reach ties."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    alone = torch.zeros(4096, 256, dtype=torch.bfloat16)
    alone[:, ::16] = values.view(4096, 16)
    for x in (alone, values.view(256, 256)):
        for r in (1.0, multiplier(3.0), 2.0**-90):
            sensitivity = torch.full((256,), 0x38, dtype=torch.uint8)
            for threshold in (THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8):
                record = Site(r, sensitivity, 1.0, threshold, "difference", scales)
                expect_definition(kernels, x, record)


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rule=st.sampled_from(["difference", "benefit"]),
    scales=st.sampled_from([*SCALES]),
)
def test_any_block(data: st.DataObject, rule: str, scales: str) -> None:
    bits = data.draw(st.lists(st.integers(-(2**15), 2**15 - 1), min_size=16, max_size=16))
    sensitivity = data.draw(st.lists(st.integers(1, E4M3.max_code), min_size=16, max_size=16))
    r = multiplier(2.0 ** data.draw(st.integers(-20, 20)) * data.draw(st.floats(1, 2)))
    x = torch.tensor(bits, dtype=torch.int16).view(torch.bfloat16)[None]
    record = Site(r, torch.tensor(sensitivity, dtype=torch.uint8), 1.0, 0, rule, scales)
    score = int(quantize(x, record).score)
    threshold = data.draw(st.sampled_from([0, max(score - 1, 0), score, min(score + 1, 2**62)]))
    record = Site(r, record.sensitivity, 1.0, threshold, rule, scales)
    for name in SETS:
        expect_definition(Kernels(instruction_set=name), x, record)


def every_code() -> PackedWeight:
    """All E2M1 codes under all scales, then all E4M3 codes but NaN, in 256 mixed rows."""
    nibbles = torch.arange(8, dtype=torch.uint8)
    low = (2 * nibbles | (2 * nibbles + 1) << 4).repeat(256, 2)  # codes 0 to 15, twice
    scale = torch.stack([(torch.arange(256) % 126 + 1), torch.full((256,), FP8_BLOCK)], 1)
    codes = (torch.arange(256)[:, None] + torch.arange(16) * 16) % 256
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes).to(torch.uint8)
    sm, e = (codes >> 4 & 8) | (codes & 7), codes >> 3 & 15
    low[:, 8:] = sm[:, 0::2] | sm[:, 1::2] << 4
    return PackedWeight(
        shape=torch.tensor([256, 32]),
        t=torch.tensor(1.0),
        low=low,
        scale=scale.to(torch.uint8),
        overflow=e[:, 0::2] | e[:, 1::2] << 4,
        row_ptr=torch.arange(257, dtype=torch.int32),
    )


def test_scales_that_estimates_cannot_tell_apart(kernels: Kernels) -> None:
    """A block, one in 64 million, whose fp32 estimates order two candidate scales wrongly."""
    x = [-1.625, -0.2158203125, -0.65234375, 0.65234375, 0.56640625, 0.90234375, -1.2109375]
    x += [-0.375, 0.04150390625, 0.609375, 1.6875, -0.55859375, -1.4609375, -1.0078125, 1.03125]
    sensitivity = [28, 61, 81, 118, 119, 106, 71, 12, 76, 114, 89, 21, 111, 119, 30, 70]
    codes = torch.tensor(sensitivity, dtype=torch.uint8)
    record = Site(multiplier(4.0), codes, 1.0, THRESHOLD_ALL_FP4, "benefit", "search")
    expect_definition(kernels, torch.tensor([[*x, 0.92578125]]), record)


def test_unpack_of_every_code(kernels: Kernels) -> None:
    weight = every_code()
    for dtype in (torch.float32, torch.bfloat16):
        units, fault = kernels.unpack(planes(weight), 32, dtype)
        assert fault == -1 and same_bits(units, unpack_units(weight).to(dtype))


@pytest.mark.parametrize("share", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (37, 40), (19, 1000), (50, 2080)])
def test_unpack(kernels: Kernels, n: int, k: int, share: float) -> None:
    weight = packed(n, k, share)
    for dtype in (torch.float32, torch.bfloat16):
        units, fault = kernels.unpack(planes(weight), k, dtype)
        assert fault == -1 and torch.equal(units, unpack_units(weight).to(dtype))


@pytest.mark.parametrize("share", MODES.values(), ids=MODES)
@pytest.mark.parametrize(("n", "k"), [(1, 16), (37, 40), (19, 1000), (20, 4300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_linear(kernels: Kernels, dtype: torch.dtype, n: int, k: int, share: float) -> None:
    weight = packed(n, k, share)
    record = site(k)
    values = unpack_units(weight)
    t_w, bias = weight.t.item(), torch.linspace(-1, 1, n)
    for m in (1, 2, 3, 4, 5, 6, 7, 8, 9, 33, 70):
        units = quantize(tokens(m, k), record).units(k).contiguous()
        y, fault = kernels.linear(
            units.to(dtype), planes(weight), record.t * t_w, bias, torch.float32
        )
        assert fault == -1
        wanted = exact_linear(units, values, record.t, t_w, bias)
        error = (y.double() - wanted.double()).abs()
        assert (error <= error_bound(units, values, record.t, t_w, bias)).all(), (m, error.max())
        narrow, _ = kernels.linear(
            units.to(dtype), planes(weight), record.t * t_w, bias, torch.bfloat16
        )
        assert torch.equal(narrow, y.to(torch.bfloat16))


def test_many_tokens_and_panels(kernels: Kernels) -> None:
    """More tokens than a chunk, more columns than a panel, none a multiple of anything."""
    n, k, m = 53, 2100, 530
    weight, record = packed(n, k, 0.2), site(k)
    units = quantize(tokens(m, k), record).units(k).contiguous()
    y, _ = kernels.linear(units.bfloat16(), planes(weight), 1.0, None, torch.float32)
    values = unpack_units(weight)
    error = (y.double() - units.double() @ values.double().T).abs()
    assert (error <= error_bound(units, values, 1.0, 1.0)).all()


@pytest.mark.parametrize("instruction_set", INTEGER_SETS)
def test_a_block_of_fp4_weights_is_exact(instruction_set: str) -> None:
    """Few tokens by FP4 weights in integers: only sums of blocks are rounded."""
    kernels = Kernels(instruction_set=instruction_set)
    k = 16 * 40
    weight = packed(30, k, 0.0)
    values = unpack_units(weight)
    for seed in range(6):
        units = quantize(tokens(8, k, seed), site(k, "benefit", "search")).units(k)
        only = torch.zeros_like(units)
        for row, block in enumerate(range(seed, 40, 5)):
            only[row, 16 * block :][:16] = units[row, 16 * block :][:16]
        y, _ = kernels.linear(only.bfloat16(), planes(weight), 1.0, None, torch.float32)
        assert torch.equal(y, exact_linear(only, values, 1.0, 1.0))


@pytest.mark.parametrize("instruction_set", INTEGER_SETS)
def test_what_two_digits_leave_counts(instruction_set: str) -> None:
    """A tiny activation beside a large one, whose weights are zero."""
    weight = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 0
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    is_fp8 = torch.zeros(9, 4, dtype=torch.bool)
    all_fp4 = planes(pack(codes, is_fp8))
    units = torch.zeros(1, 64, dtype=torch.bfloat16)
    units[0, :2] = torch.tensor([2688.0, 6 * 2.0**-9])
    y, _ = Kernels(instruction_set=instruction_set).linear(units, all_fp4, 1.0, None, torch.float32)
    assert torch.equal(y[0], units[0, 1].float() * codes.units(is_fp8)[:, 1]) and y.any()


def hard_tokens(k: int) -> Tensor:
    """Units, bf16 (8, k): large beside tiny ones, values of no site, zeros, an infinity."""
    units = quantize(tokens(8, k), site(k)).units(k)
    wide = torch.tensor([2688.0, 6 * 2.0**-9]).repeat(k // 2)
    free = torch.randn(k, generator=torch.Generator().manual_seed(3)) * 2.0 ** (
        torch.arange(k) % 50
    )
    units[1], units[2], units[3], units[4] = wide, free, 0, units[4] * 2.0**-70
    units[5, ::16], units[5, 1::16] = 2688, 6 * 2.0**-9
    units[6, 3] = torch.inf
    return units.bfloat16()


@pytest.mark.parametrize("share", MODES.values(), ids=MODES)
def test_a_token_alone_is_the_token_in_a_batch(kernels: Kernels, share: float) -> None:
    weight, k = packed(37, 496, share), 496
    units, values = hard_tokens(k), unpack_units(weight)
    batch, _ = kernels.linear(units, planes(weight), 1.0, None, torch.float32)
    for m in range(8):
        alone, fault = kernels.linear(units[m : m + 1], planes(weight), 1.0, None, torch.float32)
        assert fault == -1 and same_bits(alone[0], batch[m])
        if m != 6:
            exact = units[m].double() @ values.double().T
            bound = error_bound(units[m : m + 1].float(), values, 1.0, 1.0)[0]
            assert ((alone[0].double() - exact).abs() <= bound).all()


def test_nan_reaches_its_outputs_and_no_others(kernels: Kernels) -> None:
    weight, k = packed(20, 64, 0.3), 64
    for m in (2, 20):
        units = quantize(tokens(m, k), site(k)).units(k).bfloat16()
        clean, _ = kernels.linear(units, planes(weight), 1.0, None, torch.float32)
        units[1, 5] = torch.nan
        y, _ = kernels.linear(units, planes(weight), 1.0, None, torch.float32)
        assert y[1].isnan().all()
        others = torch.arange(m) != 1
        assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("m", [1, 5, 40])
def test_the_number_of_threads_changes_no_bit(kernels: Kernels, m: int) -> None:
    weight, k = packed(200, 1040, 0.2), 1040
    record = site(k)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            units, _ = kernels.fake_quantize(tokens(m, k), record)
            y, _ = kernels.linear(units, planes(weight), 1.0, None, torch.float32)
            results.append((units, y))
    finally:
        torch.set_num_threads(before)
    for units, y in results[1:]:
        assert torch.equal(units, results[0][0]) and torch.equal(y, results[0][1])


@pytest.mark.parametrize("m", [1, 12])
def test_corrupt_planes_are_found_while_reading(kernels: Kernels, m: int) -> None:
    n, k = 40, 160
    weight = packed(n, k, 0.3)
    units = quantize(tokens(m, k), site(k)).units(k).bfloat16()
    low, scale, overflow, row_ptr, fp8 = planes(weight)
    assert scale is not None and overflow is not None and row_ptr is not None
    disordered, negative, huge, flagged = (
        row_ptr.clone(),
        row_ptr.clone(),
        row_ptr.clone(),
        scale.clone(),
    )
    disordered[7], negative[3], huge[9] = row_ptr[8] + 1, -5, 2**31 - 1
    flagged[11, 0] ^= FP8_BLOCK
    broken = {
        6: (low, scale, overflow, disordered, fp8),
        2: (low, scale, overflow, negative, fp8),
        8: (low, scale, overflow, huge, fp8),
        11: (low, flagged, overflow, row_ptr, fp8),
        39: (low, scale, overflow[:-1].contiguous(), row_ptr, fp8),
    }
    for row, contradicting in broken.items():
        fault = kernels.linear(units, contradicting, 1.0, None, torch.float32)[1]
        last = int((row_ptr[1:] > row_ptr[:-1]).nonzero()[-1])
        assert fault == (min(row, last) if row == 39 else row)
        assert kernels.unpack(contradicting, k, torch.float32)[1] == fault


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_plane_makes_it_read_elsewhere(data: st.DataObject) -> None:
    """Any bytes in any plane: a result or a fault. Run under AddressSanitizer by test_build.py."""
    n, groups = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    k = groups * 16 - data.draw(st.integers(0, 15))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))

    def noise(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=g)

    n_fp8 = data.draw(st.integers(0, 30))
    wild = data.draw(st.sampled_from([4, 40, 2**31]))
    row_ptr = torch.randint(-wild, wild, (n + 1,), generator=g).to(torch.int32)
    corrupt = (noise(n, groups * 8), noise(n, groups), noise(n_fp8, 8), row_ptr, None)
    for name in SETS:
        kernels = Kernels(instruction_set=name)
        for m in (1, 3, 11):
            units = torch.ones(m, k, dtype=torch.bfloat16)
            kernels.linear(units, corrupt, 1.0, None, torch.float32)
        kernels.unpack(corrupt, k, torch.bfloat16)
