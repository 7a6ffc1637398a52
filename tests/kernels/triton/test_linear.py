"""The packed linear: inside the derived bound, rounded once, the same bits every time.

Integers small enough that fp32 adds them exactly leave nothing to the order of summation: there
the result must equal the exact linear bit for bit. On a GPU where there is one, else in Triton's
interpreter; tensor cores truncate when they add, which doubles the bound there.
"""

from itertools import product

import pytest
import torch

from fgmp.formats.linear import exact_linear
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.kernels.triton import linear
from fgmp.kernels.triton.linear import DECODE_ROWS, packed_linear
from fgmp.pack.planes import pack, unpack_units

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
T_X = float(torch.tensor(0.37))
ROUNDOFF = 2.0**-23 if ON_GPU else 2.0**-24

# NumPy, in which the interpreter computes, remarks on int32 products that wrap around, and on NaN.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


@pytest.fixture
def small_slices(monkeypatch):
    """Several slices of a small weight."""
    monkeypatch.setattr(linear, "SLICE", 16)


def a_packed(n, k, share, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, k, generator=generator)
    codes = quantize_weight(x, tensor_scale(x.abs().max().item()))
    return pack(codes, torch.rand(codes.scale.shape, generator=generator) < share)


def some_units(batch, k, dtype=torch.bfloat16, seed=1):
    """Values of FP8 blocks for bf16, all 24 bits for fp32."""
    x = 100 * torch.randn(batch, k, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bfloat16:
        return (x.to(torch.float8_e4m3fn).float() * 6).to(dtype)
    return x


def run(units, packed, bias=None, dtype=torch.float32):
    planes = (packed.low, packed.scale, packed.overflow, packed.row_ptr, packed.fp8)
    tensors = (units, *planes, torch.tensor(T_X), packed.t, bias)
    return packed_linear(*(None if t is None else t.to(DEVICE) for t in tensors), dtype).cpu()


def bound(units, packed):
    """docs/numerics.md, section 6, and the rounding of the exact result."""
    weight = unpack_units(packed).double()
    terms = units.double().abs() @ weight.abs().T * packed.t.double() * T_X
    return ((1 + ROUNDOFF) ** (packed.k + 5) - 1) * terms


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 5, 8, 9, 16, 17])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_inside_the_bound(share, batch, dtype, small_slices):
    packed, units = a_packed(37, 600, share), some_units(batch, 600, dtype)
    exact = units.double() @ unpack_units(packed).double().T * packed.t.double() * T_X
    y = run(units, packed)
    assert ((y - exact).abs() <= bound(units, packed)).all()


@pytest.mark.parametrize("batch", [3, DECODE_ROWS + 1])
@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_equals_the_exact_linear_where_sums_are_exact(share, batch, small_slices):
    """Six units of 1 a row: sums of multiples of 2**-10, exact if they need at most 24 bits."""
    packed = a_packed(33, 200, share, seed=2)
    chosen = torch.rand(batch, 200, generator=torch.Generator().manual_seed(3)).topk(6).indices
    units = torch.zeros(batch, 200).scatter_(1, chosen, 1.0)
    weight = unpack_units(packed)
    sure = units @ weight.abs().T < 2**14
    assert sure.float().mean() > 0.9
    bias = torch.randn(33, generator=torch.Generator().manual_seed(4))
    types = [torch.float32, torch.bfloat16, torch.float16]
    for kind, dtype, with_bias in product(types[:2], types, [None, bias]):
        exact = exact_linear(units, weight, T_X, packed.t.item(), with_bias).to(dtype)
        y = run(units.to(kind), packed, bias=with_bias, dtype=dtype)
        assert y.dtype == dtype
        assert torch.equal(y[sure], exact[sure])


@pytest.mark.parametrize("shape", [(1, 16), (3, 7), (16, 512), (18, 1040)])
@pytest.mark.parametrize("batch", [2, 20])
def test_shapes(shape, batch):
    n, k = shape
    packed, units = a_packed(n, k, 0.4), some_units(batch, k)
    exact = units.double() @ unpack_units(packed).double().T * packed.t.double() * T_X
    assert ((run(units, packed) - exact).abs() <= bound(units, packed)).all()


def test_leading_dimensions_and_no_rows_at_all():
    packed = a_packed(5, 32, 0.4)
    units = some_units(6, 32)
    y = run(units.view(2, 3, 32), packed)
    assert torch.equal(y, run(units, packed).view(2, 3, 5))
    assert run(units[:0], packed).shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [2, 20])
def test_a_row_with_nan_is_nan_and_no_other(batch, dtype):
    packed, units = a_packed(5, 48, 0.4), some_units(batch, 48, dtype)
    units[1, 40] = torch.nan
    y = run(units, packed)
    assert y[1].isnan().all()
    assert y[torch.arange(batch) != 1].isfinite().all()


@pytest.mark.parametrize("batch", [1, 16, 40])
def test_the_same_bits_every_time(batch):
    packed, units = a_packed(40, 1024, 0.3), some_units(batch, 1024)
    first = run(units, packed)
    assert all(torch.equal(run(units, packed), first) for _ in range(2))


def test_a_row_does_not_depend_on_its_neighbours():
    """Up to 8 rows share a tile of one width: each gets the bits that it gets alone."""
    packed, units = a_packed(20, 512, 0.3), some_units(8, 512)
    together = run(units, packed)
    assert all(torch.equal(run(units[i : i + 1], packed)[0], together[i]) for i in (0, 7))


def test_fp32_units_are_the_sum_of_their_terms():
    units = torch.cat([some_units(3, 64, torch.float32), torch.tensor([[torch.nan] * 64])])
    terms = linear._terms(units)
    assert terms.dtype == torch.bfloat16
    assert torch.equal(terms.double().sum(0)[:3], units.double()[:3])
    assert terms.float().sum(0)[3].isnan().all()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 16, 64])
def test_in_a_cuda_graph(batch):
    """Nothing waits for the GPU, so a graph can hold it, and replays to the same bits."""
    packed, units = a_packed(256, 512, 0.3), some_units(batch, 512).cuda()
    expected = run(units, packed)
    planes = (packed.low, packed.scale, packed.overflow, packed.row_ptr, packed.fp8)
    arguments = [None if p is None else p.cuda() for p in planes]
    scales = torch.tensor(T_X, device="cuda"), packed.t.cuda()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = packed_linear(units, *arguments, *scales, None, torch.float32)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y.cpu(), expected)
