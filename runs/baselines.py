"""Baselines: published rules of other toolkits, on this package's formats and activation sites.

Each function takes a setting and returns a packed model, so bits are counted from bytes as for
every row. The rules are implemented anew:

four_over_six   NVFP4 whose blocks put their largest value at 6 or at 4, whichever has the smaller
                squared error, weights and activations; tensor scales leave room for the factor 1.5
                (arXiv 2512.02010)
gptq            NVFP4 with error compensation (arXiv 2210.17323) and MSE scales, layer after layer
                on the second moments of inputs that the quantized layers before return;
                activations rounded to nearest
autoquantize    one format per layer, as Model Optimizer chooses it: score = sum (gradient of the
                layer's output times its error)^2, linears that read one tensor together, solved
                exactly under a budget of weight bits
by_channel      outlier channels in FP8: whole blocks of 16 channels, sorted by the error that FP8
                avoids there
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from setting import ROUND_TO_NEAREST, Setting
from torch import Tensor, nn

from fgmp.assign.compensate import Factors, compensated, factorize
from fgmp.assign.scale_search import error
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
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.losses import causal_lm_loss
from fgmp.model.observe import differentiable_inputs, frozen, observed_inputs, run_all
from fgmp.model.select import linearize
from fgmp.model.store import config_of
from fgmp.pack.planes import PackedWeight, pack
from fgmp.quantization.sequential import pack_in_turn
from fgmp.sensitivity.moments import Moments

GPTQ_DAMPING = 0.01
"""The default of GPTQ's authors."""

SCORED_SEQUENCES = 128
"""Sequences on which Model Optimizer scores layers by default."""


class Parts:
    """Weights of the original and constants of the sites, to be combined into a packed model.

    Attributes:
        linears_of: names of the linears that read a site's tensor, by the site's owner.
        sites: constants of the sites.
        model: the original, linearized.
        linears, weights: linears to quantize and their weights (N, K), by name.
        scale: tensor scales by linear.
    """

    def __init__(self, setting: Setting) -> None:
        base = setting.base
        self.linears_of = {owner: s.linears for owner, s in config_of(base).sites.items()}
        self.sites = {owner: site.record for owner, site in sites(base).items()}
        self.model = setting.load()
        linearize(self.model)
        self.linears = {n: self.model.get_submodule(n) for n in mixed_linears(base)}
        self.weights = {n: m.weight.detach() for n, m in self.linears.items()}
        self.scale = {
            name: group_scale(self.weights[n] for n in names)
            for names in self.linears_of.values()
            for name in names
        }

    def nearest_codes(self) -> dict[str, WeightCodes]:
        """Codes of all weights under scales rounded to nearest, by linear."""
        return {n: quantize_weight(w, self.scale[n]) for n, w in self.weights.items()}

    def with_thresholds(self, thresholds: dict[str, int]) -> dict[str, Site]:
        """Constants of the sites with these thresholds, by owner."""
        return {o: replace(s, threshold=thresholds[o]) for o, s in self.sites.items()}

    def install(
        self, codes: dict[str, WeightCodes], is_fp8: dict[str, Tensor], sites: dict[str, Site]
    ) -> nn.Module:
        """Pack the weights and put them into the model."""
        packed = {name: pack(codes[name], is_fp8[name]) for name in codes}
        install(self.model, packed, sites, self.linears_of)
        return self.model


# Four Over Six.

HEADROOM = E4M3.max / 256
"""Four Over Six scales the largest value of a tensor to 6 * 256, so that the factor 1.5 fits."""


def four_over_six(setting: Setting) -> nn.Module:
    """NVFP4 with the better of two scales per block."""
    parts = Parts(setting)
    codes = {
        name: four_over_six_codes(weight, parts.scale[name] * HEADROOM)
        for name, weight in parts.weights.items()
    }
    none = {name: torch.zeros_like(c.scale, dtype=torch.bool) for name, c in codes.items()}
    constants = {
        owner: replace(
            site,
            r=multiplier(E4M3.max / site.r * HEADROOM),
            threshold=THRESHOLD_ALL_FP4,
            scales="max",
        )
        for owner, site in parts.sites.items()
    }
    model = parts.install(codes, none, constants)
    for site in sites(model).values():
        site.quantizer = four_over_six_quantizer
    return model


def four_over_six_codes(weight: Tensor, t: float) -> WeightCodes:
    """Codes of a weight (N, K) under the better of two scales per block."""
    blocks = to_blocks(weight.float())
    u = blocks / (FP8_FACTOR * torch.tensor(t))
    at6, at4 = two_scales(u.abs().amax(-1))
    ones = torch.ones_like(blocks).flatten(0, 1).double()
    errors = [error(blocks.flatten(0, 1), ones, s.flatten(), t) for s in (at6, at4)]
    better = (errors[1] < errors[0]).view_as(at6)
    codes = quantize_weight(weight, t, torch.where(better, at4, at6))
    flushed = (codes.fp4 & (E2M1.sign_bit - 1) == 0).all(-1)
    codes.scale[flushed] = SCALE_MIN_CODE
    return codes


def four_over_six_quantizer(x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Online quantizer of :func:`four_over_six`; see ``ActivationSite.quantizer``."""
    u = to_blocks(x.to(torch.bfloat16).float()) * site.r
    candidates = []
    for code in two_scales(u.abs().amax(-1)):
        step = decode_e4m3(code).unsqueeze(-1)
        candidates.append(round_e2m1(FP8_FACTOR * u / step) * step)
    at6, at4 = ((q - FP8_FACTOR * u).square().sum(-1, keepdim=True) for q in candidates)
    units = torch.where(at4 < at6, candidates[1], candidates[0])
    is_fp8 = torch.zeros(units.shape[:-1], dtype=torch.bool, device=x.device)
    return from_blocks(units, x.shape[-1]).bfloat16(), is_fp8


def two_scales(largest: Tensor) -> tuple[Tensor, Tensor]:
    """Scale codes that put the largest magnitudes (...) of blocks at 6 and at 4; uint8 (...)."""
    at6, at4 = (
        encode_e4m3(largest * factor).clamp(SCALE_MIN_CODE, SCALE_MAX_CODE) for factor in (1, 6 / 4)
    )
    return at6, at4


# GPTQ.


def gptq(setting: Setting) -> nn.Module:
    """NVFP4 weights by GPTQ with MSE scales; activations rounded to nearest."""
    parts = Parts(setting)
    constants = parts.with_thresholds(dict.fromkeys(parts.sites, THRESHOLD_ALL_FP4))

    def pack_stage(
        groups: Iterable[list[str]], moments: dict[str, Moments]
    ) -> dict[str, PackedWeight]:
        packed = {}
        for names in groups:
            root = factorize(moments[names[0]].h, GPTQ_DAMPING)
            assert root is not None
            for name in names:
                w = parts.weights[name]
                none = torch.zeros(len(w), -(-w.shape[1] // BLOCK), dtype=torch.bool)
                # W* is W, since the layer compensates for no error of its input.
                factors = Factors(root, torch.zeros_like(w))
                codes = compensated(w, factors, none, parts.scale[name], torch.ones_like(w))
                packed[name] = pack(codes, none)
        return packed

    samples, packers = setting.text.samples, {"gptq": pack_stage}
    packed = pack_in_turn(
        parts.model, parts.linears_of, constants, samples, causal_lm_loss, packers
    )["gptq"]
    install(parts.model, packed, constants, parts.linears_of)
    return parts.model


# AutoQuantize.


def autoquantize(setting: Setting, bits: float) -> nn.Module:
    """One format per site, weights and activations, under a budget of bits per weight."""
    parts = Parts(setting)
    gains = {owner: s["fp4"] - s["fp8"] for owner, s in setting.once(layer_scores).items()}
    size = {o: sum(parts.weights[n].numel() for n in ns) for o, ns in parts.linears_of.items()}
    room = (bits - FP4_BITS) / (FP8_BITS - FP4_BITS) * sum(size.values())
    chosen = best_subset(gains, size, room)
    thresholds = {o: THRESHOLD_ALL_FP8 if o in chosen else THRESHOLD_ALL_FP4 for o in parts.sites}
    codes = parts.nearest_codes()
    is_fp8 = {
        name: torch.full_like(codes[name].scale, owner in chosen).bool()
        for owner, names in parts.linears_of.items()
        for name in names
    }
    return parts.install(codes, is_fp8, parts.with_thresholds(thresholds))


def best_subset(gains: dict[str, float], size: dict[str, int], room: float) -> frozenset[str]:
    """Names with the largest sum of gains whose sizes sum to at most ``room``; exact."""
    # Subsets that no cheaper one beats, by size: (gain, names).
    best: dict[int, tuple[float, frozenset[str]]] = {0: (0.0, frozenset())}
    for name, cost in size.items():
        for used, (gain, names) in list(best.items()):
            total = gain + gains[name]
            if used + cost <= room and total > best.get(used + cost, (-1.0, names))[0]:
                best[used + cost] = (total, names | {name})
        frontier, reached = {}, -1.0
        for used in sorted(best):
            if best[used][0] > reached:
                frontier[used], reached = best[used], best[used][0]
        best = frontier
    return max(best.values())[1]


def layer_scores(setting: Setting) -> dict[str, dict[str, float]]:
    """sum (dL/dY * (Y quantized - Y))^2 by site and format, over its linears and all tokens."""
    parts = Parts(setting)
    scores = {owner: {"fp4": 0.0, "fp8": 0.0} for owner in parts.sites}
    codes = parts.nearest_codes()
    thresholds = {"fp4": THRESHOLD_ALL_FP4, "fp8": THRESHOLD_ALL_FP8}

    def compare(owner: str, name: str, _: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        with torch.no_grad():
            errors = {}
            for fmt, threshold in thresholds.items():
                site = replace(parts.sites[owner], threshold=threshold)
                q = fake_quantize(args[0], site)[0] * site.t
                mask = torch.full_like(codes[name].scale, fmt == "fp8").bool()
                weight = codes[name].units(mask) * parts.scale[name]
                bias = parts.linears[name].bias
                exact = y.float() if bias is None else y.float() - bias.float()
                errors[fmt] = q @ weight.T - exact

        def score(gradient: Tensor) -> None:
            for fmt, difference in errors.items():
                scores[owner][fmt] += (gradient.float() * difference).square().sum().item()

        y.register_hook(score)

    handles = [
        parts.linears[name].register_forward_hook(partial(compare, owner, name))
        for owner, names in parts.linears_of.items()
        for name in names
    ]
    with frozen(parts.model), differentiable_inputs(parts.linears.values()):
        for sample in setting.text.samples[:SCORED_SEQUENCES]:
            causal_lm_loss(parts.model, sample)[0].backward()
    for handle in handles:
        handle.remove()
    return scores


# Outlier channels.


def by_channel(setting: Setting, fp4: float) -> nn.Module:
    """Whole blocks of 16 input channels in FP8, channels sorted by the error that FP8 avoids."""
    parts = Parts(setting)
    harm = setting.once(channel_harm)
    order = {owner: h.argsort(descending=True) for owner, h in harm.items()}
    blocks = {owner: to_blocks(h[order[owner]]).sum(-1) for owner, h in harm.items()}
    rows = {o: sum(len(parts.weights[n]) for n in ns) for o, ns in parts.linears_of.items()}
    fp8 = worst_blocks(blocks, rows, 1 - fp4)
    codes, is_fp8 = {}, {}
    for owner, names in parts.linears_of.items():
        for name in names:
            codes[name] = quantize_weight(parts.weights[name][:, order[owner]], parts.scale[name])
            is_fp8[name] = fp8[owner].expand_as(codes[name].scale)
    model = parts.install(codes, is_fp8, parts.sites)
    for owner, site in sites(model).items():
        site.quantizer = partial(channel_quantizer, order[owner], fp8[owner])
    return model


def worst_blocks(
    blocks: dict[str, Tensor], rows: dict[str, int], share: float
) -> dict[str, Tensor]:
    """Blocks of channels with the most harm per row, bool (G,) by site.

    Args:
        blocks: harm by site, (G,).
        rows: rows of all weights that read the site.
        share: at most this share of all weight blocks.
    """
    density = torch.cat([b / rows[owner] for owner, b in blocks.items()])
    counts = torch.cat([torch.full((len(b),), float(rows[owner])) for owner, b in blocks.items()])
    ranked = density.argsort(descending=True)
    inside = counts[ranked].cumsum(0) <= share * counts.sum()
    limit = density[ranked][inside].min().item() if inside.any() else float("inf")
    return {owner: b / rows[owner] >= limit for owner, b in blocks.items()}


def channel_quantizer(order: Tensor, fp8: Tensor, x: Tensor, site: Site) -> tuple[Tensor, Tensor]:
    """Online quantizer that reads channels in ``order``, int64 (K,).

    The format of a block is known beforehand: ``fp8``, bool (G,). With both arguments bound it is
    an ``ActivationSite.quantizer``.
    """
    x = x[..., order]
    high, low = (
        to_blocks(fake_quantize(x, replace(site, threshold=end))[0])
        for end in (THRESHOLD_ALL_FP8, THRESHOLD_ALL_FP4)
    )
    units = torch.where(fp8.unsqueeze(-1), high, low)
    return from_blocks(units, x.shape[-1]).bfloat16(), fp8.expand(units.shape[:-1])


def channel_harm(setting: Setting) -> dict[str, Tensor]:
    """Fisher-weighted squared error that FP8 avoids, by site and channel, float64 (K,)."""
    parts = Parts(setting)
    calibration = setting.calibrated(**ROUND_TO_NEAREST)
    harm: dict[str, Tensor] = {}
    for owner, names in parts.linears_of.items():
        for name in names:
            codes = quantize_weight(parts.weights[name], parts.scale[name])
            w, fisher = parts.weights[name].double(), calibration.weights[name].double()
            fp4, fp8 = (
                (codes.units(torch.full_like(codes.scale, high).bool()) * codes.t - w).square()
                for high in (0, 1)
            )
            harm[owner] = harm.get(owner, 0) + (fisher * (fp4 - fp8)).sum(0)

    def add(owner: str, x: Tensor) -> None:
        site, x = parts.sites[owner], x.float()
        fp4, fp8 = (
            (fake_quantize(x, replace(site, threshold=end))[0] * site.t - x).square()
            for end in (THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8)
        )
        g2 = decode_e4m3(site.sensitivity).double() * site.gamma
        squares = (fp4 - fp8).flatten(0, -2).double().sum(0)
        harm[owner] += g2 * squares / calibration.predictions

    with observed_inputs(parts.model, parts.sites, add):
        run_all(parts.model, setting.text.samples, causal_lm_loss)
    return harm
