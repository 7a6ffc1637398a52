"""Logits of the original model, reproducible batch by batch after the model is gone.

At a vocabulary of 151,936 the fp32 logits of 512 tokens take 311 MB. The input of the output head
takes 1.8 MB at width 896. So that input and the head are kept, and the head is run again whenever
the logits are needed. Gemma caps its logits after the head, which is repeated too. Whether the
result has the bits of the model's own logits is checked on the first batch. If it has not, because
a model scales its logits in a way of its own, all logits are written to files.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.evaluation.perplexity import logits_of
from fgmp.model.select import output_head


class Reference:
    """Logits of a causal LM on batches of windows.

    Args:
        model: the causal LM; only its output head is kept.
        folder: existing folder for files, if they are needed.
        batches: number of batches to record.

    Attributes:
        in_files: whether logits are in files; None before the first batch.
    """

    def __init__(self, model: nn.Module, folder: Path, batches: int) -> None:
        self._head = output_head(model)
        self._cap = _logit_cap(model)
        self._folder, self._batches = folder, batches
        self._inputs: list[Tensor] = []
        self._recorded = 0
        self.in_files: bool | None = None

    def record(self, model: nn.Module, batch: Tensor) -> Tensor:
        """Run the model on the next batch, int64 (B, L), and return its logits (B, L, V).

        Raises:
            InputError: logits go to files, and the disk has too little room for all batches.
        """
        inputs: list[Tensor] = []
        hook = self._head and self._head.register_forward_pre_hook(
            lambda _, args: inputs.append(args[0])
        )
        logits = logits_of(model, batch)
        if hook:
            hook.remove()
        if self.in_files is None:
            self.in_files = not (inputs and torch.equal(self._logits(inputs[-1]), logits))
            if self.in_files:
                _require_room(self._folder, logits.nbytes * self._batches)
        if self.in_files:
            torch.save(logits, self._file(self._recorded))
        else:
            self._inputs.append(inputs[-1])
        self._recorded += 1
        return logits

    def logits(self, index: int) -> Tensor:
        """Logits (B, L, V) of a recorded batch, by its number."""
        if self.in_files:
            loaded: Tensor = torch.load(self._file(index), weights_only=True)
            return loaded
        return self._logits(self._inputs[index])

    @torch.no_grad()
    def _logits(self, head_input: Tensor) -> Tensor:
        assert self._head is not None
        logits: Tensor = self._head(head_input)
        return logits if self._cap is None else torch.tanh(logits / self._cap) * self._cap

    def _file(self, index: int) -> Path:
        return self._folder / f"logits-{index}.pt"


def _logit_cap(model: nn.Module) -> float | None:
    """Final logit soft-capping, as Gemma has; None if the configuration names none."""
    config: Any = getattr(model, "config", None)
    for part in (getattr(config, "text_config", None), config):
        cap = getattr(part, "final_logit_softcapping", None)
        if isinstance(cap, int | float):
            return float(cap)
    return None


def _require_room(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"the original's logits need {needed / 1e9:.1f} GB of disk in {folder}, "
            f"{free / 1e9:.1f} GB are free; set TMPDIR to a larger disk, or use fewer windows"
        )
