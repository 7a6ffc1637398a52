"""Loss and KL divergence of a quantized model on evaluation windows, window by window."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from provenance import provenance
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.evaluation.compare import activation_fraction, start_counting, weight_bits
from fgmp.evaluation.perplexity import (
    batches,
    divergence_of,
    log_probabilities_of,
    loss_of,
    next_token_log_probabilities,
)


@dataclass(frozen=True)
class Measured:
    """One model on the evaluation windows.

    Attributes:
        loss, kl: sums over each window in nats, float64 (B,).
        bits_per_weight: every byte of the packed planes counted.
        fp4_activations: fraction of activation blocks in FP4.
        revision: of the code that measured.
    """

    loss: Tensor
    kl: Tensor
    bits_per_weight: float
    fp4_activations: float
    revision: str


class Original:
    """Log-probabilities of the original model, recomputed batch by batch when iterated over.

    Stored are the inputs of the output head. The log-probabilities of a hundred thousand tokens
    over a vocabulary of 49,152 would take 20 GB.

    Args:
        model: the original.
        windows: int64 (B, L).

    Raises:
        InputError: the logits are not what the output head returns.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, windows: Tensor) -> None:
        self.head = model.get_output_embeddings()
        self.inputs: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, args: self.inputs.append(args[0]))
        losses = []
        for batch in batches(windows):
            log_probabilities = next_token_log_probabilities(model.eval(), batch)
            losses.append(loss_of(log_probabilities, batch))
            if len(losses) == 1 and not torch.equal(self.recomputed(0), log_probabilities):
                raise InputError(f"{type(model).__name__}: logits must be what its head returns")
        hook.remove()
        self.losses = torch.cat(losses)

    @torch.no_grad()
    def recomputed(self, batch: int) -> Tensor:
        """Log-probabilities of one batch, fp32 (b, L - 1, V)."""
        logits: Tensor = self.head.forward(self.inputs[batch])  # skips the hook above
        return log_probabilities_of(logits[:, :-1])

    def __iter__(self) -> Iterator[Tensor]:
        """Log-probabilities, fp32 (b, L - 1, V), of one batch after the other."""
        return (self.recomputed(batch) for batch in range(len(self.inputs)))


@torch.no_grad()
def measure(model: nn.Module, reference: Iterable[Tensor], windows: Tensor) -> Measured:
    """Measure a quantized model on windows, int64 (B, L).

    Args:
        model: packed.
        reference: log-probabilities of the original, fp32 (b, L - 1, V), by batch.
        windows: evaluation windows.
    """
    start_counting(model)
    losses, divergences = [], []
    for batch, original in zip(batches(windows), reference, strict=True):
        log_probabilities = next_token_log_probabilities(model.eval(), batch)
        losses.append(loss_of(log_probabilities, batch))
        divergences.append(divergence_of(log_probabilities, original))
    return Measured(
        torch.cat(losses),
        torch.cat(divergences),
        weight_bits(model),
        activation_fraction(model),
        provenance()["revision"],
    )
