"""The recorded Fisher information is what plain autograd gives, and it predicts losses.

References run in float64 and know nothing of hooks or sites: a gradient of one sequence is taken
for every weight, or for the output of the module that feeds a site, and squared by hand.
"""

import copy
import json
import signal
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig

from fgmp.errors import InputError
from fgmp.model.losses import causal_lm_loss, sampled_label_loss
from fgmp.model.precision import run_in
from fgmp.model.select import linearize, quantizable
from fgmp.sensitivity import fisher as fisher_module
from fgmp.sensitivity.fisher import Calibration, calibrate
from fgmp.sensitivity.squares import SQUARES
from fgmp.storage.resume import PartialResults


def close(result: Tensor, expected: Tensor) -> bool:
    """Squares of fp32 gradients: sums of a few hundred terms cancel to 1e-5 of the largest."""
    assert result.dtype == torch.float32
    return torch.allclose(result.double(), expected, rtol=1e-4, atol=1e-6 * expected.max().item())


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
    result = calibrate(model, linears, tokens[:3])
    assert result.predictions == 3 * 23
    for name, expected in reference_weights(model, list(linears), tokens[:3]).items():
        assert close(result.weights[name], expected), name
    for site, module in SITES[family].items():
        assert close(result.sites[site].g2, reference_activations(model, module, tokens[:3])), site
        assert result.sites[site].tokens == 3 * 24


def test_equals_the_sequences_of_one_batch_of_four(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    result = calibrate(model, linears, tokens[:4])
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
        assert close(result.weights[name], by_sequence.square().sum(0) / (4 * 23)), name


def test_activations_of_a_batch_of_four(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    result = calibrate(model, linears, tokens[:4])
    whole = copy.deepcopy(model).double()
    held: list[Tensor] = []
    whole.model.layers[0].input_layernorm.register_forward_hook(lambda *a: held.append(a[-1]))
    logits = whole(input_ids=tokens[:4]).logits[:, :-1]
    loss = nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:4, 1:].flatten(), reduction="sum"
    )
    expected = torch.autograd.grad(loss, held[0])[0].square().sum((0, 1)) / (4 * 23)
    assert close(result.sites["model.layers.0.self_attn.q_proj"].g2, expected)


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
    result = calibrate(model, linears, tokens[:1])
    layer = "model.layers.0"
    attention = [f"{layer}.self_attn.{n}_proj" for n in "qkv"]
    gated = [f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"]
    assert result.sites[attention[0]].linears == attention
    assert result.sites[gated[0]].linears == gated
    assert len(result.sites) == 2 * 4  # qkv, o, gate and up, down
    assert sorted(n for s in result.sites.values() for n in s.linears) == sorted(linears)


def test_sites_can_be_named(tokens: Tensor) -> None:
    model, linears = prepared("llama")
    q, k, v = (f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    result = calibrate(model, linears, tokens[:1], groups={"value": [v]})
    assert result.sites[q].linears == [q, k]
    assert result.sites["value"].linears == [v]
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
    result = calibrate(model, linears, samples, squares)
    double = copy.deepcopy(model).double()
    expected = torch.zeros(8, 8, dtype=torch.float64)
    for x in samples:
        (g,) = torch.autograd.grad(squares(double, x.double())[0], [double.inner.weight])
        expected += g.square()
    assert close(result.weights["inner"], expected / 15)
    assert result.sites["inner"].linears == ["inner"]
    assert result.sites["inner"].tokens == 2 * 15


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
    result = calibrate(model, linears, [torch.zeros(2, 8)], squares)
    assert result.sites["a"].amax == 0 and result.sites["b"].amax == 1


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
    result = calibrate(model, linears, tokens[:3])
    hook.remove()
    counts = torch.cat(chosen).flatten().bincount(minlength=5).tolist()
    assert counts[2] == 0 and min(counts[:2] + counts[3:]) > 0
    expected = reference_weights(model, [n for n in linears if ".experts.2." not in n], tokens[:3])
    for name, fisher in expected.items():
        assert close(result.weights[name], fisher), name
    for index, count in enumerate(counts):
        for part in ("gate_up_proj", "down_proj"):
            name = f"model.layers.0.mlp.experts.{index}.{part}"
            assert result.sites[name].linears == [name]
            assert result.sites[name].tokens == count
            if not count:
                assert result.sites[name].amax == 0
                assert not result.sites[name].g2.any() and not result.weights[name].any()


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
    result = calibrate(model, linears, samples, labelled_loss)
    before = log_probabilities(model, ids[:32])
    originals = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    ratios = []
    for _ in range(16):
        score = 0.0
        for name, linear in linears.items():
            step = 1e-3 * originals[name].abs() * signs(originals[name])
            linear.weight.data.copy_(originals[name] + step)
            score += (result.weights[name] * step.square()).sum().item()
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
    result = calibrate(model, linears, tokens[:1])
    assert all(torch.equal(result.weights[name], quiet.weights[name]) for name in linears)


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
        calibrate(model, linears, tokens[:1], sampled_label_loss)
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


def destination(kind: str, path: Path, report: Callable[[str], None] = print) -> dict[str, Any]:
    """The argument of ``calibrate`` that stores its sums: a file, or partial results of a run."""
    if kind == "file":
        return {"file": path / "new" / "run.safetensors"}
    return {"resume": PartialResults(path / "new", "0" * 16, report)}


def stored_file(path: Path) -> Path:
    (file,) = (path / "new").iterdir()
    return file


def done_in(file: Path) -> int:
    with safe_open(file, framework="pt") as content:
        return json.loads(content.metadata()["fgmp_state"])["facts"]["done"]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("fisher", SQUARES)
@pytest.mark.parametrize(
    ("kind", "reason"), [("file", KeyboardInterrupt), ("file", MemoryError), ("resume", OSError)]
)
def test_resumes_to_equal_bits(
    family: str, fisher: str, kind: str, reason: type[BaseException], tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared(family)
    run = partial(calibrate, model, linears, tokens[:4], fisher=fisher)
    whole = run()
    stored = destination(kind, tmp_path)
    with pytest.raises(reason):
        run(**stored, advance=stopping_after(3, reason))
    assert done_in(stored_file(tmp_path)) == 3
    advanced: list[int] = []
    seen: list[Tensor] = []

    @wraps(causal_lm_loss)  # calibrations know a loss by its name
    def loss(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        seen.append(sample)
        return causal_lm_loss(model, sample)

    again = run(loss, **stored, advance=lambda: advanced.append(1))
    assert len(seen) == 1 and len(advanced) == 4
    assert same(again, whole)
    # The finished sums are stored too: packing may be interrupted as well.
    assert same(run(loss, **stored), whole) and len(seen) == 1


@pytest.mark.parametrize("seconds", [-1, 1000])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_an_error_within_a_sequence_leaves_whole_sequences_only(
    where: str, seconds: int, tokens: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fisher_module, "Periodic", partial(fisher_module.Periodic, seconds))
    model, linears = prepared("llama")
    whole = calibrate(model, linears, tokens[:4])
    file = tmp_path / "run.state"
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
        calibrate(model, linears, tokens[:4], loss, file=file)
    hook.remove()
    # Sums that hold a part of a sequence are not stored; what was stored before stays.
    assert (done_in(file) == 2) if seconds < 0 else not file.exists()
    assert same(calibrate(model, linears, tokens[:4], file=file), whole)


def test_ctrl_c_waits_for_the_sequence_to_end(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    whole = calibrate(model, linears, tokens[:4])
    file = tmp_path / "run.state"
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
        calibrate(model, linears, tokens[:4], loss, file=file)
    hook.remove()
    assert signal.getsignal(signal.SIGINT) is handler
    assert done_in(file) == 2
    assert same(calibrate(model, linears, tokens[:4], file=file), whole)


# Calibration files.


def test_a_loss_with_other_arguments_is_another(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    calibrated = partial(calibrate, model, linears, tokens[:1], file=tmp_path / "run.state")
    calibrated(partial(weighted_loss, factor=1.0))
    calibrated(partial(weighted_loss, factor=1.0))
    with pytest.raises(InputError, match="of another loss"):
        calibrated(partial(weighted_loss, factor=2.0))


def weighted_loss(model: nn.Module, sample: Tensor, factor: float) -> tuple[Tensor, int]:
    total, predictions = causal_lm_loss(model, sample)
    return factor * total, predictions


def test_a_calibration_file_is_used_again_or_refused(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    file = tmp_path / "run.state"
    calibrated = partial(calibrate, model, file=file)
    whole = calibrated(linears, tokens[:3])
    before = file.read_bytes()

    def unused(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        raise AssertionError

    unused.__module__ = causal_lm_loss.__module__  # calibrations know a loss by its name
    unused.__qualname__ = causal_lm_loss.__qualname__
    assert same(calibrated(linears, tokens[:3], unused), whole)

    def another(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        return causal_lm_loss(model, sample)

    def refused(meaning: str) -> Any:
        message = f"^{file}: a calibration {meaning}.*; name another file, or delete it$"
        return pytest.raises(InputError, match=message)

    with refused("on other token sequences"):
        calibrated(linears, tokens[3:6])
    with refused("of another loss, or with other labels"):
        calibrated(linears, tokens[:3], another)
    with refused("with other sites"):
        calibrated(linears, tokens[:3], groups={"value": ["model.layers.0.self_attn.v_proj"]})
    with refused("of other layers"):
        calibrated(dict(list(linears.items())[1:]), tokens[:3])
    embeddings = model.get_input_embeddings().weight.data  # not quantized, and part of the model
    for weight in (linears["model.layers.1.mlp.down_proj"].weight.data, embeddings):
        weight[0, 0] += 1
        with refused("of other weights"):
            calibrated(linears, tokens[:3])
        weight[0, 0] -= 1
    assert file.read_bytes() == before


def test_a_calibration_in_another_dtype_is_used_again(tokens: Tensor, tmp_path: Path) -> None:
    """The dtype of passes depends on the machine; the model is the same."""
    model = make_model("llama").bfloat16()
    file, linears = tmp_path / "run.state", quantizable(model)
    in_bf16 = calibrate(model, linears, tokens[:2], file=file)
    run_in(model, "float32")
    assert same(calibrate(model, linears, tokens[:2], file=file), in_bf16)


@pytest.mark.parametrize(("stored", "asked"), [("exact", "factored"), ("factored", "exact")])
def test_the_other_form_of_fisher_information_is_refused(
    stored: str, asked: str, tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared("llama")
    file = tmp_path / "run.state"
    calibrate(model, linears, tokens[:3], fisher=stored, file=file)
    message = f"^{file}: a calibration with another form of the Fisher information than the recipe"
    with pytest.raises(InputError, match=message):
        calibrate(model, linears, tokens[:3], fisher=asked, file=file)


def test_samples_differ_by_every_number_in_them(tmp_path: Path) -> None:
    """Also deep inside: a printed tensor of this size would show none of its middle."""
    model, file = Reused(), tmp_path / "run.state"
    linears = {"inner": model.inner, "outer": model.outer}

    def loss(model: nn.Module, sample: dict[str, Tensor]) -> tuple[Tensor, int]:
        return squares(model, sample["x"].float())

    samples = [{"x": torch.ones(500, 8, dtype=torch.bfloat16)}]
    calibrate(model, linears, samples, loss, file=file)
    samples[0]["x"][250, 4] = 100
    with pytest.raises(InputError, match="a calibration on other token sequences"):
        calibrate(model, linears, samples, loss, file=file)


def damages(path: Path) -> dict[str, bytes]:
    """A stored file cut short, with one bit of its header or of its tensors flipped."""
    whole = path.read_bytes()
    header, tensors = bytearray(whole), bytearray(whole)
    header[whole.index(b"crc32") + 30] ^= 1
    tensors[-100] ^= 1
    return {"cut": whole[: len(whole) // 2], "header": bytes(header), "tensors": bytes(tensors)}


def test_a_damaged_calibration_file_is_refused_by_name(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    file = tmp_path / "run.state"
    calibrate(model, linears, tokens[:2], file=file)
    for content in damages(file).values():
        file.write_bytes(content)
        with pytest.raises(InputError, match=f"^{file}: "):
            calibrate(model, linears, tokens[:2], file=file)
        assert file.read_bytes() == content  # it may be anything: it is not overwritten
    with pytest.raises(InputError, match=f"^{tmp_path}: is a folder, not a state file$"):
        calibrate(model, linears, tokens[:2], file=tmp_path)


def test_damaged_partial_results_are_reported_and_done_again(
    tokens: Tensor, tmp_path: Path
) -> None:
    model, linears = prepared("llama")
    lines: list[str] = []
    resume = destination("resume", tmp_path, lines.append)
    whole = calibrate(model, linears, tokens[:2], **resume)
    file = stored_file(tmp_path)
    intact = file.read_bytes()
    for content in damages(file).values():
        lines.clear()
        file.write_bytes(content)
        assert same(calibrate(model, linears, tokens[:2], **resume), whole)
        (line,) = lines
        assert line.startswith(f"{file}: ") and line.endswith(": calibration is done again")
        assert file.read_bytes() == intact


def test_partial_results_of_another_run_are_passed_over(tokens: Tensor, tmp_path: Path) -> None:
    model, linears = prepared("llama")
    calibrate(model, linears, tokens[:3], resume=PartialResults(tmp_path, "0" * 16))
    other = calibrate(model, linears, tokens[3:6], resume=PartialResults(tmp_path, "1" * 16))
    assert same(other, calibrate(model, linears, tokens[3:6]))
    assert len(list(tmp_path.iterdir())) == 2


def test_a_full_disk_costs_the_state_and_not_the_run(tokens: Tensor, tmp_path: Path) -> None:
    """The state's folder cannot be made, because a file has its name."""
    model, linears = prepared("llama")
    (tmp_path / "taken").write_text("")
    file = tmp_path / "taken" / "run.state"
    with pytest.warns(UserWarning, match=r"run\.state: could not be written .* not be resumed"):
        calibration = calibrate(model, linears, tokens[:2], file=file)
    assert same(calibration, calibrate(model, linears, tokens[:2]))
