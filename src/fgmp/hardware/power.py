"""Energy per cycle of a netlist, from toggles and a library's tables, by unit and by cause.

=========  ==================================================================================
switching  1/2 C V^2 of each net, per toggle
internal   of the driving cell, at its load and the slews of its inputs, which are weighted by
           their toggles; and of input pins themselves
clock      clock pins of registers and of clock gates, and the gated nets
leakage    of every cell, gated or not, over one period
=========  ==================================================================================

Registers with the same enable share clock gates, one per 32 registers. The clock is an ideal net,
without buffers; there are no wires.
"""

from collections import defaultdict
from dataclasses import dataclass

from fgmp.hardware.cells import Cell, Energy, Floats, Library
from fgmp.hardware.gates import Activity
from fgmp.hardware.netlist import GATED_FLOPS, ONE, Netlist
from fgmp.hardware.timing import Timing, default_slew

CAUSES = ("logic", "registers", "clock", "leakage")


@dataclass(frozen=True)
class CycleEnergy:
    """Energy of one cycle in fJ, by unit and then by cause (:data:`CAUSES`)."""

    units: dict[str, dict[str, float]]

    @property
    def total(self) -> float:
        """Sum over all units and causes."""
        return sum(sum(causes.values()) for causes in self.units.values())

    def by_cause(self) -> dict[str, float]:
        """Energy by cause, summed over units."""
        return {c: sum(unit.get(c, 0.0) for unit in self.units.values()) for c in CAUSES}

    def by_unit(self) -> dict[str, float]:
        """Energy by unit, summed over causes."""
        return {name: sum(causes.values()) for name, causes in self.units.items()}


def cycle_energy(
    netlist: Netlist, library: Library, timing: Timing, activity: Activity, period_ns: float
) -> CycleEnergy:
    """Energy of an average cycle.

    Args:
        netlist, library, timing: the design.
        activity: toggles, from ``gates``.
        period_ns: clock period, over which leakage runs.
    """
    units: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(CAUSES, 0.0))
    half_square = library.voltage**2 / 2
    toggles, load, slew = activity.toggles, timing.load, timing.slew
    for gate in netlist.gates:
        cell = library.cells[gate.cell]
        energy = toggles[gate.output] * load[gate.output] * half_square
        energy += _internal(
            cell,
            [(toggles[n], slew[n]) for n in gate.inputs],
            toggles[gate.output],
            load[gate.output],
        )
        units[gate.unit]["logic"] += energy
        units[gate.unit]["leakage"] += cell.leakage * period_ns * 1e-3
    for flop in netlist.flops:
        units[flop.unit]["registers"] += _register(flop.data, flop.output, library, timing, toggles)
        leakage = library.flip_flop.leakage
        leakage += library.inverter.leakage if library.flip_flop.inverted else 0.0
        units[flop.unit]["leakage"] += leakage * period_ns * 1e-3
    for nets in netlist.inputs.values():  # the nets of input ports have no driver in the netlist
        for net in nets:
            units[""]["logic"] += toggles[net] * load[net] * half_square
    _clock(netlist, library, activity, period_ns, units)
    return CycleEnergy({u: {c: float(v) for c, v in by.items()} for u, by in units.items()})


def _internal(
    cell: Cell, inputs: list[tuple[float, float]], output_toggles: float, load: float
) -> float:
    """Internal energy of a combinational cell; ``inputs`` are toggles and slews of its pins."""
    pins = dict(zip(cell.capacitance, inputs, strict=True))
    total = sum(t for t, _ in inputs)
    caused = [(pins[e.pin], e) for e in cell.output_energy]
    weight = sum(t for (t, _), _ in caused)
    energy = 0.0
    if weight > 0 and output_toggles > 0:
        mean = sum(t * e.at(s, load) for (t, s), e in caused) / weight
        energy += output_toggles * mean
    quiet = max(0.0, 1 - output_toggles / total) if total > 0 else 0.0
    for pin, tables in cell.input_energy.items():
        t, s = pins[pin]
        energy += t * _pin_energy(tables, s, quiet)
    return energy


def _pin_energy(tables: tuple[Energy, ...], slew: float, quiet: float) -> float:
    """Energy of one toggle of an input pin.

    Conditional tables count for ``quiet``, the share of toggles that leave the output unchanged.
    """
    always = sum(e.at(slew, 0.0) for e in tables if not e.conditional)
    states = [e.at(slew, 0.0) for e in tables if e.conditional]
    return always + quiet * (sum(states) / len(states) if states else 0.0)


def _register(
    data: int,
    output: int,
    library: Library,
    timing: Timing,
    toggles: Floats,
) -> float:
    """Energy of a register's data pin and output, inverter included, without its clock."""
    flop, half_square = library.flip_flop, library.voltage**2 / 2
    out, load = toggles[output], timing.load[output]
    energy = toggles[data] * _pin_energy(
        flop.input_energy.get(flop.data, ()), timing.slew[data], 1.0
    )
    if flop.inverted:
        inverter = library.inverter
        between = sum(inverter.capacitance.values())
        slew = flop.arcs[0].rise_slew.at(default_slew(library), between)
        energy += out * (between * half_square + _internal(inverter, [(1.0, slew)], 1.0, load))
        load, energy = between, energy + out * load * half_square
    else:
        energy += out * load * half_square
    launch = next(e for e in flop.output_energy if e.pin == flop.clock)
    return float(energy + out * launch.at(default_slew(library), load))


def _clock(
    netlist: Netlist,
    library: Library,
    activity: Activity,
    period_ns: float,
    units: dict[str, dict[str, float]],
) -> None:
    """Add the clock's energy: two edges per cycle, for gated registers only while enabled."""
    flop, slew = library.flip_flop, default_slew(library)
    half_square = library.voltage**2 / 2
    pin = flop.capacitance[flop.clock] * half_square
    edge = pin + _pin_energy(flop.input_energy.get(flop.clock, ()), slew, 1.0)
    for register in netlist.flops:
        duty = 1.0 if register.enable == ONE else float(activity.ones[register.enable])
        units[register.unit]["clock"] += 2 * duty * edge
    for (unit, enable), count in netlist.clock_gates.items():
        duty, moves = float(activity.ones[enable]), float(activity.toggles[enable])
        units[unit]["clock"] += count * _gate_energy(library, duty, moves, slew)
        leakage = sum(cell.leakage for cell in library.clock_gate)
        units[unit]["leakage"] += count * leakage * period_ns * 1e-3


def _gate_energy(library: Library, duty: float, enable_toggles: float, slew: float) -> float:
    """Energy per cycle of a clock gate: its clock pin always, its output only while enabled."""
    half_square = library.voltage**2 / 2
    first, *rest = library.clock_gate
    clock_pin = first.capacitance[first.clock] * half_square
    clock_pin += _pin_energy(first.input_energy.get(first.clock, ()), slew, 1 - duty)
    energy = 2 * clock_pin
    energy += enable_toggles * _pin_energy(first.input_energy.get(first.data, ()), slew, 1.0)
    driver = rest[0] if rest else first
    fanout = GATED_FLOPS * library.flip_flop.capacitance[library.flip_flop.clock]
    for cell in rest:  # an AND behind a flip-flop: the clock reaches one of its pins too
        clock = next(iter(cell.capacitance))
        switching = cell.capacitance[clock] * half_square
        energy += 2 * (switching + _pin_energy(cell.input_energy.get(clock, ()), slew, 1 - duty))
    output = [e.at(slew, fanout) for e in driver.output_energy]
    return energy + 2 * duty * sum(output) / max(len(output), 1)
