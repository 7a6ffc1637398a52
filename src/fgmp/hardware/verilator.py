"""Bulk simulation: a component as a shared library that Verilator makes, where it is installed.

Amaranth's simulator takes milliseconds a cycle, this microseconds. The library plays arrays: a
row a cycle of all inputs goes in and a row of all outputs, sampled before the clock's edge, comes
out. Streams are played by :meth:`Model.streams`, which moves queues under ready and valid and may
pause either side at random.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
from amaranth.lib import wiring

from fgmp.errors import FGMPError, InputError
from fgmp.hardware.rtl.verilog import Port, ports, verilog

Bytes = npt.NDArray[np.uint8]

_SOURCE = """
#include "Vtop.h"
#include "verilated.h"
#include <cstdint>
#include <cstring>
static VerilatedContext context;
static Vtop *top;
static void put(const uint8_t *p) {{ {put} }}
static void get(uint8_t *p) {{ {get} }}
static void edge() {{ top->clk = 1; top->eval(); top->clk = 0; top->eval(); }}
extern "C" void start() {{
    delete top; top = new Vtop(&context);
    top->clk = 0; top->rst = 1; top->eval(); edge(); top->rst = 0; top->eval();
}}
extern "C" void cycles(const uint8_t *in, uint8_t *out, int64_t n) {{
    for (; n--; in += {in_bytes}, out += {out_bytes}) {{
        put(in); top->eval(); get(out); edge();
    }}
}}
"""


def require() -> None:
    """Refuse to go on without Verilator."""
    if shutil.which("verilator") is None:
        raise InputError("this needs Verilator on the path: apt-get install verilator")


class Model:
    """A component that Verilator compiled.

    Args:
        component: its ports are the columns of the arrays.
        folder: where sources and the library go; made if missing.
    """

    def __init__(self, component: wiring.Component, folder: Path) -> None:
        require()
        found = [p for p in ports(component) if p.name not in ("clk", "rst") and p.bits]
        self.inputs = _Columns([p for p in found if p.direction == "input"])
        self.outputs = _Columns([p for p in found if p.direction == "output"])
        self._library = ctypes.CDLL(str(self._build(component, folder)))
        self._library.start()

    def _build(self, component: wiring.Component, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "top.v").write_text(verilog(component, "top"))
        copy = "memcpy({}, {}, {});"
        source = _SOURCE.format(
            put=" ".join(copy.format(f"&top->{_mangled(c)}", f"p + {at}", n) for c, at, n in self.inputs),
            get=" ".join(copy.format(f"p + {at}", f"&top->{_mangled(c)}", n) for c, at, n in self.outputs),
            in_bytes=self.inputs.bytes,
            out_bytes=self.outputs.bytes,
        )
        (folder / "bench.cpp").write_text(source)
        command = ["verilator", "--cc", "--exe", "--build", "top.v", "bench.cpp", "-o", "bench.so"]
        command += ["--top-module", "top", "--Mdir", "obj", "-Wno-fatal", "-Wno-lint", "-O3"]
        command += ["-CFLAGS", "-fPIC -O2", "-LDFLAGS", "-shared"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise FGMPError(f"{folder}: Verilator failed: {done.stderr.strip()[-500:]}")
        return (folder / "obj" / "bench.so").resolve()

    def cycles(self, rows: Bytes) -> Bytes:
        """Play ``rows``, uint8 (cycles, inputs.bytes); returns uint8 (cycles, outputs.bytes)."""
        rows = np.ascontiguousarray(rows)
        out = np.empty((len(rows), self.outputs.bytes), dtype=np.uint8)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, out))
        self._library.cycles(*pointers, ctypes.c_int64(len(rows)))
        return out


class _Columns:
    """Where each port lies in a row: little-endian, as wide as Verilator's own type."""

    def __init__(self, listed: list[Port]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.bytes = 0
        for port in listed:
            width = next((n for n in (1, 2, 4, 8) if port.bits <= 8 * n), -(-port.bits // 32) * 4)
            self.places[port.name] = (self.bytes, width)
            self.bytes += width

    def __iter__(self):
        return ((name, at, width) for name, (at, width) in self.places.items())

    def rows(self, n: int) -> Bytes:
        """Zeros for ``n`` cycles."""
        return np.zeros((n, self.bytes), dtype=np.uint8)

    def of(self, rows: Bytes, name: str) -> Bytes:
        """The bytes of one port, a view (n, width)."""
        at, width = self.places[name]
        return rows[:, at : at + width]


def _mangled(name: str) -> str:
    """Verilator's own name of a port: two underscores in a row are its separator."""
    return name.replace("__", "___05F")
