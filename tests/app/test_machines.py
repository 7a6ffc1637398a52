"""Operands of a model's linears, and machines made of measured lanes and quantizers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model

import fgmp
from fgmp.app import machines
from fgmp.app.commands import SILENT, Reporter
from fgmp.app.machines import Measured, Silicon, Subject
from fgmp.errors import InputError
from fgmp.formats import activation
from fgmp.formats.linear import exact_linear
from fgmp.formats.rules import PAPER_QUANTIZER, QuantizerConfig
from fgmp.hardware import silicon, yosys
from fgmp.hardware.cells import embedded
from fgmp.hardware.datapath import Datapath
from fgmp.hardware.power import CAUSES
from fgmp.hardware.rtl.ppu import latency
from fgmp.hardware.stimulus import SiteInput
from fgmp.model.linear import mixed_linears
from fgmp.model.source import load_model
from fgmp.pack.planes import unpack_units
from fgmp.recipe import PAPER, Recipe

from .cases import Place


def test_operands_are_what_the_linears_multiply(place: Place) -> None:
    """Their codes, multiplied exactly, give the linear's output."""
    model = load_model(place.checkpoint)
    tokens = torch.randint(5, 200, (1, 32), generator=torch.Generator().manual_seed(0))
    collected = machines.operands(model, tokens)
    linears = mixed_linears(model)
    assert [layer.name for layer in collected.layers] == list(linears)
    assert sum(collected.mix.values()) == pytest.approx(1)
    sites = {id(linear.input_site) for linear in linears.values()}
    assert len(collected.sites) == len(sites) == len({work.site for work in collected.work})
    name, linear = next(iter(linears.items()))
    seen: dict[str, torch.Tensor] = {}
    linear.register_forward_hook(lambda module, args, output: seen.update(y=output))
    with torch.no_grad():
        model(tokens)
    record = linear.input_site.record
    codes = activation.quantize(collected.sites[0].x, record)
    layer = collected.layers[0]
    assert torch.equal(layer.activation.is_fp8, codes.is_fp8)
    assert (layer.name, layer.activation.is_fp8.shape[0]) == (name, 32)
    units = codes.units(linear.in_features)
    y = exact_linear(units, unpack_units(linear.packed), record.t, linear.packed.t.item())
    assert torch.allclose(y, seen["y"][0].float(), rtol=1e-2, atol=1e-3)


def test_operands_leave_the_model_alone(place: Place) -> None:
    model = load_model(place.checkpoint)
    tokens = torch.randint(5, 200, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(tokens).logits
        machines.operands(model, tokens)
        assert torch.equal(model(tokens).logits, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_is_not_quantized_has_no_operands(place: Place) -> None:
    with pytest.raises(InputError, match="energy needs a quantized model; `fgmp quantize`"):
        machines.operands(load_model(place.model), torch.zeros(1, 4, dtype=torch.int64))


def test_experts_count_by_the_tokens_they_see(tokens: torch.Tensor) -> None:
    model = make_model("mixtral")
    fgmp.quantize(model, tokens[:2], Recipe(**PAPER))
    collected = machines.operands(model, tokens[:1, :2])
    experts = [work for work in collected.work if ".experts." in work.name]
    # Two tokens take two experts each, in each of two layers; those that none came to are left out.
    by_layer = {i: [w for w in experts if f"layers.{i}." in w.name] for i in (0, 1)}
    for works in by_layer.values():
        sites = {w.site: w.routed for w in works if "down_proj" in w.name}
        assert sum(sites.values()) == 2
    assert all(w.routed == 1 for w in collected.work if ".experts." not in w.name)


def a_site(rule: str = "difference", scales: str = "max", codes: int = 0x39) -> SiteInput:
    sensitivity = torch.full((32,), codes, dtype=torch.uint8)
    return SiteInput(torch.zeros(1, 32), activation.Site(1.0, sensitivity, 1.0, 0, rule, scales))


def test_the_quantizer_is_that_of_all_sites() -> None:
    """Its sensitivities are powers of two only where those of every site are."""
    subject = machines.quantizer([a_site(), a_site(codes=0x38)])
    assert subject.config == PAPER_QUANTIZER and subject.name == "difference, max, e4m3"
    assert subject.warm_up == 2 * latency(PAPER_QUANTIZER)
    powers = machines.quantizer([a_site("benefit", "search", 0x38), a_site("benefit", "search", 8)])
    assert powers.config == QuantizerConfig("benefit", "search", "powers")


def test_sites_that_no_quantizer_serves() -> None:
    with pytest.raises(InputError, match=r"got benefit, search and difference, max$"):
        machines.quantizer([a_site(), a_site("benefit", "search")])
    with pytest.raises(InputError, match=r"for the rules .*, not 'random'"):
        machines.quantizer([a_site("random")])


def a_measured(name: str, fj: float, datapath: Datapath, config: Any = None) -> Measured:
    """A component of which every operation takes ``fj``, or twice that with glitches.

    Every unit computes as many pairs of blocks as every other.
    """
    cycle = fj * silicon.OPERATIONS
    computed = [pair for unit in datapath.units for pair in datapath.computes(unit)]
    share = 1 / len(computed)
    units = {u.name: len(datapath.computes(u)) * share * cycle for u in datapath.units}
    inertial = SimpleNamespace(
        total=2 * cycle,
        by_unit=lambda: {"totals": cycle / 2, "": cycle / 2, **units},
        by_cause=lambda: dict.fromkeys(CAUSES, 2 * cycle / len(CAUSES)),
    )
    figures = {"area_um2": 9.0, "cells": 8, "depth": 7, "longest_path_ps": 6.0}
    implementation: Any = SimpleNamespace(summary=lambda: figures)
    energies: Any = SimpleNamespace(zero_delay=SimpleNamespace(total=cycle), inertial=inertial)
    shares = dict.fromkeys(computed, share)
    return Measured(name, implementation, energies, datapath, shares, config)


def a_silicon() -> Silicon:
    return Silicon(
        mixed=a_measured("fgmp", 3.0, silicon.MIXED),
        fp8=a_measured("fp8", 4.0, silicon.FP8),
        fp4=a_measured("nvfp4", 1.0, silicon.FP4),
        quantizer=a_measured("difference, max, e4m3", 100.0, silicon.MIXED, PAPER_QUANTIZER),
    )


def test_figures_are_per_operation_in_the_unit() -> None:
    lane = a_measured("fp8", 4.0, silicon.FP8)
    figures = lane.figures(unit=8.0)
    assert (figures.inertial, figures.zero_delay) == (1.0, 0.5)
    assert figures.by_cause == dict.fromkeys(CAUSES, 0.25)
    assert (figures.area_um2, figures.cells, figures.depth) == (9.0, 8, 7)
    assert figures.cuts == list(silicon.FP8.cuts)


def test_savings_are_of_the_others_energy() -> None:
    three, four = (a_measured("lane", fj, silicon.FP8) for fj in (3.0, 4.0))
    assert three.saving(four) == three.saving_zero_delay(four) == 25
    assert four.saving(three) == pytest.approx(-100 / 3)


def test_only_the_mixed_machine_pays_for_the_quantizer() -> None:
    """Uniform machines quantize with another unit, which was not measured."""
    measured = a_silicon()
    mixed, fp8, fp4 = (measured.machine(lane) for lane in measured.lanes)
    assert mixed.quantizer_fj == measured.quantizer.energies.inertial.total > 0
    assert fp8.quantizer_fj == fp4.quantizer_fj == 0
    assert {m.latency for m in (mixed, fp8, fp4)} == {latency(PAPER_QUANTIZER)}
    assert mixed.bits > fp8.bits == fp4.bits  # a flag per block


def test_results_come_in_the_order_of_subjects(monkeypatch: pytest.MonkeyPatch) -> None:
    """However synthesis, which runs side by side, ends."""
    energies = {"a": 3.0, "b": 1.0, "c": 2.0}
    names = list(energies)

    def implement_all(components: Any, library: Any) -> Iterator[Any]:
        yield from reversed([(index, names[int(index)]) for index in components])

    def measure(name: Any, stimulus: Any, warm_up: int) -> Any:
        return a_measured(name, energies[name], silicon.MIXED).energies

    monkeypatch.setattr(silicon, "implement_all", implement_all)
    monkeypatch.setattr(silicon, "measure", measure)
    stages: list[list[Any]] = []

    @contextmanager
    def progress(title: str, steps: int) -> Iterator[Callable[[], None]]:
        stages.append([steps, 0])

        def advance() -> None:
            stages[-1][1] += 1

        yield advance

    subjects = [machines.Subject(name, lambda: None, dict, 1) for name in names]
    measured = machines.measure(subjects, embedded(), Reporter(progress=progress))
    assert [m.name for m in measured] == names
    assert [m.per_op for m in measured] == [6.0, 2.0, 4.0]
    assert stages == [[6, 6]]


@pytest.mark.parametrize("best", [0, 1])
def test_the_fp8_baseline_is_the_better_one(best: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two takes less energy depends on the library."""

    def measure(subjects: list[Subject], *_: Any) -> list[Measured]:
        """The quantizer first, since it is the largest; the baseline of this index takes less."""
        assert [s.name for s in subjects] == [str(PAPER_QUANTIZER), "fgmp", "nvfp4", "fp8", "fp8"]
        energies = [9.0, 3.0, 1.0, 4.0, 4.0]
        energies[3 + best] = 3.5
        return [
            a_measured(s.name, fj, s.datapath, s.config)
            for s, fj in zip(subjects, energies, strict=True)
        ]

    monkeypatch.setattr(machines, "measure", measure)
    monkeypatch.setattr(machines.Operands, "mix", {(True, True): 1.0})
    chosen = machines.measure_machines(machines.Operands([], [a_site()], []), embedded(), SILENT)
    assert chosen.fp8.datapath == machines.BASELINES[best] and chosen.fp8.per_op == 7.0
    assert [lane.name for lane in chosen.lanes] == ["fgmp", "fp8", "nvfp4"]
    assert chosen.quantizer.config == PAPER_QUANTIZER


def test_a_library_is_read_or_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Yosys compiles itself first, and that is said."""
    messages: list[str] = []
    monkeypatch.setattr(yosys, "is_warm", lambda: False)
    monkeypatch.setattr(yosys, "warm_up", lambda progress: messages.append("warm"))
    reporter = Reporter(message=messages.append)
    assert machines.library_of(None, reporter).name == embedded().name
    assert messages[1] == "warm" and "compiles itself" in messages[0]
    monkeypatch.setattr(yosys, "is_warm", lambda: True)
    with pytest.raises(InputError, match=r"absent\.lib"):
        machines.library_of(tmp_path / "absent.lib", reporter)
    assert messages[2:] == [f"reading {tmp_path / 'absent.lib'}"]
