"""The bulk simulator: rows of ports, streams under ready and valid. Compiling needs Verilator."""

import shutil
from typing import Any

import numpy as np
import pytest
from amaranth.hdl import Cat, Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

from fgmp.errors import FGMPError
from fgmp.hardware.rtl.verilog import Port
from fgmp.hardware.verilator import Model, _Columns, _mangled

WIDE = 70


class Stage(wiring.Component):
    """A register behind a stream: each item plus ``step``, and how many came."""

    def __init__(self) -> None:
        items = stream.Signature(WIDE)
        super().__init__({"step": In(9), "input": In(items), "output": Out(items), "count": Out(8)})

    def elaborate(self, platform: Any) -> Module:
        m = Module()
        m.d.comb += self.input.ready.eq(~self.output.valid | self.output.ready)
        with m.If(self.input.ready):
            m.d.sync += self.output.valid.eq(self.input.valid)
            with m.If(self.input.valid):
                m.d.sync += Cat(self.output.payload, self.count).eq(
                    Cat((self.input.payload + self.step)[:WIDE], (self.count + 1)[:8])
                )
        return m


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    if shutil.which("verilator") is None:
        pytest.skip("needs Verilator")
    return Model(Stage(), tmp_path_factory.mktemp("verilator"))


def words(values: list[int], width: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Little-endian rows."""
    return np.array([list(value.to_bytes(width, "little")) for value in values], dtype=np.uint8)


def numbers(rows: np.ndarray[Any, np.dtype[np.uint8]]) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in rows]


def test_a_port_has_the_bytes_of_verilators_type() -> None:
    """1, 2, 4 or 8 bytes, beyond that words of four; nothing between ports."""
    sizes = {1: 1, 8: 1, 9: 2, 16: 2, 17: 4, 32: 4, 33: 8, 64: 8, 65: 12, 96: 12, 97: 16, 136: 20}
    columns = _Columns([Port(f"p{bits}", "input", bits) for bits in sizes])
    assert {int(name[1:]): width for name, _, width in columns} == sizes
    at = 0
    for name, begin, width in columns:
        assert begin == at, name
        at += width
    rows = columns.rows(3)
    assert rows.shape == (3, at)
    columns.of(rows, "p65")[1] = 7
    begin, width = columns.places["p65"]
    assert rows.nonzero()[1].tolist() == list(range(begin, begin + width))


def test_two_underscores_are_mangled() -> None:
    assert _mangled("input__payload") == "input___05Fpayload"
    assert _mangled("new_weight") == "new_weight"


def test_rows_are_sampled_before_the_edge(model: Model) -> None:
    """What goes in with row i comes out with row i + 1, all 70 bits of it."""
    values = [0, 1, 2**64 - 1, 2**69 + 2**33, 2**70 - 1, 5]
    rows = model.inputs.rows(len(values))
    model.inputs.of(rows, "input__payload")[:] = words(values, 12)
    for name in ("input__valid", "output__ready"):
        model.inputs.of(rows, name)[:] = 1
    model.inputs.of(rows, "step")[:] = words([300] * len(values), 2)
    out = model.cycles(rows)
    items = numbers(model.outputs.of(out, "output__payload")[1:])
    assert items == [(value + 300) % 2**WIDE for value in values[:-1]]
    assert model.outputs.of(out, "output__valid")[1:].all()


@pytest.mark.parametrize("pause", [0.0, 0.6])
def test_streams_lose_nothing(model: Model, pause: float) -> None:
    values = [i * (2**66 // 7) for i in range(50)]
    row = model.inputs.rows(1)
    model.inputs.of(row, "step")[:] = words([3], 2)
    model._library.start()  # a new reset: what an earlier test left in the register is gone
    sources, sinks = {"input": words(values, 12)}, {"output": len(values)}
    received, last = model.streams(row, sources, sinks, pause=pause, seed=5)
    assert numbers(received["output"]) == [value + 3 for value in values]
    assert numbers(model.outputs.of(last, "count")) == [len(values)]


def test_waiting_for_what_never_comes_ends(model: Model) -> None:
    row = model.inputs.rows(1)
    with pytest.raises(FGMPError, match="did not end within 100 cycles"):
        model.streams(row, {"input": words([1], 12)}, {"output": 2}, limit=100)
