"""A setting of a tiny random Llama, for the tests of runs/."""

from pathlib import Path

import torch
from conftest import make_model
from measuring import Measured, Original, measure
from rich.console import Console
from setting import Setting
from torch import Tensor, nn

from fgmp.data import choose_windows

SEQ_LEN = 24


class TinySetting(Setting):
    """Loads a random model by its family."""

    def load(self) -> nn.Module:
        return make_model(self.name)


def tiny_setting(folder: Path) -> Setting:
    """Eight calibration windows of random tokens; files go to ``folder``."""
    stream = torch.randint(128, (400,), generator=torch.Generator().manual_seed(1))
    text = choose_windows(stream, samples=8, seq_len=SEQ_LEN, seed=0)
    return TinySetting("llama", text, SEQ_LEN, 0, folder / "tiny", Console(quiet=True))


def windows() -> Tensor:
    """Evaluation windows, int64 (6, 24)."""
    return torch.randint(128, (6, SEQ_LEN), generator=torch.Generator().manual_seed(2))


def measured(model: nn.Module) -> Measured:
    """Measure a quantized model on the evaluation windows."""
    return measure(model, Original(make_model("llama"), windows()), windows())
