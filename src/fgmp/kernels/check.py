"""Checks of the operators' arguments; every violation has its own message.

Shapes, dtypes and devices are checked on every call. A token takes hundreds of calls, so that
messages are made only where a check fails. Whether ``row_ptr`` counts the flags of ``scale`` takes
a pass over the weight: kernels check it while they read, :func:`counts` beforehand.
"""

import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.rules import RULES, SCALES
from fgmp.formats.spec import BLOCK, FP8_BLOCK
from fgmp.pack.planes import MODES

Planes = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Planes of a packed weight in the order of :data:`PLANES`; None where the mode lacks one."""

PLANES = ("low", "scale", "overflow", "row_ptr", "fp8")


_PLANES_OF_MODES = frozenset(MODES.values())


def require(holds: bool, operator: str, argument: str, rule: str, value: object) -> None:
    """Raise InputError, "operator: argument must rule, got value", unless ``holds``."""
    if not holds:
        raise InputError(f"{operator}: {argument} must {rule}, got {value}")


def _require_shape(operator: str, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        require(False, operator, name, f"have shape {list(shape)}", [*tensor.shape])


def _require_device(operator: str, name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        require(False, operator, name, f"be on {device}", tensor.device)


def _tensor(
    operator: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    like: Tensor,
    dtype: torch.dtype,
) -> None:
    if tensor.dtype != dtype:
        require(False, operator, name, f"be {dtype}", tensor.dtype)
    _require_shape(operator, name, tensor, shape)
    if not tensor.is_contiguous():
        require(False, operator, name, "be contiguous", f"strides {tensor.stride()}")
    _require_device(operator, name, tensor, like.device)


def activation(
    operator: str,
    x: Tensor,
    r: Tensor,
    sensitivity: Tensor,
    threshold: Tensor,
    rule: str,
    scales: str,
) -> None:
    """Check the arguments of the activation quantizers.

    Raises:
        InputError: names the argument, what it must be and what it is.
    """
    require(x.is_floating_point(), operator, "x", "be floating point", x.dtype)
    require(x.dim() > 0 and x.shape[-1] > 0, operator, "x", "have shape [..., K]", [*x.shape])
    _tensor(operator, "r", r, (), x, torch.float32)
    _tensor(operator, "sensitivity", sensitivity, (x.shape[-1],), x, torch.uint8)
    _tensor(operator, "threshold", threshold, (), x, torch.int64)
    for argument, value, known in (("rule", rule, RULES), ("scales", scales, SCALES)):
        if value not in known:
            require(False, operator, argument, f"be one of {', '.join(known)}", value)


def weight(operator: str, planes: Planes, k: int) -> None:
    """Check the planes of a packed weight with ``k`` columns; raises as :func:`activation`."""
    require(k > 0, operator, "k", "be positive", k)
    present = {name: plane for name, plane in zip(PLANES, planes, strict=True) if plane is not None}
    if tuple(present) not in _PLANES_OF_MODES:
        choices = " or ".join("+".join(mode) for mode in MODES.values())
        raise InputError(f"{operator}: planes must be {choices}, got {'+'.join(present) or 'none'}")
    first = next(iter(present.values()))
    require(first.dim() == 2, operator, next(iter(present)), "have two dimensions", first.dim())
    n, groups = first.shape[0], -(-k // BLOCK)
    shapes = {
        "low": (n, groups * BLOCK // 2),
        "scale": (n, groups),
        "overflow": (len(present.get("overflow", ())), BLOCK // 2),
        "row_ptr": (n + 1,),
        "fp8": (n, groups * BLOCK),
    }
    for name, plane in present.items():
        dtype = torch.int32 if name == "row_ptr" else torch.uint8
        _tensor(operator, name, plane, shapes[name], first, dtype)


def linear(
    operator: str,
    units: Tensor,
    planes: Planes,
    r: Tensor,
    t: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> None:
    """Check the arguments of the packed linear; raises as :func:`activation`."""
    dtypes = (torch.bfloat16, torch.float32)
    require(units.dtype in dtypes, operator, "units", "be bfloat16 or float32", units.dtype)
    require(units.dim() > 0, operator, "units", "have shape [..., K]", [*units.shape])
    weight(operator, planes, units.shape[-1])
    dense = planes[0] if planes[0] is not None else planes[4]
    assert dense is not None
    _require_device(operator, "planes", dense, units.device)
    _tensor(operator, "r", r, (), units, torch.float32)
    _tensor(operator, "t", t, (), units, torch.float32)
    if bias is not None:
        _require_shape(operator, "bias", bias, (dense.shape[0],))
        require(bias.is_floating_point(), operator, "bias", "be floating point", bias.dtype)
        _require_device(operator, "bias", bias, units.device)
    require(dtype.is_floating_point, operator, "dtype", "be floating point", dtype)


def counts(operator: str, planes: Planes) -> None:
    """Check ``row_ptr`` and ``overflow`` against the flags of ``scale``, in a pass over ``scale``.

    Raises:
        InputError: names the first row where they contradict each other.
    """
    _, scale, overflow, row_ptr, _ = planes
    if scale is None:
        return
    flags_per_row = (scale == FP8_BLOCK).sum(-1)
    if row_ptr is None or overflow is None:
        wrong = flags_per_row != 0
    else:
        wrong = (row_ptr[1:] - row_ptr[:-1]).long() != flags_per_row
        wrong[0] |= row_ptr[0] != 0
        wrong[-1] |= row_ptr[-1] != len(overflow)
    if wrong.any():
        raise corrupt(operator, int(wrong.nonzero()[0]))


def corrupt(operator: str, row: int) -> InputError:
    """Error for planes that contradict each other in a row."""
    return InputError(
        f"{operator}: row_ptr must count the bytes 0x80 of scale before each row and overflow have "
        f"as many rows; row {row} does not hold to it"
    )
