"""Energy of small netlists, worked by hand from the embedded library's numbers."""

import numpy as np
import pytest

from fgmp.hardware import cells, timing
from fgmp.hardware.cells import embedded
from fgmp.hardware.gates import Activity
from fgmp.hardware.netlist import ONE, Flop, Gate, Netlist
from fgmp.hardware.power import cycle_energy


def activity(netlist: Netlist, toggles: dict[int, float], ones: dict[int, float]) -> Activity:
    moved, high = np.zeros(netlist.nets), np.zeros(netlist.nets)
    moved[list(toggles)] = list(toggles.values())
    high[list(ones)] = list(ones.values())
    high[ONE] = 1.0
    return Activity(moved, high, 1)


def test_two_inverters() -> None:
    """Net 2 drives an inverter, that another of drive 2, whose output is free."""
    library = embedded()
    gates = (Gate("INV_x1", "near", (2,), 3), Gate("INV_x2", "far", (3,), 4))
    netlist = Netlist("two", 5, gates, (), {"in": (2,)}, {"out": (4,)})
    timed = timing.analyse(netlist, library)
    assert timed.load.tolist() == [0, 0, 1, 2, 0]
    # d = p + C / x: 1 + 2 for the first; the second has no load.
    assert timed.rise.tolist() == pytest.approx([3, 1])
    energy = cycle_energy(
        netlist, library, timed, activity(netlist, {2: 0.5, 3: 0.5, 4: 0.25}, {}), 1000.0
    )
    # Half C V^2 per toggle of the net, and half the parasitic capacitance of the gate.
    assert energy.units[""]["logic"] == pytest.approx(0.5 * 1 / 2)
    assert energy.units["near"]["logic"] == pytest.approx(0.5 * 2 / 2 + 0.5 * 1 / 2)
    assert energy.units["far"]["logic"] == pytest.approx(0.25 * 2 * 1 / 2)
    inverter = library.cells["INV_x1"]
    assert energy.units["near"]["leakage"] == pytest.approx(inverter.leakage * 1000e-3)
    assert energy.total == pytest.approx(sum(energy.by_cause().values()))
    assert energy.total == pytest.approx(sum(energy.by_unit().values()))


def test_a_gated_register_takes_clock_energy_only_when_it_loads() -> None:
    library = embedded()
    flops = tuple(Flop("", 2, 3, 4 + i) for i in range(32))
    netlist = Netlist("gated", 36, (), flops, {"in": (2, 3)}, {})
    timed = timing.analyse(netlist, library)
    idle, busy = (
        cycle_energy(netlist, library, timed, activity(netlist, {}, {3: duty}), 0.0)
        for duty in (0.0, 1.0)
    )
    assert netlist.clock_gates == {("", 3): 1}
    flop, gate = library.flip_flop, library.clock_gate[0]
    pin = flop.capacitance["CK"] / 2 + flop.input_energy["CK"][0].at(1, 0)
    clock_pin = gate.capacitance["CK"] / 2 + gate.input_energy["CK"][0].at(1, 0)
    assert idle.total == pytest.approx(2 * clock_pin)
    output = gate.output_energy[0].at(1, 0)
    assert busy.total == pytest.approx(2 * clock_pin + 2 * 32 * pin + 2 * output)


def test_a_free_register_is_clocked_every_cycle() -> None:
    library = embedded()
    netlist = Netlist("free", 4, (), (Flop("", 2, ONE, 3),), {"in": (2,)}, {})
    timed = timing.analyse(netlist, library)
    energy = cycle_energy(netlist, library, timed, activity(netlist, {2: 1.0, 3: 1.0}, {}), 0.0)
    flop = library.flip_flop
    clock = 2 * (flop.capacitance["CK"] / 2 + flop.input_energy["CK"][0].at(1, 0))
    assert energy.by_cause()["clock"] == pytest.approx(clock)
    data = flop.input_energy["D"][0].at(1, 0) + flop.output_energy[0].at(1, 0)
    assert energy.by_cause()["registers"] == pytest.approx(data)


def test_states_in_which_the_output_moves_are_not_charged_twice() -> None:
    """A conditional table is for inputs that change nothing; others are for every transition."""
    one = cells.constant(1.0)
    tables = (cells.Energy(one, one), cells.Energy(one, one, conditional=True))
    from fgmp.hardware.power import _pin_energy

    assert _pin_energy(tables, 1.0, quiet=0.0) == 1.0
    assert _pin_energy(tables, 1.0, quiet=0.5) == 1.5
