"""Where a quantized model's predictions differ most: passages of text with KL per token.

The divergence at a token is that of the two distributions from which it was predicted, so the first
token of a window has none. Passages are the surroundings of the tokens with the largest divergence;
they do not overlap.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fgmp.evaluation.perplexity import batches, next_token_log_probabilities
from fgmp.progress import Progress, silent

_AROUND = 24
"""Tokens before and after the peak of a passage."""
_ALTERNATIVES = 3
"""Most likely next tokens that are shown of each model."""

Decode = Callable[[Sequence[int]], str]
"""Text of a sequence of token ids."""


@dataclass(frozen=True)
class Passage:
    """Text around one token.

    Attributes:
        tokens: texts of the tokens.
        kl: divergence from the original at each, in nats; None at a window's first token.
        peak: index of the token with the largest divergence.
        original, quantized: most likely tokens at the peak with their probabilities.
        actual: probabilities of the actual token at the peak, by the original and quantized model.
    """

    tokens: list[str]
    kl: list[float | None]
    peak: int
    original: list[tuple[str, float]]
    quantized: list[tuple[str, float]]
    actual: tuple[float, float]

    @property
    def peak_kl(self) -> float:
        """Divergence at the peak, in nats."""
        return self.kl[self.peak] or 0.0


@torch.no_grad()
def changed_passages(
    original: nn.Module,
    quantized: nn.Module,
    windows: Tensor,
    decode: Decode,
    count: int = 8,
    progress: Progress = silent,
) -> list[Passage]:
    """Passages in which two models' predictions differ most, the largest divergence first.

    Args:
        original, quantized: causal LMs.
        windows: int64 (B, L).
        decode: text of a sequence of token ids.
        count: largest number of passages.
        progress: reports progress.
    """
    original.eval()
    quantized.eval()
    divergences, probabilities, likely = [], [], []
    with progress("looking for changes", len(batches(windows))) as advance:
        for batch in batches(windows):
            pair = [next_token_log_probabilities(m, batch).cpu() for m in (original, quantized)]
            reference, predicted = pair
            divergences.append((reference.exp() * (reference - predicted)).sum(-1))
            targets = batch[:, 1:, None].cpu()
            probabilities.append(torch.stack([p.gather(-1, targets)[..., 0].exp() for p in pair]))
            best = [p.topk(min(_ALTERNATIVES, p.shape[-1])) for p in pair]
            likely.append([(b.values.exp(), b.indices) for b in best])
            advance()
    kl, actual = torch.cat(divergences), torch.cat(probabilities, 1)
    best_of = [
        (torch.cat([part[i][0] for part in likely]), torch.cat([part[i][1] for part in likely]))
        for i in (0, 1)
    ]
    passages = []
    for window, position in _peaks(kl, count):
        start = max(0, position + 1 - _AROUND)
        stop = min(windows.shape[1], position + 2 + _AROUND)
        own = [None, *kl[window].tolist()]
        before = windows[window, position].item()
        alternatives = [
            [
                (_pieces(decode, [int(before), token])[1], share)
                for token, share in zip(
                    ids[window, position].tolist(), shares[window, position].tolist(), strict=True
                )
            ]
            for shares, ids in best_of
        ]
        passages.append(
            Passage(
                tokens=_pieces(decode, windows[window, start:stop].tolist()),
                kl=own[start:stop],
                peak=position + 1 - start,
                original=alternatives[0],
                quantized=alternatives[1],
                actual=(
                    actual[0, window, position].item(),
                    actual[1, window, position].item(),
                ),
            )
        )
    return passages


def _pieces(decode: Decode, ids: Sequence[int]) -> list[str]:
    """Text that each token adds; a token that ends within a character adds nothing yet."""
    pieces: list[str] = []
    done = 0
    for count in range(1, len(ids) + 1):
        text = decode(ids[:count]).rstrip("\ufffd")
        pieces.append(text[done:])
        done = max(done, len(text))
    return pieces


def _peaks(kl: Tensor, count: int) -> list[tuple[int, int]]:
    """Window and position of the largest values of (B, T), further apart than a passage."""
    order = kl.flatten().argsort(descending=True)
    peaks: list[tuple[int, int]] = []
    for index in order.tolist():
        window, position = divmod(index, kl.shape[1])
        if all(w != window or abs(p - position) > 2 * _AROUND for w, p in peaks):
            peaks.append((window, position))
        if len(peaks) == count:
            break
    return peaks
