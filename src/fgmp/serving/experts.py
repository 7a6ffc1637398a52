"""The operator ``torch.ops.fgmp.packed_experts``: a mixture of experts on packed weights.

For every expert e that a token chose,

    y += w * down_e( act(g) * u ),   (g, u) = first_e(x),

where ``first`` holds the rows of the gate above those of the up projection. Both are packed linears
with sites of their own, which see the tokens of this expert alone, as in calibration.

The weights of all experts are stacked: expert e has rows e N to (e + 1) N. That keeps the number of
tensors of a layer constant, however many experts it has. The loop over experts depends on data, so
it is one operator, which torch.compile does not look into.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fgmp.errors import CheckpointError
from fgmp.formats.activation import Site
from fgmp.kernels import ops
from fgmp.kernels.check import PLANES
from fgmp.pack.planes import PackedWeight, rows
from fgmp.serving.shards import stack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}
"""Activation functions of the gate, by vLLM's names."""

CONSTANTS = ("t", "r", "sensitivity", "threshold")
"""Constants of every expert: (E,), (E,), (E, K), (E,)."""

_STACKED = (*PLANES, *CONSTANTS)
_SCHEMA = ", ".join(
    f"Tensor{'?' if name in PLANES else ''} {linear}_{name}"
    for linear in ("first", "down")
    for name in _STACKED
)

_lib = torch.library.Library("fgmp", "FRAGMENT")
_lib.define(
    f"packed_experts(Tensor x, Tensor weights, Tensor experts, {_SCHEMA}, str rule, str scales, "
    "str activation) -> Tensor"
)


@dataclass(frozen=True)
class Stacked:
    """One linear of every expert.

    Attributes:
        packed: rows of all experts; its ``t`` means nothing.
        constants: those of :data:`CONSTANTS`.
        rule, scales: of every expert's site.
    """

    packed: PackedWeight
    constants: dict[str, Tensor]
    rule: str
    scales: str

    def tensors(self) -> dict[str, Tensor | None]:
        """Arguments of the operator, by name, in order."""
        planes = {name: getattr(self.packed, name) for name in PLANES}
        return {**planes, **self.constants}


def stacked(layer: str, weights: Sequence[PackedWeight], sites: Sequence[Site]) -> Stacked:
    """Stack the same linear of every expert.

    Raises:
        CheckpointError: the sites differ in their rule or scales.
    """
    kinds = {(site.rule, site.scales) for site in sites}
    if len(kinds) > 1:
        raise CheckpointError(
            f"{layer}: sites of all experts must have one rule and one choice of scales, got "
            f"{sorted(kinds)}"
        )
    rule, scales = kinds.pop()
    constants = {
        "t": torch.stack([weight.t for weight in weights]),
        "r": torch.tensor([site.r for site in sites], dtype=torch.float32),
        "sensitivity": torch.stack([site.sensitivity for site in sites]),
        "threshold": torch.tensor([site.threshold for site in sites], dtype=torch.int64),
    }
    return Stacked(stack(weights), constants, rule, scales)


def _linear(stack: Sequence[Tensor | None], rule: str, scales: str) -> Callable[..., Tensor]:
    """The function (expert, x) to outputs of one stacked linear."""
    t, r, sensitivity, threshold = stack[len(PLANES) :]
    assert t is not None and r is not None and sensitivity is not None and threshold is not None
    planes = dict(zip(PLANES, stack, strict=False))
    dense = planes["low"] if planes["low"] is not None else planes["fp8"]
    assert dense is not None
    size, k = len(dense) // len(t), sensitivity.shape[-1]
    packed = PackedWeight(shape=torch.tensor([len(dense), k]), t=t, **planes)

    def apply(expert: int, x: Tensor) -> Tensor:
        own = rows(packed, expert * size, (expert + 1) * size)
        site = (r[expert], sensitivity[expert], threshold[expert])
        units, _ = ops.fake_quantize_activation(x, *site, rule, scales)
        own_planes = (getattr(own, name) for name in PLANES)
        y: Tensor = ops.packed_linear(units, *own_planes, r[expert], t[expert], None, x.dtype)
        return y

    return apply


def packed_experts(x: Tensor, weights: Tensor, experts: Tensor, *arguments: Any) -> Tensor:
    """Weighted sum of the outputs of each token's experts, (T, H), in the dtype of ``x``.

    Args:
        x: tokens, (T, H).
        weights: weights of each token's experts, (T, k).
        experts: their indices, int (T, k).
        arguments: :meth:`Stacked.tensors` of both linears, the rule and scales of their sites, and
            a key of :data:`ACTIVATIONS`.
    """
    *tensors, rule, scales, activation = arguments
    first = _linear(tensors[: len(_STACKED)], rule, scales)
    down = _linear(tensors[len(_STACKED) :], rule, scales)
    activate = ACTIVATIONS[activation]
    out = torch.zeros_like(x)
    for expert in experts.unique().tolist():
        token, slot = (experts == expert).nonzero(as_tuple=True)
        gate, up = first(expert, x[token]).chunk(2, dim=-1)
        result = down(expert, activate(gate) * up) * weights[token, slot].unsqueeze(-1)
        out.index_add_(0, token, result.to(out.dtype))
    return out


def _shape(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


_lib.impl("packed_experts", packed_experts, "CompositeExplicitAutograd")
torch.library.register_fake("fgmp::packed_experts", _shape, lib=_lib)
