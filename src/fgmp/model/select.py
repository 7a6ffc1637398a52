"""Select the weights to quantize.

Models of Transformers store matrices in three forms: ``nn.Linear``, GPT-2's transposed ``Conv1D``,
and experts fused into one 3-D parameter. :func:`linearize` converts the second and third to the
first, so that all other code deals with one kind of layer. Names are the same for a model with
weights and for one on the meta device that is about to be loaded.

Output heads and routers stay in high precision unless an include pattern names them. Embeddings
always do, and so do heads that share the embedding's weight. A weight that several linears share is
quantized once, if all of them are chosen, else not at all.
"""

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from fgmp.errors import InputError

ROUTERS = ("router", "*.router", "*.router.*", "gate", "*.gate", "*.shared_expert_gate")
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
    """Replace every ``Conv1D`` and every fused-experts module by ``nn.Linear``s, in place.

    A module or weight that the model uses in several places stays one.
    """
    new: dict[int, nn.Module] = {}
    weights: dict[int, nn.Parameter] = {}
    for parent, name, child in list(_children(model)):
        if id(child) not in new:
            if isinstance(child, Conv1D):
                linear = new[id(child)] = _linear_view(child.weight, True, child.bias)
                own = nn.Parameter(linear.weight.detach(), requires_grad=False)
                linear.weight = weights.setdefault(id(child.weight), own)
            elif is_fused_experts(child):
                new[id(child)] = Experts(child)
        if id(child) in new:
            setattr(parent, name, new[id(child)])


def quantizable(
    model: nn.Module, include: tuple[str, ...] = ("*",), exclude: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """Linears to quantize, by name, in module order.

    Args:
        model: the linearized model.
        include: name patterns (shell style); ``*`` leaves out output heads and routers.
        exclude: name patterns of linears to leave out.

    Raises:
        InputError: a pattern other than ``*`` names a linear whose weight is also an embedding.
    """
    explicit = tuple(pattern for pattern in include if pattern != "*")
    head = output_head(model)
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    gates = set(routers(model))
    chosen = {}
    for name, module in model.named_modules():
        if not is_linear(module):
            continue
        tied = id(module.weight) in embeddings
        special = tied or module is head or name in gates
        included = matches(name, explicit) or ("*" in include and not special)
        if included and not matches(name, exclude):
            if tied:
                raise InputError(
                    f"include {list(include)} names {name}, whose weight is the embedding's and "
                    "stays in high precision; exclude it, or untie the two"
                )
            chosen[name] = module
    users, modules = _users(model), _ids(chosen)
    complete = {id(m.weight) for m in chosen.values() if users[id(m.weight)] <= modules}
    return {name: module for name, module in chosen.items() if id(module.weight) in complete}


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module computes x W^T + b: ``nn.Linear``, or a subclass that does the same.

    A subclass with a forward function of its own is run on random numbers and compared.
    """
    if not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return isinstance(module, nn.Linear)
    if module.weight.is_meta:
        return True  # it was compared before the checkpoint was written
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, module.in_features, generator=generator).to(module.weight)
    try:
        with torch.no_grad():
            y, expected = module(x), nn.functional.linear(x, module.weight, module.bias)
    except Exception:  # it takes other inputs than a linear
        return False
    same = isinstance(y, Tensor) and y.shape == expected.shape
    return same and bool(torch.allclose(y.float(), expected.float(), rtol=0.05, atol=0.05))


def other_linears(model: nn.Module) -> dict[str, str]:
    """Type names of subclasses of ``nn.Linear`` that compute something else, by module name."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_linear(module)
    }


def shared_weights(linears: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears whose weight an earlier one has, too, and the name of that one, by name."""
    holders: dict[int, str] = {}
    for name, linear in linears.items():
        holders.setdefault(id(linear.weight), name)
    pairs = ((name, holders[id(linear.weight)]) for name, linear in linears.items())
    return {name: holder for name, holder in pairs if name != holder}


def _users(model: nn.Module) -> dict[int, set[int]]:
    """Identities of the modules that have a parameter, under whatever name, by the parameter's."""
    users: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), set()).add(id(module))
    return users


def _ids(modules: Mapping[str, nn.Module]) -> set[int]:
    return {id(module) for module in modules.values()}


def matrices(model: nn.Module) -> dict[str, int]:
    """Number of elements of every matrix that multiplies activations, by parameter name.

    These are all parameters with two or more dimensions except embeddings. An embedding that is
    also the output head counts once, under the head's name; so does a parameter of several
    modules, under the first one's.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = output_head(model)
    elements, seen = {}, set()
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            is_table = id(parameter) in tables and module is not head
            if parameter.ndim >= 2 and not is_table and id(parameter) not in seen:
                seen.add(id(parameter))
                elements[f"{module_name}.{name}".lstrip(".")] = parameter.numel()
    return elements


def output_head(model: nn.Module) -> nn.Module | None:
    """Layer that computes the logits; None if the model names none."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def routers(model: nn.Module) -> list[str]:
    """Names of the modules that choose experts, by :data:`ROUTERS` or by structure.

    By structure, a router is a linear with one output per entry of a module list that is its
    sibling, or a sibling of its parent.
    """
    names = []
    for name, module in model.named_modules():
        is_gate = isinstance(module, nn.Linear) and _has_experts_beside(model, name, module)
        if name and (matches(name, ROUTERS) or is_gate):
            names.append(name)
    return names


def _has_experts_beside(model: nn.Module, name: str, linear: nn.Linear) -> bool:
    holders = name.split(".")[:-1]
    for depth in (len(holders), len(holders) - 1):
        if depth < 0:
            continue
        holder = model.get_submodule(".".join(holders[:depth]))
        for list_name, child in holder.named_children():
            inside = ".".join([*holders[:depth], list_name])
            if not isinstance(child, nn.ModuleList) or name.startswith(f"{inside}."):
                continue
            if len(child) == linear.out_features > 1 and _alike(child):
                return True
    return False


def _alike(modules: nn.ModuleList) -> bool:
    """Whether the entries of a module list have one type and contain linears, as experts do."""
    types = {type(module) for module in modules}
    return len(types) == 1 and any(isinstance(m, nn.Linear) for m in modules[0].modules())


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Replace submodules by dotted name, in place, everywhere the model uses the same module."""
    if not new:
        return
    by_identity = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if id(child) in by_identity:
                setattr(parent, name, by_identity[id(child)])
                _disable_fast_path(parent)


def _disable_fast_path(parent: nn.Module) -> None:
    """Disable the fast path of PyTorch's encoder layer, which reads its linears' weights."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0


def _children(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    for parent in model.modules():
        for name, child in parent.named_children():
            yield parent, name, child


def is_fused_experts(module: nn.Module) -> bool:
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


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name matches one of the patterns (shell style)."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)
