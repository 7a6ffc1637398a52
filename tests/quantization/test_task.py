"""A task names its partial results by all that they depend on, and by nothing else."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from torch import Tensor, nn

from fgmp import Recipe
from fgmp.assign.methods import Methods
from fgmp.formats.weight import nearest_scale_codes
from fgmp.model.losses import causal_lm_loss, sampled_label_loss
from fgmp.quantization.pipeline import prepare
from fgmp.quantization.task import BudgetResult, Task


def task_of(
    tokens: Tensor, model: nn.Module | None = None, recipe: Any = None, **options: Any
) -> Task:
    recipe = Recipe(**{"clip": "off", "compensate": False, **(recipe or {})})
    options = {"held_out": tokens[:2], **options}
    return prepare(model or make_model("llama"), tokens, recipe, **options).task


def test_partial_results_are_of_one_run(tokens: Tensor, tmp_path: Path) -> None:
    def key(samples: Tensor = tokens, *inputs: Any, **options: Any) -> str:
        results = task_of(samples, resume=tmp_path, **options).partial_results(*inputs)
        assert results is not None and results.folder == tmp_path
        return results.key

    expected = key()
    assert key() == expected
    # Tuning comes after packing; what held-out text decides names it among its inputs.
    assert key(recipe={"tune": 1}) == expected
    assert key(held_out=tokens[2:5]) == expected
    buffered = make_model("llama")  # a difference that no gradient shows
    buffered.register_buffer("unused", torch.zeros(1))
    head = make_model("llama")
    head.get_output_embeddings().weight.data[0, 0] += 1
    others = [
        key(model=buffered),
        key(model=head),
        key(tokens[:-1]),
        key(tokens.flip(0)),
        key(recipe={"fp4": 0.5}),
        key(recipe={"clip": "on"}),
        key(recipe={"fp4_activations": 0.5}),
        key(recipe={"exclude": ("*.0.*",)}),
        key(recipe={"seed": 1}),
        key(methods=Methods(damping=0.1)),
        key(methods=Methods(search_scales=lambda weight, f, t: nearest_scale_codes(weight, t))),
        key(tokens, "stage 1"),
        key(tokens, "stage 2"),
        key(tokens, "stage 2", torch.zeros(2)),
    ]
    assert len({expected, *others}) == 1 + len(others)


def test_fewer_linears_are_another_run(tokens: Tensor, tmp_path: Path) -> None:
    task = task_of(tokens, resume=tmp_path)
    first = dict(list(task.linears.items())[:1])
    one, other = (t.partial_results() for t in (task, replace(task, linears=first)))
    assert one is not None and other is not None and one.key != other.key


def test_without_a_folder_nothing_is_stored(tokens: Tensor) -> None:
    assert task_of(tokens).partial_results("stage 1") is None


def test_damaged_partial_results_are_reported_to_the_caller(tokens: Tensor, tmp_path: Path) -> None:
    lines: list[str] = []
    task = task_of(tokens, resume=tmp_path, report=lines.append)
    lines.clear()
    results = task.partial_results("stage 1")
    assert results is not None
    results.file("packing").path.write_bytes(b"no state")
    assert results.load("packing") is None
    assert len(lines) == 1 and "packing is done again" in lines[0]


@pytest.mark.parametrize(
    ("labels", "expected"), [("model", sampled_label_loss), ("text", causal_lm_loss)]
)
def test_the_loss_whose_gradients_are_squared(
    labels: str, expected: object, tokens: Tensor
) -> None:
    task = task_of(tokens, recipe={"labels": labels})
    assert task.fisher_loss is expected and task.loss is causal_lm_loss

    def another(model: nn.Module, sample: Tensor) -> tuple[Tensor, int]:
        return causal_lm_loss(model, sample)

    assert replace(task, loss=another).fisher_loss is another


def test_weights_are_those_of_the_linears(tokens: Tensor) -> None:
    task = task_of(tokens, recipe={"include": ("*.layers.1.*",)})
    assert task.weights.keys() == task.linears.keys()
    for name, weight in task.weights.items():
        assert name.startswith("model.layers.1.") and not weight.requires_grad
        assert weight.data_ptr() == task.model.get_parameter(f"{name}.weight").data_ptr()


def test_a_budget_tells_what_it_came_to() -> None:
    assert BudgetResult().to_dict() == {}
    assert BudgetResult(bits=5.5, energy_percent=0.0).to_dict() == {
        "bits": 5.5,
        "energy_percent": 0.0,
    }
