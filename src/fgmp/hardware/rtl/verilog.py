"""Components as Verilog, and the list of their ports.

Amaranth writes RTLIL and Yosys turns that into Verilog. Amaranth would look for a Yosys on the
path; this uses the one that pip installed.
"""

from dataclasses import dataclass
from typing import Any

from amaranth.back import rtlil
from amaranth.lib import wiring

from fgmp.hardware import yosys


def verilog(component: wiring.Component, name: str) -> str:
    """The Verilog of a component and what it instantiates; ``name`` is its module's."""
    # -nomux and -norom keep the processes, which read better than the cells they would become.
    return yosys.run(
        f"read_rtlil <<end_of_rtlil\n{rtlil_text(component, name)}\nend_of_rtlil\n"
        "proc -nomux -norom\nmemory_collect\nwrite_verilog -norename\n"
    )


def rtlil_text(component: wiring.Component, name: str) -> str:
    """The same as RTLIL, which Yosys reads without a detour."""
    text: str = rtlil.convert(component, name=name, emit_src=False)
    return text


@dataclass(frozen=True)
class Port:
    """One port of a module: ``input`` or ``output``, unsigned."""

    name: str
    direction: str
    bits: int


def ports(component: wiring.Component) -> list[Port]:
    """Ports in order, the clock and the reset first."""
    found = [Port("clk", "input", 1), Port("rst", "input", 1)]
    for path, member, value in component.signature.flatten(component):
        direction = "input" if member.flow == wiring.In else "output"
        found.append(Port("__".join(map(str, path)), direction, _bits(value)))
    return found


def _bits(value: Any) -> int:
    """Width of a port that is a value or a structure of fields."""
    return len(value.as_value() if hasattr(value, "as_value") else value)
