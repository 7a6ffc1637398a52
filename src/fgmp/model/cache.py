"""A KV cache in the blocks of the format: NVFP4, FP8, or a mix of them chosen online.

A layer keeps its keys and its values as two packed matrices, ``fgmp.pack.planes``: a row is what
one token of one sequence appends, its heads side by side, so that a block of 16 lies along the
head dimension, inside one head. Tokens come in order, hence a new token appends rows, a
rollback drops the last ones, and beams select among them; no stored code is ever rounded again.

For keys the head dimension is that of the dot product, q . k, as K is for a linear. For values it
is not: p V sums over tokens, and blocks along tokens would share a scale. Yet a token arrives
alone, so such a block would be rounded anew 15 times or wait in high precision until it is full.
Along the head dimension it is complete at once, written once, and dropped whole; the price is that
a kernel scales the probabilities, one product a block and token, before it sums.

Scales are static. :func:`packed_cache` runs a few sequences, records the largest magnitude of
every layer's keys and values, and leaves room for twice that. A token's rows depend on that token
alone then, which what follows cannot change. In the mixed cache a block is FP8 if that takes more
than a threshold off its squared error, weighted by mean squared gradients of its channels; keys
and values of all layers share the threshold. On a packed model the gradients go straight through
the quantizers of activations.

Every read decodes the whole cache: this saves memory and shows what the format costs in quality.
It is no fast attention kernel.
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
from fgmp.pack.planes import BlockCodes, PackedWeight, append_rows, pack_blocks, rows, select_rows
from fgmp.sensitivity.fisher import frozen

KINDS = {"fp8": "fp8", "nvfp4": "fp4", "mixed": "mixed"}
"""Kinds of cache, and the mode of the planes that each holds."""

HEADROOM = 2.0
"""Room above the largest calibrated magnitude. A power of two costs FP8 nothing but the smallest
of its 18 binades, and FP4 blocks nothing but the smallest of their scales."""


class PackedLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one attention layer, packed.

    Args:
        sites: how keys and values are quantized; constants over heads * head size channels.
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
        """Note shapes and places; ``update`` does it."""
        self.batch = key_states.shape[0]
        self._heads = [(x.shape[1], x.shape[3]) for x in (key_states, value_states)]
        for site in self._sites:
            site.to(key_states.device)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens, (B, H, T, D) each, and return all as they are stored, same dtype."""
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
        """Keys and values, (B, H, T, D) of the model's dtype: units times t, rounded once."""
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
        """Tokens that each sequence has in the cache."""
        return self.packed[0].n // self.batch if self.packed else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a query sees after it is appended, and where they start."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """No limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens; scales stay."""
        self.packed, self.is_initialized = [], False

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last ``-tokens_to_remove`` tokens."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes minus the tokens to remove, got {tokens_to_remove}")
        kept = max(0, self.get_seq_length() + tokens_to_remove) * self.batch
        if kept:
            self.packed = [rows(packed, 0, kept) for packed in self.packed]
        else:
            self.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give each sequence what sequence ``beam_idx[i]`` has."""
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
        """Refused."""
        raise InputError("a packed KV cache stays on its device: it cannot be offloaded")


class PackedCache(Cache):  # type: ignore[misc]
    """For ``model.generate(past_key_values=...)`` or a forward pass; :func:`packed_cache` makes it.

    Args:
        sites: the constants of each layer's keys and values.
        kind: a key of :data:`KINDS`.
    """

    def __init__(self, sites: Sequence[tuple[Site, Site]], kind: str) -> None:
        super().__init__(layers=[PackedLayer(pair, kind) for pair in sites])

    @property
    def nbytes(self) -> int:
        """Bytes that all layers hold."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def values_per_token(self) -> int:
        """Numbers that a token appends, keys and values of all layers."""
        return sum(layer.channels for layer in self.layers)

    @property
    def bytes_per_token(self) -> float:
        """Bytes over tokens of all sequences; 0 of an empty cache."""
        tokens = self.get_seq_length() * self.layers[0].batch
        return self.nbytes / tokens if tokens else 0.0


def require_kind(kind: str) -> None:
    """Refuse what is no key of :data:`KINDS`."""
    if kind not in KINDS:
        raise InputError(f"kv cache must be one of {', '.join(KINDS)}, got {kind!r}")


def packed_cache(model: nn.Module, samples: Tensor, kind: str, fp4: float = 0.7) -> PackedCache:
    """An empty packed cache for a causal LM, quantized or not.

    Args:
        model: keys and values of all its layers attend to the whole context.
        samples: token windows, int64 (B, L): a few thousand tokens do.
        kind: ``fp8``, ``nvfp4`` or ``mixed``, which alone needs gradients.
        fp4: share of blocks that ``mixed`` keeps in FP4 on ``samples``.

    Raises:
        InputError: an unknown kind or share; no samples, or keys and values of them that are not
            finite; a model with sliding windows or other state than keys and values; heads that
            blocks of 16 do not fill.
    """
    require_kind(kind)
    if kind == "mixed" and not 0 < fp4 < 1:
        raise InputError(f"a mixed kv cache needs a share of FP4 between 0 and 1, got {fp4}")
    if samples.ndim != 2 or len(samples) == 0 or samples.shape[1] < 2:
        raise InputError(
            f"a kv cache is calibrated on windows (B, L) of at least 2 tokens, got shape "
            f"{[*samples.shape]}"
        )
    _check(model)
    seen = [_Seen() for _ in DynamicCache(config=model.config).layers]
    with differentiable(mixed_linears(model).values()), frozen(model):
        for sample in samples:
            _observe(model, sample, seen, gradients=kind == "mixed")
    records = [layer.records() for layer in seen]
    if kind == "mixed":
        found = torch.cat([layer.scores(pair) for layer, pair in zip(seen, records, strict=True)])
        limit = found.kthvalue(max(1, round(fp4 * len(found)))).values.item()
    else:
        limit = {"fp8": -torch.inf, "nvfp4": torch.inf}[kind]
    sites = [
        [replace(s, threshold=site_threshold(limit, s.r, s.gamma)) for s in pair]
        for pair in records
    ]
    return PackedCache([(keys, values) for keys, values in sites], kind)


def _check(model: nn.Module) -> None:
    """Refuse a model some layer of which keeps anything but all its keys and values."""
    for index, layer in enumerate(DynamicCache(config=model.config).layers):
        if type(layer) is not DynamicLayer:
            raise InputError(
                f"a packed kv cache needs attention to the whole context in every layer, "
                f"got {type(layer).__name__} in layer {index}"
            )


class _Seen:
    """Keys and values of one layer over the samples: rows, and sums of squared gradients."""

    def __init__(self) -> None:
        self.rows: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.squares: list[Tensor | float] = [0.0, 0.0]
        self.predictions = 0

    def records(self) -> list[Site]:
        """Constants of keys and values, before the threshold."""
        found = []
        for rows_, squares in zip(self.rows, self.squares, strict=True):
            channels = rows_[0].new_ones(rows_[0].shape[1], dtype=torch.float32)
            g2 = squares / self.predictions if isinstance(squares, Tensor) else channels
            codes, gamma = sensitivity_codes(g2)
            amax = max(part.abs().max().item() for part in rows_)
            found.append(Site(multiplier(amax * HEADROOM), codes, gamma, 0, "benefit", "search"))
        return found

    def scores(self, records: list[Site]) -> Tensor:
        """What FP8 takes off the loss, of all blocks, float64 (...)."""
        return torch.cat(
            [
                ActivationSite(site).to(part.device).scores(part).double().flatten()
                * score_unit(site)
                for rows_, site in zip(self.rows, records, strict=True)
                for part in rows_
            ]
        )


def _observe(model: nn.Module, sample: Tensor, seen: list[_Seen], gradients: bool) -> None:
    """Run one sequence, int64 (L,), and note what every layer puts into the cache."""
    device = next(model.parameters()).device
    cache = Cache(layers=[_Reached() if gradients else DynamicLayer() for _ in seen])
    window = sample.to(device).unsqueeze(0)
    with torch.set_grad_enabled(gradients):
        logits = model(input_ids=window, past_key_values=cache, use_cache=True).logits
    for index, layer in enumerate(cache.layers):
        if not layer.is_initialized:
            raise InputError(f"layer {index} puts no keys and values of its own into a cache")
        for what in ("keys", "values"):
            size = getattr(layer, what).shape[-1]
            if size % BLOCK:
                raise InputError(
                    f"a packed kv cache needs a head size that is a multiple of {BLOCK}, "
                    f"got {size} ({what} of layer {index})"
                )
    states = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    for i, x in enumerate(states):
        if not x.isfinite().all():
            raise InputError(f"{('keys', 'values')[i % 2]} of layer {i // 2} are not finite")
        seen[i // 2].rows[i % 2].append(_rows(x.detach()))
    if gradients:
        chosen = logits[0, :-1].float().log_softmax(-1).gather(-1, window[0, 1:, None])
        for i, gradient in enumerate(torch.autograd.grad(chosen.sum(), states)):
            seen[i // 2].squares[i % 2] += _rows(gradient).float().square().sum(0)
            seen[i // 2].predictions = len(seen[i // 2].rows[0]) * len(chosen)


class _Reached(DynamicLayer):  # type: ignore[misc]
    """Keys and values that a gradient reaches, be the model's parameters frozen or not."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states = (key_states, value_states)
        reached = (x if x.requires_grad else x.detach().requires_grad_() for x in states)
        keys, values = super().update(*reached)
        return keys, values


def _rows(x: Tensor) -> Tensor:
    """(B, H, T, D) to (T * B, H * D)."""
    return x.permute(2, 0, 1, 3).flatten(2).flatten(0, 1)


def _pack(site: ActivationSite, x: Tensor, mode: str) -> PackedWeight:
    """Rows of new tokens, (B, H, T, D), in the planes of a mode."""
    codes, scale = ops.quantize_activation(
        _rows(x).contiguous(), site.r, site.sensitivity, site.threshold, site.rule, site.scales
    )
    is_fp8 = scale == FP8_BLOCK
    if mode == "fp4" and is_fp8.any():
        raise InputError("keys and values must be finite to be kept in NVFP4")
    content = BlockCodes(is_fp8, codes, scale)
    return pack_blocks(content, x.shape[1] * x.shape[3], site.record.t, mode)
