"""Loads, slews, delays and arrival times of a netlist, for glitches and energies.

One pass in topological order. A gate's delay and slew come from its tables at the slew of each
input and the load of its output. They are means over inputs and, for slews, over edges: the result
is the average behaviour of a circuit and not a sign-off. Only :attr:`Timing.arrival` takes the
worst of both, to compare design points at one clock period; setup time is not in it. Wires have no
capacitance but ``wire_load``.
"""

from dataclasses import dataclass

import numpy as np

from fgmp.hardware.cells import Floats, Library
from fgmp.hardware.netlist import ONE, Netlist


@dataclass(frozen=True, eq=False)
class Timing:
    """Timing of a netlist.

    Attributes:
        load: per net, in fF.
        slew, arrival: per net, in ps.
        rise, fall: delay per gate, in ps.
        flop_delay: from the clock edge to the output, per register, in ps.
    """

    load: Floats
    slew: Floats
    arrival: Floats
    rise: Floats
    fall: Floats
    flop_delay: Floats

    @property
    def critical(self) -> float:
        """The latest arrival, in ps."""
        return float(self.arrival.max())


def analyse(netlist: Netlist, library: Library, wire_load: float = 0.0) -> Timing:
    """Timing of a netlist; each net has a ``wire_load`` per pin that it drives, in fF."""
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
    """Slew of clock edges and ports: that of a chain of inverters that each drive four."""
    arc, load = library.inverter.arcs[0], 4 * sum(library.inverter.capacitance.values())
    slew = 0.0
    for _ in range(8):  # converges within a few stages
        slew = (arc.rise_slew.at(slew, load) + arc.fall_slew.at(slew, load)) / 2
    return slew


def _loads(netlist: Netlist, library: Library, wire_load: float) -> Floats:
    """Load per net."""
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
