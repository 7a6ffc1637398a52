"""`fgmp hw synth` and `fgmp hw energy`, on the model that ships with the package."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from conftest import make_model

import fgmp
from fgmp.app import energy as accelerator
from fgmp.app.cli import main
from fgmp.app.quickstart import MODEL
from fgmp.errors import InputError
from fgmp.formats import activation
from fgmp.formats.linear import exact_linear
from fgmp.model.linear import mixed_linears
from fgmp.model.source import load_model
from fgmp.pack.planes import unpack_units
from fgmp.recipe import PAPER, Recipe
from fgmp.app.commands import quantize_to


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hw") / "checkpoint"
    text = folder.parent / "text.txt"
    text.write_text(Path(torch.__file__).read_text()[:40_000])
    # The paper's quantizer is a third of the default's gates, which take minutes to map.
    recipe = Recipe(fp4=0.7, samples=4, seq_len=128, **PAPER)  # type: ignore[arg-type]
    quantize_to(str(MODEL), folder, recipe, str(text))
    return folder


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setattr("sys.argv", ["fgmp", *words])
    with pytest.raises(SystemExit) as exit_:
        main()
    captured = capsys.readouterr()
    return captured.out if exit_.value.code == 0 else " ".join(captured.err.split())


def test_operands_are_what_the_linears_multiply(checkpoint: Path) -> None:
    """Their codes, multiplied exactly, give the linear's output."""
    model = load_model(str(checkpoint))
    tokens = torch.randint(5, 200, (1, 32), generator=torch.Generator().manual_seed(0))
    found = accelerator.operands(model, tokens)
    linears = mixed_linears(model)
    assert [layer.name for layer in found.layers] == list(linears)
    assert sum(found.mix.values()) == pytest.approx(1)
    sites = {id(linear.input_site) for linear in linears.values()}
    assert len(found.sites) == len(sites) == len({work.site for work in found.work})
    name, linear = next(iter(linears.items()))
    kept: dict[str, torch.Tensor] = {}
    linear.register_forward_hook(lambda module, args, output: kept.update(y=output))
    with torch.no_grad():
        model(tokens)
    record = linear.input_site.record
    codes = activation.quantize(found.sites[0].x, record)
    layer = found.layers[0]
    assert torch.equal(layer.activation.is_fp8, codes.is_fp8)
    assert (layer.name, layer.activation.is_fp8.shape[0]) == (name, 32)
    units = codes.units(linear.in_features)
    y = exact_linear(units, unpack_units(linear.packed), record.t, linear.packed.t.item())
    assert torch.allclose(y, kept["y"][0].float(), rtol=1e-2, atol=1e-3)


def test_energy(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All keys, and relations that hold in any library."""
    plot = checkpoint.parent / "energy.svg"
    words = ("hw", "energy", str(checkpoint), "--plot", str(plot), "--json")
    facts: dict[str, Any] = json.loads(run(capsys, monkeypatch, *words))
    assert {
        *("fj_per_op", "saving_vs_fp8_percent", "ppu_percent", "cycles", "ppu_stall_percent"),
        "assumptions",
    } <= set(facts)
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


def test_a_model_that_is_not_quantized_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "fgmp quantize" in run(capsys, monkeypatch, "hw", "energy", str(MODEL))


def test_experts_count_by_the_tokens_they_see(tokens: torch.Tensor) -> None:
    model = make_model("mixtral")
    fgmp.quantize(model, tokens[:2], Recipe(**PAPER))
    found = accelerator.operands(model, tokens[:1, :2])
    experts = [work for work in found.work if ".experts." in work.name]
    # Two tokens take two experts each, in each of two layers; those that none came to are left out.
    by_layer = {i: [w for w in experts if f"layers.{i}." in w.name] for i in (0, 1)}
    for works in by_layer.values():
        sites = {w.site: w.routed for w in works if "down_proj" in w.name}
        assert sum(sites.values()) == 2
    assert all(w.routed == 1 for w in found.work if ".experts." not in w.name)


def test_a_figure_that_cannot_be_drawn_is_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = tmp_path / "no" / "f.svg"
    said = run(capsys, monkeypatch, "hw", "energy", str(MODEL), "--plot", str(plot))
    assert "there is no folder" in said


def test_a_library_without_power_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fgmp.hardware import liberty
    from fgmp.hardware.cells import embedded

    path = tmp_path / "delays.lib"
    path.write_text(liberty.write(embedded()))
    said = run(capsys, monkeypatch, "hw", "synth", "--liberty", str(path))
    assert "has no internal_power tables" in said and str(path.name) in said


def test_synth_prints_every_unit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two small units; all of them take as long as `energy`."""
    from fgmp.hardware import silicon

    every = silicon.components()
    assert {"lane_mixed", "lane_fp8", "lane_fp4", "fp4xfp4", "fp8xfp8", "quantizer"} <= set(every)
    few = {name: every[name] for name in ("lane_fp4", "fp4xfp4")}
    monkeypatch.setattr(silicon, "components", lambda: few)
    facts = json.loads(run(capsys, monkeypatch, "hw", "synth", "--json"))
    assert set(facts["units"]) == set(few)
    for unit in facts["units"].values():
        assert {"area_um2", "cells", "depth"} <= set(unit)
    assert facts["units"]["fp4xfp4"]["cells"] < facts["units"]["lane_fp4"]["cells"]
    assert facts["area_unit"] == "inverters"


def test_without_yosys_nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    from fgmp.hardware import yosys

    monkeypatch.setattr(yosys, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'fgmp\[hw\]'"):
        accelerator.energy("absent")
