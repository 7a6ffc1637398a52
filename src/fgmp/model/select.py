"""Select the weights to quantize.

Models of Transformers store matrices in three forms: ``nn.Linear``, GPT-2's transposed ``Conv1D``,
and experts fused into one 3-D parameter. :func:`linearize` converts the second and third to the
first, so that all other code deals with one kind of layer. Names are the same for a model with
weights and for one on the meta device that is about to be loaded.

Output heads and routers stay in high precision unless an include pattern names them. Embeddings
always do, and so do heads that share the embedding's weight.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fgmp.errors import InputError

ROUTERS = ("*.router", "*.router.*", "*.gate", "*.shared_expert_gate")
"""Name patterns of routers, which choose experts and have few parameters."""


class Expert(nn.Module):
    """Container for the matrices of one expert; :class:`Experts` computes with them."""

    def __init__(self, first: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up_proj = first
        self.down_proj = down


class Experts(nn.ModuleList):
    """Fused experts as separate linears, one :class:`Expert` per expert.

    The parameters are views of the fused tensors; nothing is copied. As in the module that this
    replaces, the caller routes the tokens.

    Args:
        fused: a fused-experts module of Transformers; its parameters are removed.
    """

    def __init__(self, fused: Any) -> None:
        first_name = "gate_up_proj" if fused.has_gate else "up_proj"
        first, down = getattr(fused, first_name), fused.down_proj
        first_bias = getattr(fused, first_name + "_bias", None)
        down_bias = getattr(fused, "down_proj_bias", None)
        super().__init__(
            Expert(
                _linear_view(first[e], fused.is_transposed, _row(first_bias, e)),
                _linear_view(down[e], fused.is_transposed, _row(down_bias, e)),
            )
            for e in range(len(first))
        )
        for name in (first_name, "down_proj", first_name + "_bias", "down_proj_bias"):
            fused._parameters.pop(name, None)
        # The fused module still provides the activation function; it is no child of this module.
        object.__setattr__(self, "_activation", fused)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Weighted sum of the outputs of each token's experts.

        Args:
            hidden_states: (T, H).
            top_k_index: indices of each token's experts, int64 (T, k).
            top_k_weights: their weights, (T, k).

        Returns:
            (T, H), in the dtype of ``hidden_states``.
        """
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):  # a padding entry of expert parallelism
                continue
            token, slot = (top_k_index == index).nonzero(as_tuple=True)
            expert = self[index]
            middle = self._activate(expert.gate_up_proj(hidden_states[token]))
            result = expert.down_proj(middle) * top_k_weights[token, slot].unsqueeze(-1)
            out.index_add_(0, token, result.to(out.dtype))
        return out

    def _activate(self, x: Tensor) -> Tensor:
        fused: Any = self._activation
        activated: Tensor = fused._apply_gate(x) if fused.has_gate else fused.act_fn(x)
        return activated


def linearize(model: nn.Module) -> None:
    """Replace every ``Conv1D`` and every fused-experts module by ``nn.Linear``s, in place."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, Conv1D):
            setattr(parent, name, _linear_view(child.weight, True, child.bias))
        elif _is_fused_experts(child):
            setattr(parent, name, Experts(child))


def quantizable(
    model: nn.Module, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """Linears to quantize, by name, in module order.

    Args:
        model: linearized.
        include: name patterns (shell style); ``*`` leaves out output heads and routers.
        exclude: name patterns of linears to leave out.

    Raises:
        InputError: a pattern other than ``*`` names a linear whose weight is also an embedding.
    """
    explicit = tuple(pattern for pattern in include if pattern != "*")
    head = output_head(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    chosen = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:
            continue
        tied = id(module.weight) in embeddings
        special = tied or module is head or _matches(name, ROUTERS)
        included = _matches(name, explicit) or ("*" in include and not special)
        if included and not _matches(name, exclude):
            if tied:
                raise InputError(
                    f"include {list(include)} names {name}, whose weight is the embedding's and "
                    "stays in high precision; exclude it, or untie the two"
                )
            chosen[name] = module
    return chosen


def matrices(model: nn.Module) -> dict[str, int]:
    """Number of elements of every matrix that multiplies activations, by parameter name.

    These are all parameters with two or more dimensions except embeddings. An embedding that is
    also the output head counts once, under the head's name.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = output_head(model)
    elements = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_table = id(parameter) in tables and module is not head
            if parameter.ndim >= 2 and not is_table:
                elements[f"{module_name}.{name}".lstrip(".")] = parameter.numel()
    return elements


def output_head(model: nn.Module) -> nn.Module | None:
    """Layer that computes the logits; None if the model names none."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that choose experts, by :data:`ROUTERS`."""
    return [name for name, _ in model.named_modules() if _matches(name, ROUTERS)]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Replace the submodule with the dotted name ``name`` by ``new``, in place."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _is_fused_experts(module: nn.Module) -> bool:
    """Whether a module follows the fused-experts interface of Transformers."""
    first = getattr(module, "gate_up_proj", getattr(module, "up_proj", None))
    down = getattr(module, "down_proj", None)
    return (
        isinstance(first, Tensor)
        and isinstance(down, Tensor)
        and first.ndim == down.ndim == 3
        and hasattr(module, "has_gate")
        and hasattr(module, "is_transposed")
        and not getattr(module, "has_post_expert_norm", False)
    )


def _linear_view(weight: Tensor, transposed: bool, bias: Tensor | None) -> nn.Linear:
    """``nn.Linear`` over existing tensors, without gradient; a ``transposed`` weight is (K, N)."""
    weight = weight.detach()
    if transposed:
        weight = weight.T.contiguous()
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def _row(bias: Tensor | None, index: int) -> Tensor | None:
    return None if bias is None else bias[index]


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
