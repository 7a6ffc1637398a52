"""Transforms of a Llama's weights that make its tensors easier to quantize.

Neither the model's function nor the format changes. Each takes a model before quantization, and
calibration windows, and changes the model in place.

migrate         per-channel scales moved from activations into weights: out of a norm's weight, of
                the value projection's rows or of the up projection's, into the columns of the
                linears that follow. SmoothQuant (arXiv 2211.10438) with maxima of both, AWQ (arXiv
                2306.00978) with the mean magnitude of activations alone; calibration text chooses
                the exponent. Scales are powers of two, so nothing is rounded.
reorder         channels sorted by Fisher-weighted squares, so that a block holds like channels
rotate          orthogonal rotations: of the residual stream and of each head's values, folded into
                weights (QuaRot, arXiv 2404.00456), and of the input of down projections, applied
                online. Hadamard matrices with random signs, as large as a power of two divides the
                width, or block-local ones of 16.
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
from fgmp.model.losses import causal_lm_loss
from fgmp.model.observe import observed_inputs, run_all
from fgmp.model.select import quantizable
from fgmp.sensitivity.fisher import calibrate

SEQUENCES = 8
"""Calibration sequences for the statistics of single channels."""


@dataclass(frozen=True)
class Seam:
    """A tensor between the parameters that write it and the linears that read it.

    Attributes:
        writers: parameters whose rows, or elements, write the tensor's channels.
        readers: the linears that read it.
        repeats: how often each written channel is read: query heads per value head. Channels of one
            head stay together.
        head: channels per head.
    """

    writers: list[nn.Parameter]
    readers: list[nn.Linear]
    repeats: int = 1
    head: int = 1

    def spread(self, per_channel: Tensor) -> Tensor:
        """A value per written channel, (C,), to one per read channel, (C * repeats,)."""
        heads = per_channel.unflatten(0, (-1, self.head))
        return heads.repeat_interleave(self.repeats, 0).flatten()

    def gather(self, read: Tensor) -> Tensor:
        """The largest value read of each written channel, (..., C); inverse of `spread`."""
        return read.unflatten(-1, (-1, self.repeats, self.head)).amax(-2).flatten(-2)


def seams(model: nn.Module) -> Iterator[Seam]:
    """The four seams of every layer of a Llama.

    Raises:
        InputError: a model of another type.
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
"""(activations (T, C), largest weights by channel (C,)) to divisors of the channels, (C,)."""


def smoothquant(alpha: float) -> Scale:
    """max|x|^alpha / max|w|^(1 - alpha)."""
    return lambda x, w: x.abs().amax(0).clamp(min=_TINY) ** alpha / w ** (1 - alpha)


def awq(alpha: float) -> Scale:
    """mean|x|^alpha."""
    return lambda x, w: x.abs().mean(0).clamp(min=_TINY) ** alpha


CANDIDATES = (awq(0.0), *(family(a) for family in (awq, smoothquant) for a in (0.25, 0.5, 0.75)))
"""Candidates of :func:`migrate`; the first changes nothing."""

_TINY = 1e-9
"""Smallest magnitude that a channel counts with."""


@torch.no_grad()
def migrate(
    model: nn.Module, samples: Tensor, candidates: tuple[Scale, ...] = CANDIDATES
) -> nn.Module:
    """Divide the writers of each channel by a scale and multiply its readers by it, in place.

    Each seam takes the candidate under which the outputs of its readers, with weights and
    activations all NVFP4, are nearest to the original's on calibration tokens.

    Args:
        model: a Llama without biases in its linears.
        samples: calibration windows, int64 (B, L), of which the first few are used.
        candidates: rounded to powers of two.
    """
    all_seams = list(seams(model))
    for seam, x in zip(all_seams, seam_inputs(model, all_seams, samples), strict=True):
        w = torch.stack([r.weight.abs().amax(0) for r in seam.readers]).amax(0).float()
        largest = seam.gather(x.abs()), seam.gather(w).clamp(min=_TINY)
        scales = [powers_of_two(scale(*largest)) for scale in candidates]
        s = min(scales, key=lambda s: output_error(seam, x, seam.spread(s)))
        for parameter in seam.writers:
            parameter.div_(s.view(-1, *[1] * (parameter.ndim - 1)))
        for reader in seam.readers:
            reader.weight.mul_(seam.spread(s))
    return model


def powers_of_two(s: Tensor) -> Tensor:
    """Nearest powers of two, scaled so that their geometric mean is about 1."""
    exponents = s.log2()
    return (exponents - exponents.mean()).round().exp2()


def output_error(seam: Seam, x: Tensor, s: Tensor) -> float:
    """Squared error of the readers' outputs in NVFP4 when channels (K,) are divided by ``s``."""
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
    """Sort channels by the product of mean squares g^2 x^2, in place, so blocks hold like channels.

    The residual stream has one order for all layers, by the mean of logarithms. The feed-forward
    channels of each layer have their own order, and so have the value channels of each head.
    """
    all_seams = list(seams(model))
    with torch.enable_grad():
        sites = calibrate(model, quantizable(model), samples).sites.values()
    g2 = {name: site.g2 for site in sites for name in site.linears}
    names = {id(module): name for name, module in model.named_modules()}
    harm = [
        (g2[names[id(seam.readers[0])]] * x.square().mean(0)).clamp(min=1e-30).log()
        for seam, x in zip(all_seams, seam_inputs(model, all_seams, samples), strict=True)
    ]
    stream = torch.stack([h - h.mean() for h in (*harm[0::4], *harm[2::4])]).mean(0).argsort()
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[:, stream])
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        model.lm_head.weight.copy_(model.lm_head.weight[:, stream])
    model.model.norm.weight.copy_(model.model.norm.weight[stream])
    for index, layer in enumerate(model.model.layers):
        into_attention, values, into_mlp = all_seams[4 * index : 4 * index + 3]
        for seam in (into_attention, into_mlp):
            seam.writers[0].copy_(seam.writers[0][stream])
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
        values.writers[0].copy_(values.writers[0][rows])
        read = by_head.repeat_interleave(values.repeats, 0)
        columns = (read + values.head * torch.arange(len(read)).unsqueeze(-1)).flatten()
        layer.self_attn.o_proj.weight.copy_(layer.self_attn.o_proj.weight[:, columns])
    return model


def seam_inputs(model: nn.Module, all_seams: list[Seam], samples: Tensor) -> list[Tensor]:
    """Inputs of each seam's readers on the first samples, fp32 (T, K)."""
    names = {id(module): name for name, module in model.named_modules()}
    readers = [names[id(seam.readers[0])] for seam in all_seams]
    inputs: dict[str, list[Tensor]] = {name: [] for name in readers}

    def keep(name: str, x: Tensor) -> None:
        inputs[name].append(x.flatten(0, -2).float())

    with observed_inputs(model, readers, keep):
        run_all(model, samples[:SEQUENCES], causal_lm_loss)
    return [torch.cat(inputs[name]) for name in readers]


def hadamard(size: int) -> Tensor:
    """Orthogonal Hadamard matrix, float64 (size, size); ``size`` is a power of two."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h / size**0.5


def rotation(width: int, block: int | None, seed: int) -> Tensor:
    """Block-diagonal Hadamard with random signs, float64 (width, width).

    ``block`` is the largest span of a block; None: the largest power of two that divides ``width``.
    """
    size = width & -width
    size = size if block is None else min(size, block)
    signs = torch.randint(2, (width,), generator=torch.Generator().manual_seed(seed)) * 2.0 - 1
    return signs.double().unsqueeze(-1) * torch.block_diag(*[hadamard(size)] * (width // size))


class Rotated(nn.Module):
    """A linear whose input is rotated online."""

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
    """Rotate every quantized tensor of a Llama, in place.

    The model becomes fp32: rotated weights do not fit bf16.

    Args:
        model: a Llama.
        samples: not used; every transform gets them.
        block: as in :func:`rotation`.
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
    """Turn W into W R, in place: a linear then reads x R, an embedding returns it."""
    module.weight.copy_(module.weight.double() @ matrix)


def _absorb(norm: nn.Module, readers: list[nn.Linear]) -> None:
    """Move a norm's weight into its readers; without it the norm commutes with rotations."""
    for reader in readers:
        reader.weight.mul_(norm.weight)
    norm.weight.fill_(1)


def _untie(model: nn.Module) -> None:
    """Give the output head a matrix of its own."""
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
