"""Compare the original with all-FP8, all-NVFP4 and FGMP models on the same windows in one run.

``kl`` is the mean KL divergence per token of a model's predictions from the original's. It is the
less noisy metric: on small, overconfident models quantization noise can *lower* perplexity.

Intervals are paired. Windows are resampled together for a model and the original, which gives an
interval of their perplexity ratio; it is reported times the original's perplexity.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.evaluation.perplexity import (
    Losses,
    batches,
    divergence_of,
    loss_of,
    next_token_log_probabilities,
)
from fgmp.formats.spec import BLOCK, FP4_BITS, FP8_BITS, stream_bits
from fgmp.model.linear import sites, weight_holders
from fgmp.model.precision import stored_dtype
from fgmp.progress import Progress, silent

CONTEXT = 4096
"""Tokens whose activations ``compression`` counts in addition to the weights, as in the paper."""

_REFERENCE_BITS = 16
_RESAMPLES = 2000
_SMALLEST_GAP = 0.005


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        name: ``original``, ``fp8``, ``nvfp4`` or ``fgmp``.
        perplexity: exp of the mean next-token loss.
        ci95: 95% interval of the perplexity, paired with the original's.
        kl: mean KL divergence from the original per token, in nats.
        bits_per_weight: all bytes stored for the quantized weights, per weight; for the original,
            the bits of its dtype.
        bits_per_activation: bits per value of the stream that hardware moves, flags included.
        compression: 16 over the mean bits per value of the weights and 4,096 tokens' activations.
        fp4_activations: fraction of activation blocks that ran in FP4; None for the original.
        vs_fp8_percent: increase of perplexity over all-FP8's.
        gap_recovered_percent: fraction of the perplexity gap between all-NVFP4 and all-FP8 that is
            closed; None if that gap is below 0.5% of all-FP8's perplexity, and for the original.
        kl_gap_recovered_percent: likewise for the KL gap; None if there is none.
    """

    name: str
    perplexity: float
    ci95: tuple[float, float]
    kl: float
    bits_per_weight: float
    bits_per_activation: float
    compression: float
    fp4_activations: float | None
    vs_fp8_percent: float
    gap_recovered_percent: float | None
    kl_gap_recovered_percent: float | None

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return {**asdict(self), "ci95": list(self.ci95)}


@dataclass
class _Measured:
    losses: Losses
    kl: float
    weight_bits: float
    activation_bits: float
    compression: float
    fp4_activations: float | None


def compare(
    original: nn.Module,
    models: dict[str, nn.Module],
    windows: Tensor,
    progress: Progress = silent,
) -> list[Row]:
    """Measure the original and quantized models on the same windows.

    Args:
        original: the unquantized causal LM.
        models: quantized models by name; ``fp8`` and ``nvfp4``, the ends of the gap, are required.
        windows: evaluation windows, int64 (B, L).
        progress: reports progress.

    Returns:
        One row per model, the original first.
    """
    losses: dict[str, list[Tensor]] = {"original": [], **{name: [] for name in models}}
    divergence = dict.fromkeys(models, 0.0)
    for model in models.values():
        start_counting(model)
    original.eval()
    with progress("comparing", len(batches(windows))) as advance:
        for batch in batches(windows):
            reference = next_token_log_probabilities(original, batch)
            losses["original"].append(loss_of(reference, batch))
            for name, model in models.items():
                predicted = next_token_log_probabilities(model.eval(), batch)
                losses[name].append(loss_of(predicted, batch))
                divergence[name] += divergence_of(predicted, reference).sum().item()
            advance()
    by_model = {name: Losses(torch.cat(ls), windows.shape[1] - 1) for name, ls in losses.items()}
    measured = {"original": _original_row(original, by_model["original"])}
    for name, model in models.items():
        fraction = activation_fraction(model)
        measured[name] = _Measured(
            by_model[name],
            divergence[name] / by_model[name].predicted_tokens,
            weight_bits(model),
            activation_bits(name, fraction),
            _compression(model, activation_bits(name, fraction), windows.numel()),
            fraction,
        )
    return [_row(name, m, measured) for name, m in measured.items()]


def start_counting(model: nn.Module) -> None:
    """Make every activation site count FP4 blocks and saturated elements, starting from zero."""
    for site in sites(model).values():
        site.counting = True
        site.counts = [0, 0, 0]


def activation_fraction(model: nn.Module) -> float:
    """Fraction of activation blocks that ran in FP4 since :func:`start_counting`."""
    counts = [site.counts for site in sites(model).values()]
    return sum(c[0] for c in counts) / max(1, sum(c[1] for c in counts))


def saturated_elements(model: nn.Module) -> int:
    """Number of activation elements beyond the largest FP8 value since :func:`start_counting`."""
    return sum(site.counts[2] for site in sites(model).values())


def drift(model: nn.Module, calibrated: dict[str, float]) -> dict[str, float]:
    """Fraction of FP4 blocks since :func:`start_counting`, minus that at calibration, by site."""
    return {
        name: site.counts[0] / site.counts[1] - calibrated[name]
        for name, site in sites(model).items()
        if site.counts[1]
    }


def weight_bits(model: nn.Module) -> float:
    """Bits per quantized weight, counting every stored byte of the planes."""
    packed = [m.packed for m in weight_holders(model).values()]
    return 8 * sum(p.nbytes for p in packed) / sum(p.n * p.k for p in packed)


def activation_bits(name: str, fp4_fraction: float) -> float:
    """Bits per activation value; only the mixed stream needs flags."""
    return {"fp8": FP8_BITS, "nvfp4": FP4_BITS}.get(name, stream_bits(fp4_fraction))


def _compression(model: nn.Module, bits: float, tokens: int) -> float:
    weights = sum(m.packed.n * m.packed.k for m in weight_holders(model).values())
    values = sum(s.counts[1] * BLOCK for s in sites(model).values()) / tokens * CONTEXT
    return _REFERENCE_BITS * (weights + values) / (weight_bits(model) * weights + bits * values)


def _original_row(original: nn.Module, losses: Losses) -> _Measured:
    bits = 8.0 * stored_dtype(original).itemsize
    return _Measured(losses, 0.0, bits, bits, _REFERENCE_BITS / bits, None)


def _row(name: str, m: _Measured, measured: dict[str, _Measured]) -> Row:
    original, fp8, nvfp4 = (measured[n] for n in ("original", "fp8", "nvfp4"))
    ppl, ppl8, ppl4 = (x.losses.perplexity for x in (m, fp8, nvfp4))
    gap, kl_gap = ppl4 - ppl8, nvfp4.kl - fp8.kl
    quantized = m is not original
    return Row(
        name=name,
        perplexity=ppl,
        ci95=_interval(m.losses, original.losses),
        kl=m.kl,
        bits_per_weight=m.weight_bits,
        bits_per_activation=m.activation_bits,
        compression=m.compression,
        fp4_activations=m.fp4_activations,
        vs_fp8_percent=100 * (ppl / ppl8 - 1),
        gap_recovered_percent=(
            100 * (ppl4 - ppl) / gap if quantized and gap >= _SMALLEST_GAP * ppl8 else None
        ),
        kl_gap_recovered_percent=(
            100 * (nvfp4.kl - m.kl) / kl_gap if quantized and kl_gap > 0 else None
        ),
    )


def _interval(losses: Losses, original: Losses) -> tuple[float, float]:
    """95% bootstrap interval of the perplexity, by resampling windows in pairs."""
    difference = (losses.by_window - original.by_window) / losses.predictions
    count = len(difference)
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(count, (_RESAMPLES, count), generator=generator)
    means = difference[picks].mean(-1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=means.dtype)).tolist()
    return original.perplexity * math.exp(low), original.perplexity * math.exp(high)


def table(rows: list[Row]) -> list[list[str]]:
    """Rows as text, by line and column, with a header first."""
    header = ["model", "perplexity", "95% interval", "KL", "bits/w", "bits/act"]
    header += ["compression", "FP4 act", "vs FP8", "gap rec", "KL rec"]

    def show(value: float | None, pattern: str, missing: str = "-") -> str:
        return missing if value is None else pattern.format(value)

    lines = [header]
    for row in rows:
        lines.append(
            [
                row.name,
                f"{row.perplexity:.3f}",
                f"{row.ci95[0]:.3f} - {row.ci95[1]:.3f}",
                f"{row.kl:.4f}",
                f"{row.bits_per_weight:.2f}",
                f"{row.bits_per_activation:.2f}",
                f"{row.compression:.2f}x",
                show(row.fp4_activations, "{:.1%}"),
                f"{row.vs_fp8_percent:+.2f}%",
                show(row.gap_recovered_percent, "{:.0f}%"),
                show(row.kl_gap_recovered_percent, "{:.0f}%"),
            ]
        )
    return lines
