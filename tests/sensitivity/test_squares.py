"""Both forms of F_w are sums of squared gradients: one per weight, or one per row and column.

References run in float64, by plain autograd.
"""

import copy
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from torch import Tensor, nn

from fgmp.model.losses import causal_lm_loss
from fgmp.model.select import linearize, quantizable
from fgmp.sensitivity.fisher import calibrate
from fgmp.sensitivity.squares import SQUARES


def prepared(family: str) -> tuple[nn.Module, dict[str, nn.Linear]]:
    model = make_model(family)
    linearize(model)
    return model, quantizable(model)


def close(result: Tensor, expected: Tensor) -> bool:
    """Squares of fp32 gradients: sums of a few hundred terms cancel to 1e-5 of the largest."""
    assert result.dtype == torch.float32
    return torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-6 * expected.max().item())


def squares(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().sum(), len(x)


def reference_factors(model: nn.Module, samples: Tensor) -> dict[str, Tensor]:
    """Outer products of mean squared output gradients and inputs, of the first layer's MLP."""
    model = copy.deepcopy(model).double()
    mlp = model.model.layers[0].mlp
    sums: dict[str, list[Tensor]] = {}
    n = tokens = 0
    for sample in samples:
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def keep(name: str, x: Tensor, y: Tensor, into: dict = seen) -> None:
            into[name] = (x, y)

        hooks = [
            getattr(mlp, name).register_forward_hook(
                lambda _, args, out, name=name: keep(name, args[0], out)
            )
            for name in ("gate_proj", "down_proj")
        ]
        loss, predictions = causal_lm_loss(model, sample)
        for hook in hooks:
            hook.remove()
        n, tokens = n + predictions, tokens + len(sample)
        for name, (x, y) in seen.items():
            g = torch.autograd.grad(loss, y, retain_graph=True)[0][0]
            a, b = sums.setdefault(name, [torch.tensor(0.0), torch.tensor(0.0)])
            sums[name] = [a + (g**2).sum(0), b + (x[0].detach() ** 2).sum(0)]
    return {
        f"model.layers.0.mlp.{name}": torch.einsum("i,j->ij", a / n, b / tokens)
        for name, (a, b) in sums.items()
    }


def test_factors_against_autograd(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    result = calibrate(model, linears, tokens[:3], fisher="factored")
    for name, expected in reference_factors(model, tokens[:3]).items():
        assert close(result.weights[name], expected), name
    exact = calibrate(model, linears, tokens[:3])
    assert result.weights.keys() == exact.weights.keys()
    for name, f in exact.weights.items():
        assert result.weights[name].shape == f.shape
    for name, site in exact.sites.items():
        assert torch.equal(result.sites[name].g2, site.g2)


def test_factors_are_exact_of_one_token() -> None:
    """One token a sequence, one sequence: the gradient is an outer product, and so its square."""
    model = nn.Linear(8, 4, bias=False)
    x = torch.randn(1, 8)
    exact, factored = (
        calibrate(model, {"": model}, [x], squares, fisher=f).weights[""]
        for f in ("exact", "factored")
    )
    assert torch.allclose(factored, exact, rtol=1e-5)


def test_factors_hold_no_matrix(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    file = tmp_path / "run.state"
    calibration = calibrate(model, linears, tokens[:3], fisher="factored", file=file)
    with safe_open(file, framework="pt") as content:
        assert max(content.get_tensor(name).ndim for name in content.keys()) == 1  # noqa: SIM118
    name = next(iter(linears))
    assert calibration.weights[name] is not calibration.weights[name]  # formed at every access


@pytest.fixture
def linears() -> dict[str, nn.Linear]:
    return {"a": nn.Linear(6, 4), "b": nn.Linear(5, 3)}


def sequences(linear: nn.Linear, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Inputs (T, K) and output gradients (T, N) of two sequences of different length."""
    g = torch.Generator().manual_seed(seed)
    n, k = linear.weight.shape
    return [(torch.randn(t, k, generator=g), torch.randn(t, n, generator=g)) for t in (7, 2)]


def test_exact_squares_are_of_whole_sequences(linears: dict[str, nn.Linear]) -> None:
    """The square of a sum over tokens, not the sum of squares."""
    sums = SQUARES["exact"](linears)
    expected = {}
    for name, linear in linears.items():
        used = sequences(linear, len(name))
        for x, gradient in used:
            sums.add(name, x, gradient)
        expected[name] = sum((g.double().T @ x.double()).square() for x, g in used) / 10
    result = sums.result(10)
    for name, value in expected.items():
        torch.testing.assert_close(result[name].double(), value, rtol=1e-5, atol=1e-6)


def test_factored_squares_are_an_outer_product(linears: dict[str, nn.Linear]) -> None:
    sums = SQUARES["factored"](linears)
    expected = {}
    for name, linear in linears.items():
        used = sequences(linear, len(name))
        for x, gradient in used:
            sums.add(name, x, gradient)
        rows = sum(g.double().square().sum(0) for _, g in used) / 10
        columns = sum(x.double().square().sum(0) for x, _ in used) / 9  # tokens
        expected[name] = rows[:, None] * columns
    result = sums.result(10)
    assert list(result) == ["a", "b"] and len(result) == 2
    for name, value in expected.items():
        torch.testing.assert_close(result[name].double(), value, rtol=1e-5, atol=0)


@pytest.mark.parametrize("form", SQUARES)
def test_a_linear_that_no_token_reached_has_none(form: str, linears: dict[str, nn.Linear]) -> None:
    sums = SQUARES[form](linears)
    for x, gradient in sequences(linears["a"], 0):
        sums.add("a", x, gradient)
    result = sums.result(10)
    assert result["a"].any() and not result["b"].any()
    assert result["b"].shape == (3, 5) and result["b"].isfinite().all()


@pytest.mark.parametrize("form", SQUARES)
def test_sums_continue_from_their_tensors(form: str, linears: dict[str, nn.Linear]) -> None:
    """Names are unique, and the tensors are the sums themselves: copying into them restores."""
    first, second = (SQUARES[form](linears) for _ in range(2))
    (x, gradient), (y, later) = sequences(linears["b"], 3)
    first.add("b", x, gradient)
    stored = {key: tensor.clone() for key, tensor in first.tensors().items()}
    for key, tensor in second.tensors().items():
        assert not tensor.any()
        tensor.copy_(stored[key])
    assert all(key.endswith((".a", ".b")) for key in stored)
    for sums in (first, second):
        sums.add("b", y, later)
    a, b = first.result(9)["b"], second.result(9)["b"]
    assert torch.equal(a, b) and a.any()
