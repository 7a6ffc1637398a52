"""Which weights: every matrix multiplication as an ``nn.Linear``, and the choice among them.

Models keep their matrices in three guises: ``nn.Linear``, GPT-2's transposed ``Conv1D``, and
experts fused into one 3-D parameter. :func:`linearize` turns the second and third into the
first, so that everything after it knows one kind of layer. It works on a model with weights and
on an empty one that is about to be loaded, and gives both the same names.

Output heads and routers stay in high precision unless an include pattern names them; embeddings
always do, and with them heads that share their weight.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fgmp.errors import InputError

ROUTERS = ("*.router", "*.router.*", "*.gate", "*.shared_expert_gate")
"""Name patterns of routers, which choose experts and hold next to no parameters."""


class Expert(nn.Module):
    """One expert's matrices; computes nothing by itself."""

    def __init__(self, first: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self.gate_up_proj = first
        self.down_proj = down


class Experts(nn.ModuleList):
    """Fused experts taken apart into linears, one :class:`Expert` each.

    The parameters are views of the fused tensors, so nothing is copied. Routing is the caller's:
    the arguments are those of the module it replaces.
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
        # What is left of the fused module knows the activation; it is no child of this one.
        object.__setattr__(self, "_activation", fused)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum each token's chosen experts.

        Args:
            hidden_states: (T, H).
            top_k_index: int64 (T, k), the experts a token goes to.
            top_k_weights: (T, k), what each of them counts.

        Returns:
            (T, H), the dtype of ``hidden_states``.
        """
        out = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if index >= len(self):  # a padding slot of expert parallelism
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
    """Replace every ``Conv1D`` and every fused expert module by ``nn.Linear``s, in place."""
    for parent, name, child in list(_children(model)):
        if isinstance(child, Conv1D):
            setattr(parent, name, _linear_view(child.weight, True, child.bias))
        elif _is_fused_experts(child):
            setattr(parent, name, Experts(child))


def quantizable(
    model: nn.Module, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """The linears to quantize, by name, in module order; the model must be linearized.

    Raises:
        InputError: a pattern other than ``*`` names a linear whose weight is an embedding too.
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
        wanted = _matches(name, explicit) or ("*" in include and not special)
        if wanted and not _matches(name, exclude):
            if tied:
                raise InputError(
                    f"include {list(include)} names {name}, whose weight is the embedding's and "
                    "stays in high precision; exclude it, or untie the two"
                )
            chosen[name] = module
    return chosen


def matrices(model: nn.Module) -> dict[str, int]:
    """Elements of every matrix that multiplies activations, by parameter name.

    All parameters of two or more dimensions but the embeddings; an embedding that doubles as the
    output head counts once, under the head's name.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = output_head(model)
    found = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_table = id(parameter) in tables and module is not head
            if parameter.ndim >= 2 and not is_table:
                found[f"{module_name}.{name}".lstrip(".")] = parameter.numel()
    return found


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, where the model names one."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that choose experts."""
    return [name for name, _ in model.named_modules() if _matches(name, ROUTERS)]


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` where the dotted ``name`` is."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def _is_fused_experts(module: nn.Module) -> bool:
    """Whether this follows the fused-experts interface of Transformers."""
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
    """An ``nn.Linear`` over existing tensors; ``transposed`` weights are (K, N)."""
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
