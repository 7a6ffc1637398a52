"""A packed linear computes docs/numerics.md, and nothing that moves or copies it rounds it."""

import copy
import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fgmp.formats.activation import Site, multiplier, quantize, sensitivity_codes
from fgmp.formats.linear import exact_linear
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels import ops
from fgmp.model.linear import ActivationSite, MixedLinear, mixed_linears, sites
from fgmp.pack.planes import PackedWeight, pack, unpack_units

K = 72  # ragged: four blocks and a half


THRESHOLD = 2**52
"""Splits the blocks of these tests' activations between the formats."""


def a_site(threshold: int = THRESHOLD, rule: str = "difference") -> Site:
    g = torch.Generator().manual_seed(2)
    codes, gamma = sensitivity_codes(torch.rand(K, generator=g))
    return Site(multiplier(4.0), codes, gamma, threshold, rule)


def packed(n: int = 24, mode: str = "mixed", seed: int = 0) -> PackedWeight:
    weight = torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
    codes = quantize_weight(weight, tensor_scale(weight.abs().max().item()))
    blocks = torch.arange(codes.scale.numel()).view(codes.scale.shape)
    is_fp8 = {"mixed": blocks % 3 == 0, "fp4": blocks < 0, "fp8": blocks >= 0}[mode]
    return pack(codes, is_fp8)


def attention(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Three linears that read one site, the first of which owns it."""
    site = ActivationSite(a_site())
    model = nn.Module()
    for position, name in enumerate("qkv"):
        bias = torch.linspace(-1, 1, 24, dtype=dtype) if name == "k" else None
        linear = MixedLinear(packed(seed=position), bias, site, owns_site=position == 0)
        setattr(model, name, linear)
    return model


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, K, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tensors that were quantized since."""
    seen: list[Tensor] = []
    original = ops.fake_quantize_activation

    def counted(x: Tensor, *site: object) -> tuple[Tensor, Tensor]:
        seen.append(x)
        units, flags = original(x, *site)
        return units, flags

    monkeypatch.setattr(ops, "fake_quantize_activation", counted)
    return seen


def exactly(linear: MixedLinear, x: Tensor) -> tuple[Tensor, Tensor]:
    """The exact linear, and the most that fp32 accumulation may be off by."""
    record = linear.input_site.record
    units = quantize(x, record).units(K)
    weight = unpack_units(linear.packed)
    y = exact_linear(units, weight, record.t, linear.packed.t.item(), linear.bias)
    # K * 2**-24 * sum |a w| of the accumulator, to first order; the epilogue's last rounding can
    # fall to either neighbour then: an ulp of the result more.
    sums = units.abs().double() @ weight.abs().double().T * record.t * linear.packed.t.item()
    return y, K * 2**-24 * sums + 2**-23 * y.abs().double()


@pytest.mark.parametrize("mode", ["mixed", "fp4", "fp8"])
@pytest.mark.parametrize("threshold", [THRESHOLD, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8])
@pytest.mark.parametrize("bias", [None, torch.linspace(-2, 2, 24)])
def test_equals_the_exact_linear(mode: str, threshold: int, bias: Tensor | None, x: Tensor) -> None:
    linear = MixedLinear(packed(mode=mode), bias, ActivationSite(a_site(threshold)), owns_site=True)
    wanted, bound = exactly(linear, x)
    assert ((linear(x).double() - wanted.double()).abs() <= bound).all()
    assert bound.max() < 1e-4 * wanted.abs().max()
    if threshold == THRESHOLD:  # both formats occur
        share = quantize(x, linear.input_site.record).is_fp8.double().mean()
        assert 0.05 < share < 0.95


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_has_the_inputs_dtype(dtype: torch.dtype, x: Tensor) -> None:
    model = attention()
    out = model.k(x.to(dtype))
    assert out.dtype == dtype and out.shape == (3, 5, 24)
    # One rounding, of the fp32 result for the rounded input.
    assert torch.equal(out, model.k(x.to(dtype).float()).to(dtype))


def test_a_site_quantizes_its_tensor_once(x: Tensor, calls: list[Tensor]) -> None:
    model = attention()
    outs = [model.q(x), model.k(x), model.v(x)]
    assert len(calls) == 1 and calls[0] is x
    model.q(x.clone())
    assert len(calls) == 2
    for name, out in zip("qkv", outs, strict=True):
        assert torch.equal(getattr(attention(), name)(x), out)


def test_nothing_outlives_the_tensor(calls: list[Tensor]) -> None:
    model = attention()
    for i in range(3):  # addresses, and Python ids, are used again
        x = torch.full((1, K), float(i))
        assert torch.equal(model.q(x), attention().q(x.clone()))
        calls.clear()  # it holds x
        del x
        assert len(model.q.input_site._quantized) == 0


def test_a_tensor_that_changed_is_quantized_again(x: Tensor, calls: list[Tensor]) -> None:
    model = attention()
    model.q(x)
    x.mul_(0.5)
    assert torch.equal(model.q(x), attention().q(x.clone()))
    with torch.inference_mode():  # where tensors do not tell that they changed
        y = torch.ones(2, K)
        model.q(y)
        y.mul_(0.5)
        assert torch.equal(model.q(y), attention().q(y.clone()))


def test_counts_what_it_decides(x: Tensor) -> None:
    model = attention()
    site = model.q.input_site
    model.q(x)
    assert site.counts == [0, 0, 0]
    site.counting = True
    x[0, 0, 3] = 5.0  # r maps 4 to 448
    for name in "qkv":
        getattr(model, name)(x)
    fp8 = int(quantize(x, site.record).is_fp8.sum())
    assert site.counts == [15 * 5 - fp8, 15 * 5, int((x.bfloat16().abs() > 4.0).sum())]


def test_what_is_not_finite_stays_in_its_row(x: Tensor) -> None:
    x[1, 2, 7] = torch.nan
    x[0, 1, 0] = torch.inf
    bad = torch.zeros(3, 5, dtype=torch.bool)
    bad[1, 2] = bad[0, 1] = True
    assert torch.equal(attention().q(x).isnan().any(-1), bad)


def state(module: nn.Module) -> dict[str, bytes]:
    return {
        name: str(t.dtype).encode() + t.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, t in module.state_dict().items()
    }


def pickled(module: nn.Module) -> nn.Module:
    stream = io.BytesIO()
    torch.save(module, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "there and back": lambda m: m.half().float(),
    "flags": lambda m: m.eval().requires_grad_(False).train(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES.keys())
def test_codes_and_scales_move_bit_exact(move: Callable[[nn.Module], nn.Module], x: Tensor) -> None:
    model = attention()
    before = {name: getattr(model, name)(x) for name in "qkv"}
    bytes_before = state(model)
    moved = move(model)
    assert state(moved) == bytes_before
    for name, out in before.items():
        assert torch.equal(getattr(moved, name)(x), out), name
    assert moved.k.input_site is moved.q.input_site  # still one site


def test_a_copy_is_independent(x: Tensor, calls: list[Tensor]) -> None:
    model = attention()
    model.q(x)
    other = copy.deepcopy(model)
    assert other.q.input_site is not model.q.input_site
    other.q.input_site.threshold.fill_(THRESHOLD_ALL_FP8)
    assert model.q.input_site.record.threshold == THRESHOLD


def test_loading_a_state_takes_effect(x: Tensor) -> None:
    """Also on a module that ran before, whose constants are kept for speed."""
    model, other = attention(), attention()
    other.q.input_site.threshold.fill_(THRESHOLD_ALL_FP8)
    other.q.input_site.r.fill_(2.0)
    model.q(x)
    model.load_state_dict(other.state_dict())
    record = model.q.input_site.record
    assert (record.r, record.threshold) == (2.0, THRESHOLD_ALL_FP8)
    assert torch.equal(model.q(x), other.q(x))


def test_weight_is_the_dequantized_one() -> None:
    linear = attention().q
    assert linear.weight.dtype == torch.float32 and linear.weight.shape == (24, K)
    assert torch.equal(linear.weight, unpack_units(linear.packed) * linear.packed.t)
    linear.weight.zero_()
    assert linear.weight.any()
    assert "weight" not in dict(linear.named_parameters())


def test_names() -> None:
    model = attention()
    assert list(mixed_linears(model)) == ["q", "k", "v"]
    assert list(sites(model)) == ["q"]
    names = {"shape", "t", "low", "scale", "overflow", "row_ptr"}
    assert set(model.state_dict()) == {
        *(f"{linear}.weight_{name}" for linear in "qkv" for name in names),
        "k.bias",
        *(f"q.input_site.{name}" for name in ("r", "gamma", "sensitivity", "threshold")),
    }
    assert "mode=mixed" in repr(model.q) and "K=72" in repr(model.q.input_site)


def test_an_arbitrary_rule_runs(x: Tensor) -> None:
    linear = MixedLinear(packed(), None, ActivationSite(a_site(2**59, "random")), owns_site=True)
    wanted, bound = exactly(linear, x)
    assert ((linear(x).double() - wanted.double()).abs() <= bound).all()
