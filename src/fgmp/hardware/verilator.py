"""Bulk simulation: a component as a shared library built by Verilator, where it is installed.

Amaranth's simulator takes milliseconds per cycle, this one microseconds. :meth:`Model.cycles` plays
arrays: per cycle, one row of all inputs goes in, and one row of all outputs, sampled before the
clock edge, comes out. :meth:`Model.streams` moves queues under ready and valid and can pause either
side at random.
"""

import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
from amaranth.lib import wiring

from fgmp.errors import FGMPError, InputError
from fgmp.hardware.rtl.verilog import Port, ports, rtlil_text, verilog

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
struct Stream {{ int64_t payload, width, valid, ready, count, at, offered; uint8_t *items; }};
static uint64_t state;
static bool pauses(uint32_t share) {{
    state ^= state << 13; state ^= state >> 7; state ^= state << 17;
    return (state >> 24 & 0xFF) < share;
}}
extern "C" int64_t streams(uint8_t *in, uint8_t *out, Stream *source, int64_t sources, Stream *sink,
                           int64_t sinks, int64_t limit, uint32_t share, uint64_t seed) {{
    state = seed | 1;
    for (int64_t cycle = 0; cycle < limit; cycle++) {{
        for (Stream *s = source; s < source + sources; s++) {{
            if (!s->offered) s->offered = s->at < s->count && !pauses(share);
            in[s->valid] = s->offered;
            if (s->offered) memcpy(in + s->payload, s->items + s->at * s->width, s->width);
        }}
        for (Stream *s = sink; s < sink + sinks; s++) in[s->ready] = !pauses(share);
        put(in); top->eval(); get(out);
        for (Stream *s = source; s < source + sources; s++)
            if (s->offered && out[s->ready]) s->at++, s->offered = 0;
        bool missing = false;
        for (Stream *s = sink; s < sink + sinks; s++) {{
            if (in[s->ready] && out[s->valid] && s->at < s->count)
                memcpy(s->items + s->at++ * s->width, out + s->payload, s->width);
            missing |= s->at < s->count;
        }}
        edge();
        if (!missing) {{ top->eval(); get(out); return cycle + 1; }}
    }}
    return -1;
}}
extern "C" void cycles(const uint8_t *in, uint8_t *out, int64_t n) {{
    for (; n--; in += {in_bytes}, out += {out_bytes}) {{
        put(in); top->eval(); get(out); edge();
    }}
}}
"""


def require() -> None:
    """Refuse if Verilator is not installed.

    Raises:
        InputError: with the command that installs it.
    """
    if shutil.which("verilator") is None:
        raise InputError("this needs Verilator on the path: apt-get install verilator")


class Model:
    """A component compiled by Verilator.

    Args:
        component: its ports are the columns of the arrays.
        folder: folder of sources and the library; created if missing.
    """

    def __init__(self, component: wiring.Component, folder: Path) -> None:
        require()
        listed = [p for p in ports(component) if p.name not in ("clk", "rst") and p.bits]
        self.inputs = _Columns([p for p in listed if p.direction == "input"])
        self.outputs = _Columns([p for p in listed if p.direction == "output"])
        self._library = ctypes.CDLL(str(self._build(component, folder)))
        self._library.streams.restype = ctypes.c_int64
        self._library.start()

    def _build(self, component: wiring.Component, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "top.v").write_text(verilog(rtlil_text(component, "top")))
        copy = "memcpy({}, {}, {});"
        source = _SOURCE.format(
            put=" ".join(
                copy.format(f"&top->{_mangled(c)}", f"p + {at}", n) for c, at, n in self.inputs
            ),
            get=" ".join(
                copy.format(f"p + {at}", f"&top->{_mangled(c)}", n) for c, at, n in self.outputs
            ),
            in_bytes=self.inputs.bytes,
            out_bytes=self.outputs.bytes,
        )
        (folder / "bench.cpp").write_text(source)
        command = ["verilator", "--cc", "--exe", "--build", "top.v", "bench.cpp", "-o", "bench.so"]
        command += ["--top-module", "top", "--Mdir", "obj", "-Wno-fatal", "-Wno-lint", "-O3"]
        # Chosen over -O2: in a single comparison, which no script repeats, -O1 simulated a quarter
        # slower and compiled in a third of the time.
        command += ["-j", "2", "--output-split", "20000", "-CFLAGS", "-fPIC -O1"]
        command += ["-LDFLAGS", "-shared"]
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

    def streams(
        self,
        row: Bytes,
        sources: dict[str, Bytes],
        sinks: dict[str, int],
        pause: float = 0.0,
        seed: int = 1,
        limit: int = 1 << 40,
    ) -> tuple[dict[str, Bytes], Bytes]:
        """Move queues under ready and valid until every sink is full.

        Args:
            row: all other inputs, uint8 (1, inputs.bytes).
            sources: items by the stream's name, uint8 (items, bytes of the payload).
            sinks: number of items to receive, by the stream's name.
            pause: probability per cycle that a side pauses.
            seed: random seed of the pauses.
            limit: largest number of cycles.

        Returns:
            the sinks' items, and the outputs after the last cycle, uint8 (1, outputs.bytes).

        Raises:
            FGMPError: the limit was reached.
        """
        row, out = np.ascontiguousarray(row), self.outputs.rows(1)
        sent = {name: np.ascontiguousarray(items) for name, items in sources.items()}
        received = {
            name: np.empty((count, self.outputs.places[f"{name}__payload"][1]), dtype=np.uint8)
            for name, count in sinks.items()
        }
        inputs = [_stream(name, i, self.inputs, self.outputs) for name, i in sent.items()]
        outputs = [_stream(name, i, self.outputs, self.inputs) for name, i in received.items()]
        cycles = self._library.streams(
            row.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            (_Stream * len(inputs))(*inputs),
            ctypes.c_int64(len(inputs)),
            (_Stream * len(outputs))(*outputs),
            ctypes.c_int64(len(outputs)),
            ctypes.c_int64(limit),
            ctypes.c_uint32(round(pause * 256)),
            ctypes.c_uint64(seed),
        )
        if cycles < 0:
            raise FGMPError(f"the simulated hardware did not end within {limit} cycles")
        return received, out


class _Stream(ctypes.Structure):
    """The ``struct Stream`` of the C++ source above."""

    _fields_ = [
        *((n, ctypes.c_int64) for n in ("payload", "width", "valid", "ready")),
        *((n, ctypes.c_int64) for n in ("count", "at", "offered")),
        ("items", ctypes.c_void_p),
    ]


def _stream(name: str, items: Bytes, source: "_Columns", sink: "_Columns") -> _Stream:
    """A queue whose payload and valid are in ``source`` and whose ready is in ``sink``."""
    at, width = source.places[f"{name}__payload"]
    assert items.shape[1] == width, f"{name}: {items.shape} items for {width} bytes"
    valid, ready = source.places[f"{name}__valid"][0], sink.places[f"{name}__ready"][0]
    return _Stream(at, width, valid, ready, len(items), 0, 0, items.ctypes.data)


class _Columns:
    """Place of each port in a row: little-endian, with the width of Verilator's type."""

    def __init__(self, listed: list[Port]) -> None:
        self.places: dict[str, tuple[int, int]] = {}
        self.bytes = 0
        for port in listed:
            width = next((n for n in (1, 2, 4, 8) if port.bits <= 8 * n), -(-port.bits // 32) * 4)
            self.places[port.name] = (self.bytes, width)
            self.bytes += width

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return ((name, at, width) for name, (at, width) in self.places.items())

    def rows(self, n: int) -> Bytes:
        """Zeros for ``n`` cycles."""
        return np.zeros((n, self.bytes), dtype=np.uint8)

    def of(self, rows: Bytes, name: str) -> Bytes:
        """The bytes of one port, a view (n, width)."""
        at, width = self.places[name]
        return rows[:, at : at + width]


def _mangled(name: str) -> str:
    """Verilator's name of a port: it reserves two underscores in a row as a separator."""
    return name.replace("__", "___05F")
