"""Passes run in a dtype that is fast on the machine; files keep their own."""

import pytest
import torch
from conftest import make_model
from pytest import MonkeyPatch
from torch import nn

from fgmp import InputError
from fgmp.model import precision
from fgmp.model.precision import compute_dtype, round_to_stored, run_in, stored_dtype
from fgmp.model.store import bytes_to_save, tensors_to_save

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("stored", "device", "choice", "arithmetic", "expected"),
    [
        (torch.bfloat16, CPU, "auto", False, torch.float32),
        (torch.bfloat16, CPU, "auto", True, torch.bfloat16),
        (torch.bfloat16, CPU, "stored", False, torch.bfloat16),
        (torch.bfloat16, CPU, "float32", True, torch.float32),
        (torch.bfloat16, GPU, "auto", False, torch.bfloat16),
        (torch.float16, GPU, "stored", True, torch.float32),
        (torch.float32, CPU, "stored", True, torch.float32),
    ],
)
def test_the_dtype_of_passes(
    stored: torch.dtype,
    device: torch.device,
    choice: str,
    arithmetic: bool,
    expected: torch.dtype,
    monkeypatch: MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "has_bf16_arithmetic", lambda: arithmetic)
    assert compute_dtype(stored, device, choice) == expected


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(InputError, match="dtype must be one of auto, float32, stored, got 'bf16'"):
        run_in(make_model("llama"), "bf16")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_in_fp32_stays(dtype: torch.dtype) -> None:
    model = make_model("llama").to(dtype)
    norm = model.model.norm.float()
    assert run_in(run_in(model, "float32"), "auto") is model
    assert model.dtype == norm.weight.dtype == torch.float32 and stored_dtype(model) == dtype
    dtypes = {name: tensor.dtype for name, tensor in tensors_to_save(model).items()}
    assert dtypes.pop("model.norm.weight") == torch.float32
    assert set(dtypes.values()) == {dtype}
    assert bytes_to_save(model) == {n: t.nbytes for n, t in tensors_to_save(model).items()}


def test_parameters_with_new_names_are_stored_as_the_model_is() -> None:
    """Fused experts become linears after the conversion."""
    model = run_in(nn.Sequential(nn.Linear(2, 2)).bfloat16(), "float32")
    model.add_module("new", nn.Linear(2, 2))
    model.register_buffer("constant", torch.ones(2))
    dtypes = {name: tensor.dtype for name, tensor in tensors_to_save(model).items()}
    assert dtypes.pop("constant") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_rounding_to_what_is_stored() -> None:
    model = run_in(nn.Linear(2, 1).bfloat16(), "float32")
    with torch.no_grad():
        model.weight.fill_(1 + 2**-12)
    round_to_stored(model)
    assert model.weight.dtype == torch.float32 and (model.weight == 1).all()
