"""A component in silicon: synthesized, timed, driven by real operands, measured.

The numbers of one design point: area by unit, and the energy of a cycle without delays and with
glitches. What the lane's cycles mean in operations is :func:`per_operation`; which units exist is
:func:`components`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fgmp.formats.spec import BLOCK
from fgmp.hardware import gates, timing, yosys
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.gates import Trace, Words
from fgmp.hardware.netlist import Netlist
from fgmp.hardware.power import CycleEnergy, cycle_energy
from fgmp.hardware.synthesis import Design, synthesize
from fgmp.hardware.timing import Timing

PERIOD_NS = 2.5
"""Clock period that synthesis sizes for and leakage is counted over: 400 MHz, which every design
point of docs/energy.md with exact totals meets on ASAP7. In the embedded library it is 1250 tau."""

MIXED = Datapath(shared=True, fp8_cuts=("significands", "sums"))
"""The recommended lane: the least energy of the design points in docs/energy.md, and less area than
the four units of the paper."""

FP8 = Datapath(kind="fp8", cuts=("significands", "sums"))
"""The FP8-only lane of least energy on ASAP7."""

FP4 = Datapath(kind="fp4")
"""The FP4-only lane."""

OPERATIONS = 2 * BLOCK
"""Operations of a pair of blocks: a multiplication and an addition an element."""

_EMBEDDED_TAU_PS = 2.0
_STEPS_A_GATE = 8
"""Grid of the glitch simulation: steps in the mean delay of a gate. Twice as many change the energy
of an FP8 lane by 1%."""


@dataclass(frozen=True, eq=False)
class Implementation:
    """A netlist and its timing."""

    netlist: Netlist
    timing: Timing
    library: Library

    @property
    def area(self) -> float:
        """Of all cells, in the library's unit."""
        return sum(self.netlist.area(self.library).values())

    def summary(self) -> dict[str, Any]:
        """Plain JSON types: area, cells, depth in gates, longest path."""
        return {
            "area_um2": self.area,
            "cells": self.netlist.cells,
            "depth": self.netlist.depth,
            "longest_path_ps": self.timing.critical,
        }


@dataclass(frozen=True, eq=False)
class Measurement:
    """Energy of an average cycle: without delays, and with glitches."""

    zero_delay: CycleEnergy
    inertial: CycleEnergy


def components() -> dict[str, Callable[[], Any]]:
    """Every unit by name, as a function that creates it, the largest first: quantizers of the
    default recipe and of the paper, lanes, and what those hold."""
    from fgmp.hardware.rtl.dot import DotUnit
    from fgmp.hardware.rtl.ppu import Quantizer
    from fgmp.hardware.rtl.registers import Totals

    made: dict[str, Callable[[], Any]] = {
        "quantizer": partial(Quantizer, "benefit", "search"),
        "quantizer_difference_max": partial(Quantizer, "difference", "max"),
        "lane_four_units": replace(MIXED, shared=False).create,
    }
    made |= {f"lane_{lane.kind}": lane.create for lane in (MIXED, FP8, FP4)}
    for unit in MIXED.units:
        made[unit.name] = partial(DotUnit, unit, MIXED.cuts_of(unit), MIXED.addition)
    made["totals"] = partial(Totals, MIXED)
    return made


def implement(component: Any, library: Library, period_ns: float = PERIOD_NS) -> Implementation:
    """Synthesize and time a component of the accelerator."""
    ((_, made),) = implement_all({"top": lambda: component}, library, period_ns)
    return made


def implement_all(
    components: Mapping[str, Callable[[], Any]], library: Library, period_ns: float = PERIOD_NS
) -> Iterator[tuple[str, Implementation]]:
    """Synthesize and time components, one on each core; what is done first comes first.

    Args:
        components: functions that create them, by name; large ones had better be named first.
        library: cells to map to.
        period_ns: clock period.
    """
    from fgmp.hardware.rtl.verilog import rtlil_text

    scale = 1000.0 if library.absolute else 1000.0 / _EMBEDDED_TAU_PS

    def made(design: Design) -> Implementation:
        netlist = synthesize(design, library, period_ns * scale)
        return Implementation(netlist, timing.analyse(netlist, library), library)

    # Amaranth counts what it makes, and is not for threads: only what follows goes side by side.
    designs = {n: Design(rtlil_text(create(), "top"), "top") for n, create in components.items()}
    yield from yosys.side_by_side(made, designs)


def measure(
    implementation: Implementation,
    stimulus: Mapping[str, Words],
    warm_up: int,
    period_ns: float = PERIOD_NS,
    advance: Callable[[], None] = lambda: None,
) -> Measurement:
    """Energy of an average cycle.

    Args:
        implementation: from :func:`implement`.
        stimulus: words (cycles, bits, W) of its ports.
        warm_up: cycles at the start that do not count, in which registers fill.
        period_ns: leakage is counted over it.
        advance: called once for each logic level.
    """
    netlist, library, timed = (
        implementation.netlist,
        implementation.library,
        implementation.timing,
    )
    trace = Trace(gates.settle(netlist, library, stimulus).values[warm_up:])
    mean_delay = float((timed.rise.mean() + timed.fall.mean()) / 2)
    settled = gates.zero_delay(trace)
    moving = gates.glitches(netlist, library, trace, timed, mean_delay / _STEPS_A_GATE, advance)
    return Measurement(
        cycle_energy(netlist, library, timed, settled, period_ns),
        cycle_energy(netlist, library, timed, moving, period_ns),
    )


def per_operation(
    energy: CycleEnergy, datapath: Datapath, shares: Mapping[str, float]
) -> dict[str, float]:
    """fJ an operation by part of a lane.

    Args:
        energy: of a cycle, in which one pair of blocks passes.
        datapath: the lane's.
        shares: which share of the pairs each unit computes, by its name.

    Returns:
        for each unit, operand registers included, fJ for an operation *of its own*; for ``totals``
        and ``control``, fJ for any operation.
    """
    by_unit = energy.by_unit()
    found: dict[str, float] = {}
    for unit in datapath.units:
        own = by_unit.get(unit.name, 0.0) + by_unit.get(f"{unit.name}_operands", 0.0)
        share = sum(shares.get(name, 0.0) for name in datapath.computes(unit))
        if share:
            found |= dict.fromkeys(datapath.computes(unit), own / share / OPERATIONS)
    found["totals"] = by_unit.get("totals", 0.0) / OPERATIONS
    found["control"] = by_unit.get("", 0.0) / OPERATIONS
    return found
