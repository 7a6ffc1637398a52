"""A mapped design as nets, gates and registers, read from Yosys' JSON.

Gates refer to cells of a :class:`~fgmp.hardware.cells.Library` by name. Registers stay abstract: a
data net, an output net and, where Yosys detects one, an enable net. The library determines their
flip-flops and clock gates, and ``power`` accounts for them.
"""

import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cached_property

from fgmp.errors import InputError
from fgmp.hardware.cells import Library

ZERO, ONE = 0, 1
"""The constant nets."""

GATED_FLOPS = 32
"""Flip-flops per clock gate, at most. Chosen; docs/energy.md, section 1."""

_REGISTERS = {"$_DFF_P_": False, "$_DFFE_PP_": True}
_CONSTANTS = {"0": ZERO, "1": ONE, "x": ZERO, "z": ZERO}


@dataclass(frozen=True)
class Gate:
    """A combinational cell: nets of its pins in the library's order, and the net of its output."""

    cell: str
    unit: str
    inputs: tuple[int, ...]
    output: int


@dataclass(frozen=True)
class Flop:
    """One bit of state; ``enable`` is a net, or ``ONE`` if the register loads in every cycle."""

    unit: str
    data: int
    enable: int
    output: int


@dataclass(frozen=True, eq=False)
class Netlist:
    """A flat design: gates in topological order, and ports as nets, low bit first."""

    name: str
    nets: int
    gates: tuple[Gate, ...]
    flops: tuple[Flop, ...]
    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]]

    @cached_property
    def readers(self) -> list[list[int]]:
        """Indices of the gates that read each net."""
        readers: list[list[int]] = [[] for _ in range(self.nets)]
        for index, gate in enumerate(self.gates):
            for net in gate.inputs:
                readers[net].append(index)
        return readers

    @cached_property
    def levels(self) -> list[list[int]]:
        """Indices of gates by logic level; gates of a level read only earlier levels."""
        level = [0] * self.nets
        levels: list[list[int]] = []
        for index, gate in enumerate(self.gates):
            depth = max((level[net] for net in gate.inputs), default=0)
            level[gate.output] = depth + 1
            if depth == len(levels):
                levels.append([])
            levels[depth].append(index)
        return levels

    @property
    def depth(self) -> int:
        """Gates on the longest path between registers or ports."""
        return len(self.levels)

    @cached_property
    def clock_gates(self) -> dict[tuple[str, int], int]:
        """Number of clock gates by (unit, enable net)."""
        groups = Counter((f.unit, f.enable) for f in self.flops if f.enable != ONE)
        return {group: -(-count // GATED_FLOPS) for group, count in groups.items()}

    def area(self, library: Library) -> dict[str, float]:
        """Area by unit, registers and clock gates included."""
        total: dict[str, float] = defaultdict(float)
        for gate in self.gates:
            total[gate.unit] += library.cells[gate.cell].area
        for flop in self.flops:
            total[flop.unit] += flop_area(library)
        for (unit, _), count in self.clock_gates.items():
            total[unit] += count * sum(cell.area for cell in library.clock_gate)
        return dict(total)

    @property
    def cells(self) -> int:
        """Number of cells of all kinds."""
        return len(self.gates) + len(self.flops) + sum(self.clock_gates.values())


def flop_area(library: Library) -> float:
    """Area of one bit of state: the flip-flop, and an inverter if its output is the complement."""
    return library.flip_flop.area + (library.inverter.area if library.flip_flop.inverted else 0.0)


def from_yosys(text: str, top: str, library: Library) -> Netlist:
    """The netlist of a flattened, mapped module.

    The unit of a cell is the first part of the hierarchical path in its name; cells of the top
    module have the unit ``""``.

    Raises:
        InputError: an unknown cell, a net without driver, or a combinational loop.
    """
    module = json.loads(text)["modules"][top]
    numbers: dict[object, int] = dict(_CONSTANTS.items())

    def net(bit: object) -> int:
        return numbers.setdefault(bit, len(numbers) - len(_CONSTANTS) + 2)

    ports = {"input": {}, "output": {}}  # type: dict[str, dict[str, tuple[int, ...]]]
    for name, port in module["ports"].items():
        ports[port["direction"]][name] = tuple(net(bit) for bit in port["bits"])
    gates, flops = [], []
    for name, cell in module["cells"].items():
        pins = {pin: tuple(net(bit) for bit in bits) for pin, bits in cell["connections"].items()}
        unit = _unit(name, cell.get("attributes", {}))
        kind = cell["type"]
        if kind in _REGISTERS:
            enable = pins["E"][0] if _REGISTERS[kind] else ONE
            flops.append(Flop(unit, pins["D"][0], enable, pins["Q"][0]))
        elif kind in library.cells:
            record = library.cells[kind]
            nets = tuple(pins[pin][0] for pin in record.capacitance)
            gates.append(Gate(kind, unit, nets, pins[record.output][0]))
        else:
            raise InputError(
                f"{top}: cell {name} is of type {kind}, which the library {library.name!r} does "
                f"not hold and is no positive-edge register"
            )
    sources = {ZERO, ONE, *(n for nets in ports["input"].values() for n in nets)}
    sources |= {flop.output for flop in flops}
    ordered = _sorted(gates, sources, top)
    count = max([1, *(n for n in numbers.values())]) + 1
    return Netlist(top, count, ordered, tuple(flops), ports["input"], ports["output"])


def _unit(name: str, attributes: dict[str, str]) -> str:
    """Unit of a cell, from the attributes that flattening left or from its name."""
    path = attributes.get("hdlname", "").split(" ")[:-1] or attributes.get("scopename", "").split()
    if path:
        return path[0]
    return name.lstrip("\\").split(".")[0] if "." in name.split("$")[0] else ""


def _sorted(gates: list[Gate], sources: set[int], top: str) -> tuple[Gate, ...]:
    """Gates in topological order; refuses loops and nets without driver."""
    driver = {gate.output: index for index, gate in enumerate(gates)}
    waiting = [0] * len(gates)
    readers: dict[int, list[int]] = {}
    for index, gate in enumerate(gates):
        for pin in set(gate.inputs) - sources:
            if pin not in driver:
                raise InputError(f"{top}: net {pin} is read by a {gate.cell} and driven by nothing")
            waiting[index] += 1
            readers.setdefault(pin, []).append(index)
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    for index in ready:
        order.append(gates[index])
        for reader in readers.get(gates[index].output, ()):
            waiting[reader] -= 1
            if waiting[reader] == 0:
                ready.append(reader)
    if len(order) != len(gates):
        raise InputError(f"{top}: {len(gates) - len(order)} gates form combinational loops")
    return tuple(order)
