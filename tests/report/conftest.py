"""A small checkpoint that the report's tests share, and copies of it to change."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model

import fgmp
from fgmp import Recipe


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny Llama, 70% FP4. Not to be changed."""
    tokens = torch.randint(128, (8, 24), generator=torch.Generator().manual_seed(1))
    model = fgmp.quantize(make_model("llama"), tokens, Recipe(clip="on"))
    folder = tmp_path_factory.mktemp("report") / "tiny"
    fgmp.save(model, folder)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copy the checkpoint under another name."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    return copy
