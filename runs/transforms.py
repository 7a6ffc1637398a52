"""Easier tensors: transforms of a Llama's weights that leave its function and the format alone.

migrate         per-channel scales moved from activations into weights: out of a norm's weight, of
                the value projection's rows or of the up projection's, into the columns of the
                linears that follow. SmoothQuant (arXiv 2211.10438) with maxima of both, AWQ (arXiv
                2306.00978) with the mean magnitude of activations alone, and the exponent that
                calibration text likes best. Scales are powers of two, so that nothing is rounded.
reorder         channels sorted by Fisher-weighted squares, so that a block holds like channels
rotate          orthogonal rotations: of the residual stream and of each head's values, folded into
                weights (QuaRot, arXiv 2404.00456), and of the input of down projections, applied
                online. Hadamard matrices with random signs, as large as a power of two divides the
                width, or block-local ones of 16.

All take a model before quantization and change it in place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.formats.activation import Site, fake_quantize, multiplier, sensitivity_codes
from fgmp.formats.codec import from_blocks
from fgmp.formats.spec import BLOCK, THRESHOLD_ALL_FP4
from fgmp.formats.weight import quantize_weight, tensor_scale
from fgmp.model.select import quantizable
from fgmp.sensitivity.fisher import calibrate, causal_lm_loss

SEQUENCES = 8
"""Calibration sequences that statistics of single channels are taken from."""


@dataclass(frozen=True)
class Seam:
    """A tensor between what makes it and the linears that read it.

    Attributes:
        scaled: parameters whose rows, or elements, make the tensor's channels.
        readers: the linears that read it.
        repeats: how often each channel made comes up in what is read: value heads that several
            query heads share. Channels of one head stay together.
        head: channels in a head.
    """

    scaled: list[nn.Parameter]
    readers: list[nn.Linear]
    repeats: int = 1
    head: int = 1

    def spread(self, per_channel: Tensor) -> Tensor:
        """A value for every channel made, (C,), to every channel read, (C * repeats,)."""
        heads = per_channel.unflatten(0, (-1, self.head))
        return heads.repeat_interleave(self.repeats, 0).flatten()

    def gather(self, read: Tensor) -> Tensor:
        """The largest of what is read of each channel made, (..., C): the way back."""
        return read.unflatten(-1, (-1, self.repeats, self.head)).amax(-2).flatten(-2)


def seams(model: nn.Module) -> Iterator[Seam]:
    """The four seams of every layer of a Llama.

    Raises:
        InputError: another model.
    """
    config = model.config
    if config.model_type != "llama":
        raise InputError(f"transforms need a model of type llama, got {config.model_type}")
    head = model.model.layers[0].self_attn.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        yield Seam(
            [layer.input_layernorm.weight], [attention.q_proj, attention.k_proj, attention.v_proj]
        )
        yield Seam([attention.v_proj.weight], [attention.o_proj], group, head)
        yield Seam([layer.post_attention_layernorm.weight], [mlp.gate_proj, mlp.up_proj])
        yield Seam([mlp.up_proj.weight], [mlp.down_proj])


Scale = Callable[[Tensor, Tensor], Tensor]
"""Activations (T, C) and largest weight by channel, (C,), to what channels are divided by."""


def smoothquant(alpha: float) -> Scale:
    """max|x|^alpha / max|w|^(1 - alpha)."""
    return lambda x, w: x.abs().amax(0).clamp(min=_TINY) ** alpha / w ** (1 - alpha)


def awq(alpha: float) -> Scale:
    """mean|x|^alpha."""
    return lambda x, w: x.abs().mean(0).clamp(min=_TINY) ** alpha


CANDIDATES = (awq(0.0), *(family(a) for family in (awq, smoothquant) for a in (0.25, 0.5, 0.75)))
"""What :func:`migrate` chooses from; the first leaves everything as it is."""

_TINY = 1e-9


@torch.no_grad()
def migrate(
    model: nn.Module, samples: Tensor, candidates: tuple[Scale, ...] = CANDIDATES
) -> nn.Module:
    """Divide what is made by a scale a channel and multiply what reads it, in place.

    Each seam takes the candidate under which the outputs of its readers, weights and activations
    all NVFP4, are nearest to their own on calibration tokens.

    Args:
        model: a Llama without biases in its linears.
        samples: calibration windows, int64 (B, L), of which the first few are used.
        candidates: powers of two are made of them here.
    """
    found = list(seams(model))
    for seam, x in zip(found, _inputs(model, found, samples), strict=True):
        w = torch.stack([r.weight.abs().amax(0) for r in seam.readers]).amax(0).float()
        read = seam.gather(x.abs()), seam.gather(w).clamp(min=_TINY)
        tried = [_powers_of_two(scale(*read)) for scale in candidates]
        s = min(tried, key=lambda s: _output_error(seam, x, seam.spread(s)))
        for parameter in seam.scaled:
            parameter.div_(s.view(-1, *[1] * (parameter.ndim - 1)))
        for reader in seam.readers:
            reader.weight.mul_(seam.spread(s))
    return model


def _powers_of_two(s: Tensor) -> Tensor:
    exponents = s.log2()
    return (exponents - exponents.mean()).round().exp2()


def _output_error(seam: Seam, x: Tensor, s: Tensor) -> float:
    """Squared error of the readers' outputs with everything in FP4."""
    moved = x / s
    codes, gamma = sensitivity_codes(torch.ones_like(s))
    r = multiplier(moved.abs().max().item())
    site = Site(r, codes, gamma, THRESHOLD_ALL_FP4, "benefit", "search")
    q = fake_quantize(moved, site)[0] * site.t
    total = 0.0
    for reader in seam.readers:
        weight = reader.weight.float()
        t = tensor_scale((weight * s).abs().max().item())
        fp4 = from_blocks(quantize_weight(weight * s, t).fp4_units(), weight.shape[1]) * t
        total += (q @ fp4.T - x @ weight.T).square().sum().item()
    return total


@torch.no_grad()
def reorder(model: nn.Module, samples: Tensor) -> nn.Module:
    """Sort channels by g^2 x^2, mean squares, so that blocks hold like channels; in place.

    The residual stream has one order for all layers, by the mean of logarithms; each layer's
    feed-forward channels have their own, and so have the value channels of each head.
    """
    found = list(seams(model))
    with torch.enable_grad():
        sites = calibrate(model, quantizable(model), samples).sites.values()
    g2 = {name: site.g2 for site in sites for name in site.linears}
    names = {id(module): name for name, module in model.named_modules()}
    harm = [
        (g2[names[id(seam.readers[0])]] * x.square().mean(0)).clamp(min=1e-30).log()
        for seam, x in zip(found, _inputs(model, found, samples), strict=True)
    ]
    stream = torch.stack([h - h.mean() for h in (*harm[0::4], *harm[2::4])]).mean(0).argsort()
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream])
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight.copy_(model.lm_head.weight[:, stream])
    model.model.norm.weight.copy_(model.model.norm.weight[stream])
    for index, layer in enumerate(model.model.layers):
        into_attention, values, into_mlp = found[4 * index : 4 * index + 3]
        for seam in (into_attention, into_mlp):
            seam.scaled[0].copy_(seam.scaled[0][stream])
            for reader in seam.readers:
                reader.weight.copy_(reader.weight[:, stream])
        for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
            writer.weight.copy_(writer.weight[stream])
        order = harm[4 * index + 3].argsort()
        for writer in (layer.mlp.gate_proj, layer.mlp.up_proj):
            writer.weight.copy_(writer.weight[order])
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, order])
        by_head = values.gather(harm[4 * index + 1]).unflatten(0, (-1, values.head)).argsort(-1)
        rows = (by_head + values.head * torch.arange(len(by_head)).unsqueeze(-1)).flatten()
        values.scaled[0].copy_(values.scaled[0][rows])
        read = by_head.repeat_interleave(values.repeats, 0)
        columns = (read + values.head * torch.arange(len(read)).unsqueeze(-1)).flatten()
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, columns])
    return model


def _inputs(model: nn.Module, found: list[Seam], samples: Tensor) -> list[Tensor]:
    """What each seam's readers read in the first samples, fp32 (T, K)."""
    seen: list[list[Tensor]] = [[] for _ in found]

    def watch(index: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: seen[index].append(args[0].flatten(0, -2).float())

    handles = [seam.readers[0].register_forward_pre_hook(watch(i)) for i, seam in enumerate(found)]
    for sample in samples[:SEQUENCES]:
        causal_lm_loss(model, sample)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts) for parts in seen]


def hadamard(size: int) -> Tensor:
    """The orthogonal Hadamard matrix of a power of two, float64 (size, size)."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def rotation(width: int, block: int | None, seed: int) -> Tensor:
    """Block-diagonal Hadamard with random signs, float64 (width, width).

    ``block`` is the most that a block spans; None: as much as a power of two divides ``width``.
    """
    size = width & -width
    size = size if block is None else min(size, block)
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs.double().unsqueeze(-1) * torch.block_diag(*[hadamard(size)] * (width // size))


class Rotated(nn.Module):
    """A linear that reads its input rotated, online."""

    def __init__(self, linear: nn.Linear, matrix: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.register_buffer("matrix", matrix.float())

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) to (..., N)."""
        y: Tensor = self.linear((x.float() @ self.matrix).to(x.dtype))
        return y


@torch.no_grad()
def rotate(model: nn.Module, samples: Tensor, block: int | None = None) -> nn.Module:
    """Rotate every quantized tensor of a Llama, in place; ``block`` as in :func:`rotation`.

    ``samples`` are what every transform gets; a rotation has no use for them.

    The model becomes fp32: a rotated weight has no reason to fit bf16.
    """
    model.float()
    config = model.config
    head_size = model.model.layers[0].self_attn.head_dim
    stream = rotation(config.hidden_size, block, seed=0)
    values = rotation(head_size, block, seed=1)
    _untie(model)
    _columns(model.model.embed_tokens, stream)
    _absorb(model.model.norm, [model.lm_head])
    _columns(model.lm_head, stream)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        into_attention = [attention.q_proj, attention.k_proj, attention.v_proj]
        into_mlp = [mlp.gate_proj, mlp.up_proj]
        _absorb(layer.input_layernorm, into_attention)
        _absorb(layer.post_attention_layernorm, into_mlp)
        for linear in into_attention + into_mlp:
            _columns(linear, stream)
        for linear in (attention.o_proj, mlp.down_proj):
            linear.weight.copy_(stream.T @ linear.weight.double())
        by_head = torch.block_diag(*[values] * config.num_key_value_heads)
        attention.v_proj.weight.copy_(by_head.T @ attention.v_proj.weight.double())
        _columns(attention.o_proj, torch.block_diag(*[values] * config.num_attention_heads))
        middle = rotation(config.intermediate_size, block, seed=2)
        _columns(mlp.down_proj, middle)
        mlp.down_proj = Rotated(mlp.down_proj, middle)
    return model


def rotate_blocks(model: nn.Module, samples: Tensor) -> nn.Module:
    """Rotate within blocks of 16."""
    return rotate(model, samples, BLOCK)


def _columns(module: nn.Module, matrix: Tensor) -> None:
    """W to W R, so that it reads x R (or, of an embedding, gives it)."""
    module.weight.copy_(module.weight.double() @ matrix)


def _absorb(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Move a norm's weight into what reads it: without it the norm commutes with rotations."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _untie(model: nn.Module) -> None:
    """Give the head a matrix of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
