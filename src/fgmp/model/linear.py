"""Packed layers: the linear with a packed weight, and the site that quantizes its input.

A site quantizes its tensor once, for all linears that read it. The result is cached as long as the
tensor exists unchanged. The site is a submodule of its *owner*, the first linear that reads it; the
other linears only refer to it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fgmp.formats import activation
from fgmp.formats.activation import Site
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.pack.planes import PackedWeight, unpack_units

OnlineQuantizer = Callable[[Tensor, Site], tuple[Tensor, Tensor]]
"""Activation quantizer: (x (..., K), constants) to units, bf16 (..., K), and which blocks are FP8,
bool (..., G)."""


class ActivationSite(nn.Module):
    """Module that quantizes one activation tensor online.

    Args:
        site: constants of the tensor.

    Attributes:
        r, gamma: buffers, float32 ().
        sensitivity: buffer, E4M3 codes, uint8 (K,).
        threshold: buffer, int64 ().
        counting: whether ``counts`` is updated.
        counts: FP4 blocks, all blocks, saturated elements.
        quantizer: replaces the format's quantizer, for experiments; not saved. None: the format's.
    """

    r: Tensor
    gamma: Tensor
    sensitivity: Tensor
    threshold: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.rule, self.scales = site.rule, site.scales
        self.register_buffer("r", torch.tensor(site.r, dtype=torch.float32))
        self.register_buffer("gamma", torch.tensor(site.gamma, dtype=torch.float32))
        self.register_buffer("sensitivity", site.sensitivity)
        self.register_buffer("threshold", torch.tensor(site.threshold, dtype=torch.int64))
        self.counting = False
        self.counts = [0, 0, 0]
        self.quantizer: OnlineQuantizer | None = None
        self._forget()

    def _forget(self) -> None:
        self._quantized = WeakTensorKeyDictionary()
        self._record: Site | None = None

    @property
    def record(self) -> Site:
        """Constants of the site as a :class:`fgmp.formats.activation.Site`."""
        if self._record is None or self._record.sensitivity is not self.sensitivity:
            self._record = Site(
                r=self.r.item(),
                sensitivity=self.sensitivity,
                gamma=self.gamma.item(),
                threshold=int(self.threshold.item()),
                rule=self.rule,
                scales=self.scales,
            )
        return self._record

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` (..., K) and decode it to units, bf16 of the same shape."""
        # A tensor of inference mode has no version counter, so a change in place would go
        # unnoticed. A compiled graph shares equal calls by itself.
        if torch.compiler.is_compiling() or x.is_inference():
            return self._quantize(x)
        units: Tensor | None
        version, units = self._quantized.get(x, (None, None))
        if units is None or version != x._version:
            units = self._quantize(x)
            self._quantized[x] = (x._version, units)
        return units

    def scores(self, x: Tensor) -> Tensor:
        """Integer score S of every block of ``x`` (..., K), int64 (..., G)."""
        result: Tensor = ops.score_activation(x, *self._arguments())
        return result

    def _arguments(self) -> tuple[Tensor, Tensor, Tensor, str, str]:
        return self.r, self.sensitivity, self.threshold, self.rule, self.scales

    def _quantize(self, x: Tensor) -> Tensor:
        units: Tensor
        if self.quantizer is None:
            units, is_fp8 = ops.fake_quantize_activation(x, *self._arguments())
        else:
            units, is_fp8 = self.quantizer(x, self.record)
        if self.counting:
            self.counts[0] += is_fp8.numel() - int(is_fp8.sum())
            self.counts[1] += is_fp8.numel()
            self.counts[2] += int(activation.saturated(x, self.record))
        return units

    # The cache and the record are derived from buffers: they are not copied, moved or loaded.

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _apply(self, fn: Any, recurse: bool = True) -> "ActivationSite":
        super()._apply(_device_only(fn), recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_quantized", "_record")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def extra_repr(self) -> str:
        return f"K={len(self.sensitivity)}, rule={self.rule}, scales={self.scales}"


class MixedLinear(nn.Module):
    """Linear layer with a packed weight and an input that is quantized online.

    Args:
        weight: planes of the weight; they become the buffers ``weight_low``, ``weight_scale``, ...
            Or another packed linear whose planes this one uses, and then has no such buffers.
        bias: (N,) or None.
        site: quantizes the input.
        owns_site: whether the site becomes a submodule, as in the first linear that reads it.

    Attributes:
        holder: the linear that has the planes, this one or the other.
    """

    holder: "MixedLinear"
    out_features: int
    in_features: int

    def __init__(
        self,
        weight: "PackedWeight | MixedLinear",
        bias: Tensor | None,
        site: ActivationSite,
        *,
        owns_site: bool,
    ) -> None:
        super().__init__()
        if isinstance(weight, MixedLinear):
            self.out_features, self.in_features = weight.out_features, weight.in_features
        else:
            self.out_features, self.in_features = weight.n, weight.k
            for name in ("shape", "t", *PLANES):
                self.register_buffer(f"weight_{name}", getattr(weight, name))
        # A reference and no submodule: names, devices and files are the holder's.
        object.__setattr__(self, "holder", weight if isinstance(weight, MixedLinear) else self)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        if owns_site:
            self.input_site = site
        else:
            object.__setattr__(self, "input_site", site)

    @property
    def packed(self) -> PackedWeight:
        """Planes of the weight."""
        names = ("shape", "t", *PLANES)
        return PackedWeight(**{name: getattr(self.holder, f"weight_{name}") for name in names})

    @property
    def weight(self) -> Tensor:
        """Dequantized weight, fp32 (N, K), computed at each access; writing to it has no effect.

        It exists because model code reads a linear's weight, for its dtype or to initialize it.
        """
        packed = self.packed
        return unpack_units(packed) * packed.t

    def _apply(self, fn: Any, recurse: bool = True) -> "MixedLinear":
        super()._apply(_device_only(fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Quantize ``x`` (..., K) and multiply: (..., N) in the dtype of ``x``."""
        y: Tensor = ops.packed_linear(
            self.input_site(x),
            *(getattr(self.holder, f"weight_{plane}") for plane in PLANES),
            self.input_site.r,
            self.holder.weight_t,
            self.bias,
            x.dtype,
        )
        return y

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, mode={self.packed.mode}"
        )


def _device_only(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Wrap the function of ``Module._apply``: tensors change device but never dtype.

    ``model.half()`` and the like thus cannot round codes and scales.
    """

    def apply(tensor: Tensor) -> Tensor:
        new = fn(tensor)
        return new if new.dtype == tensor.dtype else tensor.to(new.device)

    return apply


def sites(model: nn.Module) -> dict[str, ActivationSite]:
    """Activation sites of a quantized model, by the name of their owner."""
    return {
        name.removesuffix(".input_site"): module
        for name, module in model.named_modules()
        if isinstance(module, ActivationSite)
    }


def mixed_linears(model: nn.Module) -> dict[str, MixedLinear]:
    """Packed linears of a quantized model, by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, MixedLinear)}


def weight_holders(model: nn.Module) -> dict[str, MixedLinear]:
    """Packed linears by name, one for each packed weight."""
    return {name: m for name, m in mixed_linears(model).items() if m.holder is m}
