"""What ``fgmp hw`` does with a model: its operands through netlists, its layers into joules.

The model runs in PyTorch on some text; the operands of its linears, as codes, then drive the lanes'
netlists. ``hardware`` knows nothing of models.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgmp.data import evaluation_windows, tokenize, windows
from fgmp.demo.text import docstrings, standard_library
from fgmp.errors import InputError
from fgmp.formats import activation
from fgmp.hardware import cells, inference, liberty, silicon, stimulus, synthesis
from fgmp.hardware.cells import Library
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.inference import Machine, Work
from fgmp.hardware.power import CycleEnergy
from fgmp.hardware.silicon import Measurement
from fgmp.hardware.stimulus import Layer, SiteInput
from fgmp.model.linear import mixed_linears
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.pack.planes import unpack
from fgmp.workflow import Reporter

LANE = Datapath(cuts=("sums", "scaled"))
"""The recommended lane: the least energy of the design points in docs/energy.md."""

BASELINES = tuple(
    Datapath(kind="fp8", cuts=cuts) for cuts in (("sums",), ("significands", "sums"))
)
"""FP8-only lanes, of which the one that takes least energy is what FGMP is compared with."""

TOKENS = 256
"""Tokens whose activations drive the netlists."""

_CYCLES = 96
_WARM_UP = 32


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


def operands(model: nn.Module, tokens: torch.Tensor, fp8: nn.Module | None = None) -> Operands:
    """Run a packed model and keep what its linears multiply.

    Args:
        model: from ``load_model`` of a checkpoint.
        tokens: windows, int64 (B, L).
        fp8: the same model all in FP8, for what an FP8 lane would be given; without it, FP8 codes
            of FP4 weight blocks are made from their decoded values.
    """
    linears = mixed_linears(model)
    if not linears:
        raise InputError("energy needs a quantized model; `fgmp quantize` makes one")
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(_keep(inputs, name)) for name, linear in linears.items()
    ]
    with torch.no_grad():
        model.eval()(tokens)
    for handle in handles:
        handle.remove()
    wide = mixed_linears(fp8) if fp8 is not None else {}
    layers, work, sites = [], [], {}
    for name, linear in linears.items():
        record = linear.input_site.record
        codes = activation.quantize(inputs[name], record)
        weight = unpack(linear.packed)
        weight_fp8 = unpack(wide[name].packed).codes if wide else stimulus.requantized_fp8(weight)
        layer = Layer(name, stimulus.activation_blocks(codes), weight, codes.fp8, weight_fp8)
        site = str(id(linear.input_site))
        sites[site] = SiteInput(inputs[name], record)
        layers.append(layer)
        pairs = layer.mix()
        mix = {flags: count / layer.pairs for flags, count in pairs.items()}
        work.append(Work(name, site, linear.out_features, linear.in_features, mix))
    return Operands(layers, list(sites.values()), work)


def _keep(inputs: dict[str, torch.Tensor], name: str) -> Any:
    def hook(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        inputs[name] = args[0].reshape(-1, args[0].shape[-1])

    return hook


def library_of(path: Path | None, reporter: Reporter) -> Library:
    """The library in a file, or the embedded one."""
    synthesis.require_yosys()
    if not synthesis.is_warm():
        reporter.line("Yosys compiles itself before its first run on this machine: about a minute")
    if path is None:
        return cells.embedded()
    reporter.line(f"reading {path}")
    return liberty.read(path)


def synthesize_units(path: Path | None, reporter: Reporter) -> dict[str, Any]:
    """Area, cells and depth of every unit: what ``fgmp hw synth`` prints."""
    library = library_of(path, reporter)
    made = silicon.components()
    units = {}
    with reporter.stages("synthesizing", len(made)) as advance:
        for name, create in made.items():
            units[name] = silicon.implement(create(), library).summary()
            advance()
    return {"units": units, "library": library.name, "area_unit": library.area_unit}


def measure_lane(
    datapath: Datapath, found: Operands, library: Library, reporter: Reporter
) -> tuple[silicon.Implementation, Measurement]:
    """Synthesize a lane and run the model's operands through it."""
    with reporter.stages(f"{datapath.kind} lane, {'+'.join(datapath.cuts)}", 2) as advance:
        implementation = silicon.implement(datapath.create(), library)
        advance()
        ports = stimulus.stimulate(found.layers, datapath, _CYCLES)
        measured = silicon.measure(implementation, ports, _WARM_UP)
        advance()
    return implementation, measured


def measure_quantizer(
    found: Operands, library: Library, reporter: Reporter
) -> tuple[silicon.Implementation, Measurement]:
    """The same for the quantizer, on the model's activations."""
    from fgmp.hardware.rtl.ppu import LATENCY, Quantizer

    with reporter.stages("quantizer", 2) as advance:
        implementation = silicon.implement(Quantizer(), library)
        advance()
        ports = stimulus.stimulate_quantizer(found.sites, _CYCLES)
        measured = silicon.measure(implementation, ports, 2 * LATENCY)
        advance()
    return implementation, measured


def energy(
    name: str,
    path: Path | None = None,
    data: str | None = None,
    original: str | None = None,
    reporter: Reporter | None = None,
) -> dict[str, Any]:
    """What ``fgmp hw energy`` prints.

    Args:
        name: a checkpoint.
        path: liberty file; None takes the embedded library, whose results are ratios.
        data: text that the activations come from; default: docstrings of the Python library.
        original: the model that was quantized, for the exact FP8 codes of its weights.
        reporter: where progress goes.
    """
    from fgmp.pipeline import uniform

    reporter = reporter or Reporter()
    library = library_of(path, reporter)
    model = load_model(name)
    length = min(TOKENS, context_length(model))
    tokenizer = load_tokenizer(name)
    if data is None:
        documents = docstrings(standard_library())
        tokens = windows(tokenize(list(documents), tokenizer), length)[: TOKENS // length]
    else:
        tokens = evaluation_windows(data, tokenizer, length)[: TOKENS // length]
    fp8 = uniform(load_model(original), model, "fp8", 0.0) if original else None
    found = operands(model, tokens, fp8)

    lane, mixed = measure_lane(LANE, found, library, reporter)
    baselines = [(b, *measure_lane(b, found, library, reporter)) for b in BASELINES]
    baseline = min(baselines, key=lambda b: b[2].inertial.total)
    ppu, quantizer = measure_quantizer(found, library, reporter)
    shares = inference.unit_shares(found.mix)
    per_op = silicon.per_operation(mixed.inertial, LANE, shares)
    fp8_op = silicon.per_operation(baseline[2].inertial, baseline[0], {"fp8xfp8": 1.0})
    machines = {
        "fgmp": _machine("fgmp", "mixed", per_op, quantizer.inertial),
        "fp8": _machine("fp8", "fp8", fp8_op, None),
    }
    unit = 1.0 if library.absolute else _total(baseline[2].inertial)
    busy, waiting = inference.cycles(found.work, machines["fgmp"], length)
    saving = _saving(_total(mixed.inertial), _total(baseline[2].inertial))
    overhead = inference.buffer_overhead(machines["fgmp"], _total(baseline[2].inertial))
    facts: dict[str, Any] = {
        "fj_per_op": {
            **{k: v / unit for k, v in per_op.items()},
            "lane": _total(mixed.inertial) / unit,
            "lane_zero_delay": _total(mixed.zero_delay) / unit,
            "fp8_lane": _total(baseline[2].inertial) / unit,
            "fp8_lane_zero_delay": _total(baseline[2].zero_delay) / unit,
        },
        "unit": "fJ/op" if library.absolute else "of the FP8 lane's energy",
        "saving_vs_fp8_percent": saving,
        "saving_zero_delay_percent": _saving(
            _total(mixed.zero_delay), _total(baseline[2].zero_delay)
        ),
        "mix": shares,
        "ppu_percent": {},
        "cycles": busy + waiting,
        "ppu_stall_percent": 100 * waiting / (busy + waiting),
        "lane": {"cuts": list(LANE.cuts), **lane.summary()},
        "fp8_lane": {"cuts": list(baseline[0].cuts), **baseline[1].summary()},
        "quantizer": {**ppu.summary(), "fj_per_block": quantizer.inertial.total / unit},
        "by_cause_fj_per_op": {
            "fgmp": _causes(mixed.inertial, unit),
            "fp8": _causes(baseline[2].inertial, unit),
        },
    }
    return facts


def _total(energy: CycleEnergy) -> float:
    return energy.total / silicon.OPERATIONS


def _causes(energy: CycleEnergy, unit: float) -> dict[str, float]:
    return {k: v / silicon.OPERATIONS / unit for k, v in energy.by_cause().items()}


def _saving(ours: float, theirs: float) -> float:
    return 100 * (1 - ours / theirs)


def _machine(
    name: str, kind: str, per_op: dict[str, float], quantizer: CycleEnergy | None
) -> Machine:
    return Machine(
        name=name,
        fj_per_op=per_op,
        quantizer_fj=quantizer.total if quantizer else 0.0,
        bits=inference.bits_of(kind),
        lanes=16,
        rows=1,
        reuse=LANE.reuse,
    )
