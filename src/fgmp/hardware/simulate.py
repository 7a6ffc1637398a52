"""Amaranth's simulator, made faster; it needs no tool beyond what pip installs.

The simulator runs all combinational statements of a module again whenever one of its inputs
changes, and once more for every level of logic. :func:`simulate` first moves each driven signal to
a module of its own, so that only changed signals are computed again. On the quantizer this was 13
times faster in a single comparison, which no script repeats.
"""

from collections.abc import Awaitable, Callable
from typing import Any

from amaranth.hdl import Fragment
from amaranth.lib import wiring
from amaranth.sim import Simulator

CYCLE = 1e-9
"""Period of the simulated clock in seconds; nothing depends on it."""

Bench = Callable[[Any], Awaitable[None]]


def simulate(component: wiring.Component, bench: Bench, *background: Bench) -> None:
    """Run a test bench, a coroutine that takes a simulator context, to its end.

    Benches in the ``background`` run in parallel and end with it.
    """
    fragment = Fragment.get(component, None)
    _separate_signals(fragment)
    simulator = Simulator(fragment)
    simulator.add_clock(CYCLE)
    simulator.add_testbench(bench)
    for other in background:
        simulator.add_testbench(other, background=True)
    simulator.run()


def _separate_signals(fragment: Fragment) -> None:
    """Move the combinational statements of each driven signal to a fragment of its own."""
    for child, _, _ in list(fragment.subfragments):
        _separate_signals(child)
    # Signals are keyed by identity, because == builds hardware. Statements that drive parts of one
    # signal, and a statement that drives several signals, stay together.
    owner: dict[int, list[Any]] = {}
    for statement in fragment.statements.pop("comb", ()):
        driven = [id(signal) for signal in statement._lhs_signals()]
        shared = list({id(owner[k]): owner[k] for k in driven if k in owner}.values())
        merged = [s for group in shared for s in group] + [statement]
        moved = [k for k, group in owner.items() if any(group is g for g in shared)]
        owner |= dict.fromkeys([*moved, *driven], merged)
    for group in {id(g): g for g in owner.values()}.values():
        part = Fragment()
        part.add_statements("comb", *group)
        fragment.add_subfragment(part)
