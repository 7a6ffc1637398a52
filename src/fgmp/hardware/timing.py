"""Loads, slews, delays and arrival times of a netlist: what both glitches and energies need.

One pass in topological order. A gate's delay and slew come from its tables at the slew of each
input and the load of its output, as the mean over inputs and, for slews, over edges: the question
here is how a circuit switches on average and not whether a chip works. :attr:`Timing.arrival` alone
takes the worst of both, to compare design points at one clock period; setup time is not in it.
Wires have no capacitance but what ``wire_load`` says.
"""

from dataclasses import dataclass

import numpy as np

from fgmp.hardware.cells import Array, Library
from fgmp.hardware.netlist import ONE, Netlist


@dataclass(frozen=True, eq=False)
class Timing:
    """Per net: load (fF), slew and arrival (ps). Per gate: delays (ps) of a rise and a fall."""

    load: Array
    slew: Array
    arrival: Array
    rise: Array
    fall: Array
    flop_delay: Array
    """From the clock edge to each register's output."""

    @property
    def critical(self) -> float:
        """The latest arrival anywhere, in ps."""
        return float(self.arrival.max())


def analyse(netlist: Netlist, library: Library, wire_load: float = 0.0) -> Timing:
    """Time a netlist; ``wire_load`` is added to each net for every pin that it drives, in fF."""
    load = _loads(netlist, library, wire_load)
    slew, arrival = np.zeros(netlist.nets), np.zeros(netlist.nets)
    flop = library.flip_flop
    edge = default_slew(library)
    launch = flop.arcs[0]
    flop_delay = np.zeros(len(netlist.flops))
    for index, register in enumerate(netlist.flops):
        net = register.output
        flop_delay[index] = (launch.rise.at(edge, load[net]) + launch.fall.at(edge, load[net])) / 2
        slew[net] = (
            launch.rise_slew.at(edge, load[net]) + launch.fall_slew.at(edge, load[net])
        ) / 2
        arrival[net] = flop_delay[index]
    for nets in netlist.inputs.values():
        slew[list(nets)] = edge
        arrival[list(nets)] = flop_delay.mean() if len(flop_delay) else 0.0
    rise, fall = np.zeros(len(netlist.gates)), np.zeros(len(netlist.gates))
    for index, gate in enumerate(netlist.gates):
        cell = library.cells[gate.cell]
        pins = dict(zip(cell.capacitance, gate.inputs, strict=True))
        out = load[gate.output]
        points = [(arc, pins[arc.pin]) for arc in cell.arcs]
        rises = [arc.rise.at(slew[net], out) for arc, net in points]
        falls = [arc.fall.at(slew[net], out) for arc, net in points]
        slews = [
            (arc.rise_slew.at(slew[net], out) + arc.fall_slew.at(slew[net], out)) / 2
            for arc, net in points
        ]
        rise[index], fall[index] = np.mean(rises), np.mean(falls)
        slew[gate.output] = np.mean(slews)
        worst = [max(r, f) for r, f in zip(rises, falls, strict=True)]
        arrival[gate.output] = max(
            arrival[net] + delay for (_, net), delay in zip(points, worst, strict=True)
        )
    return Timing(load, slew, arrival, rise, fall, flop_delay)


def default_slew(library: Library) -> float:
    """The slew of a clock edge and of a port: an inverter that drives four, driven by its like."""
    arc, load = library.inverter.arcs[0], 4 * sum(library.inverter.capacitance.values())
    slew = 0.0
    for _ in range(8):  # converges within a few stages
        slew = (arc.rise_slew.at(slew, load) + arc.fall_slew.at(slew, load)) / 2
    return slew


def _loads(netlist: Netlist, library: Library, wire_load: float) -> Array:
    load = np.zeros(netlist.nets)
    for gate in netlist.gates:
        capacitance = library.cells[gate.cell].capacitance.values()
        for net, pin in zip(gate.inputs, capacitance, strict=True):
            load[net] += pin + wire_load
    data = library.flip_flop.capacitance[library.flip_flop.data] + wire_load
    for register in netlist.flops:
        load[register.data] += data
    gate_cell = library.clock_gate[0]
    for (_, enable), count in netlist.clock_gates.items():
        load[enable] += count * (gate_cell.capacitance[gate_cell.data] + wire_load)
    load[: ONE + 1] = 0.0
    return load
