"""Compare the original with all-FP8, all-NVFP4 and FGMP models on the same windows in one run.

Models run one after the other, so memory holds one model and the logits of a few windows. Of the
original, :class:`fgmp.evaluation.reference.Reference` keeps what its logits are computed from.

``kl`` is the mean KL divergence per token of a model's predictions from the original's. It is the
less noisy metric: on small, overconfident models quantization noise can *lower* perplexity.
``kl_p99`` and ``top1_agreement_percent`` show what the mean hides: the worst tokens, and how often
a greedy decoder would choose another token.

Intervals are paired. Windows are resampled together for a model and the original, which gives an
interval of their perplexity ratio; it is reported times the original's perplexity.
"""

import math
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.evaluation.perplexity import Losses, batches, logits_of, vocabulary_size
from fgmp.evaluation.reference import Reference
from fgmp.formats.spec import BLOCK, FP4_BITS, FP8_BITS, stream_bits
from fgmp.model.linear import sites, weight_holders
from fgmp.model.precision import stored_dtype
from fgmp.progress import Progress, silent

CONTEXT = 4096
"""Tokens whose activations ``compression`` counts in addition to the weights, as in the paper."""

_REFERENCE_BITS = 16
_RESAMPLES = 2000
_SMALLEST_GAP = 0.005
_TAIL = 0.99
"""Quantile of the token KL that :attr:`Row.kl_p99` reports."""
_CHUNK = 2**24
"""Elements of log-probabilities, (tokens, V), that are computed at a time: 64 MB in fp32."""


@dataclass(frozen=True)
class Row:
    """One model of the comparison.

    Attributes:
        name: ``original``, ``fp8``, ``nvfp4``, ``uniform`` or ``fgmp``. ``uniform`` has one format
            per site and at most the bytes of ``fgmp``; see ``fgmp.quantization.twin``.
        perplexity: exp of the mean next-token loss.
        ci95: 95% interval of the perplexity, paired with the original's.
        kl: mean KL divergence from the original per token, in nats.
        kl_p99: 99th percentile of the KL divergence per token, in nats.
        top1_agreement_percent: percentage of tokens whose most likely next token is the original's.
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
    kl_p99: float
    top1_agreement_percent: float
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
    kl_p99: float
    top1_agreement: float
    weight_bits: float
    activation_bits: float
    compression: float
    fp4_activations: float | None


@dataclass(frozen=True)
class _Tokens:
    """Measurements of the predictions of one or more windows, each (T,).

    Attributes:
        loss: loss in nats, float64.
        kl: KL divergence from the original in nats, float64.
        agrees: whether the most likely token is the original's, bool.
    """

    loss: Tensor
    kl: Tensor
    agrees: Tensor

    @staticmethod
    def joined(parts: list["_Tokens"]) -> "_Tokens":
        """All of them, one after the other."""
        columns = zip(*((p.loss, p.kl, p.agrees) for p in parts), strict=True)
        return _Tokens(*(torch.cat(column) for column in columns))


def compare(
    models: Iterable[tuple[str, nn.Module]], windows: Tensor, progress: Progress = silent
) -> list[Row]:
    """Measure the original and quantized models on the same windows, one after the other.

    Args:
        models: names and models. ``original``, the unquantized causal LM, comes first; ``fp8`` and
            ``nvfp4``, the ends of the gap, are required. Nothing refers to a model once the next
            one is asked for, so a generator that loads each has one in memory at a time.
        windows: evaluation windows, int64 (B, L).
        progress: reports progress, one stage per model.

    Returns:
        One row per model, in their order.

    Raises:
        InputError: the original's logits do not fit on the disk; see ``Reference``.
    """
    measured: dict[str, _Measured] = {}
    with tempfile.TemporaryDirectory(prefix="fgmp-compare-") as folder:
        for name, model in models:
            model.eval()
            start_counting(model)
            if name == "original":
                parts = batches(windows, vocabulary_size(model))
                reference = Reference(model, Path(folder), len(parts))
            with progress(f"comparing {name}", len(parts)) as advance:
                tokens = _run(name, model, parts, reference, advance)
            measured[name] = _measured(name, model, tokens, windows)
            del model
    return [_row(name, m, measured) for name, m in measured.items()]


def _run(
    name: str,
    model: nn.Module,
    parts: tuple[Tensor, ...],
    reference: Reference,
    advance: Callable[[], None],
) -> _Tokens:
    """Predictions of a model on all batches, measured against the reference."""
    tokens = []
    for index, batch in enumerate(parts):
        if name == "original":
            logits = expected = reference.record(model, batch)
        else:
            logits, expected = logits_of(model, batch), reference.logits(index)
        tokens += [_predictions(*w) for w in zip(logits, expected, batch, strict=True)]
        del logits, expected  # before the next batch's are computed
        advance()
    return _Tokens.joined(tokens)


@torch.no_grad()
def _predictions(logits: Tensor, expected: Tensor, window: Tensor) -> _Tokens:
    """Measurements of one window, int64 (L,), from logits (L, V) of a model and of the original."""
    targets = window[1:, None].to(logits.device)
    rows = max(1, _CHUNK // logits.shape[-1])
    chunks = (t.split(rows) for t in (logits[:-1], expected[:-1], targets))
    parts = []
    for predicted, reference, target in zip(*chunks, strict=True):
        p, r = (x.log_softmax(-1, dtype=torch.float32) for x in (predicted, reference))
        parts.append(
            _Tokens(
                loss=-p.gather(-1, target)[:, 0].double().cpu(),
                kl=(r.exp() * (r - p)).double().sum(-1).cpu(),
                agrees=(p.argmax(-1) == r.argmax(-1)).cpu(),
            )
        )
    return _Tokens.joined(parts)


def _measured(name: str, model: nn.Module, tokens: _Tokens, windows: Tensor) -> _Measured:
    losses = Losses(tokens.loss.view(len(windows), -1).sum(-1), windows.shape[1] - 1)
    if name == "original":
        return _original_row(model, losses)
    fraction = activation_fraction(model)
    bits = activation_bits(name, fraction)
    return _Measured(
        losses,
        tokens.kl.mean().item(),
        _quantile(tokens.kl, _TAIL),
        tokens.agrees.double().mean().item(),
        weight_bits(model),
        bits,
        _compression(model, bits, windows.numel()),
        fraction,
    )


def _quantile(values: Tensor, fraction: float) -> float:
    """Quantile with linear interpolation; unlike ``Tensor.quantile`` for any number of values."""
    ordered = values.sort().values
    position = fraction * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return torch.lerp(ordered[low], ordered[high], position - low).item()


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
    """Bits per activation value; only a stream whose blocks are mixed needs flags."""
    if name in ("fp8", "nvfp4", "uniform"):
        return FP4_BITS * fp4_fraction + FP8_BITS * (1 - fp4_fraction)
    return stream_bits(fp4_fraction)


def _compression(model: nn.Module, bits: float, tokens: int) -> float:
    weights = sum(m.packed.n * m.packed.k for m in weight_holders(model).values())
    values = sum(s.counts[1] * BLOCK for s in sites(model).values()) / tokens * CONTEXT
    return _REFERENCE_BITS * (weights + values) / (weight_bits(model) * weights + bits * values)


def _original_row(original: nn.Module, losses: Losses) -> _Measured:
    bits = 8.0 * stored_dtype(original).itemsize
    return _Measured(losses, 0.0, 0.0, 1.0, bits, bits, _REFERENCE_BITS / bits, None)


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
        kl_p99=m.kl_p99,
        top1_agreement_percent=100 * m.top1_agreement,
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
    header = ["model", "perplexity", "95% interval", "KL", "KL p99", "top-1", "bits/w"]
    header += ["bits/act", "compression", "FP4 act", "vs FP8", "gap rec", "KL rec"]

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
                f"{row.kl_p99:.3f}",
                f"{row.top1_agreement_percent:.1f}%",
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
