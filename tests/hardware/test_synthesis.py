"""Mapped netlists compute what the lane's arithmetic says, and refusals come with a remedy."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from random_layers import layer, row_of

from fgmp.errors import FGMPError, InputError
from fgmp.hardware import gates, liberty, netlist, silicon, stimulus, synthesis, yosys
from fgmp.hardware.cells import Library, embedded
from fgmp.hardware.datapath import Datapath

LIBERTY = Path(os.environ.get("FGMP_LIBERTY", "no-folder"))
"""asap7_rvt_tt.lib.gz and gt2n.lib.gz lie there."""


def totals(values: np.ndarray, nets: tuple[int, ...], stream: int) -> list[int]:
    """A signed port over the cycles of one stream."""
    values_by_cycle = []
    for words in values[:, list(nets), 0]:
        value = sum((int(word) >> stream & 1) << bit for bit, word in enumerate(words))
        values_by_cycle.append(value - (value >> (len(nets) - 1) << len(nets)))
    return values_by_cycle


@pytest.mark.parametrize(
    ("kind", "fp8_share"), [("fp8", 1.0), ("fp4", 0.0)], ids=["fp8 lane", "fp4 lane"]
)
def test_a_mapped_lane_computes_exact_totals(kind: str, fp8_share: float) -> None:
    """Every total that leaves the gates is an exact dot product of two rows of the layer."""
    datapath = Datapath(kind=kind, reuse=2, k_max=48, cuts=("sums",))
    library, linear = embedded(), layer(fp8_share)
    mapped = silicon.implement(datapath.create(), library)
    ports = stimulus.stimulate([linear], datapath, 40)
    trace = gates.settle(mapped.netlist, library, ports)
    expected = {
        int(v)
        for row in range(linear.weight.is_fp8.shape[0])
        for v in datapath.contributions(linear.activation, row_of(linear.weight, row)).sum(-1)
    }
    done = mapped.netlist.outputs["done"][0]
    checked = 0
    for stream in range(stimulus.STREAMS):
        results = totals(trace.values, mapped.netlist.outputs["total"], stream)
        # The first dot product of a stream may have begun before it.
        start = 3 * datapath.reuse + datapath.latency
        for cycle in range(start, 40):
            if int(trace.values[cycle, done, 0]) >> stream & 1:
                assert results[cycle] in expected
                checked += 1
    assert checked > 500


def test_gated_units_are_still() -> None:
    """While all pairs are FP8 on both sides, nothing in the FP4 unit's registers or gates moves."""
    library = embedded()
    from fgmp.hardware.rtl.registers import Operands

    datapath = Datapath(cuts=("sums",))
    mapped = silicon.implement(Operands(datapath.units[0]), library)
    rng = np.random.default_rng(0)
    ports = {
        name: rng.integers(0, 2**63, (10, len(nets), 1)).astype(np.uint64)
        for name, nets in mapped.netlist.inputs.items()
        if name not in ("clk", "rst")
    }
    ports["load"][3:] = 0
    trace = gates.settle(mapped.netlist, library, ports)
    for port in ("activation_held", "weight_held"):
        values = trace.values[4:, list(mapped.netlist.outputs[port])]
        assert (values == values[0]).all()


def small() -> synthesis.Design:
    from fgmp.hardware.rtl.registers import Operands
    from fgmp.hardware.rtl.verilog import rtlil_text

    return synthesis.Design(rtlil_text(Operands(Datapath(cuts=()).units[0]), "top"), "top")


def test_netlists_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FGMP_CACHE_DIR", str(tmp_path / "cache"))
    runs = []
    yosys_run = yosys.run
    monkeypatch.setattr(yosys, "run", lambda *arguments: runs.append(1) or yosys_run(*arguments))
    first = synthesis.synthesize(small(), embedded(), 1000.0)
    again = synthesis.synthesize(small(), embedded(), 1000.0)
    assert len(runs) == 1
    assert again.inputs == first.inputs and again.cells == first.cells
    synthesis.synthesize(small(), embedded(), 900.0)  # another period is another netlist
    assert len(runs) == 2
    for path in (tmp_path / "cache" / "netlists").iterdir():
        path.write_bytes(path.read_bytes()[:-9])
    assert synthesis.synthesize(small(), embedded(), 1000.0).cells == first.cells
    assert len(runs) == 3


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FGMP_CACHE_DIR", str(tmp_path / "file"))
    assert synthesis.synthesize(small(), embedded()).cells > 0


def test_without_yosys_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yosys, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fgmp\[hw\]'"):
        synthesis.synthesize(synthesis.Design("", "top"), embedded())


def test_yosys_errors_are_passed_on() -> None:
    with pytest.raises(FGMPError, match=r"Yosys refused: .*"):
        synthesis.synthesize(synthesis.Design("module \\a\nend\n", "absent"), embedded())


def test_a_yosys_that_is_killed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yosys, "_RUN", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(FGMPError, match="ended by SIGKILL; large designs need"):
        yosys.run("")


def yosys_json(kind: str, pins: dict[str, list[object]]) -> str:
    ports = {
        "a": {"direction": "input", "bits": [2]},
        "y": {"direction": "output", "bits": [3]},
    }
    cell = {"type": kind, "connections": pins, "attributes": {}}
    return json.dumps({"modules": {"top": {"ports": ports, "cells": {"unit.g": cell}}}})


def test_a_cell_that_the_library_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"type NAND9.* library 'embedded' does not hold"):
        netlist.from_yosys(yosys_json("NAND9", {"A": [2], "Y": [3]}), "top", embedded())


def test_loops_and_floating_nets_are_refused() -> None:
    loop = yosys_json("NAND2_x1", {"A": [2], "B": [3], "Y": [3]})
    with pytest.raises(InputError, match="loops"):
        netlist.from_yosys(loop, "top", embedded())
    floating = yosys_json("NAND2_x1", {"A": [2], "B": [9], "Y": [3]})
    with pytest.raises(InputError, match="driven by nothing"):
        netlist.from_yosys(floating, "top", embedded())


def test_cells_know_their_unit() -> None:
    read = netlist.from_yosys(yosys_json("INV_x1", {"A": [2], "Y": [3]}), "top", embedded())
    assert [gate.unit for gate in read.gates] == ["unit"]
    assert read.area(embedded()) == {"unit": 1.0}


def test_a_liberty_file_in_the_temporary_directory_is_seen(tmp_path: Path) -> None:
    """YoWASP hides that directory from Yosys; the library travels another way."""
    source = LIBERTY / "gt2n.lib.gz"
    if not source.exists():
        pytest.skip("FGMP_LIBERTY names no folder with this library")
    copy = tmp_path / "gt2n.lib.gz"
    copy.write_bytes(source.read_bytes())
    library: Library = liberty.read(copy)
    design = silicon.implement(Datapath(kind="fp4", reuse=1, cuts=()).create(), library)
    assert {gate.cell for gate in design.netlist.gates} <= set(library.cells)
    assert 10 < design.area < 1000
