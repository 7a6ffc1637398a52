"""The recorded Fisher information is what plain autograd gives, and it predicts losses.

References run in float64 and know nothing of hooks or sites: a gradient of one sequence is taken
for every weight, or for the output of the module that feeds a site, and squared by hand.
"""

import copy
import json
import signal
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from fgmp.errors import InputError
from fgmp.model.select import linearize, quantizable
from fgmp.sensitivity.fisher import Calibration, calibrate, causal_lm_loss, drawn_label_loss
from fgmp.sensitivity.squares import SQUARES


def close(found: Tensor, wanted: Tensor) -> bool:
    """Squares of fp32 gradients: sums of a few hundred terms cancel to 1e-5 of the largest."""
    assert found.dtype == torch.float32
    return torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-6 * wanted.max().item())


def prepared(family: str) -> tuple[nn.Module, dict[str, nn.Linear]]:
    model = make_model(family)
    linearize(model)
    return model, quantizable(model)


def reference_weights(model: nn.Module, names: list[str], samples: Tensor) -> dict[str, Tensor]:
    """(1/n) sum over sequences (dL/dw)^2, by one autograd call a sequence."""
    model = copy.deepcopy(model).double()
    weights = [model.get_submodule(name).weight.requires_grad_() for name in names]
    sums = [torch.zeros_like(w) for w in weights]
    n = 0
    for tokens in samples:
        loss, predictions = causal_lm_loss(model, tokens)
        n += predictions
        for total, g in zip(sums, torch.autograd.grad(loss, weights), strict=True):
            total += g.square()
    return {name: total / n for name, total in zip(names, sums, strict=True)}


def reference_activations(model: nn.Module, module: str, samples: Tensor) -> Tensor:
    """(1/n) sum over tokens (dL/dx)^2 of the output of ``module``."""
    model = copy.deepcopy(model).double()
    held: list[Tensor] = []
    model.get_submodule(module).register_forward_hook(lambda *args: held.append(args[-1]))
    total, n = 0.0, 0
    for tokens in samples:
        held.clear()
        loss, predictions = causal_lm_loss(model, tokens)
        total = total + torch.autograd.grad(loss, held[0])[0].square().sum((0, 1))
        n += predictions
    return total / n


# Sites, and the module whose output each of them is.
SITES = {
    "llama": {
        "model.layers.0.self_attn.q_proj": "model.layers.0.input_layernorm",
        "model.layers.1.mlp.gate_proj": "model.layers.1.post_attention_layernorm",
    },
    "gpt2": {
        "transformer.h.0.attn.c_attn": "transformer.h.0.ln_1",
        "transformer.h.1.mlp.c_proj": "transformer.h.1.mlp.act",
    },
}


@pytest.mark.parametrize("family", SITES)
def test_against_autograd(family: str, tokens: Tensor) -> None:
    model, linears = prepared(family)
    found = calibrate(model, linears, tokens[:3])
    assert found.predictions == 3 * 23
    for name, wanted in reference_weights(model, list(linears), tokens[:3]).items():
        assert close(found.weights[name], wanted), name
    for site, module in SITES[family].items():
        assert close(found.sites[site].g2, reference_activations(model, module, tokens[:3])), site
        assert found.sites[site].tokens == 3 * 24


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
    found = calibrate(model, linears, tokens[:3], fisher="factored")
    for name, wanted in reference_factors(model, tokens[:3]).items():
        assert close(found.weights[name], wanted), name
    exact = calibrate(model, linears, tokens[:3])
    assert found.weights.keys() == exact.weights.keys()
    for name, f in exact.weights.items():
        assert found.weights[name].shape == f.shape
    for name, site in exact.sites.items():
        assert torch.equal(found.sites[name].g2, site.g2)


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
    found = calibrate(model, linears, tokens[:3], fisher="factored", state=tmp_path / "state")
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert max(file.get_tensor(name).ndim for name in file.keys()) == 1  # noqa: SIM118
    name = next(iter(linears))
    assert found.weights[name] is not found.weights[name]  # made anew, kept by nobody


def test_equals_the_sequences_of_one_batch_of_four(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    found = calibrate(model, linears, tokens[:4])
    # One forward and one backward pass over all four; what belongs to a sequence is sorted out of
    # each linear's input and output gradient afterwards.
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    for name, linear in linears.items():

        def keep(_: nn.Module, args: tuple[Tensor], out: Tensor, name: str = name) -> None:
            inputs[name], outputs[name] = args[0], out

        linear.register_forward_hook(keep)
    logits = model(input_ids=tokens[:4]).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:4, 1:].flatten(), reduction="sum"
    )
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    for name, gradient in zip(outputs, gradients, strict=True):
        by_sequence = torch.einsum("bto,bti->boi", gradient.double(), inputs[name].double())
        assert close(found.weights[name], by_sequence.square().sum(0) / (4 * 23)), name


def test_activations_of_a_batch_of_four(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    found = calibrate(model, linears, tokens[:4])
    whole = copy.deepcopy(model).double()
    held: list[Tensor] = []
    whole.model.layers[0].input_layernorm.register_forward_hook(lambda *a: held.append(a[-1]))
    logits = whole(input_ids=tokens[:4]).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:4, 1:].flatten(), reduction="sum"
    )
    wanted = torch.autograd.grad(loss, held[0])[0].square().sum((0, 1)) / (4 * 23)
    assert close(found.sites["model.layers.0.self_attn.q_proj"].g2, wanted)


def test_padding_contributes_nothing(tokens: Tensor) -> None:
    model, linears = prepared("llama")

    def padded_loss(model: nn.Module, sample: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        ids, mask = sample
        labels = ids.masked_fill(mask == 0, -100)[1:]
        logits = model(input_ids=ids[None], attention_mask=mask[None]).logits[0, :-1]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum", ignore_index=-100)
        return loss, int((labels != -100).sum())

    short = tokens[:2, :17]
    ids = torch.cat([short, torch.full((2, 7), 3)], 1)
    mask = torch.cat([torch.ones(2, 17), torch.zeros(2, 7)], 1).long()
    plain = calibrate(model, linears, short)
    padded = calibrate(model, linears, list(zip(ids, mask, strict=True)), padded_loss)
    assert padded.predictions == plain.predictions == 2 * 16
    for name in linears:
        assert close(padded.weights[name], plain.weights[name].double()), name
    for name, site in plain.sites.items():
        assert close(padded.sites[name].g2, site.g2.double()), name


def test_readers_of_one_tensor_share_a_site(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    found = calibrate(model, linears, tokens[:1])
    layer = "model.layers.0"
    attention = [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
    gated = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
    assert found.sites[attention[0]].linears == attention
    assert found.sites[gated[0]].linears == gated
    assert len(found.sites) == 2 * 4  # qkv, o, gate and up, down
    assert sorted(n for s in found.sites.values() for n in s.linears) == sorted(linears)


def test_sites_can_be_named(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    q, k, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    found = calibrate(model, linears, tokens[:1], groups={"value": [v]})
    assert found.sites[q].linears == [q, k]
    assert found.sites["value"].linears == [v]
    with pytest.raises(InputError, match="site value: 'nowhere' is not a quantized linear"):
        calibrate(model, linears, tokens[:1], groups={"value": ["nowhere"]})


class Reused(nn.Module):
    """One linear that is used twice, on different tensors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.inner(self.inner(x).tanh()).tanh())


def squares(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).square().sum(), len(x)


def test_a_linear_used_twice_squares_the_sum() -> None:
    model = Reused()
    samples = list(torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0)))
    linears = {"inner": model.inner, "outer": model.outer}
    found = calibrate(model, linears, samples, squares)
    double = copy.deepcopy(model).double()
    wanted = torch.zeros(8, 8, dtype=torch.float64)
    for x in samples:
        (g,) = torch.autograd.grad(squares(double, x.double())[0], [double.inner.weight])
        wanted += g.square()
    assert close(found.weights["inner"], wanted / 15)
    assert found.sites["inner"].linears == ["inner"]
    assert found.sites["inner"].tokens == 2 * 15


class Crossed(nn.Module):
    """Two linears that read one tensor at first and different ones later."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) + self.b(x) if x[0, 0] > 0 else self.a(x) + self.b(x * 2)


def test_sites_must_stay_the_same() -> None:
    model = Crossed()
    samples = [torch.ones(2, 8), -torch.ones(2, 8)]
    linears = {"a": model.a, "b": model.b}
    # A site may see several tensors, as that of a linear used twice does, so this order is fine.
    assert calibrate(model, linears, samples, squares).sites["a"].linears == ["a", "b"]
    with pytest.raises(InputError, match="b read the tensor of site a, earlier that of b"):
        calibrate(model, linears, samples[::-1], squares)


def test_a_tensor_changed_in_place_is_another_site() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            x += 1
            return first + self.b(x)

    model = InPlace()
    linears = {"a": model.a, "b": model.b}
    found = calibrate(model, linears, [torch.zeros(2, 8)], squares)
    assert found.sites["a"].amax == 0 and found.sites["b"].amax == 1


@pytest.fixture
def experts() -> tuple[nn.Module, dict[str, nn.Linear]]:
    """A Mixtral of five experts, of which the middle one is chosen by no token.

    The router's rows are multiples of one vector, so of every token the two largest or the two
    smallest multiples win.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = MixtralConfig(
        vocab_size=128, num_attention_heads=2, num_key_value_heads=2, num_local_experts=5, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            parameter.data.normal_(0, 0.1 if "embed" not in name else 1.0)
    gate = model.model.layers[0].mlp.gate.weight.data
    gate.copy_(torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0])[:, None] * gate[0])
    linearize(model)
    return model, quantizable(model)


def test_experts_count_their_own_tokens(
    experts: tuple[nn.Module, dict[str, nn.Linear]], tokens: Tensor
) -> None:
    model, linears = experts
    chosen: list[Tensor] = []
    hook = model.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda _, args: chosen.append(args[1])
    )
    found = calibrate(model, linears, tokens[:3])
    hook.remove()
    counts = torch.cat(chosen).flatten().bincount(minlength=5).tolist()
    assert counts[2] == 0 and min(counts[:2] + counts[3:]) > 0
    wanted = reference_weights(model, [n for n in linears if ".experts.2." not in n], tokens[:3])
    for name, fisher in wanted.items():
        assert close(found.weights[name], fisher), name
    for index, count in enumerate(counts):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{index}.{part}"
            assert found.sites[name].linears == [name]
            assert found.sites[name].tokens == count
            if not count:
                assert found.sites[name].amax == 0
                assert not found.sites[name].g2.any() and not found.weights[name].any()


# Fisher information and Hessian agree in expectation over labels from the model itself, so the
# labels are drawn from it. Perturbations have random signs, so off-diagonal terms average out.

Labelled = tuple[Tensor, Tensor]


def labelled_loss(model: nn.Module, sample: Labelled) -> tuple[Tensor, int]:
    ids, labels = sample
    logits = model(input_ids=ids[None]).logits[0]
    return nn.functional.cross_entropy(logits, labels, reduction="sum"), len(ids)


@torch.no_grad()
def log_probabilities(model: nn.Module, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits.log_softmax(-1)


def signs(like: Tensor) -> Tensor:
    return torch.randint(2, like.shape, dtype=like.dtype) * 2 - 1


@pytest.fixture
def labelled(tokens: Tensor) -> tuple[nn.Module, dict[str, nn.Linear], list[Labelled], Tensor]:
    """A float64 model, its linears, 96 labelled sequences, and their ids."""
    torch.manual_seed(5)
    model, linears = prepared("llama")
    model.double()
    ids = torch.randint(128, (96, 24))
    drawn = torch.distributions.Categorical(logits=log_probabilities(model, ids)).sample()
    return model, linears, list(zip(ids, drawn, strict=True)), ids


# The mean ratio over 16 drawn perturbations. One draw scatters by 0.04 (the off-diagonal terms),
# their mean by 0.01; drawn labels of 2,304 tokens add as much again.
TOLERANCE = 0.05


def test_half_the_score_predicts_the_loss_of_weight_noise(
    labelled: tuple[nn.Module, dict[str, nn.Linear], list[Labelled], Tensor],
) -> None:
    model, linears, samples, ids = labelled
    found = calibrate(model, linears, samples, labelled_loss)
    before = log_probabilities(model, ids[:32])
    originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    ratios = []
    for _ in range(16):
        score = 0.0
        for name, linear in linears.items():
            step = 1e-3 * originals[name].abs() * signs(originals[name])
            linear.weight.data.copy_(originals[name] + step)
            score += (found.weights[name] * step.square()).sum().item()
        increase = (before.exp() * (before - log_probabilities(model, ids[:32]))).sum(-1).mean()
        ratios.append(increase.item() / (score / 2))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=TOLERANCE)


@pytest.mark.parametrize(
    ("site", "module"), SITES["llama"].items(), ids=["attention", "feed-forward"]
)
def test_half_the_score_predicts_the_loss_of_activation_noise(
    site: str,
    module: str,
    labelled: tuple[nn.Module, dict[str, nn.Linear], list[Labelled], Tensor],
) -> None:
    model, linears, samples, ids = labelled
    g2 = calibrate(model, linears, samples, labelled_loss).sites[site].g2
    before = log_probabilities(model, ids)
    ratios = []
    for _ in range(16):
        step = 1e-3 * torch.rand(64, dtype=torch.float64)
        hook = model.get_submodule(module).register_forward_hook(
            lambda _, args, out, step=step: out + step * signs(out)
        )
        increase = (before.exp() * (before - log_probabilities(model, ids))).sum(-1).mean()
        hook.remove()
        ratios.append(increase.item() / ((g2 * step.square()).sum().item() / 2))
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=TOLERANCE)


def marks(model: nn.Module) -> list[object]:
    """Everything that calibration touches and must put back."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        [parameter.grad for parameter in model.parameters()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [parameter.detach().clone().numpy().tobytes() for parameter in model.parameters()],
    ]


def test_the_model_is_left_as_it_was(tokens: Tensor) -> None:
    model, linears = prepared("gpt2")
    model.train()
    model.transformer.h[0].eval()  # someone's own mixture
    model.transformer.wte.weight.requires_grad_(False)
    before = marks(model)
    calibrate(model, linears, tokens[:2])
    assert marks(model) == before

    def broken(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        causal_lm_loss(model, sample)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        calibrate(model, linears, tokens[:2], broken)
    assert marks(model) == before


def test_dropout_does_not_drop(tokens: Tensor) -> None:
    model, linears = prepared("gpt2")
    quiet = calibrate(model, linears, tokens[:1])
    model.train()
    found = calibrate(model, linears, tokens[:1])
    assert all(torch.equal(found.weights[name], quiet.weights[name]) for name in linears)


def test_refuses_what_is_not_finite(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    with pytest.raises(InputError, match="the loss of sequence 1 is nan"):
        calibrate(
            model,
            linears,
            [0, 1],
            lambda m, i: (causal_lm_loss(m, tokens[i])[0] * (1.0, torch.nan)[i], 23),
        )
    head = model.lm_head.weight.data.clone()
    model.lm_head.weight.data[3] = torch.inf  # no linear that is quantized sees it
    with pytest.raises(InputError, match="the loss of sequence 0 is nan"):
        calibrate(model, linears, tokens[:1], drawn_label_loss)
    model.lm_head.weight.data.copy_(head)
    # A finite loss whose gradient is not: the square root at zero.
    with pytest.raises(InputError, match=r"the gradient of model\.layers\.\d\.\S+ is not finite"):
        calibrate(
            model,
            linears,
            tokens[:1],
            lambda m, t: ((causal_lm_loss(m, t)[0] * 0).sqrt(), 23),
        )
    model.model.layers[1].input_layernorm.weight.data[5] = torch.inf
    name = r"model\.layers\.1\.self_attn\.q_proj"
    with pytest.raises(InputError, match=f"the activations of {name} are not finite"):
        calibrate(model, linears, tokens[:1])


# Interrupted and continued.


def stopping_after(count: int, reason: type[BaseException]) -> Callable[[], None]:
    calls = iter(range(1, 1000))

    def advance() -> None:
        if next(calls) == count:
            raise reason

    return advance


def same(a: Calibration, b: Calibration) -> bool:
    return (
        a.predictions == b.predictions
        and a.weights.keys() == b.weights.keys()
        and list(a.sites) == list(b.sites)
        and all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)
        and all(
            (s.linears, s.amax, s.tokens)
            == (b.sites[n].linears, b.sites[n].amax, b.sites[n].tokens)
            and torch.equal(s.g2, b.sites[n].g2)
            for n, s in a.sites.items()
        )
    )


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("fisher", SQUARES)
@pytest.mark.parametrize("reason", [KeyboardInterrupt, MemoryError])
def test_goes_on_to_equal_bits(
    family: str, fisher: str, reason: type[BaseException], tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared(family)
    asked = partial(calibrate, model, linears, tokens[:4], fisher=fisher)
    whole = asked()
    state = tmp_path / "new" / "run.safetensors"
    with pytest.raises(reason):
        asked(state=state, advance=stopping_after(3, reason))
    assert done_in(state) == 3
    advanced: list[int] = []
    seen: list[Tensor] = []

    @wraps(causal_lm_loss)  # calibrations know a loss by its name
    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        seen.append(sample)
        return causal_lm_loss(model, sample)

    again = asked(loss, state=state, advance=lambda: advanced.append(1))
    assert len(seen) == 1 and len(advanced) == 4
    assert same(again, whole)
    # Its own result is stored too: packing may be interrupted as well.
    assert same(asked(state=state), whole)


def done_in(state: Path) -> int:
    with safe_open(state, framework="pt") as file:
        return json.loads(file.metadata()["state"])["done"]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_within_a_sequence_leaves_whole_sequences_only(
    where: str, tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared("llama")
    whole = calibrate(model, linears, tokens[:4])
    state = tmp_path / "state"
    seen: list[Tensor] = []

    @wraps(causal_lm_loss)  # calibrations know a loss by its name
    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        seen.append(sample)
        total, predictions = causal_lm_loss(model, sample)
        if len(seen) == 3 and where == "forward":
            raise KeyboardInterrupt
        return total, predictions

    def stumble(*_: object) -> None:
        if len(seen) == 3 and where == "backward":
            raise KeyboardInterrupt

    # Between two layers, where the gradients of the second are counted and of the first are not.
    hook = model.model.layers[0].register_forward_hook(
        lambda _, args, out: out.register_hook(stumble) and None
    )
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, linears, tokens[:4], loss, state=state)
    hook.remove()
    assert same(calibrate(model, linears, tokens[:4], state=state), whole)


def test_ctrl_c_waits_for_the_sequence_to_end(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    whole = calibrate(model, linears, tokens[:4])
    state = tmp_path / "state"
    seen: list[Tensor] = []

    @wraps(causal_lm_loss)  # calibrations know a loss by its name
    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        seen.append(sample)
        return causal_lm_loss(model, sample)

    def press(*_: object) -> None:
        if len(seen) == 2:
            signal.raise_signal(signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    hook = model.model.layers[0].register_forward_hook(
        lambda _, args, out: out.register_hook(press) and None
    )
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, linears, tokens[:4], loss, state=state)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert done_in(state) == 2
    assert same(calibrate(model, linears, tokens[:4], state=state), whole)


def test_drawn_labels_are_the_models() -> None:
    """At one prediction made 40,000 times the mean gradient vanishes: labels are as likely as it
    says, to four standard errors."""

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.tensor([0.0, 1.0, -2.0, 2.5]))

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))

    model, count = Constant(), 40_000
    gradients = []
    for tokens in (torch.zeros(count + 1), torch.zeros(count + 1), torch.ones(count + 1)):
        loss, predictions = drawn_label_loss(model, tokens.long())
        assert predictions == count
        gradients.append(torch.autograd.grad(loss, model.logits)[0] / count)
    p = model.logits.detach().softmax(0)
    assert torch.equal(gradients[0], gradients[1])  # the same tokens draw the same labels
    assert not torch.equal(gradients[0], gradients[2])
    for gradient in gradients:
        assert (gradient.abs() < 4 * (p * (1 - p) / count).sqrt()).all()


def test_a_kept_calibration_is_used_again_or_refused(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    state = tmp_path / "state"
    whole = calibrate(model, linears, tokens[:3], state=state, reuse=True)
    seen = state.read_bytes()
    assert same(calibrate(model, linears, tokens[:3], state=state, reuse=True), whole)
    message = "state: a calibration of other "
    with pytest.raises(InputError, match=message):
        calibrate(model, linears, tokens[3:6], state=state, reuse=True)
    embeddings = model.get_input_embeddings().weight.data  # not quantized, and part of the model
    for weight in (linears["model.layers.1.mlp.down_proj"].weight.data, embeddings):
        weight[0, 0] += 1
        with pytest.raises(InputError, match=message + "weights"):
            calibrate(model, linears, tokens[:3], state=state, reuse=True)
        weight[0, 0] -= 1

    def another(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        return causal_lm_loss(model, tokens)

    with pytest.raises(InputError, match="a calibration of another loss, or other labels"):
        calibrate(model, linears, tokens[:3], another, state=state, reuse=True)
    assert state.read_bytes() == seen


@pytest.mark.parametrize(("held", "asked"), [("exact", "factored"), ("factored", "exact")])
def test_the_other_kind_of_fisher_information_is_refused(
    held: str, asked: str, tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared("llama")
    state = tmp_path / "state"
    calibrate(model, linears, tokens[:3], fisher=held, state=state, reuse=True)
    message = f"state: holds the {held} Fisher information, the recipe asks for fisher: {asked};"
    with pytest.raises(InputError, match=message):
        calibrate(model, linears, tokens[:3], fisher=asked, state=state, reuse=True)
    # A run that was not told to reuse begins anew.
    assert same(
        calibrate(model, linears, tokens[:3], fisher=asked, state=state),
        calibrate(model, linears, tokens[:3], fisher=asked),
    )


def test_a_state_of_another_run_is_passed_over(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    state = tmp_path / "state"
    calibrate(model, linears, tokens[:3], state=state)
    groups = {"value": ["model.layers.0.self_attn.v_proj"]}
    grouped = calibrate(model, linears, tokens[:3], groups=groups, state=state)
    assert "value" in grouped.sites
    calibrate(model, linears, tokens[:3], state=state)
    assert same(
        calibrate(model, linears, tokens[3:6], state=state), calibrate(model, linears, tokens[3:6])
    )
    calibrate(model, linears, tokens[:3], state=state)
    linears["model.layers.1.mlp.down_proj"].weight.data[0, 0] += 1
    assert same(
        calibrate(model, linears, tokens[:3], state=state), calibrate(model, linears, tokens[:3])
    )


def test_samples_differ_by_every_number_in_them(tmp_path: Path) -> None:
    """Also deep inside: a printed tensor of this size would show none of its middle."""
    model, state = Reused(), tmp_path / "state"
    linears = {"inner": model.inner, "outer": model.outer}

    def loss(model: nn.Module, sample: dict[str, Tensor]) -> tuple[Tensor, int]:
        return squares(model, sample["x"].float())

    samples = [{"x": torch.ones(500, 8, dtype=torch.bfloat16)}]
    calibrate(model, linears, samples, loss, state=state)
    samples[0]["x"][250, 4] = 100
    assert same(
        calibrate(model, linears, samples, loss, state=state),
        calibrate(model, linears, samples, loss),
    )


def corruptions(state: Path) -> Iterator[str]:
    """Only what is known to be a state may be deleted."""
    whole = state.read_bytes()
    state.write_bytes(whole[: len(whole) // 2])
    yield "move this one away"
    state.write_bytes(b"not a file of tensors")
    yield "move this one away"
    save_file({"x": torch.zeros(1)}, state)
    yield "no state in its metadata.*move this one away"
    save_file({"x": torch.zeros(1)}, state, metadata={"state": "{"})
    yield "delete it"
    save_file({"x": torch.zeros(1)}, state, metadata={"state": "[1]"})
    yield "delete it"
    with safe_open_bytes(whole, state) as file:
        facts, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    del tensors[next(n for n in names if n.startswith("weight."))]
    save_file(tensors, state, metadata=facts)
    yield "File does not contain tensor.*delete it"


def safe_open_bytes(content: bytes, at: Path) -> safe_open:
    copy_of = at.with_suffix(".copy")
    copy_of.write_bytes(content)
    return safe_open(copy_of, framework="pt")


def test_a_corrupt_state_is_named(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    state = tmp_path / "run.state"
    calibrate(model, linears, tokens[:2], state=state)
    found = []
    for message in corruptions(state):
        with pytest.raises(
            InputError, match=rf"run\.state: not a calibration state \(.*{message}$"
        ):
            calibrate(model, linears, tokens[:2], state=state)
        found.append(message)
    assert len(found) == 6
    with pytest.raises(InputError, match="is a folder, not a calibration state"):
        calibrate(model, linears, tokens[:2], state=tmp_path)


def test_a_full_disk_costs_the_state_and_not_the_run(tokens: Tensor, tmp_path: Path) -> None:
    """The state's folder cannot be made, because a file has its name."""
    model, linears = prepared("llama")
    (tmp_path / "taken").write_text("")
    state = tmp_path / "taken" / "run.state"
    with pytest.warns(UserWarning, match=r"run\.state: could not be written .* not be resumed"):
        found = calibrate(model, linears, tokens[:2], state=state)
    assert same(found, calibrate(model, linears, tokens[:2]))
