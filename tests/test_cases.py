"""Modules and folders on which a quantizer can silently do the wrong thing, one test per kind."""

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import fgmp
from fgmp import CheckpointError, FGMPError, InputError, Recipe
from fgmp.app.console import printable
from fgmp.evaluation.compare import start_counting
from fgmp.evaluation.inspect import inspect_checkpoint
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.select import linearize
from fgmp.model.source import Source
from fgmp.model.store import config_of
from fgmp.pack.checkpoint import _partial_prefix, require_free, write
from fgmp.pack.reader import Reader
from fgmp.quantization.sequential import stages
from fgmp.sensitivity.fisher import calibrate
from fgmp.storage.resume import forget, require_own

WIDTH = 64


def samples(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, 32, WIDTH, generator=generator) for _ in range(count)]


def loss(model: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    return model(x).float().square().sum(), x.shape[1]


def quantized(model: nn.Module, **fields: Any) -> tuple[nn.Module, list[str]]:
    """The model, quantized without a choice of scales, and what was reported."""
    lines: list[str] = []
    recipe = Recipe(clip="off", **fields)
    fgmp.quantize(model, samples(), recipe, loss=loss, report=lines.append)
    return model, lines


def linear(outputs: int = WIDTH) -> nn.Linear:
    torch.manual_seed(outputs)
    return nn.Linear(WIDTH, outputs)


# Identity, not names.


class Twice(nn.Module):
    """One module under two names, or two modules with one weight."""

    def __init__(self, share: str) -> None:
        super().__init__()
        self.a, self.b, self.c = linear(), linear(), linear()
        if share == "module":
            self.b = self.a
        else:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_a_module_under_two_names_is_packed_once(tmp_path: Path) -> None:
    model, _ = quantized(Twice("module"))
    assert model.a is model.b and sorted(mixed_linears(model)) == ["a", "c"]
    fgmp.save(model, tmp_path / "out")
    names = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("b.") for name in names)
    loaded = fgmp.load(tmp_path / "out", Twice("module"))
    assert loaded.a is loaded.b
    assert torch.equal(loaded(samples()[0]), model(samples()[0]))


@pytest.mark.parametrize("fields", [{}, {"compensate": False}, {"fisher": "factored"}])
def test_two_modules_with_one_weight_are_packed_once(
    fields: dict[str, Any], tmp_path: Path
) -> None:
    model, _ = quantized(Twice("weight"), **fields)
    packed = mixed_linears(model)
    assert sorted(packed) == ["a", "b", "c"] and sorted(sites(model)) == ["a", "b", "c"]
    assert packed["b"].holder is packed["a"] and config_of(model).shared == {"b": "a"}
    assert (
        config_of(model).result["quantized_share"] == 1
        and not config_of(model).result["unquantized"]
    )
    fgmp.save(model, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(name.startswith("b.weight") for name in tensors) and "b.bias" in tensors
    assert inspect_checkpoint(tmp_path / "out").quantized_weights == 2 * WIDTH**2
    loaded = fgmp.load(tmp_path / "out", Twice("weight"))
    assert mixed_linears(loaded)["b"].holder is mixed_linears(loaded)["a"]
    assert torch.equal(loaded(samples()[0]), model(samples()[0]))
    copied = copy.deepcopy(loaded)
    assert mixed_linears(copied)["b"].holder is mixed_linears(copied)["a"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = linear(96), nn.Linear(96, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


class Adapted(nn.Module):
    """A block whose weights a later block shares, between blocks that share nothing."""

    def __init__(self, *, called: bool = True, share: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Block() for _ in range(4))
        for name in ("up", "down"):
            if share:
                getattr(self.layers[3], name).weight = getattr(self.layers[1], name).weight
        self.called = called

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x) if self.called else layer.forward(x)
        return x


@pytest.mark.parametrize("share", [False, True])
def test_blocks_that_are_not_called_themselves_are_compensated_alike(share: bool) -> None:
    """Where a block is only a container, hooks on it see nothing."""
    one, other = (quantized(Adapted(called=called, share=share))[0] for called in (True, False))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_shared_weights_are_compensated_for_all_their_uses() -> None:
    """Sites that read one weight share a stage and a tensor scale; the others are as before."""
    model, _ = quantized(Adapted())
    packed = mixed_linears(model)
    assert len(packed) == 8
    for name in ("up", "down"):
        assert packed[f"layers.3.{name}"].holder is packed[f"layers.1.{name}"]
        assert packed[f"layers.3.{name}"].bias is not packed[f"layers.1.{name}"].bias
    todo = stages(Adapted(), list(packed), [["layers.1.up", "layers.3.up"]])
    assert [stage.owners for stage in todo if not stage.block] == [["layers.1.up", "layers.3.up"]]


def test_a_shared_weight_keeps_its_precision_where_one_of_its_linears_does() -> None:
    model, _ = quantized(Twice("weight"), exclude=("b",))
    assert sorted(mixed_linears(model)) == ["c"] and model.a.weight is model.b.weight
    assert config_of(model).result["unquantized"] == ["a.weight"]


class Borrowed(Twice):
    """The weight of a linear under another name, read without a call."""

    def __init__(self) -> None:
        super().__init__("module")
        self.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(nn.functional.linear(self.a(x), self.weight))


def test_a_weight_that_is_also_a_parameter_of_another_module_keeps_its_precision() -> None:
    model, _ = quantized(Borrowed())
    assert sorted(mixed_linears(model)) == ["c"]


def test_a_bias_of_two_linears_stays_one(tmp_path: Path) -> None:
    def make() -> nn.Module:
        model = nn.Sequential(linear(), linear())
        model[1].bias = model[0].bias
        return model

    model, _ = quantized(make())
    assert model[0].bias is model[1].bias
    fgmp.save(model, tmp_path / "out")
    loaded = fgmp.load(tmp_path / "out", make())
    assert torch.equal(loaded(samples()[0]), model(samples()[0]))


@pytest.mark.parametrize("share", ["module", "weight"])
def test_a_transposed_linear_that_is_shared_stays_one(share: str) -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict(), "b": nn.ModuleDict()})
    first = Conv1D(WIDTH, WIDTH)
    second = first if share == "module" else Conv1D(WIDTH, WIDTH)
    second.weight = first.weight
    model["a"]["one"], model["b"]["one"] = first, second
    linearize(model)
    one, other = model["a"]["one"], model["b"]["one"]
    assert one.weight is other.weight and (one is other) == (share == "module")


@pytest.mark.parametrize(
    "shared", [{"b": "c"}, {"b": "b"}, {"x": "a"}, {"b": 5}, ["b"], {"a": "b", "b": "a"}]
)
def test_an_edit_of_what_is_shared_is_refused(shared: object, tmp_path: Path) -> None:
    model, _ = quantized(Twice("weight"))
    fgmp.save(model, tmp_path / "out")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert quantization["shared"] == {"b": "a"}
    edit_config(tmp_path / "out", quantization_config={**quantization, "shared": shared})
    with pytest.raises(CheckpointError, match="shared"):
        fgmp.load(tmp_path / "out", Twice("weight"))


def test_gradients_of_all_uses_are_added_before_they_are_squared() -> None:
    """Against autograd, sequence by sequence."""
    model = Twice("weight")
    linears = {"a": model.a, "b": model.b, "c": model.c}
    calibration = calibrate(model, linears, samples(), loss)
    expected, n = torch.zeros(WIDTH, WIDTH), 0
    for x in samples():
        total, count = loss(model, x)
        (gradient,) = torch.autograd.grad(total, [model.a.weight])
        expected, n = expected + gradient.square(), n + count
    assert sorted(calibration.weights) == ["a", "c"]
    torch.testing.assert_close(calibration.weights["a"], expected / n, rtol=1e-4, atol=0)


# Routers.


class Mixture(nn.Module):
    def __init__(self, gate: str) -> None:
        super().__init__()
        setattr(self, gate, linear(4))
        self.experts = nn.ModuleList(linear() for _ in range(4))
        self.gate_name = gate

    def forward(self, x: Tensor) -> Tensor:
        weights = getattr(self, self.gate_name)(x).softmax(-1)
        return sum(weights[..., i : i + 1] * e(x) for i, e in enumerate(self.experts))


@pytest.mark.parametrize("gate", ["gate", "router", "choose"])
def test_routers_are_known_by_name_and_by_structure(gate: str) -> None:
    model, _ = quantized(Mixture(gate))
    assert sorted(mixed_linears(model)) == [f"experts.{i}" for i in range(4)]


# Weights that are read instead of called, and what no token reached.


class Read(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.a(x), self.b.weight)


def test_a_linear_whose_weight_another_reads_is_left_alone() -> None:
    model, lines = quantized(Read())
    assert sorted(mixed_linears(model)) == ["a"]
    assert any("received no calibration tokens: b" in line for line in lines)


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(linear(), nn.ReLU()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](self.layers[0](x))


def test_blocks_that_never_run_are_no_blocks() -> None:
    model, lines = quantized(Unused())
    assert sorted(mixed_linears(model)) == ["layers.0.0", "layers.1.0"]
    assert any("layers.2.0, layers.3.0" in line for line in lines)


def test_what_no_token_reached_is_quantized_if_it_is_named() -> None:
    model, _ = quantized(Unused(), include=("*", "layers.2.*"))
    assert sorted(mixed_linears(model)) == ["layers.0.0", "layers.1.0", "layers.2.0"]


def test_nothing_reached_is_refused() -> None:
    with pytest.raises(InputError, match="no calibration token reached a linear"):
        fgmp.quantize(
            Unused(),
            samples(),
            Recipe(clip="off", exclude=("layers.0.*", "layers.1.*")),
            loss=loss,
        )


def test_the_fast_path_of_an_encoder_layer_cannot_pass_by_the_quantizers() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(WIDTH, 4, 128, dropout=0.0, batch_first=True), 2
    ).eval()
    model, lines = quantized(encoder)
    packed = [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert sorted(mixed_linears(model)) == packed
    assert any("out_proj" in line for line in lines)  # read by the attention, never called
    start_counting(model)
    with torch.no_grad():
        model(samples()[0])
    assert all(site.counts[1] for site in sites(model).values())


class Alternating(nn.Module):
    """All tokens to one expert, in turn; the other gets an empty tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(linear() for _ in range(2))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        busy, self.calls = self.calls % 2, self.calls + 1
        out = [expert(x if i == busy else x[:, :0]) for i, expert in enumerate(self.experts)]
        return out[busy]


@pytest.mark.parametrize("compensate", [False, True])
def test_empty_tensors_identify_no_site(compensate: bool) -> None:
    model, _ = quantized(Alternating(), compensate=compensate)
    assert sorted(sites(model)) == ["experts.0", "experts.1"]


class Cycles(nn.Module):
    """A first cycle without gradients, as hierarchical reasoning models have."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = linear(), linear()

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            first = self.b(self.a(x).relu())
        return self.b(self.a(x + first).relu())


def test_a_pass_without_gradients_adds_none() -> None:
    model, _ = quantized(Cycles())
    assert sorted(mixed_linears(model)) == ["a", "b"]


# Subclasses of nn.Linear.


class Same(nn.Linear):
    """Its own words for the same function."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + self.bias


class Other(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).square()


def test_a_subclass_that_computes_a_linear_is_quantized_and_another_named() -> None:
    model, _ = quantized(nn.Sequential(Same(WIDTH, WIDTH), Other(WIDTH, WIDTH)))
    assert list(mixed_linears(model)) == ["0"]
    with pytest.raises(InputError, match=r"no linear layer .* unsupported linear types: Other"):
        fgmp.quantize(nn.Sequential(Other(WIDTH, WIDTH)), samples(), Recipe(), loss=loss)


# Sources.


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    make_model("llama").save_pretrained(folder)
    return folder


def with_tensor(folder: Path, name: str) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, name: torch.zeros(4, 4)}, path, metadata={"format": "pt"})


def test_a_weight_that_no_class_reads_is_refused(source: Path) -> None:
    with_tensor(source, "mtp.fc.weight")
    with pytest.raises(InputError, match=r"does not read tensor mtp\.fc\.weight"):
        Source(str(source)).load()


def test_a_weight_that_the_class_ignores_is_refused(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"^mtp\."])
    with_tensor(source, "mtp.fc.weight")
    one = Source(str(source))
    with pytest.raises(InputError, match=r"does not read tensor mtp\.fc\.weight"):
        one.require_every_tensor(one.load())


def test_code_that_comes_with_a_model_is_not_run(source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "code.py").write_text(f"open({str(source / 'ran')!r}, 'w')\n")
    with pytest.raises(InputError, match=r"auto_map .* --trust-remote-code"):
        Source(str(source))
    assert not (source / "ran").exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_kernel_of_the_hub_is_refused(key: str, source: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, key: "someone/kernel"}))
    with pytest.raises(InputError, match=f"{key} must be an implementation of Transformers"):
        Source(str(source))


def test_a_pipe_instead_of_a_configuration_does_not_hang(source: Path) -> None:
    (source / "config.json").unlink()
    os.mkfifo(source / "config.json")
    with pytest.raises(InputError, match="must be a regular file"):
        Source(str(source))


# Checkpoint folders.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "out"
    model = make_model("llama")
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    fgmp.quantize(model, tokens, Recipe(clip="off", compensate=False))
    fgmp.save(model, folder)
    return folder


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


def from_pretrained(folder: Path) -> object:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


READERS: list[Callable[[Path], object]] = [inspect_checkpoint, fgmp.load, from_pretrained]


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("read", READERS)
def test_an_index_beside_a_single_file_is_ambiguous(
    read: Callable[[Path], object], checkpoint: Path
) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "model-1.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-1.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"both model\.safetensors and"):
        read(checkpoint)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("name", ["other.safetensors", "pytorch_model.bin", "model.gguf"])
def test_stray_files_of_weights_are_named(
    read: Callable[[Path], object], name: str, checkpoint: Path
) -> None:
    (checkpoint / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"{name}: is no part of the checkpoint"):
        read(checkpoint)


def test_a_configuration_that_names_other_weights_is_refused(checkpoint: Path) -> None:
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "other")
    edit_config(checkpoint, transformers_weights="other")
    with pytest.raises(CheckpointError, match="transformers_weights must be absent"):
        fgmp.load(checkpoint)


@pytest.mark.parametrize("name", ["/etc/hostname", "../out/model.safetensors", "a\0b", "\ud800", 5])
def test_names_in_the_index_stay_inside(name: object, checkpoint: Path) -> None:
    index = {"weight_map": {"lm_head.weight": name}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="must stay inside its folder"):
        inspect_checkpoint(checkpoint)


def test_nesting_too_deep_is_no_traceback(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON: nested too deep"):
        inspect_checkpoint(checkpoint)


@pytest.mark.parametrize("read", [fgmp.load, from_pretrained])
def test_another_rule_in_the_configuration_is_refused(
    read: Callable[[Path], object], checkpoint: Path
) -> None:
    quantization = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    first = next(iter(quantization["sites"].values()))
    first["rule"] = "difference" if first["rule"] == "benefit" else "benefit"
    edit_config(checkpoint, quantization_config=quantization)
    with pytest.raises(CheckpointError, match="sites must be as written"):
        read(checkpoint)


def test_an_edit_of_the_configuration_is_named(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit_config(checkpoint, rms_norm_eps=1e-3)
    fgmp.load(checkpoint)
    assert "edited after the checkpoint was written: rms_norm_eps" in caplog.text


def test_more_layers_than_tensors_are_refused_before_they_are_built(checkpoint: Path) -> None:
    edit_config(checkpoint, num_hidden_layers=10_000)
    with pytest.raises(CheckpointError, match="num_hidden_layers must be at most 2"):
        fgmp.load(checkpoint)


@pytest.mark.parametrize("architectures", [{"a": 1}, "LlamaForCausalLM", ["os"], ["pipeline"], [5]])
def test_architectures_must_name_a_model_class(architectures: object, checkpoint: Path) -> None:
    edit_config(checkpoint, architectures=architectures)
    with pytest.raises(FGMPError, match="architectures must name"):
        fgmp.load(checkpoint)


@pytest.mark.parametrize("sites", [{}, [], None, {"a": 5}])
def test_malformed_sites_are_refused(sites: object, checkpoint: Path) -> None:
    quantization = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    edit_config(checkpoint, quantization_config={**quantization, "sites": sites})
    for read in (fgmp.load, inspect_checkpoint):
        with pytest.raises(CheckpointError):
            read(checkpoint)


def test_two_runs_write_equal_files(tmp_path: Path) -> None:
    tokens = torch.randint(128, (4, 16), generator=torch.Generator().manual_seed(0))
    for name in ("a", "b"):
        model = make_model("llama")
        fgmp.quantize(model, tokens, Recipe(clip="off"))
        fgmp.save(model, tmp_path / name)
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files - {"fgmp_run.json"} == {
        "config.json",
        "fgmp_scores.json",
        "generation_config.json",
        "model.safetensors",
    }
    for name in files - {"fgmp_run.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# What is left behind, and what must not be followed or deleted.


def test_a_link_instead_of_partial_results_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    precious = [victim / "0123456789abcdef-x.safetensors", victim / "model.safetensors"]
    for path in precious:
        path.write_text("precious")
    link = tmp_path / ".out.unfinished"
    link.symlink_to(victim)
    forget(link)
    with pytest.raises(InputError, match="got a link or a file"):
        require_own(link)
    assert all(path.read_text() == "precious" for path in precious)


def test_only_files_of_the_run_are_deleted(tmp_path: Path) -> None:
    folder = tmp_path / ".out.unfinished"
    folder.mkdir()
    own, other = folder / f"{'a' * 16}-stage-1.safetensors", folder / "model.safetensors"
    for path in (own, other):
        path.write_text("")
    forget(folder)
    assert not own.exists() and other.exists()


def killed_while_writing(target: Path) -> Path:
    """What a process that was killed leaves: a folder that names it."""
    script = (
        "import os, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from fgmp.pack import checkpoint\n"
        "checkpoint._open_to_others = lambda folder: os.kill(os.getpid(), signal.SIGKILL)\n"
        "config = {'quantization_config': {}}\n"
        "checkpoint.write(Path(sys.argv[1]), {'x': torch.ones(8)}, config)\n"
    )
    subprocess.run([sys.executable, "-c", script, str(target)], check=False)
    (partial,) = target.parent.glob(f".{target.name}.partial-*")
    return partial


def test_what_a_killed_run_left_is_deleted_by_the_next(tmp_path: Path) -> None:
    target = tmp_path / "out"
    partial = killed_while_writing(target)
    require_free(tmp_path / "other")
    assert partial.exists()
    require_free(target)
    assert not partial.exists()


def test_what_a_running_process_writes_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / _partial_prefix(tmp_path / "out", os.getpid())
    partial.mkdir()
    require_free(tmp_path / "out")
    assert partial.exists()


@pytest.mark.parametrize("name", ["x" * 240, "a\0b", "\udcff"])
def test_a_name_that_no_folder_can_have_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the name of a file or folder must"):
        require_free(tmp_path / name)


@pytest.mark.parametrize("r", [0.0, float("nan"), float("inf"), -1.0])
def test_a_multiplier_that_no_site_has_is_refused(r: float) -> None:
    x, codes = torch.randn(2, 16), torch.full((16,), 0x38, dtype=torch.uint8)
    site = (torch.tensor(r), codes, torch.tensor(0), "benefit", "search")
    with pytest.raises(InputError, match="r must be positive with at most 12 bits"):
        torch.ops.fgmp.fake_quantize_activation(x, *site)


# Many tensors.


def test_a_plane_is_found_without_a_look_at_all_names(checkpoint: Path) -> None:
    """Every header is parsed once, however many tensors are read."""
    reader = Reader([checkpoint / "model.safetensors"])
    (checkpoint / "model.safetensors").unlink()  # what is open stays readable
    for name in reader.names:
        reader.tensor(name)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    tensors = {name: torch.ones(400) for name in "xy"}
    write(tmp_path / "out", tensors, {}, max_shard_size="1KB")
    first, second = sorted((tmp_path / "out").glob("*.safetensors"))
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match=f"is in both {first} and {second}"):
        Reader([first, second])


# The terminal.


def test_control_characters_reach_no_terminal() -> None:
    shown = printable("\x1b[31mred\x07 \u202e\ud800 [bold]")
    assert "\x1b" not in shown and "\x07" not in shown and "\ud800" not in shown
    assert r"\x1b" in shown and r"\[bold]" in shown
    assert len(printable("x" * 10_000)) < 2100 and "(10,000 characters)" in printable("x" * 10_000)


# The start.


@pytest.mark.parametrize(
    "code",
    [
        "import fgmp",
        "import fgmp; fgmp.InputError",
        "import sys; sys.argv = ['fgmp', '--help']; from fgmp.app.cli import app;"
        "app(standalone_mode=False)",
        "import sys; sys.argv = ['fgmp', 'quantize', '--help']; from fgmp.app.cli import app;"
        "app(standalone_mode=False)",
    ],
)
def test_help_and_import_wait_for_no_torch(code: str) -> None:
    script = (
        f"{code}\nimport sys\nassert not {{'torch', 'transformers', 'numpy'}} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_misspelt_quantization_config_is_no_random_model(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantisation_config"] = config.pop("quantization_config")
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"does not read tensor .* it would be lost"):
        Source(str(checkpoint)).load()
