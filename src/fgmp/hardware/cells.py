"""Standard cells, and a small library that needs no foundry.

A :class:`Library` holds combinational cells, one flip-flop and one clock gate, each with area,
pin capacitances, and tables of delay, slew and internal energy over input slew and output load.
``liberty`` reads one from a file. :func:`embedded` creates one by the method of logical effort
(Sutherland, Sproull, Harris, 1999): a gate with input capacitance g per unit of drive and parasitic
p, at drive x and load C, has the delay

    d = tau (p + C / x)

whatever its function, and its area and leakage are proportional to its transistor widths. Units
are those of one inverter: tau, its input capacitance, its area, a supply of 1. They are not
picoseconds and femtojoules, so results from this library are ratios.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Table:
    """Values over input slew (S,) and output load (L,), interpolated linearly in both.

    Beyond the ends, values are extrapolated from the last two points, as in static timing
    analysis. An axis of length 1 means that the value does not depend on it.
    """

    slews: Floats
    loads: Floats
    values: Floats

    def at(self, slew: float, load: float) -> float:
        """The value at one point."""
        i, u = _position(self.slews, slew)
        j, v = _position(self.loads, load)
        row = self.values[i] if u == 0 else self.values[i] * (1 - u) + self.values[i + 1] * u
        return float(row[j] if v == 0 else row[j] * (1 - v) + row[j + 1] * v)


def _position(axis: Floats, x: float) -> tuple[int, float]:
    """Index of the interval of ``x`` and the relative place in it."""
    if len(axis) == 1:
        return 0, 0.0
    i = min(max(int(np.searchsorted(axis, x)) - 1, 0), len(axis) - 2)
    return i, float((x - axis[i]) / (axis[i + 1] - axis[i]))


@dataclass(frozen=True, eq=False)
class Arc:
    """Delays and slews of one output after a change of one input pin, rising and falling."""

    pin: str
    sense: str
    rise: Table
    fall: Table
    rise_slew: Table
    fall_slew: Table


@dataclass(frozen=True, eq=False)
class Energy:
    """Internal energy of one transition, rising and falling, in fJ; without that of the load.

    A table of an output belongs to the input ``pin`` that causes the transition. A table of an
    input has no cause: if ``conditional``, it holds for states (liberty's ``when``) in which the
    output stays; otherwise it holds for every transition of the pin.
    """

    rise: Table
    fall: Table
    pin: str = ""
    conditional: bool = False

    def at(self, slew: float, load: float) -> float:
        """Mean of rise and fall, which are equally frequent."""
        return (self.rise.at(slew, load) + self.fall.at(slew, load)) / 2


@dataclass(frozen=True, eq=False)
class Cell:
    """A combinational cell with one output, a flip-flop or a clock gate.

    Attributes:
        area: in the library's unit.
        leakage: mean over states, in nW.
        capacitance: capacitance of each input pin, in fF.
        output: the output pin.
        function: output function in liberty's operators over input pins; empty for flip-flops.
        arcs, output_energy, input_energy: see :class:`Arc` and :class:`Energy`.
        max_load: largest load of the output, in fF.
        clock, data: pins of a flip-flop; for a clock gate ``data`` is its enable.
        inverted: whether a flip-flop's output is the complement of the stored bit.
    """

    name: str
    area: float
    leakage: float
    capacitance: dict[str, float]
    output: str
    function: str = ""
    arcs: tuple[Arc, ...] = ()
    output_energy: tuple[Energy, ...] = ()
    input_energy: dict[str, tuple[Energy, ...]] = field(default_factory=dict)
    max_load: float = np.inf
    clock: str = ""
    data: str = ""
    inverted: bool = False


@dataclass(frozen=True, eq=False)
class Library:
    """Cells by name. Units: um2, ps, fF, fJ, nW, V; those of an inverter if not ``absolute``."""

    name: str
    voltage: float
    cells: dict[str, Cell]
    flip_flop: Cell
    clock_gate: tuple[Cell, ...]
    """One integrated cell, or a flip-flop and an AND where the library has none."""
    inverter: Cell
    buffer: Cell
    absolute: bool = True

    @property
    def area_unit(self) -> str:
        """Unit of areas."""
        return "um2" if self.absolute else "inverters"


# Function, logical effort of each input (its capacitance at drive 1), parasitic delay, and width of
# the transistors that are not at an input, such as a second stage, in inverters. Derived from the
# transistor networks with a p-to-n ratio of 2; 3 units of width are one inverter.
_GATES: dict[str, tuple[str, tuple[float, ...], float, float]] = {
    "INV": ("!A", (1,), 1, 0),
    "BUF": ("A", (1,), 2, 1),
    "NAND2": ("!(A*B)", (4 / 3, 4 / 3), 2, 0),
    "NAND3": ("!(A*B*C)", (5 / 3, 5 / 3, 5 / 3), 3, 0),
    "NOR2": ("!(A+B)", (5 / 3, 5 / 3), 2, 0),
    "NOR3": ("!(A+B+C)", (7 / 3, 7 / 3, 7 / 3), 3, 0),
    "AND2": ("A*B", (4 / 3, 4 / 3), 4, 1),
    "OR2": ("A+B", (5 / 3, 5 / 3), 4, 1),
    "AOI21": ("!((A*B)+C)", (2, 2, 5 / 3), 7 / 3, 0),
    "OAI21": ("!((A+B)*C)", (2, 2, 4 / 3), 7 / 3, 0),
    "AOI22": ("!((A*B)+(C*D))", (2, 2, 2, 2), 4, 0),
    "OAI22": ("!((A+B)*(C+D))", (2, 2, 2, 2), 4, 0),
    # Four series pairs, and an inverter for each input's complement.
    "XOR2": ("A^B", (3, 3), 5, 4),
    "XNOR2": ("!(A^B)", (3, 3), 5, 4),
    "MUX2": ("(A*!S)+(B*S)", (2, 2, 3), 5, 4),
}
_DRIVES = (1, 2, 4)

_LEAKAGE = 2e-6
"""Leakage per inverter, in its switching energies per tau. Chosen; 50 pW, 0.15 fJ and 2 ps of a
7 nm gate would be 7e-7. It is below 1% of every energy in docs/results/energy_embedded_70.json."""

_SETTLE = 2.0
"""Slew over delay. Chosen: a slope that takes twice the delay from 50% to 50%."""


def embedded() -> Library:
    """The library by logical effort: 15 gates in three drives, a flip-flop and a clock gate."""
    cells = {
        f"{name}_x{drive}": _gate(f"{name}_x{drive}", drive, *gate)
        for name, gate in _GATES.items()
        for drive in _DRIVES
    }
    return Library(
        name="embedded",
        voltage=1.0,
        cells=cells,
        flip_flop=_FLIP_FLOP,
        clock_gate=(_CLOCK_GATE,),
        inverter=cells["INV_x1"],
        buffer=cells["BUF_x1"],
        absolute=False,
    )


def _gate(
    name: str,
    drive: int,
    function: str,
    efforts: tuple[float, ...],
    parasitic: float,
    hidden: float,
) -> Cell:
    pins = "ABS" if "S" in function else "ABCD"
    capacitance = {pin: drive * g for pin, g in zip(pins, efforts, strict=False)}
    delay, slew = _effort(drive, parasitic, 1.0), _effort(drive, parasitic, _SETTLE)
    # Charging the parasitic and half of the hidden gates, at 1/2 C V^2 per transition.
    energy = constant(drive * (parasitic + hidden / 2) / 2)
    width = drive * (sum(efforts) + hidden)
    return Cell(
        name=name,
        area=width,
        leakage=width * _LEAKAGE,
        capacitance=capacitance,
        output="Y",
        function=function,
        arcs=tuple(Arc(pin, "non_unate", delay, delay, slew, slew) for pin in capacitance),
        output_energy=tuple(Energy(energy, energy, pin) for pin in capacitance),
        max_load=drive * 64.0,
    )


def _effort(drive: float, parasitic: float, factor: float) -> Table:
    loads = np.array([0.0, 64.0 * drive])
    return Table(np.zeros(1), loads, (factor * (parasitic + loads / drive))[None])


def constant(value: float) -> Table:
    """A table of one value."""
    return Table(np.zeros(1), np.zeros(1), np.full((1, 1), value))


def _stored(name: str, area: float, clock_energy: float, data: str, output_energy: float) -> Cell:
    delay, slew = _effort(1, 6, 1.0), _effort(1, 3, _SETTLE)
    return Cell(
        name=name,
        area=area,
        leakage=area * _LEAKAGE,
        capacitance={"CK": 1.0, data: 4 / 3},
        output="Q",
        arcs=(Arc("CK", "non_unate", delay, delay, slew, slew),),
        output_energy=(Energy(constant(output_energy), constant(output_energy), "CK"),),
        input_energy={
            "CK": (Energy(constant(clock_energy), constant(clock_energy)),),
            data: (Energy(constant(2.0), constant(2.0)),),
        },
        clock="CK",
        data=data,
    )


# Master and slave, each of a pass gate, an inverter and a weak keeper; two clock inverters; an
# output inverter. A clock edge switches the second clock inverter and eight clocked half gates.
_FLIP_FLOP = _stored("DFF", 14.0, 2.5, "D", 3.0)
_CLOCK_GATE = _stored("ICG", 12.0, 2.0, "E", 1.5)
