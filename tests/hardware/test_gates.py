"""The bit-parallel simulator against event-driven ones: one in plain Python, and Icarus."""

import heapq
import itertools
import random
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from fgmp.errors import InputError
from fgmp.hardware import gates, liberty, timing
from fgmp.hardware.cells import Library, embedded
from fgmp.hardware.netlist import ONE, ZERO, Flop, Gate, Netlist

STREAMS = 64
CYCLES = 9


def random_netlist(library: Library, seed: int, inputs: int = 12, count: int = 150) -> Netlist:
    """Gates that read anything before them, and registers with and without enable."""
    rng = random.Random(seed)
    net = itertools.count(2)
    ports = tuple(next(net) for _ in range(inputs))
    states = [next(net) for _ in range(6)]
    known = [ZERO, ONE, *ports, *states]
    gates_so_far = []
    for _ in range(count):
        cell = rng.choice(list(library.cells.values()))
        # Late nets are likelier, so that paths become long and glitches many.
        pins = tuple(known[-1 - int(len(known) * rng.random() ** 2)] for _ in cell.capacitance)
        gates_so_far.append(Gate(cell.name, "", pins, next(net)))
        known.append(gates_so_far[-1].output)
    flops = [
        Flop("", rng.choice(known), ONE if i % 2 else rng.choice(known), state)
        for i, state in enumerate(states)
    ]
    # Every gate drives something: sinks become outputs.
    return Netlist(
        "random", next(net), tuple(gates_so_far), tuple(flops), {"in": ports}, {"out": (known[-1],)}
    )


def stimulus(netlist: Netlist, seed: int) -> np.ndarray:
    bits = np.random.default_rng(seed).integers(0, 2**63, (CYCLES, len(netlist.inputs["in"]), 1))
    return bits.astype(np.uint64)


def steps_of(timed: timing.Timing, step: float) -> tuple[list[int], list[int]]:
    return tuple(  # type: ignore[return-value]
        np.maximum(np.rint(d / step), 1).astype(int).tolist() for d in (timed.rise, timed.fall)
    )


def events(
    netlist: Netlist, library: Library, trace: gates.Trace, timed: timing.Timing, step: float
) -> np.ndarray:
    """Toggles per net by an event queue, one cycle of one stream at a time."""
    rise, fall = steps_of(timed, step)
    tables = {
        name: liberty.truth(cell.function, list(cell.capacitance))
        for name, cell in library.cells.items()
    }
    start = {
        f.output: round(d / step) for f, d in zip(netlist.flops, timed.flop_delay, strict=True)
    }
    start |= {net: round(timed.arrival[net] / step) for net in netlist.inputs["in"]}
    toggles = np.zeros(netlist.nets, dtype=int)

    def function(index: int, value: list[int]) -> int:
        gate = netlist.gates[index]
        address = 0
        for net in gate.inputs:
            address = address * 2 + value[net]
        return int(tables[gate.cell][address])

    for cycle, stream in itertools.product(range(1, trace.values.shape[0]), range(STREAMS)):
        old, new = (
            [int(w) >> stream & 1 for w in trace.values[c, :, 0]] for c in (cycle - 1, cycle)
        )
        value = list(old)
        pending: dict[int, tuple[int, int]] = {}
        # Outputs that are due come before the inputs that change at the same moment.
        queue = [(start[n], 1, n, new[n]) for n in start if old[n] != new[n]]
        heapq.heapify(queue)
        while queue:
            now = queue[0][0]
            changed = set()
            while queue and queue[0][0] == now:
                _, _, net, to = heapq.heappop(queue)
                if net not in start:
                    if pending.get(net) != (now, to):
                        continue
                    del pending[net]
                value[net] = to
                toggles[net] += 1
                changed.update(netlist.readers[net])
            for index in changed:
                net = netlist.gates[index].output
                to = function(index, value)
                if net in pending:
                    if pending[net][1] != to:
                        del pending[net]
                elif to != value[net]:
                    due = now + (rise if to else fall)[index]
                    pending[net] = (due, to)
                    heapq.heappush(queue, (due, 0, net, to))
        assert value == new
    return toggles


@pytest.mark.parametrize("seed", range(4))
def test_toggles_equal_those_of_an_event_queue(seed: int) -> None:
    library = embedded()
    netlist = random_netlist(library, seed)
    trace = gates.settle(netlist, library, {"in": stimulus(netlist, seed)})
    timed = timing.analyse(netlist, library)
    for step in (0.7, 3.0):
        moving = gates.glitches(netlist, library, trace, timed, step)
        expected = events(netlist, library, trace, timed, step)
        assert (moving.toggles * moving.transitions).round().astype(int).tolist() == (
            expected.tolist()
        )
    settled = gates.zero_delay(trace)
    assert (moving.toggles >= settled.toggles - 1e-12).all()
    assert moving.toggles.sum() > settled.toggles.sum()


def test_registers_load_when_they_are_enabled() -> None:
    library = embedded()
    netlist = Netlist("hold", 5, (), (Flop("", 2, 3, 4),), {"in": (2, 3)}, {"out": (4,)})
    data, enable = [1, 1, 0, 0, 1], [1, 0, 1, 0, 0]
    words = np.array([[[d], [e]] for d, e in zip(data, enable, strict=True)], dtype=np.uint64)
    seen = gates.settle(netlist, library, {"in": words}).values[:, 4, 0].tolist()
    assert seen == [0, 1, 1, 0, 0]


def test_a_pulse_shorter_than_the_delay_is_swallowed() -> None:
    """A static hazard behind an inverter: a NAND of a and not a, by an inverter of one delay."""
    library = embedded()
    netlist = Netlist(
        "hazard",
        6,
        (Gate("INV_x1", "", (2,), 3), Gate("NAND2_x1", "", (2, 3), 4), Gate("BUF_x1", "", (4,), 5)),
        (),
        {"in": (2,)},
        {"out": (5,)},
    )
    words = np.array([[[0]], [[1]]], dtype=np.uint64)
    trace = gates.settle(netlist, library, {"in": words})
    timed = timing.analyse(netlist, library)
    pulse = timed.rise[0]
    assert pulse < timed.rise[1]
    swallowed = gates.glitches(netlist, library, trace, timed, 0.01)
    assert swallowed.toggles[4] == 0
    slow = timing.Timing(
        timed.load,
        timed.slew,
        timed.arrival,
        timed.rise * [9, 1, 0.1],
        timed.fall * [9, 1, 0.1],
        timed.flop_delay,
    )
    passed = gates.glitches(netlist, library, trace, slow, 0.01)
    assert passed.toggles[4] * passed.transitions == 2


def test_stimuli_must_fit() -> None:
    library = embedded()
    netlist = random_netlist(library, 0)
    with pytest.raises(InputError, match="no stimulus for ports"):
        gates.settle(netlist, library, {})
    with pytest.raises(InputError, match="widths"):
        gates.settle(netlist, library, {"in": stimulus(netlist, 0)[:, 1:]})


def verilog(netlist: Netlist, library: Library, timed: timing.Timing, step: float) -> str:
    """The netlist with delays, and a bench that counts toggles."""
    rise, fall = steps_of(timed, step)
    lines = ["`timescale 1ns/1ns", "module bench;", f"reg clk = 0; reg [{netlist.nets}:0] n;"]
    lines += ["initial begin n[0] = 0; n[1] = 1; end"]
    lines += [f"wire g{gate.output};" for gate in netlist.gates]
    driven = {gate.output for gate in netlist.gates}

    def name(net: int) -> str:
        return f"g{net}" if net in driven else f"n[{net}]"

    for index, gate in enumerate(netlist.gates):
        cell = library.cells[gate.cell]
        function = "".join(
            name(dict(zip(cell.capacitance, gate.inputs, strict=True))[t])
            if t in cell.capacitance
            else {"!": "~", "*": "&", "+": "|"}.get(t, t)
            for t in re.findall(r"[A-Za-z_]\w*|[!()*&+|^01]", cell.function)
        )
        # One extra continuous assignment would add a delta; the function stands in the primitive.
        lines.append(f"assign #({rise[index]}, {fall[index]}) g{gate.output} = {function};")
    for f, d in zip(netlist.flops, timed.flop_delay, strict=True):
        load = f"if ({name(f.enable)})" if f.enable != ONE else ""
        lines.append(f"initial n[{f.output}] = 0;")
        lines.append(
            f"always @(posedge clk) {load} n[{f.output}] <= #{round(d / step)} {name(f.data)};"
        )
    ports = netlist.inputs["in"]
    lines.append(f"reg [{len(ports) - 1}:0] stimuli [0:{CYCLES * STREAMS - 1}];")
    lines.append("integer i, s; reg counting = 0; integer total = 0;")
    for net in range(2, netlist.nets):
        if net in driven or net in ports or net in {f.output for f in netlist.flops}:
            lines.append(f"always @({name(net)}) if (counting) total = total + 1;")
    moment = round(timed.arrival[ports[0]] / step)
    drive = " ".join(f"n[{p}] <= #{moment} stimuli[i][{j}];" for j, p in enumerate(ports))
    zero = " ".join(f"n[{p}] = stimuli[i][{j}];" for j, p in enumerate(ports))
    reset = " ".join(f"n[{f.output}] = 0;" for f in netlist.flops)
    lines += [
        'initial begin $readmemb("stimuli.txt", stimuli);',
        f"for (s = 0; s < {STREAMS}; s = s + 1) begin counting = 0;",
        f"i = s * {CYCLES}; {reset} {zero} #100000 counting = 1;",
        f"for (i = s * {CYCLES} + 1; i < (s + 1) * {CYCLES}; i = i + 1) begin",
        f"clk = 1; {drive} #50000 clk = 0; #50000; end end",
        '$display("%0d", total); $finish; end endmodule',
    ]
    return "\n".join(lines)


def test_toggles_equal_those_of_icarus(tmp_path: Path) -> None:
    if shutil.which("iverilog") is None:
        pytest.skip("needs Icarus Verilog")
    library = embedded()
    netlist = random_netlist(library, 7, count=300)
    words = stimulus(netlist, 7)
    trace = gates.settle(netlist, library, {"in": words})
    timed = timing.analyse(netlist, library)
    step = 0.7
    vectors = [
        "".join(str(int(word) >> stream & 1) for word in words[cycle, ::-1, 0])
        for stream in range(STREAMS)
        for cycle in range(CYCLES)
    ]
    (tmp_path / "stimuli.txt").write_text("\n".join(vectors))
    (tmp_path / "bench.v").write_text(verilog(netlist, library, timed, step))
    subprocess.run(["iverilog", "-o", "bench", "bench.v"], cwd=tmp_path, check=True)
    counted = subprocess.run(["./bench"], cwd=tmp_path, check=True, capture_output=True, text=True)
    ours = gates.glitches(netlist, library, trace, timed, step)
    total = round(float(ours.toggles.sum() * ours.transitions))
    # Which of two events at one moment comes first is for each simulator to choose.
    assert int(counted.stdout.split()[-1]) == pytest.approx(total, rel=2e-3)
