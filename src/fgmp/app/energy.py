"""``fgmp hw energy`` and ``fgmp hw synth``: area, and energy of serving a model.

``app.machines`` measures lanes and quantizers on the model's operands; here their energies become
joules of a prefill and a decode, beside machines of FP8 and FP4 lanes.
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fgmp.app.commands import SILENT, Reporter
from fgmp.app.machines import (
    LaneFigures,
    Measured,
    Silicon,
    library_of,
    measure_machines,
    operands,
)
from fgmp.app.records import Lines
from fgmp.data import evaluation_windows
from fgmp.demo.text import docstrings, standard_library
from fgmp.hardware import inference, silicon
from fgmp.hardware.cells import Library
from fgmp.hardware.inference import LANES, PREFILL, Work
from fgmp.hardware.silicon import MIXED
from fgmp.model.source import context_length, load_model, load_tokenizer
from fgmp.model.store import config_of
from fgmp.quantization.pipeline import require_valid_token_ids

TOKENS = 256
"""Tokens whose activations drive the netlists."""

PHASES = {"prefill": (PREFILL, 1), "decode": (1, 256)}
"""Tokens that are processed together, and how often."""

SCENARIO = "Llama-2-7B"
"""A model of which only the shapes are used."""

PAPER_SAVING = 14.0
"""Percent less inference energy than all FP8 at 70% FP4 (arXiv 2504.14152)."""

_DOCUMENTS = 200
"""Docstrings that the activations come from, unless a text is given."""


@dataclass(frozen=True)
class Synthesis:
    """Area, cells and depth of every unit."""

    units: dict[str, dict[str, Any]]
    library: str
    area_unit: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


def synthesize_units(path: Path | None, reporter: Reporter) -> Synthesis:
    """Synthesize every unit of the accelerator with a cell library."""
    library = library_of(path, reporter)
    components = silicon.components()
    units = {}
    with reporter.progress("synthesizing", len(components)) as advance:
        for name, implementation in silicon.implement_all(components, library):
            units[name] = implementation.summary()
            advance()
    return Synthesis({n: units[n] for n in components}, library.name, library.area_unit)


@dataclass(frozen=True)
class Phase:
    """A prefill or a decode on every machine.

    Attributes:
        tokens, passes: tokens that are processed together, and how often.
        cycles: cycles of the mixed accelerator.
        ppu_stall_percent: cycles in which its lanes wait for the quantizer.
        ppu_percent: quantizer energy over that of lanes and totals.
        saving_vs_fp8_percent: by boundary: lanes and quantizer, on chip, with DRAM.
        joules: by machine and component; only with a library in absolute units.
    """

    tokens: int
    passes: int
    cycles: float
    ppu_stall_percent: float
    ppu_percent: float
    saving_vs_fp8_percent: dict[str, float]
    joules: dict[str, dict[str, float]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        values = asdict(self)
        if self.joules is None:
            del values["joules"]
        return values


@dataclass(frozen=True)
class QuantizerFigures:
    """The quantizer: its configuration, netlist and energy per block."""

    rule: str
    scales: str
    sensitivities: str
    area_um2: float
    cells: int
    depth: int
    longest_path_ps: float
    fj_per_block: float


@dataclass(frozen=True)
class EnergyResult:
    """What ``fgmp hw energy`` computed; energies are in ``unit``.

    Attributes:
        fj_per_op: energy per operation of the mixed lane, by unit.
        unit, library: unit of energies, and the cell library.
        saving_vs_fp8_percent, saving_zero_delay_percent: saving of the lane with and without
            glitches.
        ppu_percent, cycles, ppu_stall_percent: those of the prefill; see :class:`Phase`.
        mix: fractions of the pairs of formats.
        lanes, quantizer: measured components.
        overhead: the saving with energy that does not depend on the format; see :func:`overhead`.
        inference: phases by model.
        assumptions: sentences.
    """

    fj_per_op: dict[str, float]
    unit: str
    library: str
    saving_vs_fp8_percent: float
    saving_zero_delay_percent: float
    ppu_percent: float
    cycles: float
    ppu_stall_percent: float
    mix: dict[str, float]
    lanes: dict[str, LaneFigures]
    quantizer: QuantizerFigures
    overhead: dict[str, Any]
    inference: dict[str, dict[str, Phase]]
    assumptions: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        served = {
            model: {name: phase.to_dict() for name, phase in phases.items()}
            for model, phases in self.inference.items()
        }
        return {**asdict(self), "inference": served}

    def lines(self) -> Lines:
        """Labelled lines, beside the table of lanes."""
        parts = ", ".join(f"{name} {value:.3g}" for name, value in self.fj_per_op.items())
        savings = {
            f"saving, {model}, {name}": ", ".join(
                f"{boundary.replace('_', ' ')} {value:.1f}%"
                for boundary, value in phase.saving_vs_fp8_percent.items()
            )
            for model, phases in self.inference.items()
            for name, phase in phases.items()
        }
        return {
            f"parts, {self.unit}": parts,
            "saving against FP8": f"{self.saving_vs_fp8_percent:.1f}% of a lane, "
            f"{self.saving_zero_delay_percent:.1f}% without glitches",
            "quantizer": f"{self.ppu_percent:.2f}% of dot-product energy, "
            f"{self.ppu_stall_percent:.2f}% of cycles",
            **savings,
            "assumptions": "; ".join(self.assumptions),
        }


def energy(
    name: str,
    path: Path | None = None,
    data: str | None = None,
    reporter: Reporter = SILENT,
) -> EnergyResult:
    """Measure the accelerator on a checkpoint's operands and add up what serving it takes.

    Args:
        name: a checkpoint.
        path: liberty file; None takes the embedded library, whose results are ratios.
        data: text for the activations; default: docstrings of the Python library.
        reporter: where progress goes.
    """
    library = library_of(path, reporter)
    model = load_model(name)
    tokens = text_windows(name, model, data)
    collected = operands(model, tokens)
    measured = measure_machines(collected, library, reporter)
    fractions = config_of(model).result
    scenario = inference.independent(fractions["fp4_activations"], fractions["fp4_weights"])
    phases = serve(collected.work, measured, library)
    prefill = phases["prefill"]
    unit = 1.0 if library.absolute else measured.fp8.per_op
    return EnergyResult(
        fj_per_op={k: v / unit for k, v in measured.mixed.parts.items()},
        unit="fJ/op" if library.absolute else "energy of the FP8 lane",
        library=library.name,
        saving_vs_fp8_percent=measured.mixed.saving(measured.fp8),
        saving_zero_delay_percent=measured.mixed.saving_zero_delay(measured.fp8),
        ppu_percent=prefill.ppu_percent,
        cycles=prefill.cycles,
        ppu_stall_percent=prefill.ppu_stall_percent,
        mix=inference.unit_shares(collected.mix),
        lanes={lane.name: lane.figures(unit) for lane in measured.lanes},
        quantizer=_quantizer_figures(measured.quantizer, unit),
        overhead=overhead(measured, library),
        inference={
            own_name(name): phases,
            SCENARIO: serve(inference.llama_2_7b(scenario), measured, library),
        },
        assumptions=assumptions(library, data, tokens, scenario, measured.quantizer.name),
    )


def own_name(name: str) -> str:
    """A checkpoint's name in results, which must differ from :data:`SCENARIO`."""
    last = Path(name).name
    return f"{last}, the checkpoint" if last == SCENARIO else last


def _quantizer_figures(quantizer: Measured, unit: float) -> QuantizerFigures:
    assert quantizer.config is not None
    return QuantizerFigures(
        **asdict(quantizer.config),
        **quantizer.implementation.summary(),
        fj_per_block=quantizer.energies.inertial.total / unit,
    )


def serve(work: list[Work], measured: Silicon, library: Library) -> dict[str, Phase]:
    """A model's prefill and decode on each machine."""
    return {
        name: _phase(work, measured, library, tokens, passes)
        for name, (tokens, passes) in PHASES.items()
    }


def _phase(
    work: list[Work], measured: Silicon, library: Library, tokens: int, passes: int
) -> Phase:
    joules = _joules(work, measured, tokens, passes)
    busy, waiting = inference.cycles(work, measured.machine(measured.mixed), tokens, passes)
    ours, theirs = joules["fgmp"], joules["fp8"]
    arithmetic = [j["lanes"] + j["totals"] for j in (ours, theirs)]
    savings = {"lanes_and_quantizer": _saving(arithmetic[0] + ours["quantizer"], arithmetic[1])}
    if library.absolute:  # a ratio cannot be added to a table's femtojoules
        on_chip = [sum(v for k, v in j.items() if k != "dram") for j in (ours, theirs)]
        savings["on_chip"] = _saving(*on_chip)
        savings["with_dram"] = _saving(sum(ours.values()), sum(theirs.values()))
    return Phase(
        tokens=tokens,
        passes=passes,
        cycles=busy + waiting,
        ppu_stall_percent=100 * waiting / (busy + waiting),
        ppu_percent=100 * ours["quantizer"] / arithmetic[0],
        saving_vs_fp8_percent=savings,
        joules=joules if library.absolute else None,
    )


def _joules(
    work: list[Work], measured: Silicon, tokens: int, passes: int
) -> dict[str, dict[str, float]]:
    """Joules by machine and component; uniform machines read operands of their one format."""
    uniform: Mapping[str, tuple[bool, bool] | None]
    uniform = {"fgmp": None, "fp8": (True, True), "nvfp4": (False, False)}
    joules = {}
    for lane in measured.lanes:
        flags = uniform[lane.name]
        own = work if flags is None else [replace(w, mix={flags: 1.0}) for w in work]
        joules[lane.name] = inference.serve(own, measured.machine(lane), tokens, passes)
    return joules


def overhead(measured: Silicon, library: Library) -> dict[str, Any]:
    """Saving if 0 to 2 times an FP8 dot product's energy does not depend on the format."""
    saving = measured.mixed.saving(measured.fp8)
    curve = [(i / 5, inference.diluted(saving, i / 5)) for i in range(11)]
    result: dict[str, Any] = {
        "saving_percent": dict(curve),
        "at_least_14_percent_up_to": max(0.0, saving / PAPER_SAVING - 1),
    }
    if library.absolute:
        sourced = inference.buffer_overhead(measured.machine(measured.fp8), measured.fp8.per_op)
        result["sourced"] = sourced
        result["saving_percent_at_sourced"] = inference.diluted(saving, sourced)
    return result


def assumptions(
    library: Library,
    data: str | None,
    tokens: torch.Tensor,
    scenario: dict[tuple[bool, bool], float],
    quantizer: str,
) -> list[str]:
    """Assumptions behind the figures, as sentences."""
    table = inference.energies()
    stated = [
        f"cells: {library.name}, {library.voltage:g} V; no wires, an ideal clock net",
        f"clock period {silicon.PERIOD_NS:g} ns, one pair of blocks a lane a cycle",
        f"operands: {tokens.numel()} tokens of {Path(data).name if data else 'Python docstrings'}",
        "FP8 codes of weights that the checkpoint holds in FP4 are sampled from the values that "
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
        "Llama-2-7B: its shapes, every linear with independent fractions of FP4 blocks, "
        + ", ".join(
            f"{unit} {share:.1%}" for unit, share in inference.unit_shares(scenario).items()
        ),
    ]
    if library.absolute:
        return stated + [str(entry) for entry in table.values()]
    return [*stated, "the embedded library knows no femtojoules: all energies are ratios"]


def text_windows(name: str, model: nn.Module, data: str | None) -> torch.Tensor:
    """Windows that drive the netlists, int64 (B, L), as ``eval`` cuts them.

    Without ``data`` the text is the Python library's.

    Raises:
        InputError: the text cannot be read, or has a token without an embedding.
    """
    length = min(TOKENS, context_length(model))
    tokenizer = load_tokenizer(name)
    documents = None
    if data is None:
        documents = list(itertools.islice(docstrings(standard_library()), _DOCUMENTS))
    text = data or "docstrings"
    tokens = evaluation_windows(text, tokenizer, length, documents)[: TOKENS // length]
    require_valid_token_ids(f"text {text}", tokens, model)
    return tokens


def _saving(ours: float, theirs: float) -> float:
    return 100 * (1 - ours / theirs)
