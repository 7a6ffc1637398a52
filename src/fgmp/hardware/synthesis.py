"""From RTL to a mapped netlist, by Yosys and abc as WebAssembly: ``pip install fgmp[hw]``.

Modules are mapped one by one and flattened afterwards, so that every cell still knows the unit it
belongs to and no logic moves across the gating between units. Registers with an enable keep it: it
becomes a clock gate and no multiplexer. With a period, abc sizes gates and buffers fan-out for it.

YoWASP shows Yosys a directory tree of its own, in which the system's temporary directory is
hidden. Everything goes through a private folder that is mounted by name, so that a liberty file may
lie anywhere.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from fgmp.hardware import liberty, yosys
from fgmp.hardware.cells import Library
from fgmp.hardware.netlist import Netlist, from_yosys
from fgmp.hardware.yosys import MOUNT

_SMALLEST_GATED = 4
"""Registers with fewer bits under one enable get multiplexers: a clock gate would cost more."""


@dataclass(frozen=True)
class Design:
    """RTL to synthesize.

    Attributes:
        rtlil: text of Yosys' own format, which Amaranth emits.
        top: the module.
    """

    rtlil: str
    top: str


def synthesize(design: Design, library: Library, period_ps: float | None = None) -> Netlist:
    """Map a design to a library's cells.

    Args:
        design: the RTL.
        library: cells to map to.
        period_ps: clock period that abc sizes and buffers for, in the library's time unit; None
            gives the smallest area, without buffers.

    Raises:
        InputError: Yosys is not installed.
        FGMPError: it refuses the design or the library.
    """
    with tempfile.TemporaryDirectory(prefix="fgmp-") as folder:
        work = Path(folder)
        (work / "design.il").write_text(design.rtlil)
        (work / "cells.lib").write_text(liberty.write(library))
        (work / "abc.constr").write_text(
            f"set_driving_cell {library.buffer.name}\nset_load {_typical_load(library):.6g}\n"
        )
        yosys.run("\n".join(_script(design.top, period_ps)) + "\n", work)
        return from_yosys((work / "netlist.json").read_text(), design.top, library)


def _typical_load(library: Library) -> float:
    """Four inverters, in fF."""
    return 4 * next(iter(library.inverter.capacitance.values()))


def _script(top: str, period_ps: float | None) -> list[str]:
    timed = "" if period_ps is None else f" -D {period_ps:.6g} -constr {MOUNT}/abc.constr"
    return [
        f"read_rtlil {MOUNT}/design.il",
        # Without -noalumacc Yosys turns trees of adders into carry-save arrays, which are 3%
        # smaller and glitch: +21% energy of an FP8 lane (ASAP7).
        f"synth -noalumacc -noabc -top {top}",
        "setattr -unset init w:*",
        f"dfflegalize -cell $_DFF_P_ x -cell $_DFFE_PP_ x -mince {_SMALLEST_GATED}",
        "opt_clean -purge",
        f"abc -liberty {MOUNT}/cells.lib{timed}",
        "setundef -zero",
        "flatten -scopename",
        "opt_clean -purge",
        f"write_json {MOUNT}/netlist.json",
    ]
