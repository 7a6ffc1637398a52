"""``fgmp hw synth`` and ``fgmp hw energy``, on the model that ships with the package."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from fgmp.app import energy
from fgmp.app.commands import SILENT, quantize_to
from fgmp.app.energy import EnergyResult
from fgmp.app.quickstart import MODEL
from fgmp.errors import InputError
from fgmp.hardware import inference, liberty, silicon, yosys
from fgmp.hardware.cells import embedded
from fgmp.model.source import load_model, load_tokenizer
from fgmp.recipe import PAPER, Recipe

from .cases import Place, Run
from .test_machines import a_silicon


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hw") / "checkpoint"
    text = folder.parent / "text.txt"
    text.write_text(Path(torch.__file__).read_text()[:40_000])
    # The paper's quantizer is a third of the default's gates, which take minutes to map.
    recipe = Recipe(fp4=0.7, samples=4, seq_len=128, **PAPER)  # type: ignore[arg-type]
    quantize_to(str(MODEL), folder, recipe, str(text))
    return folder


KEYS = {
    *("fj_per_op", "unit", "library", "saving_vs_fp8_percent", "saving_zero_delay_percent"),
    *("ppu_percent", "cycles", "ppu_stall_percent", "mix", "lanes", "quantizer", "overhead"),
    *("inference", "assumptions"),
}


def test_energy(checkpoint: Path, run: Run) -> None:
    """All keys, and relations that hold in any library."""
    plot = checkpoint.parent / "energy.svg"
    words = ("hw", "energy", str(checkpoint), "--plot", str(plot), "--json")
    facts = run(*words).json
    assert set(facts) == KEYS
    ops, lanes = facts["fj_per_op"], facts["lanes"]
    assert facts["unit"] == "energy of the FP8 lane"
    assert lanes["fp8"]["inertial"] == pytest.approx(1.0)
    assert ops["fp4xfp4"] < ops["fp4xfp8"] < ops["fp8xfp8"]
    assert lanes["nvfp4"]["area_um2"] < lanes["fp8"]["area_um2"] < lanes["fgmp"]["area_um2"]
    for lane in lanes.values():
        assert lane["zero_delay"] < lane["inertial"]
        assert sum(lane["by_cause"].values()) == pytest.approx(lane["inertial"])
    mixed = sum(facts["mix"][unit] * ops[unit] for unit in facts["mix"])
    assert mixed + ops["totals"] + ops["control"] == pytest.approx(lanes["fgmp"]["inertial"])
    saving = facts["saving_vs_fp8_percent"]
    assert saving == pytest.approx(100 * (1 - lanes["fgmp"]["inertial"]))
    assert 0 < saving < 100 * (1 - lanes["nvfp4"]["inertial"])
    assert set(facts["inference"]) == {"checkpoint", "Llama-2-7B"}
    llama = facts["inference"]["Llama-2-7B"]
    assert llama["prefill"]["ppu_percent"] < 1
    assert llama["prefill"]["ppu_stall_percent"] < 1
    assert "joules" not in llama["prefill"]
    assert any("ratios" in line for line in facts["assumptions"])
    measured = facts["quantizer"]
    assert [measured[key] for key in ("rule", "scales")] == [PAPER["rule"], PAPER["scales"]]
    assert any("difference, max" in line for line in facts["assumptions"])
    drawn = ElementTree.parse(plot)
    bars = [e for e in drawn.iter() if e.tag.endswith("rect") and e.get("height") == "20"]
    assert len(bars) == len(lanes) * 4


def test_synth_prints_every_unit(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two small units; all of them take as long as `energy`."""
    every = silicon.components()
    assert {"lane_mixed", "lane_fp8", "lane_fp4", "fp4xfp4", "fp8xfp8", "quantizer"} <= set(every)
    few = {name: every[name] for name in ("lane_fp4", "fp4xfp4")}
    monkeypatch.setattr(silicon, "components", lambda: few)
    facts = run("hw", "synth", "--json").json
    assert set(facts) == {"units", "library", "area_unit"}
    assert set(facts["units"]) == set(few)
    for unit in facts["units"].values():
        assert {"area_um2", "cells", "depth"} <= set(unit)
    assert facts["units"]["fp4xfp4"]["cells"] < facts["units"]["lane_fp4"]["cells"]
    assert facts["area_unit"] == "inverters"
    shown = run("hw", "synth")
    assert shown.code == 0
    for name, unit in facts["units"].items():
        assert f"{name} {unit['area_um2']:,.0f} {unit['cells']:,} {unit['depth']}" in shown.words


def test_a_model_that_is_not_quantized_is_refused(run: Run) -> None:
    done = run("hw", "energy", MODEL)
    assert done.code == 1 and "fgmp quantize" in done.words


def test_a_library_without_power_is_refused(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "delays.lib"
    path.write_text(liberty.write(embedded()))
    done = run("hw", "synth", "--liberty", path)
    assert done.code == 1
    assert "has no internal_power tables" in done.words and path.name in done.words


def test_without_yosys_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yosys, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fgmp\[hw\]'"):
        energy.energy("absent")


# Without synthesis: what becomes of measured energies.

WORK = [inference.Work("q", "site", 64, 32, {(False, False): 1.0})]


def an_absolute_library() -> Any:
    """The embedded cells, as if their energies were femtojoules."""
    return replace(embedded(), absolute=True)


def test_savings_of_a_ratio_and_of_joules() -> None:
    """Ratios cannot be added to a table's femtojoules: without them only the arithmetic counts."""
    measured = a_silicon()
    ratio = energy.serve(WORK, measured, embedded())
    assert set(ratio) == {"prefill", "decode"}
    for phase in ratio.values():
        assert set(phase.saving_vs_fp8_percent) == {"lanes_and_quantizer"}
        assert phase.joules is None and "joules" not in phase.to_dict()
    absolute = energy.serve(WORK, measured, an_absolute_library())
    for name, phase in absolute.items():
        joules = phase.to_dict()["joules"]
        assert set(joules) == {"fgmp", "fp8", "nvfp4"}
        on_chip = {k: sum(v for c, v in j.items() if c != "dram") for k, j in joules.items()}
        savings = phase.saving_vs_fp8_percent
        assert savings["on_chip"] == pytest.approx(100 * (1 - on_chip["fgmp"] / on_chip["fp8"]))
        totals = {k: sum(j.values()) for k, j in joules.items()}
        assert savings["with_dram"] == pytest.approx(100 * (1 - totals["fgmp"] / totals["fp8"]))
        arithmetic = {k: j["lanes"] + j["totals"] for k, j in joules.items()}
        ours = arithmetic["fgmp"] + joules["fgmp"]["quantizer"]
        assert savings["lanes_and_quantizer"] == pytest.approx(100 * (1 - ours / arithmetic["fp8"]))
        expected = 100 * joules["fgmp"]["quantizer"] / arithmetic["fgmp"]
        assert phase.ppu_percent == pytest.approx(expected)
        assert savings["lanes_and_quantizer"] == pytest.approx(
            ratio[name].saving_vs_fp8_percent["lanes_and_quantizer"]
        )


def test_uniform_machines_read_operands_of_their_format() -> None:
    """Whatever the checkpoint's mix, the FP8 machine multiplies FP8 only."""
    measured, library = a_silicon(), an_absolute_library()
    for mix in ({(False, False): 1.0}, {(True, False): 1.0}):
        work = [inference.Work("q", "site", 64, 32, mix)]
        joules = energy.serve(work, measured, library)["prefill"].joules
        assert joules is not None
        pairs = inference.PREFILL * 64 * 2 * silicon.OPERATIONS
        per_op = measured.machine(measured.fp8).fj_per_op["fp8xfp8"]
        assert joules["fp8"]["lanes"] == pytest.approx(pairs * per_op * 1e-15)


def test_overhead_dilutes_the_saving() -> None:
    """A saving of 25% is 14% beside 25/14 - 1 of the FP8 lane's energy that no format changes."""
    measured = a_silicon()
    result = energy.overhead(measured, embedded())
    assert set(result) == {"saving_percent", "at_least_14_percent_up_to"}
    assert result["saving_percent"][0.0] == 25 and result["saving_percent"][1.0] == 12.5
    assert result["at_least_14_percent_up_to"] == pytest.approx(25 / 14 - 1)
    assert len(result["saving_percent"]) == 11 and max(result["saving_percent"]) == 2.0
    sourced = energy.overhead(measured, an_absolute_library())
    share = sourced["sourced"]
    assert sourced["saving_percent_at_sourced"] == pytest.approx(25 / (1 + share))


def test_the_checkpoint_is_told_from_the_scenario() -> None:
    assert energy.own_name("some/where/wiki5m-70") == "wiki5m-70"
    assert energy.own_name("models/Llama-2-7B") != energy.SCENARIO


def test_assumptions_say_what_was_measured() -> None:
    tokens = torch.zeros(2, 128)
    scenario = inference.independent(0.7, 0.7)
    ratios = energy.assumptions(embedded(), None, tokens, scenario, "difference, max, e4m3")
    assert "operands: 256 tokens of Python docstrings" in ratios
    assert "fp4xfp4 49.0%" in " ".join(ratios) and "fp8xfp8 9.0%" in " ".join(ratios)
    assert "ratios" in ratios[-1]
    assert any("difference, max, e4m3" in sentence for sentence in ratios)
    library = an_absolute_library()
    absolute = energy.assumptions(library, "a/wiki.txt", tokens, scenario, "benefit")
    assert "operands: 256 tokens of wiki.txt" in absolute
    assert absolute[-len(inference.energies()) :] == [str(e) for e in inference.energies().values()]


def test_windows_that_drive_the_netlists(place: Place) -> None:
    """As many whole windows as make 256 tokens; of the Python library if no text is given."""
    model = load_model(place.model)
    for data in (None, place.text):
        tokens = energy.text_windows(place.model, model, data)
        assert tokens.shape == (4, 64) and tokens.dtype == torch.int64


def test_windows_start_as_the_tokenizer_starts_a_text(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``eval``, with a text and without one."""
    model, tokenizer = load_model(place.model), load_tokenizer(place.model)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    bos = tokenizer.bos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    model.resize_token_embeddings(bos + 1)
    monkeypatch.setattr(energy, "load_tokenizer", lambda name: tokenizer)
    for data in (None, place.text):
        assert energy.text_windows(place.model, model, data)[:, 0].tolist() == [bos] * 4


def test_a_token_without_an_embedding_is_refused(place: Place) -> None:
    model = load_model(place.model)
    model.resize_token_embeddings(5)
    for data in (None, place.text):
        with pytest.raises(InputError, match=r"embedding has 5 rows"):
            energy.text_windows(place.model, model, data)


def test_a_text_that_is_missing_is_refused(place: Place) -> None:
    with pytest.raises(InputError, match="no such file"):
        energy.energy(place.checkpoint, data=f"{place.text}.no", reporter=SILENT)


def a_result() -> EnergyResult:
    """A result of made-up figures."""
    return EnergyResult(
        fj_per_op={"fp4xfp4": 0.5, "fp8xfp8": 1.0},
        unit="fJ/op",
        library="cells",
        saving_vs_fp8_percent=25.04,
        saving_zero_delay_percent=20.0,
        ppu_percent=0.512,
        cycles=1.0,
        ppu_stall_percent=0.1,
        mix={"fp4xfp4": 1.0},
        lanes={lane.name: lane.figures(1.0) for lane in a_silicon().lanes},
        quantizer=energy.QuantizerFigures("difference", "max", "e4m3", 1.0, 2, 3, 4.0, 5.0),
        overhead=energy.overhead(a_silicon(), embedded()),
        inference={"tiny": energy.serve(WORK, a_silicon(), an_absolute_library())},
        assumptions=["one", "two"],
    )


def test_lines_name_every_saving() -> None:
    """Labels of each model and phase, and figures that round as printed."""
    result = a_result()
    lines = result.lines()
    assert lines["parts, fJ/op"] == "fp4xfp4 0.5, fp8xfp8 1"
    assert lines["saving against FP8"] == "25.0% of a lane, 20.0% without glitches"
    assert lines["quantizer"] == "0.51% of dot-product energy, 0.10% of cycles"
    assert lines["assumptions"] == "one; two"
    for name, phase in result.inference["tiny"].items():
        saving = phase.saving_vs_fp8_percent["with_dram"]
        assert f"with dram {saving:.1f}%" in lines[f"saving, tiny, {name}"]
    facts = json.loads(json.dumps(result.to_dict()))
    assert set(facts) == KEYS
    assert facts["lanes"]["fp8"] == asdict(result.lanes["fp8"])
    assert facts["quantizer"]["rule"] == "difference" and facts["quantizer"]["depth"] == 3
