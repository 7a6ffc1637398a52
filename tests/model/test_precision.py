"""Passes run in a dtype that is fast on the machine; files keep their own."""

from pathlib import Path

import pytest
import torch
from conftest import make_model
from pytest import MonkeyPatch
from safetensors.torch import load_file
from torch import Tensor, nn

import fgmp
from fgmp import InputError, Recipe
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


def test_a_checkpoint_is_loaded_in_a_fast_dtype(
    tokens: Tensor, tmp_path: Path, monkeypatch: MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "has_bf16_arithmetic", lambda: False)
    model = make_model("llama").bfloat16()
    fgmp.save(
        fgmp.quantize(model, tokens[:4], Recipe(clip="off", compensate=False)), tmp_path / "a"
    )
    fast = fgmp.load(tmp_path / "a", dtype="auto")
    assert fast.dtype == torch.float32 and fgmp.load(tmp_path / "a").dtype == torch.bfloat16
    fgmp.save(fast, tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert a.keys() == b.keys()
    assert all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def test_rounding_to_what_is_stored() -> None:
    model = run_in(nn.Linear(2, 1).bfloat16(), "float32")
    with torch.no_grad():
        model.weight.fill_(1 + 2**-12)
    round_to_stored(model)
    assert model.weight.dtype == torch.float32 and (model.weight == 1).all()


def test_a_copy_that_does_not_fit_is_not_made(monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_bf16_arithmetic", lambda: False)
    monkeypatch.setattr(precision, "_fits", lambda model, free: False)
    assert run_in(make_model("llama").bfloat16()).dtype == torch.bfloat16
    assert run_in(make_model("llama").bfloat16(), "float32").dtype == torch.float32
    assert run_in(make_model("llama").half()).dtype == torch.float32  # fp16 would overflow
