"""Components as Verilog, and lists of their ports.

Amaranth writes RTLIL, and Yosys converts that to Verilog. Amaranth would look for a Yosys on the
path; this module uses the one that pip installed.
"""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

from amaranth.back import rtlil
from amaranth.lib import wiring

from fgmp.hardware import yosys


def verilog(rtlil: str) -> str:
    """Verilog of RTLIL text from :func:`rtlil_text`."""
    # -nomux and -norom leave processes in place, which are more readable than cells.
    return yosys.run(
        f"read_rtlil <<end_of_rtlil\n{rtlil}\nend_of_rtlil\n"
        "proc -nomux -norom\nmemory_collect\nwrite_verilog -norename\n"
    )


def rtlil_text(component: wiring.Component, name: str) -> str:
    """RTLIL of a component and its submodules; ``name`` is that of the top module."""
    text: str = rtlil.convert(component, name=name, emit_src=False)
    return _shared(text)


def _shared(text: str) -> str:
    """Merge modules of equal content, so that each is mapped once."""
    modules = {_OPENING.search(m)[1]: m for m in text.split("\n" + _MARK)}  # type: ignore[index]
    while True:
        first: dict[str, str] = {}
        names = {n: first.setdefault(_OPENING.sub("", m), n) for n, m in modules.items()}
        modules = {n: _CELL.sub(partial(_renamed, names), modules[n]) for n in first.values()}
        if len(modules) == len(names):
            return ("\n" + _MARK).join(modules.values())


def _renamed(names: dict[str, str], cell: re.Match[str]) -> str:
    return cell[1] + names.get(cell[2], cell[2])


_OPENING = re.compile(r"^module (\S+)$", re.MULTILINE)
_CELL = re.compile(r"^(  cell )(\S+)(?= )", re.MULTILINE)
_MARK = 'attribute \\generator "Amaranth"\n'
"""First line of each of Amaranth's modules."""


@dataclass(frozen=True)
class Port:
    """One port of a module, ``input`` or ``output``, unsigned."""

    name: str
    direction: str
    bits: int


def ports(component: wiring.Component) -> list[Port]:
    """Ports in order, clock and reset first."""
    listed = [Port("clk", "input", 1), Port("rst", "input", 1)]
    for path, member, value in component.signature.flatten(component):
        direction = "input" if member.flow == wiring.In else "output"
        listed.append(Port("__".join(map(str, path)), direction, _bits(value)))
    return listed


def _bits(value: Any) -> int:
    """Width of a port that is a value or a structure of fields."""
    return len(value.as_value() if hasattr(value, "as_value") else value)
