"""KV cache in NVFP4, FP8, or a mix of both chosen online block by block.

A layer stores its keys and its values as two packed matrices (``fgmp.pack.planes``). One token of
one sequence is one row, its heads side by side, so a block of 16 lies along the head dimension of
one head. Tokens arrive in order: a new token appends rows, a rollback drops the last rows, and beam
search selects rows. No stored code is ever rounded again.

For keys the head dimension is that of the dot product q . k, as K is for a linear. For values it is
not: p V sums over tokens, so a shared scale would call for blocks along tokens. But tokens arrive
one by one, and such a block would be rounded again 15 times, or stay in high precision until it is
full. A block along the head dimension is complete at once, written once and dropped whole. The cost
is that a kernel multiplies the probabilities by scales, one product per block and token.

Scales are static. :func:`packed_cache` runs a few sequences, records the largest magnitude of every
layer's keys and values, and leaves headroom of a factor two. The rows of a token therefore depend
on that token alone. In the mixed cache a block is FP8 if its *benefit* exceeds a threshold: the
reduction in squared error from FP4 to FP8, weighted by the channels' mean squared gradients. Keys
and values of all layers share the threshold. In a packed model gradients use the straight-through
estimator for activation quantizers.

Every read decodes the whole cache. This saves memory and shows the format's effect on quality; it
is not a fast attention kernel.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from fgmp.errors import InputError
from fgmp.formats.activation import (
    Site,
    multiplier,
    score_unit,
    sensitivity_codes,
    site_threshold,
)
from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.model.gradients import differentiable
from fgmp.model.linear import ActivationSite, mixed_linears
from fgmp.model.observe import frozen
from fgmp.pack.planes import BlockCodes, PackedWeight, append_rows, pack_blocks, rows, select_rows

KINDS = {"fp8": "fp8", "nvfp4": "fp4", "mixed": "mixed"}
"""Mode of the planes (``pack.planes.MODES``) by kind of cache."""

HEADROOM = 2.0
"""Factor on the largest calibrated magnitude. A power of two costs FP8 only the smallest of its 18
binades, and FP4 blocks only the smallest of their scales."""


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Packed keys and values of one attention layer.

    Args:
        sites: constants for quantizing keys and values; channels are heads * head size.
        kind: a key of :data:`KINDS`.
    """

    is_croppable = True

    def __init__(self, sites: tuple[Site, Site], kind: str) -> None:
        super().__init__()
        self.mode = KINDS[kind]
        self._sites = tuple(ActivationSite(site) for site in sites)
        self.channels = sum(len(site.sensitivity) for site in sites)
        self.packed: list[PackedWeight] = []
        self.batch = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record shapes, dtype and device; called by ``update``."""
        self.batch = key_states.shape[0]
        self._heads = [(x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        for site in self._sites:
            site.to(key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values of new tokens and return those of all tokens, decoded.

        Args:
            key_states, value_states: (B, H, T, D).

        Returns:
            Keys and values of all tokens, (B, H, T', D), in the dtype of the states.

        Raises:
            InputError: other sequences, heads or head size than before.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for x, (heads, size) in zip((key_states, value_states), self._heads, strict=True):
            if (x.shape[0], x.shape[1], x.shape[3]) != (self.batch, heads, size):
                raise InputError(
                    f"this cache holds (sequences, heads, head size) ({self.batch}, {heads}, "
                    f"{size}), got {(x.shape[0], x.shape[1], x.shape[3])}; reset it first"
                )
        new = [
            _pack(site, x, self.mode)
            for site, x in zip(self._sites, (key_states, value_states), strict=True)
        ]
        old = self.packed
        self.packed = [append_rows(*pair) for pair in zip(old, new, strict=True)] if old else new
        keys, values = self.read()
        return keys, values

    def read(self) -> list[Tensor]:
        """Decode keys and values to (B, H, T, D) in the model's dtype: units times t, rounded."""
        states = []
        for packed, (heads, size) in zip(self.packed, self._heads, strict=True):
            planes = (getattr(packed, plane) for plane in PLANES)
            values = ops.unpack_weight(*planes, packed.k, torch.float32) * packed.t.item()
            states.append(values.view(-1, self.batch, heads, size).permute(1, 2, 0, 3))
        return [state.to(self.dtype).contiguous() for state in states]

    @property
    def nbytes(self) -> int:
        """Bytes of all planes."""
        return sum(packed.nbytes for packed in self.packed)

    def get_seq_length(self) -> int:
        """Number of tokens per sequence in the cache."""
        return self.packed[0].n // self.batch if self.packed else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Number of keys that a query sees once it is appended, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Largest number of tokens: -1, no limit."""
        return -1

    def reset(self) -> None:
        """Drop all tokens; scales stay."""
        self.packed, self.is_initialized = [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens.

        Raises:
            InputError: ``tokens_to_remove`` is positive.
        """
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the tokens to remove, got {tokens_to_remove}")
        row_count = max(0, self.get_seq_length() + tokens_to_remove) * self.batch
        if row_count:
            self.packed = [rows(packed, 0, row_count) for packed in self.packed]
        else:
            self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace sequence i by sequence ``beam_idx[i]``, for every i."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self.batch_select_indices(torch.arange(self.batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``, in that order."""
        if not self.packed:
            return
        tokens = torch.arange(self.get_seq_length(), device=self.device).unsqueeze(-1)
        index = (tokens * self.batch + indices.to(self.device)).flatten()
        self.packed = [select_rows(packed, index) for packed in self.packed]
        self.batch = len(indices)

    def offload(self) -> None:
        """Not supported.

        Raises:
            InputError: always.
        """
        raise InputError("a packed KV cache stays on its device: it cannot be offloaded")


class PackedCache(Cache):  # type: ignore[misc]
    """Packed cache for ``model.generate(past_key_values=...)`` or a forward pass.

    :func:`packed_cache` calibrates and creates one.

    Args:
        sites: constants of each layer's keys and values.
        kind: a key of :data:`KINDS`.
    """

    def __init__(self, sites: Sequence[tuple[Site, Site]], kind: str) -> None:
        super().__init__(layers=[PackedLayer(pair, kind) for pair in sites])

    @property
    def nbytes(self) -> int:
        """Bytes of all planes of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def values_per_token(self) -> int:
        """Values per token: keys and values of all layers."""
        return sum(layer.channels for layer in self.layers)

    @property
    def bytes_per_token(self) -> float:
        """Bytes per token, averaged over all sequences; 0 for an empty cache."""
        tokens = self.get_seq_length() * self.layers[0].batch
        return self.nbytes / tokens if tokens else 0.0


def require_kind(kind: str) -> None:
    """Check that ``kind`` is a key of :data:`KINDS`.

    Raises:
        InputError: it is not.
    """
    if kind not in KINDS:
        raise InputError(f"kv cache must be one of {', '.join(KINDS)}, got {kind!r}")


def packed_cache(model: nn.Module, samples: Tensor, kind: str, fp4: float = 0.7) -> PackedCache:
    """Create an empty packed cache for a causal LM, quantized or not.

    Args:
        model: every layer attends to the whole context.
        samples: calibration windows, int64 (B, L); a few thousand tokens suffice.
        kind: ``fp8``, ``nvfp4`` or ``mixed``; only ``mixed`` needs gradients.
        fp4: fraction of FP4 blocks on ``samples``, for ``mixed``.

    Raises:
        InputError: an unknown kind, a fraction out of range, no samples, or keys and values that
            are not finite; a model with sliding windows or other state than keys and values; a head
            size that is not a multiple of 16.
    """
    require_kind(kind)
    if kind == "mixed" and not 0 < fp4 < 1:
        raise InputError(f"a mixed kv cache needs a fraction of FP4 between 0 and 1, got {fp4}")
    if samples.ndim != 2 or len(samples) == 0 or samples.shape[1] < 2:
        raise InputError(
            f"a kv cache is calibrated on windows (B, L) of at least 2 tokens, got shape "
            f"{[*samples.shape]}"
        )
    _check(model)
    layers = [_LayerStates() for _ in DynamicCache(config=model.config).layers]
    with differentiable(mixed_linears(model).values()), frozen(model):
        for sample in samples:
            _observe(model, sample, layers, gradients=kind == "mixed")
    records = [layer.records() for layer in layers]
    if kind == "mixed":
        scores = torch.cat(
            [layer.scores(pair) for layer, pair in zip(layers, records, strict=True)]
        )
        limit = scores.kthvalue(max(1, round(fp4 * len(scores)))).values.item()
    else:
        limit = {"fp8": -torch.inf, "nvfp4": torch.inf}[kind]
    sites = [
        [replace(s, threshold=site_threshold(limit, s.r, s.gamma)) for s in pair]
        for pair in records
    ]
    return PackedCache([(keys, values) for keys, values in sites], kind)


def _check(model: nn.Module) -> None:
    """Check that every layer of a model caches all its keys and values and nothing else."""
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) is not DynamicLayer:
            raise InputError(
                f"a packed kv cache needs attention to the whole context in every layer, "
                f"got {type(layer).__name__} in layer {index}"
            )


class _LayerStates:
    """Keys and values of one layer over the samples, and their sums of squared gradients."""

    def __init__(self) -> None:
        self.rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.squares: list[Tensor | float] = [0.0, 0.0]
        self.predictions = 0

    def records(self) -> list[Site]:
        """Constants of keys and values, with a threshold of 0."""
        sites = []
        for rows_, squares in zip(self.rows, self.squares, strict=True):
            channels = rows_[0].new_ones(rows_[0].shape[1], dtype=torch.float32)
            g2 = squares / self.predictions if isinstance(squares, Tensor) else channels
            codes, gamma = sensitivity_codes(g2)
            amax = max(part.abs().max().item() for part in rows_)
            sites.append(Site(multiplier(amax * HEADROOM), codes, gamma, 0, "benefit", "search"))
        return sites

    def scores(self, records: list[Site]) -> Tensor:
        """Loss that FP8 avoids in each block, float64 (blocks,)."""
        return torch.cat(
            [
                ActivationSite(site).to(part.device).scores(part).double().flatten()
                * score_unit(site)
                for rows_, site in zip(self.rows, records, strict=True)
                for part in rows_
            ]
        )


def _observe(
    model: nn.Module, sample: Tensor, observed: list[_LayerStates], gradients: bool
) -> None:
    """Run one sequence, int64 (L,), and record what every layer puts into the cache."""
    device = next(model.parameters()).device
    cache = Cache(
        layers=[_DifferentiableLayer() if gradients else DynamicLayer() for _ in observed]
    )
    window = sample.to(device).unsqueeze(0)
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=window, past_key_values=cache, use_cache=True).logits
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise InputError(f"layer {index} puts no keys and values of its own into a cache")
        for state in ("keys", "values"):
            size = getattr(layer, state).shape[-1]
            if size % BLOCK:
                raise InputError(
                    f"a packed kv cache needs a head size that is a multiple of {BLOCK}, "
                    f"got {size} ({state} of layer {index})"
                )
    states = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    for i, x in enumerate(states):
        if not x.isfinite().all():
            raise InputError(f"{('keys', 'values')[i % 2]} of layer {i // 2} are not finite")
        observed[i // 2].rows[i % 2].append(_rows(x.detach()))
    if gradients:
        log_likelihoods = logits[0, :-1].float().log_softmax(-1).gather(-1, window[0, 1:, None])
        for i, gradient in enumerate(torch.autograd.grad(log_likelihoods.sum(), states)):
            observed[i // 2].squares[i % 2] += _rows(gradient).float().square().sum(0)
            observed[i // 2].predictions = len(observed[i // 2].rows[0]) * len(log_likelihoods)


class _DifferentiableLayer(DynamicLayer):  # type: ignore[misc]
    """Cache layer whose keys and values get gradients even if all parameters are frozen."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = (key_states, value_states)
        leaves = (x if x.requires_grad else x.detach().requires_grad_() for x in states)
        keys, values = super().update(*leaves)
        return keys, values


def _rows(x: Tensor) -> Tensor:
    """Reorder (B, H, T, D) to rows (T * B, H * D)."""
    return x.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)


def _pack(site: ActivationSite, x: Tensor, mode: str) -> PackedWeight:
    """Quantize the rows of new tokens, (B, H, T, D), and pack them in a given mode."""
    codes, scale = ops.quantize_activation(
        _rows(x).contiguous(), site.r, site.sensitivity, site.threshold, site.rule, site.scales
    )
    is_fp8 = scale == FP8_BLOCK
    if mode == "fp4" and is_fp8.any():
        raise InputError("keys and values must be finite to be kept in NVFP4")
    content = BlockCodes(is_fp8, codes, scale)
    return pack_blocks(content, x.shape[1] * x.shape[3], site.record.t, mode)
