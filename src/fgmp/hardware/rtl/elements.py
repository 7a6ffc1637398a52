"""Parts of a calculation as modules of their own, which synthesis maps one by one.

The 16 elements of a block are handled alike. Their modules have the same content, so that
``rtl.verilog`` merges them into one.
"""

from collections.abc import Callable, Sequence
from typing import Any

from amaranth.hdl import Module, Value

from fgmp.hardware.rtl.decode import named


def part(m: Module, name: str) -> Module:
    """A new submodule for a part of the calculation."""
    m.submodules[name] = module = Module()
    return module


def each(m: Module, name: str, step: Callable[..., Any], *values: Sequence[Value]) -> list[Any]:
    """Results of ``step`` for each of the 16 elements, one submodule per element."""
    module, results, label = part(m, name), [], name.rstrip("_0123456789") + "_of"
    for i, operands in enumerate(zip(*values, strict=True)):
        element = Module()
        module.submodules[f"element_{i}"] = element
        result = step(element, *operands)
        single = isinstance(result, Value)
        wires = [named(element, label, v) for v in ([result] if single else result)]
        results.append(wires[0] if single else tuple(wires))
    return results


def columns(rows: list[tuple[Value, ...]]) -> list[list[Value]]:
    """Results of a step with several results, one list per result."""
    return [list(column) for column in zip(*rows, strict=True)]
