"""Registers between the steps of a calculation.

A calculation is written step by step as one formula; :meth:`Pipeline.next` begins the next step.
:meth:`Pipeline.carry` carries a value to later steps, by one register per step. A register loads
only when its input is valid.
"""

from collections.abc import Sequence

from amaranth.hdl import Const, Module, Signal, Value


class Pipeline:
    """Cuts a calculation into cycles.

    Args:
        m: the module that holds the registers.
        valid: the calculation's inputs are valid in this cycle.
        advance: the pipeline moves; while it is 0 everything holds.
    """

    def __init__(self, m: Module, valid: Value, advance: Value | None = None) -> None:
        self._m = m
        self._valid = [valid]
        self._advance = Const(1) if advance is None else advance

    @property
    def step(self) -> int:
        """Number of completed steps: the latency so far, in cycles."""
        return len(self._valid) - 1

    @property
    def valid(self) -> Value:
        """Whether the values of the present step are valid."""
        return self._valid[-1]

    def next(self) -> None:
        """Begin the next step, behind a register."""
        passed = Signal(name=f"valid_{len(self._valid)}")
        with self._m.If(self._advance):
            self._m.d.sync += passed.eq(self.valid)
        self._valid.append(passed)

    def carry(self, values: Sequence[Value], name: str) -> "Carried":
        """Make values of the present step readable in later ones."""
        return Carried(self, values, name)

    def register(self, step: int, values: Sequence[Value], name: str) -> list[Signal]:
        """Register ``values`` of ``step``: the same values one step later."""
        held = [Signal(v.shape(), name=f"{name}_{step + 1}", reset_less=True) for v in values]
        with self._m.If(self._advance & self._valid[step]):
            self._m.d.sync += [h.eq(v) for h, v in zip(held, values, strict=True)]
        return held


class Carried:
    """Values that move with the calculation."""

    def __init__(self, pipeline: Pipeline, values: Sequence[Value], name: str) -> None:
        self._pipeline, self._values, self._name = pipeline, list(values), name
        self._step = pipeline.step

    @property
    def now(self) -> list[Value]:
        """The values in the present step; must be read in the order of steps."""
        while self._step < self._pipeline.step:
            self._values = list(self._pipeline.register(self._step, self._values, self._name))
            self._step += 1
        return self._values
