"""One design point: synthesis, timing, and energy per cycle on real operands.

:func:`implement` gives a component's area and longest path, :func:`measure` its energy per cycle,
without delays and with glitches. :func:`per_operation` converts that of a lane to energy per
operation; :func:`components` lists all units.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
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
"""Clock period for gate sizing and leakage: 400 MHz. Chosen; all design points with exact totals
meet it on ASAP7 (runs/design_points.py). In the embedded library it is 1250 tau."""

MIXED = Datapath(shared=True, fp8_cuts=("significands", "sums"))
"""The recommended lane: the least energy of all design points, and less area than the paper's four
units (runs/design_points.py; docs/energy.md, section 3)."""

FP8 = Datapath(kind="fp8", cuts=("significands", "sums"))
"""The FP8-only lane of least energy on ASAP7 (runs/design_points.py; docs/energy.md, section 2)."""

FP4 = Datapath(kind="fp4")
"""The FP4-only lane."""

OPERATIONS = 2 * BLOCK
"""Operations per pair of blocks: one multiplication and one addition per element."""

_EMBEDDED_TAU_PS = 2.0
"""Delay unit of the embedded library for the clock period. Chosen, about that of a 7 nm gate."""

_STEPS_PER_GATE = 8
"""Steps per mean gate delay in the glitch simulation. Chosen; with twice as many, the energy of an
FP8 lane changed by 1% in a single comparison, which no script repeats."""


@dataclass(frozen=True, eq=False)
class Implementation:
    """A netlist and its timing."""

    netlist: Netlist
    timing: Timing
    library: Library

    @property
    def area(self) -> float:
        """Area of all cells, in the library's unit."""
        return sum(self.netlist.area(self.library).values())

    def summary(self) -> dict[str, Any]:
        """Area, number of cells, depth in gates and longest path, as plain JSON types."""
        return {
            "area_um2": self.area,
            "cells": self.netlist.cells,
            "depth": self.netlist.depth,
            "longest_path_ps": self.timing.critical,
        }


@dataclass(frozen=True, eq=False)
class Measurement:
    """Energy of an average cycle, without delays and with glitches."""

    zero_delay: CycleEnergy
    inertial: CycleEnergy


def components() -> dict[str, Callable[[], Any]]:
    """Functions that create every unit, by its name, the largest first.

    The units are the quantizers of the default recipe and of the paper, the lanes, and the parts
    of the recommended lane.
    """
    from fgmp.hardware.rtl.dot import DotUnit
    from fgmp.hardware.rtl.ppu import Quantizer
    from fgmp.hardware.rtl.registers import Totals

    units: dict[str, Callable[[], Any]] = {
        "quantizer": partial(Quantizer, QuantizerConfig()),
        "quantizer_difference_max": partial(Quantizer, PAPER_QUANTIZER),
        "lane_four_units": replace(MIXED, shared=False).create,
    }
    units |= {f"lane_{lane.kind}": lane.create for lane in (MIXED, FP8, FP4)}
    for unit in MIXED.units:
        units[unit.name] = partial(DotUnit, unit, MIXED.cuts_of(unit), MIXED.addition)
    units["totals"] = partial(Totals, MIXED)
    return units


def implement(component: Any, library: Library, period_ns: float = PERIOD_NS) -> Implementation:
    """Synthesize and time a component of the accelerator."""
    ((_, implementation),) = implement_all({"top": lambda: component}, library, period_ns)
    return implementation


def implement_all(
    components: Mapping[str, Callable[[], Any]], library: Library, period_ns: float = PERIOD_NS
) -> Iterator[tuple[str, Implementation]]:
    """Synthesize and time components, one per core; yields each with its name when it is done.

    Args:
        components: functions that create them, by name; name large ones first.
        library: cells to map to.
        period_ns: clock period.
    """
    from fgmp.hardware.rtl.verilog import rtlil_text

    scale = 1000.0 if library.absolute else 1000.0 / _EMBEDDED_TAU_PS

    def implementation(design: Design) -> Implementation:
        netlist = synthesize(design, library, period_ns * scale)
        return Implementation(netlist, timing.analyse(netlist, library), library)

    # Amaranth has global counters and is not thread-safe, so RTL is generated before the threads.
    designs = {n: Design(rtlil_text(create(), "top"), "top") for n, create in components.items()}
    yield from yosys.side_by_side(implementation, designs)


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
        period_ns: clock period, over which leakage runs.
        advance: called once per logic level.
    """
    netlist, library, timed = (
        implementation.netlist,
        implementation.library,
        implementation.timing,
    )
    trace = Trace(gates.settle(netlist, library, stimulus).values[warm_up:])
    mean_delay = float((timed.rise.mean() + timed.fall.mean()) / 2)
    settled = gates.zero_delay(trace)
    step = mean_delay / _STEPS_PER_GATE
    moving = gates.glitches(netlist, library, trace, timed, step, advance)
    return Measurement(
        cycle_energy(netlist, library, timed, settled, period_ns),
        cycle_energy(netlist, library, timed, moving, period_ns),
    )


def per_operation(
    energy: CycleEnergy, datapath: Datapath, shares: Mapping[str, float]
) -> dict[str, float]:
    """fJ per operation by part of a lane.

    Args:
        energy: energy of a cycle, in which one pair of blocks passes.
        datapath: the lane's.
        shares: share of the pairs that each unit computes, by its name.

    Returns:
        for each unit, operand registers included, fJ per operation *of that unit*; for ``totals``
        and ``control``, fJ per operation of any.
    """
    by_unit = energy.by_unit()
    parts: dict[str, float] = {}
    for unit in datapath.units:
        unit_energy = by_unit.get(unit.name, 0.0) + by_unit.get(f"{unit.name}_operands", 0.0)
        share = sum(shares.get(name, 0.0) for name in datapath.computes(unit))
        if share:
            parts |= dict.fromkeys(datapath.computes(unit), unit_energy / share / OPERATIONS)
    parts["totals"] = by_unit.get("totals", 0.0) / OPERATIONS
    parts["control"] = by_unit.get("", 0.0) / OPERATIONS
    return parts
