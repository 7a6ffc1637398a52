"""Gate-level simulation of many cycles at once, in the bits of machine words.

A design first runs cycle by cycle without delays, on 64 W independent streams in parallel
(:func:`settle`). Then every register is known in every cycle, and a cycle depends only on its
start and end states. So all cycles of all streams can be simulated *together* with delays
(:func:`glitches`). Each net has its waveform on a grid of time steps, as an array of words, and a
gate's waveform follows from those of its inputs by a few array operations.

Delays are inertial, as in Verilog: an output rises one rise delay after its function, if that
stayed up for as long; shorter pulses are swallowed. With g the function's waveform and r, f the
delays,

    out[t] = up[t] | out[t-1] & ~down[t]
    up[t]   = g[t-r] & ... & g[t-1]        down[t] = ~g[t-f] & ... & ~g[t-1]

Words are uint64; bit b of word w is stream 64 w + b.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fgmp.errors import InputError
from fgmp.hardware import expression
from fgmp.hardware.cells import Library
from fgmp.hardware.netlist import ONE, ZERO, Netlist
from fgmp.hardware.timing import Timing

Words = NDArray[np.uint64]
_ALL = np.uint64(2**64 - 1)


@dataclass(frozen=True, eq=False)
class Trace:
    """Settled states of a run without delays.

    Attributes:
        values: values of every net at the end of each cycle, (cycles, nets, W).
    """

    values: Words

    @property
    def transitions(self) -> int:
        """Number of pairs of consecutive cycles, over all streams."""
        return int((self.values.shape[0] - 1) * self.values.shape[2] * 64)


@dataclass(frozen=True, eq=False)
class Activity:
    """Toggle rates of nets, per cycle of one stream.

    Attributes:
        toggles: float64 (nets,).
        ones: share of cycles in which the net ends at 1, float64 (nets,).
        transitions: number of cycles in the averages.
    """

    toggles: NDArray[np.float64]
    ones: NDArray[np.float64]
    transitions: int


def functions(library: Library) -> dict[str, Callable[..., Words]]:
    """Each cell's function on words, with arguments in the order of its pins."""
    return {
        name: expression.compiled(cell.function, list(cell.capacitance))
        for name, cell in library.cells.items()
    }


def settle(netlist: Netlist, library: Library, inputs: Mapping[str, Words]) -> Trace:
    """Run a design without delays, registers starting at zero.

    Args:
        netlist: the design.
        library: its cells.
        inputs: words (cycles, bits, W) of every input port but the clock; a missing reset is low.

    Raises:
        InputError: a port is missing, or shapes do not agree.
    """
    cycles, words = _shape(netlist, inputs)
    steps = _steps(netlist, library)
    values = np.zeros((cycles, netlist.nets, words), dtype=np.uint64)
    values[:, ONE] = _ALL
    for port, nets in netlist.inputs.items():
        if port in inputs:
            values[:, list(nets)] = inputs[port]
    data, enable, output = (
        np.array([getattr(f, name) for f in netlist.flops], dtype=np.intp)
        for name in ("data", "enable", "output")
    )
    for cycle in range(cycles):
        now = values[cycle]
        if cycle:
            before = values[cycle - 1]
            on = before[enable]
            now[output] = before[data] & on | before[output] & ~on
        for function, pins, out in steps:
            now[out] = function(*(now[pin] for pin in pins))
    return Trace(values)


def _shape(netlist: Netlist, inputs: Mapping[str, Words]) -> tuple[int, int]:
    """Cycles and words per cycle, equal for all inputs."""
    needed = set(netlist.inputs) - {"clk", "rst"}
    if missing := needed - set(inputs):
        raise InputError(f"{netlist.name}: no stimulus for ports {sorted(missing)}")
    shapes = {(array.shape[0], array.shape[2]) for array in inputs.values()}
    widths = {port: array.shape[1] for port, array in inputs.items()}
    wrong = [p for p, width in widths.items() if width != len(netlist.inputs.get(p, ()))]
    if len(shapes) != 1 or wrong:
        raise InputError(
            f"{netlist.name}: stimuli must cover equal cycles and streams and have the ports' "
            f"widths, got {sorted(shapes)}, wrong: {wrong}"
        )
    return shapes.pop()


def _steps(
    netlist: Netlist, library: Library
) -> list[tuple[Callable[..., Words], NDArray[np.intp], NDArray[np.intp]]]:
    """Function, pins (pins, n) and outputs (n,) of n gates of one level and cell, to be evaluated
    together."""
    compiled = functions(library)
    steps = []
    for level in netlist.levels:
        by_cell: dict[str, list[int]] = {}
        for index in level:
            by_cell.setdefault(netlist.gates[index].cell, []).append(index)
        for cell, members in by_cell.items():
            pins = np.array([netlist.gates[i].inputs for i in members], dtype=np.intp).T
            out = np.array([netlist.gates[i].output for i in members], dtype=np.intp)
            steps.append((compiled[cell], pins, out))
    return steps


def zero_delay(trace: Trace) -> Activity:
    """Toggles between the settled states of consecutive cycles."""
    values = trace.values
    count = np.zeros(values.shape[1])
    ones = np.zeros(values.shape[1])
    for before, now in itertools.pairwise(values):
        count += np.bitwise_count(before ^ now).sum(-1)
        ones += np.bitwise_count(now).sum(-1)
    return Activity(count / trace.transitions, ones / trace.transitions, trace.transitions)


@dataclass(eq=False)
class _Wave:
    """A net's values (steps, V) from time ``start`` on; old before that, new after the last."""

    start: int
    values: Words


def glitches(
    netlist: Netlist,
    library: Library,
    trace: Trace,
    timing: Timing,
    step: float,
    advance: Callable[[], None] = lambda: None,
) -> Activity:
    """Toggles with inertial delays, glitches included.

    Args:
        netlist, library: the design.
        trace: from :func:`settle`.
        timing: from ``timing.analyse``.
        step: grid of time, in the unit of ``timing``.
        advance: called once per logic level.
    """
    flat = trace.values.transpose(1, 0, 2)
    old = np.ascontiguousarray(flat[:, :-1]).reshape(netlist.nets, -1)
    new = np.ascontiguousarray(flat[:, 1:]).reshape(netlist.nets, -1)
    waves = _sources(netlist, timing, step, new)
    toggles = np.bitwise_count(old ^ new).sum(-1, dtype=np.int64).astype(np.float64)
    rise, fall = (np.maximum(np.rint(d / step), 1).astype(int) for d in (timing.rise, timing.fall))
    compiled = functions(library)
    unread = np.array([len(readers) for readers in netlist.readers])
    for level in netlist.levels:
        for index in level:
            gate = netlist.gates[index]
            aligned, start = _aligned([(waves.get(n), old[n], new[n]) for n in gate.inputs])
            if aligned is not None:
                wave = compiled[gate.cell](*aligned)
                out = _inertial(wave, old[gate.output], int(rise[index]), int(fall[index]))
                begin = start + min(int(rise[index]), int(fall[index]))
                waves[gate.output] = _Wave(begin, out)
                toggles[gate.output] = _toggles(out, old[gate.output])
            for net in gate.inputs:
                unread[net] -= 1
                if unread[net] == 0:
                    waves.pop(net, None)
        advance()
    ones = np.bitwise_count(new).sum(-1, dtype=np.int64) / trace.transitions
    return Activity(toggles / trace.transitions, ones, trace.transitions)


def _sources(netlist: Netlist, timing: Timing, step: float, new: Words) -> dict[int, _Wave]:
    """Waveforms of ports and registers, which change at one moment each."""
    moments = {f.output: d for f, d in zip(netlist.flops, timing.flop_delay, strict=True)}
    for nets in netlist.inputs.values():
        moments |= {net: timing.arrival[net] for net in nets}
    return {
        net: _Wave(round(moment / step), new[net][None])
        for net, moment in moments.items()
        if net not in (ZERO, ONE)
    }


def _aligned(
    inputs: list[tuple[_Wave | None, Words, Words]],
) -> tuple[list[Words] | None, int]:
    """Input waveforms over the union of their times, and its start; None if no input changes."""
    moving = [wave for wave, _, _ in inputs if wave is not None]
    if not moving:
        return None, 0
    start = min(wave.start for wave in moving)
    stop = max(wave.start + len(wave.values) for wave in moving)
    aligned = []
    for wave, old, new in inputs:
        if wave is None:  # a constant
            aligned.append(np.broadcast_to(old, (stop - start, len(old))))
            continue
        full = np.empty((stop - start, len(old)), dtype=np.uint64)
        first = wave.start - start
        last = first + len(wave.values)
        full[:first] = old
        full[first:last] = wave.values
        full[last:] = new
        aligned.append(full)
    return aligned, start


def _inertial(wave: Words, old: Words, rise: int, fall: int) -> Words:
    """Output waveform from ``min(rise, fall)`` steps after the start of ``wave`` to its end."""
    least, most = min(rise, fall), max(rise, fall)
    steps = len(wave) + most - least
    # Row i of g is time start - most + 1 + i; before its start, the function has its old value.
    g = np.empty((most - 1 + steps + least, wave.shape[1]), dtype=np.uint64)
    g[: most - 1] = old
    g[most - 1 : most - 1 + len(wave)] = wave
    g[most - 1 + len(wave) :] = wave[-1]
    up = _windows(g, rise)[most - rise + least - 1 :][:steps]
    stay = ~_windows(~g, fall)[most - fall + least - 1 :][:steps]
    out = np.empty((steps, wave.shape[1]), dtype=np.uint64)
    before = old
    for now, keep, high in zip(out, stay, up, strict=True):
        np.bitwise_and(before, keep, out=now)
        np.bitwise_or(now, high, out=now)
        before = now
    return out


def _windows(g: Words, length: int) -> Words:
    """AND of rows i to i + length - 1, for every i."""
    out, covered = g, 1
    while covered < length:
        by = min(covered, length - covered)
        out = out[:-by] & out[by:]
        covered += by
    return out


def _toggles(out: Words, old: Words) -> int:
    """Number of toggles of a waveform that starts from ``old``."""
    changes = int(np.bitwise_count(out[1:] ^ out[:-1]).sum(dtype=np.int64))
    return changes + int(np.bitwise_count(out[0] ^ old).sum(dtype=np.int64))
