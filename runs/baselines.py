"""What a user would choose instead: rules of other toolkits, on our formats and our sites.

Each function takes a setting of ``runs/accuracy.py`` and returns a packed model, so that bits are
counted from bytes like everyone's. The rules are published ones, implemented anew:

four_over_six   NVFP4 whose blocks put their largest value at 6 or at 4, whichever has the smaller
                squared error, weights and activations; tensor scales leave room for the factor 1.5
                (arXiv 2512.02010)
gptq            NVFP4 with error compensation (arXiv 2210.17323) and MSE scales, layer after layer
                on the second moments of inputs that the quantized layers before make; activations
                rounded to nearest
autoquantize    one format a layer: Model Optimizer's rule, score = sum (gradient of the layer's
                output times its error)^2, linears that read one tensor together, solved exactly
                under a budget of weight bits
by_channel      outlier channels in FP8: whole blocks of 16 channels, sorted by what FP8 saves there
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from fgmp import Recipe
from fgmp.assign.clip import error
from fgmp.assign.compensate import compensated, factorize
from fgmp.assign.weights import group_scale
from fgmp.formats.activation import Site, fake_quantize, multiplier
from fgmp.formats.codec import decode_e4m3, encode_e4m3, from_blocks, round_e2m1, to_blocks
from fgmp.formats.spec import (
    BLOCK,
    E2M1,
    E4M3,
    FP4_BITS,
    FP8_BITS,
    FP8_FACTOR,
    SCALE_MAX_CODE,
    SCALE_MIN_CODE,
    THRESHOLD_ALL_FP4,
    THRESHOLD_ALL_FP8,
)
from fgmp.formats.weight import WeightCodes, quantize_weight
from fgmp.model.convert import install
from fgmp.model.linear import ActivationSite, mixed_linears, sites
from fgmp.model.select import linearize
from fgmp.model.store import config_of
from fgmp.pack.planes import PackedWeight, pack, packed_bytes
from fgmp.sensitivity.fisher import causal_lm_loss, frozen
from fgmp.sensitivity.moments import Moments
from fgmp.sequential import pack_in_turn

if TYPE_CHECKING:
    from accuracy import Setting

GPTQ_DAMPING = 0.01
SCORED_SEQUENCES = 128
"""What Model Optimizer scores layers on by default."""


class Parts:
    """The original's weights, the sites, and what calibration learnt, ready to recombine."""

    def __init__(self, setting: Setting) -> None:
        base = setting.base
        self.linears_of = {owner: s.linears for owner, s in config_of(base).sites.items()}
        self.records = {owner: site.record for owner, site in sites(base).items()}
        self.model = setting.load()
        linearize(self.model)
        self.linears = {n: self.model.get_submodule(n) for n in mixed_linears(base)}
        self.weights = {n: m.weight.detach() for n, m in self.linears.items()}
        self.scale = {
            name: group_scale(self.weights[n] for n in names)
            for names in self.linears_of.values()
            for name in names
        }

    def with_threshold(self, threshold: dict[str, int]) -> dict[str, Site]:
        """Records that decide alike for every block of a site."""
        return {o: replace(r, threshold=threshold[o]) for o, r in self.records.items()}

    def install(
        self, codes: dict[str, WeightCodes], is_fp8: dict[str, Tensor], records: dict[str, Site]
    ) -> nn.Module:
        """The packed model."""
        packed = {name: pack(codes[name], is_fp8[name]) for name in codes}
        install(self.model, packed, records, self.linears_of)
        return self.model


def at_bits(setting: Setting, bits: float) -> nn.Module:
    """Our default with as many FP8 weight blocks as so many bits a weight hold, were every weight
    to mix formats: every byte counted. The same share of its activation blocks is FP8."""
    shapes = [(m.packed.n, m.packed.k) for m in mixed_linears(setting.base).values()]
    blocks = sum(n * -(-k // BLOCK) for n, k in shapes)
    more = packed_bytes(BLOCK, BLOCK, 2) - packed_bytes(BLOCK, BLOCK, 1)
    none = sum(packed_bytes(n, k, 1) - more for n, k in shapes)
    room = bits / 8 * sum(n * k for n, k in shapes) - none
    return setting.quantized(fp4=1 - math.floor(room / more) / blocks)


def four_over_six(setting: Setting) -> nn.Module:
    """NVFP4 with the better of two scales a block."""
    parts = Parts(setting)
    codes = {}
    for name, weight in parts.weights.items():
        t = parts.scale[name] * _ROOM
        blocks = to_blocks(weight.float())
        u = blocks / (FP8_FACTOR * torch.tensor(t))
        at6, at4 = _two_scales(u.abs().amax(-1))
        ones = torch.ones_like(blocks).flatten(0, 1).double()
        errors = [error(blocks.flatten(0, 1), ones, s.flatten(), t) for s in (at6, at4)]
        better = (errors[1] < errors[0]).view_as(at6)
        codes[name] = quantize_weight(weight, t, torch.where(better, at4, at6))
        flushed = (codes[name].fp4 & (E2M1.sign_bit - 1) == 0).all(-1)
        codes[name].scale[flushed] = SCALE_MIN_CODE
    none = {name: torch.zeros_like(c.scale, dtype=torch.bool) for name, c in codes.items()}
    records = {
        owner: replace(
            r, r=multiplier(E4M3.max / r.r * _ROOM), threshold=THRESHOLD_ALL_FP4, scales="max"
        )
        for owner, r in parts.records.items()
    }
    model = parts.install(codes, none, records)
    for site in sites(model).values():
        site.__class__ = _FourOverSixSite
    return model


_ROOM = E4M3.max / 256
"""Four Over Six scales a tensor's largest value to 6 * 256, so that the factor 1.5 fits."""


def _two_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    codes = (encode_e4m3(largest), encode_e4m3(largest * (6 / 4)))
    return tuple(c.clamp(SCALE_MIN_CODE, SCALE_MAX_CODE) for c in codes)  # type: ignore[return-value]


class _FourOverSixSite(ActivationSite):
    def _quantize(self, x: Tensor) -> Tensor:
        u = to_blocks(x.to(torch.bfloat16).float()) * self.record.r
        tried = []
        for code in _two_scales(u.abs().amax(-1)):
            step = decode_e4m3(code).unsqueeze(-1)
            tried.append(round_e2m1(FP8_FACTOR * u / step) * step)
        at6, at4 = ((q - FP8_FACTOR * u).square().sum(-1, keepdim=True) for q in tried)
        self.counts[0] += at6.numel()
        self.counts[1] += at6.numel()
        better = torch.where(at4 < at6, tried[1], tried[0])
        return from_blocks(better, x.shape[-1]).bfloat16()


def gptq(setting: Setting) -> nn.Module:
    """NVFP4 weights by GPTQ with MSE scales; activations rounded to nearest."""
    parts = Parts(setting)
    records = parts.with_threshold(dict.fromkeys(parts.records, THRESHOLD_ALL_FP4))

    def pack_stage(
        groups: Iterable[list[str]], moments: dict[str, Moments]
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in groups:
            h = moments[names[0]].h
            factors = factorize(Moments(h, h.clone()), GPTQ_DAMPING)  # its own inputs: from W on
            for name in names:
                w = parts.weights[name]
                nothing = torch.zeros(len(w), -(-w.shape[1] // BLOCK), dtype=torch.bool)
                ones = torch.ones_like(w)
                codes = compensated(w, factors, nothing, parts.scale[name], ones)
                packed[name] = pack(codes, nothing)
        return packed

    samples = setting.text.samples
    packed = pack_in_turn(
        parts.model, parts.linears_of, records, samples, causal_lm_loss, pack_stage
    )
    install(parts.model, packed, records, parts.linears_of)
    return parts.model


@torch.no_grad()
def _watch(parts: Parts, hook: Any, samples: Tensor) -> None:
    """Run the original; ``hook`` gets a site's owner, the module and its arguments."""
    handles = [parts.linears[o].register_forward_pre_hook(partial(hook, o)) for o in parts.records]
    for sample in samples:
        causal_lm_loss(parts.model, sample)
    for handle in handles:
        handle.remove()


def autoquantize(setting: Setting, bits: float) -> nn.Module:
    """One format a site, weights and activations, under a budget of bits a weight."""
    parts = Parts(setting)
    scores = setting.layer_scores
    size = {o: sum(parts.weights[n].numel() for n in ns) for o, ns in parts.linears_of.items()}
    room = (bits - FP4_BITS) / (FP8_BITS - FP4_BITS) * sum(size.values())
    # Every subset of sites in FP8 that no cheaper one beats: cost -> (gain, sites).
    best: dict[int, tuple[float, frozenset[str]]] = {0: (0.0, frozenset())}
    for owner, cost in size.items():
        gain = scores[owner]["fp4"] - scores[owner]["fp8"]
        for used, (sum_, chosen) in list(best.items()):
            if used + cost <= room and sum_ + gain > best.get(used + cost, (-1.0, chosen))[0]:
                best[used + cost] = (sum_ + gain, chosen | {owner})
        frontier, reached = {}, -1.0
        for used in sorted(best):
            if best[used][0] > reached:
                frontier[used], reached = best[used], best[used][0]
        best = frontier
    chosen = max(best.values())[1]
    ends = {o: THRESHOLD_ALL_FP8 if o in chosen else THRESHOLD_ALL_FP4 for o in parts.records}
    codes = {n: quantize_weight(w, parts.scale[n]) for n, w in parts.weights.items()}
    is_fp8 = {
        name: torch.full_like(codes[name].scale, owner in chosen).bool()
        for owner, names in parts.linears_of.items()
        for name in names
    }
    return parts.install(codes, is_fp8, parts.with_threshold(ends))


def layer_scores(parts: Parts, samples: Tensor) -> dict[str, dict[str, float]]:
    """sum (dL/dY * (Y quantized - Y))^2 by site and format, over its linears and all tokens."""
    samples = samples[:SCORED_SEQUENCES]
    scores = {owner: {"fp4": 0.0, "fp8": 0.0} for owner in parts.records}
    codes = {n: quantize_weight(w, parts.scale[n]) for n, w in parts.weights.items()}
    ends = {"fp4": THRESHOLD_ALL_FP4, "fp8": THRESHOLD_ALL_FP8}

    def differentiate(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0] if args[0].requires_grad else args[0].detach().requires_grad_(),)

    def compare(owner: str, name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        with torch.no_grad():
            difference = {}
            for fmt, threshold in ends.items():
                record = replace(parts.records[owner], threshold=threshold)
                q = fake_quantize(args[0], record)[0] * record.t
                mask = torch.full_like(codes[name].scale, fmt == "fp8").bool()
                weight = codes[name].units(mask) * parts.scale[name]
                bias = parts.linears[name].bias
                exact = y.float() if bias is None else y.float() - bias.float()
                difference[fmt] = q @ weight.T - exact

        def score(gradient: Tensor) -> None:
            for fmt, d in difference.items():
                scores[owner][fmt] += (gradient.float() * d).square().sum().item()

        y.register_hook(score)

    handles = []
    for owner, names in parts.linears_of.items():
        for name in names:
            linear = parts.linears[name]
            handles.append(linear.register_forward_pre_hook(differentiate))
            handles.append(linear.register_forward_hook(partial(compare, owner, name)))
    with frozen(parts.model):
        for sample in samples:
            causal_lm_loss(parts.model, sample)[0].backward()
    for handle in handles:
        handle.remove()
    return scores


def by_channel(setting: Setting, fp4: float) -> nn.Module:
    """Whole blocks of 16 input channels in FP8, channels sorted by the harm FP4 does in them."""
    parts = Parts(setting)
    harm = setting.channel_harm
    order = {o: h.argsort(descending=True) for o, h in harm.items()}
    blocks = {o: to_blocks(h[order[o]]).sum(-1) for o, h in harm.items()}
    rows = {o: sum(len(parts.weights[n]) for n in ns) for o, ns in parts.linears_of.items()}
    density = torch.cat([b / rows[o] for o, b in blocks.items()])
    counts = torch.cat([torch.full((len(b),), float(rows[o])) for o, b in blocks.items()])
    ranked = density.argsort(descending=True)
    inside = counts[ranked].cumsum(0) <= (1 - fp4) * counts.sum()
    limit = density[ranked][inside].min().item() if inside.any() else float("inf")
    fp8 = {o: b / rows[o] >= limit for o, b in blocks.items()}
    codes, is_fp8 = {}, {}
    for owner, names in parts.linears_of.items():
        for name in names:
            codes[name] = quantize_weight(parts.weights[name][:, order[owner]], parts.scale[name])
            is_fp8[name] = fp8[owner].expand_as(codes[name].scale)
    model = parts.install(codes, is_fp8, parts.records)
    for owner, site in sites(model).items():
        site.__class__ = _ChannelSite
        site.order, site.fp8 = order[owner], fp8[owner]
    return model


class _ChannelSite(ActivationSite):
    """Reads channels in ``order``; ``fp8`` says which blocks of 16 of them are FP8."""

    order: Tensor
    fp8: Tensor

    def _quantize(self, x: Tensor) -> Tensor:
        x = x[..., self.order]
        high, low = (
            to_blocks(fake_quantize(x, replace(self.record, threshold=end))[0])
            for end in (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4)
        )
        tokens = x.numel() // x.shape[-1]
        self.counts[0] += tokens * int((~self.fp8).sum())
        self.counts[1] += tokens * len(self.fp8)
        mixed = torch.where(self.fp8.unsqueeze(-1), high, low)
        return from_blocks(mixed, x.shape[-1]).bfloat16()


def channel_harm(parts: Parts, setting: Setting) -> dict[str, Tensor]:
    """Fisher-weighted error that FP8 takes away, by site and channel, float64 (K,)."""
    kept = setting.calibration(Recipe.from_dict(config_of(setting.base).recipe))
    with safe_open(kept, framework="pt") as file:
        predictions = json.loads(file.metadata()["state"])["predictions"]
        fisher = {n: file.get_tensor(f"weight.{n}").double() / predictions for n in parts.weights}
    harm: dict[str, Tensor] = {}
    for owner, names in parts.linears_of.items():
        for name in names:
            codes = quantize_weight(parts.weights[name], parts.scale[name])
            w = parts.weights[name].double()
            fp4, fp8 = (
                (codes.units(torch.full_like(codes.scale, high).bool()) * codes.t - w).square()
                for high in (0, 1)
            )
            harm[owner] = harm.get(owner, 0) + (fisher[name] * (fp4 - fp8)).sum(0)

    def add(owner: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        record, x = parts.records[owner], args[0].float()
        fp4, fp8 = (
            (fake_quantize(x, replace(record, threshold=end))[0] * record.t - x).square()
            for end in (THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8)
        )
        g2 = decode_e4m3(record.sensitivity).double() * record.gamma
        harm[owner] += g2 * (fp4 - fp8).flatten(0, -2).double().sum(0) / predictions

    _watch(parts, add, setting.text.samples)
    return harm
