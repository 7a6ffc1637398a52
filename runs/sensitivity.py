"""How well cheaper and other estimates of the weights' sensitivity rank blocks.

    python runs/sensitivity.py MODEL --calib TEXT [--samples 128] [--seq-len 256] [--cache DIR]
    python runs/sensitivity.py --memory

The first command prints JSON: for each estimate, the Spearman rank correlation of its block scores
with those of the exact F_w, over all blocks and as the median over linears, and the ratio of the
sums of scores. ``exact, half of the text`` says how far F_w agrees with itself. The second says
what calibrating a Llama of 70B parameters holds, from its shapes alone.

Rows of ``runs/accuracy.py`` say what an estimate is worth in the end; :func:`estimated` makes them,
by writing the estimate into a copy of a saved calibration.

factored                (sum over tokens g^2) (sum over tokens x^2) / tokens, of the recipe's
                        ``fisher: factored``
by token                (g^2)^T (x^2): squares of each token's gradient, not of a sequence's sum
nearest rank one        row sums times column sums of the exact F_w over its sum
at the quantized point  exact, activations' as well, of the model quantized at 70%, straight through
of the text's labels    exact, activations' as well, of the text's next tokens: the empirical Fisher
                        information, of the recipe's ``labels: text``

Labels of all others are drawn from the model's predictions, the default.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from provenance import provenance
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from fgmp import Recipe, calibration_text
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import score_weights
from fgmp.formats.activation import Site, fake_quantize
from fgmp.model.linear import mixed_linears
from fgmp.model.select import linearize, quantizable
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.sensitivity import memory
from fgmp.sensitivity.fisher import (
    Loss,
    calibrate,
    causal_lm_loss,
    drawn_label_loss,
    frozen,
)
from fgmp.sensitivity.squares import SQUARES
from fgmp.sequential import stage_bytes

if TYPE_CHECKING:
    from accuracy import Setting

Tensors = dict[str, Tensor]


def estimated(setting: Setting, label: str, **fields: object) -> nn.Module:
    """The model quantized by a recipe on another estimate of the sensitivities."""
    state = setting.state.with_suffix(f".{label.replace(' ', '-')}.safetensors")
    other = replace(setting, state=state, reuse=True)
    recipe = Recipe(**fields)  # type: ignore[arg-type]
    if not other.calibration(recipe).exists():
        setting.quantized(compensate=False)  # calibrates
        with safe_open(setting.calibration(recipe), framework="pt") as file:
            sums, facts = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        save_file(sums | ESTIMATES[label](setting), other.calibration(recipe), metadata=facts)
    return other.quantized(**fields)


def from_gradients(add: Callable[[Tensor, Tensor], Tensor], setting: Setting) -> Tensors:
    """Sums over sequences of ``add`` of a linear's inputs (T, K) and output gradients (T, N)."""
    model, linears = _linears(setting)
    sums: Tensors = {}

    def differentiate(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] if args[0].requires_grad else args[0].detach().requires_grad_(),)

    def after(name: str, _: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        x = args[0].detach().flatten(0, -2)

        def count(gradient: Tensor) -> None:
            found = add(x, gradient.flatten(0, -2))
            sums[f"weight.{name}"] = found + sums.get(f"weight.{name}", 0)

        out.register_hook(count)

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(differentiate).remove)
            stack.callback(linear.register_forward_hook(partial(after, name)).remove)
        for sample in setting.text.samples:
            drawn_label_loss(model, sample)[0].backward()
    return sums


def by_token(x: Tensor, gradient: Tensor) -> Tensor:
    """Sum over tokens of each one's squared weight gradient."""
    return gradient.square().T @ x.square()


def nearest_rank_one(setting: Setting) -> Tensors:
    """Of the exact F_w, in generalized Kullback-Leibler divergence."""
    exact = from_gradients(lambda x, g: (g.T @ x).square(), setting)
    return {k: torch.outer(f.sum(1), f.sum(0)) / f.sum() for k, f in exact.items()}


def calibrated(
    setting: Setting, loss: Loss = drawn_label_loss, weights: Tensors | None = None, **options: Any
) -> Tensors:
    """F_w and F_x as sums, of another loss or at other weights, by options of ``calibrate``."""
    model, linears = _linears(setting)
    for name, weight in (weights or {}).items():
        linears[name].weight.data.copy_(weight)
    found = calibrate(model, linears, setting.text.samples, loss, **options)
    sums = {f"weight.{name}": f * found.predictions for name, f in found.weights.items()}
    return sums | {f"site.{n}": s.g2 * found.predictions for n, s in found.sites.items()}


def quantized_point(setting: Setting) -> Tensors:
    """Weights and activations as quantized at 70%; gradients pass through rounding."""
    packed = setting.quantized(fp4=0.7)
    weights = {name: linear.weight for name, linear in mixed_linears(packed).items()}
    records = {name: m.input_site.record for name, m in mixed_linears(packed).items()}

    def loss(model: nn.Module, tokens: Tensor) -> tuple[Tensor, int]:
        with _rounding(model, records):
            return drawn_label_loss(model, tokens)

    return calibrated(setting, loss, weights)


@contextmanager
def _rounding(model: nn.Module, records: dict[str, Site]) -> Iterator[None]:
    """Linears read quantized activations; hooks of calibration, set before, see the original's."""

    def quantize(record: Site, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0]
        return (x + (fake_quantize(x.detach(), record)[0] * record.t - x.detach()),)

    with ExitStack() as stack:
        for name, record in records.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(quantize, record)).remove)
        yield


ESTIMATES: dict[str, Callable[[Setting], Tensors]] = {
    "factored": partial(calibrated, fisher="factored"),
    "by token": partial(from_gradients, by_token),
    "nearest rank one": nearest_rank_one,
    "at the quantized point": quantized_point,
    "of the text's labels": partial(calibrated, loss=causal_lm_loss),
}


def scores(weights: Tensors, fisher: Tensors) -> Tensors:
    """Of all blocks by linear, float64 (N, G), under nearest scales: only F_w may differ."""
    sums = {name: fisher[f"weight.{name}"] for name in weights}
    groups = [[name] for name in weights]
    rule = Recipe().rule
    return score_weights(weights, sums, groups, POLICIES["fisher"], rule=rule, clipped=False).scores


def spearman(a: Tensor, b: Tensor) -> float:
    """Correlation of ranks, those of equal values averaged."""
    return torch.corrcoef(torch.stack([_ranks(a.flatten()), _ranks(b.flatten())]))[0, 1].item()


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[inverse]


def agreement(exact: Tensors, other: Tensors) -> dict[str, float]:
    """Of two sets of scores."""
    ours, theirs = (torch.cat([s.flatten() for s in some.values()]) for some in (exact, other))
    by_linear = torch.tensor([spearman(exact[name], other[name]) for name in exact])
    return {
        "spearman": spearman(ours, theirs),
        "spearman_by_linear_median": by_linear.median().item(),
        "sum_over_exact": (theirs.sum() / ours.sum()).item(),
    }


def correlations(setting: Setting) -> dict[str, dict[str, float]]:
    """Every estimate's agreement with the exact F_w."""
    weights = {name: m.weight.detach() for name, m in _linears(setting)[1].items()}
    exact = scores(weights, calibrated(setting))
    half = replace(setting, text=replace(setting.text, samples=setting.text.samples[::2]))
    more = len(setting.text.samples) / len(half.text.samples)
    part = {key: more * sums for key, sums in calibrated(half).items()}
    found = {"exact, half of the text": agreement(exact, scores(weights, part))}
    for label, estimate in ESTIMATES.items():
        found[label] = agreement(exact, scores(weights, estimate(setting)))
    return found


def memory_of_70b() -> dict[str, float]:
    """Gigabytes that calibrating a Llama of 70B parameters keeps beside the model."""
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    linears = quantizable(model)
    parts = {f"fisher, {kind}": memory.fisher_bytes(linears, kind) for kind in SQUARES}
    parts["moments and factors of a stage, if compensated"] = stage_bytes(model, linears)
    parameters = sum(linear.weight.numel() for linear in linears.values())
    return {
        "quantized_parameters_billions": parameters / 1e9,
        **{f"{name}_gb": size / 1e9 for name, size in parts.items()},
    }


def _linears(setting: Setting) -> tuple[nn.Module, dict[str, nn.Linear]]:
    model = setting.load()
    linearize(model)
    return model, quantizable(model)


def main() -> None:
    from accuracy import Setting  # which imports this file for its rows

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?")
    parser.add_argument("--calib")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--cache", type=Path, default=Path("accuracy-cache"))
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(memory_of_70b(), indent=1))
        return
    if not args.model or not args.calib:
        parser.error("a model and --calib, or --memory")
    args.cache.mkdir(parents=True, exist_ok=True)
    seq_len = args.seq_len or min(512, context_length(load_model(args.model)))
    text = calibration_text(
        args.calib, load_tokenizer(args.model), samples=args.samples, seq_len=seq_len, seed=0
    )
    state = args.cache / f"{text.fingerprint[:8]}.sensitivity.safetensors"
    setting = Setting(args.model, text, seq_len, 0, state, Console(stderr=True))
    facts = {
        "model": Path(args.model).name,
        "calibration_sequences": len(text.samples),
        "seq_len": seq_len,
        **provenance(),
        "estimates": correlations(setting),
    }
    print(json.dumps(facts, indent=1))


if __name__ == "__main__":
    sys.exit(main())
