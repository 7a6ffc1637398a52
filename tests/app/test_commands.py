"""Every command, from arguments to exit code, on a tiny model and tokenizer in a folder.

Commands run in this process, through the function that the console script calls; one real process
is interrupted with a real signal.
"""

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

import fgmp.progress
from fgmp import InputError
from fgmp.quantization import candidates
from fgmp.app.cli import main
from fgmp.pack.planes import PackedWeight
from fgmp.pack.stream import image_bytes
from fgmp.sensitivity.fisher import _Recorder
from fgmp.quantization.sequential import _Run

TEXT = "The quick brown fox jumps over the lazy dog, again and again.\n" * 60


def a_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level: a token a byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def a_model(layers: int = 1, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data.normal_(0, 0.2)
    return model


@dataclass
class Place:
    """A folder with a model, its checkpoint and a text."""

    model: str
    checkpoint: str
    text: str


SMALL = ["--samples", "6", "--seq-len", "32"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    a_model().save_pretrained(folder / "model")
    a_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    found = Place(*(str(folder / name) for name in ("model", "checkpoint", "text.txt")))
    quantize = ["quantize", found.model, "-o", found.checkpoint, "--calib", found.text, *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fgmp", *quantize, "--json"])
        with pytest.raises(SystemExit, match="0"):
            main()
    return found


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1 and self.out.endswith("}\n")
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line; file descriptors are caught, so that libraries cannot print past it."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["fgmp", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


def keys(value: object) -> object:
    """The keys of nested mappings; what is below a list or number does not matter."""
    return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None


# Every command.


def test_quantize(run: Run, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    facts = run(
        *("quantize", place.model, "-o", out, "--calib", place.text, *SMALL),
        *("--fp4", "0.5", "--fp4-activations", "0.8", "--seed", "3", "--json"),
    ).json
    own = "on" if facts["clip"]["used"] else "off"
    assert keys(facts) == {
        "output": None,
        "fp4_fraction": {"weights": None, "activations": None},
        "quantized_share": None,
        "unquantized": None,
        "bits_per_weight": None,
        "bytes": None,
        "tensor_bytes": None,
        "budget": {},
        "clip": {
            "used": None,
            "held_out_nll": {"on": None, "off": None},
            "held_out_kl": {"on": None, "off": None},
        },
        "uniform": {
            "used": None,
            "held_out_nll": {own: None, "nvfp4": None},
            "held_out_kl": {own: None, "nvfp4": None},
        },
        "tune": {},
        "seconds": None,
        "peak_bytes": None,
    }
    assert facts["output"] == str(out)
    assert facts["fp4_fraction"]["weights"] == pytest.approx(0.5, abs=0.005)
    assert facts["fp4_fraction"]["activations"] == pytest.approx(0.8, abs=0.005)
    assert facts["bytes"] == (out / "model.safetensors").stat().st_size
    assert sorted(p.name for p in (tmp_path / "deep").iterdir()) == ["out"]  # no state is left
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["recipe"]["seed"] == 3 and config["recipe"]["fp4_activations"] == 0.8
    assert config["calibration"].keys() == {
        "sequences",
        "predictions",
        "text",
        "fingerprint",
        "digest",
        "seq_len",
    }
    assert config["calibration"]["sequences"] == 6 and config["calibration"]["seq_len"] == 32
    assert (out / "tokenizer.json").exists()


def test_recipe_files_and_options(run: Run, place: Place, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fp4: 0.4\nclip: off\npolicy: error\nexclude: ['*.o_proj']\nsamples: 6\n")
    command = ("quantize", place.model, "--calib", place.text, "--seq-len", "32", "--json")
    facts = run(*command, "-o", tmp_path / "out", "--recipe", recipe, "--fp4", "0.6").json
    assert facts["fp4_fraction"]["weights"] == pytest.approx(0.6, abs=0.005)
    assert facts["clip"] == {"used": False, "held_out_nll": {}, "held_out_kl": {}}
    assert "model.layers.0.self_attn.o_proj.weight" in facts["unquantized"]
    stored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (stored["recipe"]["policy"], stored["recipe"]["fp4"]) == ("error", 0.6)


def test_eval(run: Run, place: Place) -> None:
    plain = run("eval", place.model, "--data", place.text, "--json").json
    packed = run("eval", place.checkpoint, "--data", place.text, "--seq-len", "32", "--json").json
    common = {"perplexity", "nll", "tokens", "fp4_activations"}
    assert plain.keys() == common and plain["fp4_activations"] is None
    extra = {"saturated", "drift", "quantized_share", "unquantized", "calibration_overlap"}
    assert packed.keys() == common | extra
    assert plain["tokens"] == len(TEXT) // 64 * 63
    assert packed["tokens"] == len(TEXT) // 32 * 31
    assert packed["fp4_activations"] == pytest.approx(0.7, abs=0.05)


def test_a_packed_kv_cache(run: Run, place: Place) -> None:
    plain = run("eval", place.model, "--data", place.text, "--json").json
    facts = {}
    for kind in ("fp8", "nvfp4", "mixed"):
        facts[kind] = run(
            "eval", place.model, "--data", place.text, "--kv-cache", kind, "--json"
        ).json
        assert facts[kind]["kv_cache"] == kind and facts[kind]["kv_bytes_per_token_bf16"] == 64
        assert facts[kind]["perplexity"] != plain["perplexity"]
        assert facts[kind]["perplexity"] == pytest.approx(plain["perplexity"], rel=0.2)
    # 32 values a token, and what a batch of 37 windows of 64 tokens adds: two shapes and scales.
    constants = 2 * (16 + 4) / (37 * 64)
    assert facts["fp8"]["kv_bytes_per_token"] == pytest.approx(32 + constants, rel=1e-3)
    assert facts["nvfp4"]["kv_bytes_per_token"] == pytest.approx(18 + constants, rel=1e-3)
    assert 18 < facts["mixed"]["kv_bytes_per_token"] < 18 + 14 + 8 + 1
    arguments = ("generate", place.checkpoint, "The quick", "--max-new-tokens", "5")
    made = run(*arguments, "--kv-cache", "fp8", "--json").json
    assert made["kv_cache"] == "fp8" and 32 < made["kv_bytes_per_token"] < 64
    assert 1 <= made["tokens"] <= 5


def test_compare(run: Run, place: Place) -> None:
    facts = run("compare", place.model, place.checkpoint, "--data", place.text, "--json").json
    assert facts.keys() == {"rows", "quantized_share", "unquantized", "calibration_overlap"}
    assert [row["name"] for row in facts["rows"]] == ["original", "fp8", "nvfp4", "fgmp"]
    assert set(facts["rows"][0]) == {
        *("name", "perplexity", "ci95", "kl", "bits_per_weight", "bits_per_activation"),
        *("compression", "fp4_activations", "vs_fp8_percent", "gap_recovered_percent"),
        "kl_gap_recovered_percent",
    }
    assert facts["rows"][0]["perplexity"] == pytest.approx(
        run("eval", place.model, "--data", place.text, "--json").json["perplexity"]
    )


def test_a_checkpoint_of_another_model_is_not_compared(
    run: Run, place: Place, tmp_path: Path
) -> None:
    model = tmp_path / "wider"
    a_model(width=64).save_pretrained(model)
    a_tokenizer().save_pretrained(model)
    done = run("compare", model, place.checkpoint, "--data", place.text)
    assert done.code == 1 and done.out == "" and "comparing" not in done.err
    assert (
        f"{place.checkpoint}: not a quantized {model}: model.embed_tokens.weight must have the "
        "same shape in both, got [257, 32] and [257, 64]"
    ) in done.err


def test_inspect(run: Run, place: Place) -> None:
    facts = run("inspect", place.checkpoint, "--json").json
    assert facts["intact"] is True and facts["path"] == place.checkpoint
    assert facts["linears"] == 7
    assert set(facts) == {
        *("path", "intact", "tensors", "file_bytes", "linears", "quantized_weights", "fp8_share"),
        *("bits_per_weight", "bytes", "unquantized", "quantized_share", "recipe"),
        *("calibration", "clip", "tune"),
    }
    assert facts["bytes"]["streamed_image"] > image_bytes(1, 0)


def test_generate(run: Run, place: Place) -> None:
    arguments = ("generate", place.checkpoint, "The quick", "--max-new-tokens", "5")
    facts = run(*arguments, "--json").json
    assert facts.keys() == {"text", "tokens", "tokens_per_second"}
    assert 1 <= facts["tokens"] <= 5
    assert run(*arguments, "--json").json["text"] == facts["text"]
    plain = run(*arguments)
    assert plain.code == 0 and plain.out.strip() == f"The quick{facts['text']}".strip()
    warm = (*arguments, "--temperature", "2.0", "--json")
    texts = {run(*warm, "--seed", seed).json["text"] for seed in (0, 1, 2)}
    assert len(texts) > 1
    assert run(*warm, "--seed", 1).json["text"] in texts


def test_a_calibration_serves_several_budgets(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = _Recorder.begin
    monkeypatch.setattr(_Recorder, "begin", lambda self: (begun.append(1), begin(self))[1])
    kept = tmp_path / "kept.safetensors"
    arguments = ("quantize", place.model, "--calib", place.text, *SMALL, "--calibration", kept)
    for bits in (5.0, 6.0):
        done = run(*arguments, "-o", tmp_path / f"out{bits}", "--bits", bits, "--json")
        shares = done.json["fp4_fraction"]
        mean = (shares["weights"] + shares["activations"]) / 2
        assert mean == pytest.approx((8 - bits) / 3.5, abs=0.02)
        assert ("gradients are taken from" in done.err.replace("\n", " ")) == (bits == 6.0)
    sizes = [stored_bytes(tmp_path / f"out{bits}") for bits in (5.0, 6.0)]
    facts = run(*arguments, "-o", tmp_path / "bytes", "--max-bytes", sizes[1] - 1, "--json").json
    assert sizes[0] < facts["tensor_bytes"] == stored_bytes(tmp_path / "bytes") < sizes[1]
    facts = run(*arguments, "-o", tmp_path / "energy", "--max-energy", "95%", "--json").json
    assert 93 < facts["budget"]["energy_percent"] <= 95
    assert len(begun) == 6  # sequences went backward once each


def test_an_increase_is_bounded_on_held_out_text(run: Run, place: Place, tmp_path: Path) -> None:
    quantize = ("quantize", place.model, "--calib", place.text, *SMALL, "--max-increase", "50%")
    done = run(*quantize, "-o", tmp_path / "few")
    assert done.code == 1 and "max_increase needs at least 2 held-out sequences" in done.err
    done = run(*quantize, "--samples", "16", "-o", tmp_path / "enough")
    assert done.code == 0 and "all-FP8's perplexity on held-out text" in done.out
    config = json.loads((tmp_path / "enough" / "config.json").read_text())
    budget = config["quantization_config"]["result"]["budget"]
    assert budget["increase_low"] <= budget["increase_percent"] <= budget["increase_high"]


def stored_bytes(checkpoint: Path) -> int:
    return sum(t.nbytes for t in load_file(checkpoint / "model.safetensors").values())


def test_a_calibration_of_something_else_is_refused(run: Run, place: Place, tmp_path: Path) -> None:
    kept = tmp_path / "kept.safetensors"

    def quantize(*more: object, model: object = place.model) -> list[object]:
        start = ["quantize", model, "-o", tmp_path / "out", "--calib", place.text, *SMALL]
        return [*start, "--calibration", kept, *more]

    assert run(*quantize()).code == 0
    shutil.rmtree(tmp_path / "out")
    for folder, changed in (("weights", a_model()), ("layers", a_model(layers=2))):
        if folder == "weights":
            changed.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
        changed.save_pretrained(tmp_path / folder)
        a_tokenizer().save_pretrained(tmp_path / folder)
    shutil.copytree(place.model, tmp_path / "tokens")
    tokenizer = a_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "tokens")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text('exclude: ["*.o_proj"]\n')
    lacking = tmp_path / "lacking.safetensors"
    with safe_open(kept, framework="pt") as file:
        missing, *others = list(file.keys())
        tensors = {n: file.get_tensor(n) for n in others}
        save_file(tensors, lacking, metadata=file.metadata())
    cases: list[tuple[list[object], str]] = [
        (quantize(model=tmp_path / "weights"), "a calibration of other weights;"),
        (quantize(model=tmp_path / "layers"), "a calibration of other layers (another model"),
        (quantize("--recipe", recipe), "a calibration of other layers (another model"),
        (quantize(model=tmp_path / "tokens"), "a calibration of other token sequences (text, tok"),
        (quantize("--seed", "5"), "a calibration of other token sequences (text, tok"),
        (quantize("--calibration", lacking), "not a calibration state (File does not contain te"),
        (quantize("--calibration", lacking), missing),
        (quantize("--calibration", place.text), "name another file, or move this one away"),
        (quantize("--calibration", tmp_path), "is a folder, not a calibration state"),
        (quantize("--bits", "4.4"), "bits must be from 4.5 (all FP4) to 8 (all FP8), got 4.4"),
        (quantize("--bits", "5", "--fp4", "0.5"), "give one of fp4, bits, max_bytes,"),
        (quantize("--max-bytes", "1k"), "max_bytes must be more than "),
        (quantize("--max-bytes", "much"), "max_bytes must be a number of bytes, with k, M or G"),
        (quantize("--max-energy", "20%"), "max_energy must be at least "),
        (quantize("--max-energy", "120%"), "max_energy must be a percentage above 0 and at most"),
        (quantize("--max-increase=-1%"), "max_increase must be a percentage of 0 or more"),
        (quantize("--bits", "5", "--policy", "error"), "bits needs scores of one unit, policy fis"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.code == 1 and done.out == "" and "Traceback" not in done.err, (arguments, done)
        assert message in done.err and done.err.count("delete it") <= 1, (message, done.err)
        used = message == "max_energy must be at least "
        assert ("gradients are taken from" in done.err) == used, done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["/proc", "taken"])
def test_a_calibration_that_could_not_be_kept_is_refused_first(
    folder: str, run: Run, place: Place, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    kept = tmp_path / folder / "new" / "kept.safetensors"
    quantize = ("quantize", place.model, "--calib", place.text, *SMALL)
    for options in (("-o", tmp_path / "out", "--calibration", kept), ("-o", kept)):
        done = run(*quantize, *options)
        assert done.code == 1 and "peak memory" not in done.err, done
        assert "kept.safetensors: could not be written: " in done.err
        assert "is no writable folder" in done.err
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]


@pytest.mark.parametrize("name", ["out", "out/kept.safetensors"])
def test_a_calibration_in_the_output_folder_is_refused(
    name: str, run: Run, place: Place, tmp_path: Path
) -> None:
    out, kept = tmp_path / "out", tmp_path / name
    done = run("quantize", place.model, "--calib", place.text, "-o", out, "--calibration", kept)
    assert done.code == 1 and f"{kept}: lies in {out}, which must be empty" in done.err
    assert not out.exists()


def test_evaluating_on_calibration_text_is_warned_of(
    run: Run, place: Place, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(
        "Pack my box with five dozen liquor jugs, said the wizard to the quail.\n" * 40
    )
    out = tmp_path / "out"
    quantize = ("quantize", place.model, "-o", out, "--calib", place.text, "--samples", "6")
    assert run(*quantize, "--seq-len", "64").code == 0
    for text, repeats in ((place.text, True), (other, False)):
        for command in (["eval"], ["compare", place.model]):
            done = run(*command, out, "--data", text, "--json")
            warned = "of the evaluation windows or more repeat text" in done.err
            assert (done.json["calibration_overlap"] > 0) == warned == repeats
    assert run("inspect", out, "--json").json["calibration"].keys() == {
        *("sequences", "predictions", "text", "fingerprint", "seq_len")
    }
    # Checkpoints of before remember nothing, and nothing is said.
    old = tmp_path / "old"
    shutil.copytree(out, old)
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]["calibration"]["digest"]
    (old / "config.json").write_text(json.dumps(config))
    done = run("eval", old, "--data", place.text, "--json")
    assert done.json["calibration_overlap"] is None and "repeat text" not in done.err


def test_tables_for_people(run: Run, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", place.model, "-o", out, "--calib", place.text, *SMALL)
    assert shown.code == 0 and "FP4 blocks" in shown.out and "quantized" in shown.out
    assert "peak memory will be about" in shown.err and "FP4 blocks" not in shown.err
    told = run("eval", place.checkpoint, "--data", place.text).out
    assert "perplexity" in told and "% of blocks" in told and "matmul parameters" in told
    assert told.count("model.layers") == 1 and "{" not in told  # the furthest site's, not each
    assert "perplexity" in run("eval", place.model, "--data", place.text).out
    assert "fgmp" in run("compare", place.model, place.checkpoint, "--data", place.text).out
    assert "intact" in run("inspect", place.checkpoint).out


def test_checkpoints_are_what_the_library_makes(place: Place) -> None:
    """The command adds texts and files, no arithmetic of its own."""
    model = AutoModelForCausalLM.from_pretrained(place.model)
    text = fgmp.calibration_text(place.text, a_tokenizer(), samples=6, seq_len=32, seed=0)
    recipe = fgmp.Recipe(samples=6, seq_len=32)
    fgmp.quantize(model, text.samples, recipe, held_out=text.held_out)
    stored = load_file(Path(place.checkpoint) / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_a_short_text_is_remarked_on(run: Run, place: Place, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:200])
    arguments = ("quantize", place.model, "-o", tmp_path / "out", "--calib", text, *SMALL)
    done = run(*arguments, "--json")
    assert "gives 5 sequences of 32 tokens, fewer than the 6 asked for" in done.err
    assert done.json["output"] == str(tmp_path / "out")


def test_the_context_caps_windows(run: Run, place: Place, tmp_path: Path) -> None:
    arguments = ("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text)
    assert run(*arguments, "--samples", "3", "--seq-len", "9999", "--json").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["calibration"]["seq_len"] == 64
    refused = run("eval", place.model, "--data", place.text, "--seq-len", "65")
    assert refused.code == 1 and "seq-len must fit the model's context of 64, got 65" in refused.err
    refused = run("eval", place.model, "--data", place.text, "--seq-len", "1")
    assert refused.code == 1 and "seq-len must be at least 2, got 1" in refused.err


# Errors: one line, exit code 1, nothing on standard output.


def test_errors(run: Run, place: Place, tmp_path: Path) -> None:
    empty, bert, t5 = tmp_path / "empty", tmp_path / "bert", tmp_path / "t5"
    empty.mkdir()
    sizes = {"vocab_size": 257, "hidden_size": 32, "num_hidden_layers": 1}
    BertModel(BertConfig(**sizes, num_attention_heads=2, intermediate_size=32)).save_pretrained(
        bert
    )
    t5_config = T5Config(vocab_size=257, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    T5ForConditionalGeneration(t5_config).save_pretrained(t5)
    for folder in (bert, t5):
        a_tokenizer().save_pretrained(folder)
    bare = tmp_path / "bare"
    a_model().save_pretrained(bare)
    short = tmp_path / "short.txt"
    short.write_text("too short")
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": ""}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("fp5: 0.7\n")
    broken = tmp_path / "broken"
    a_model().save_pretrained(broken)
    a_tokenizer().save_pretrained(broken)
    weights = broken / "model.safetensors"
    whole = {name: tensor.clone() for name, tensor in load_file(weights).items()}
    weights.write_bytes(weights.read_bytes()[:1000])
    lacking, resized = tmp_path / "lacking", tmp_path / "resized"
    for folder in (lacking, resized):
        shutil.copytree(broken, folder)
        up = "model.layers.0.mlp.up_proj.weight"
        rest = {k: t for k, t in whole.items() if folder is resized or k != up}
        save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((resized / "config.json").read_text())
    (resized / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))

    def quantize(*more: object, model: object = place.model) -> list[object]:
        return ["quantize", model, "-o", tmp_path / "out", *SMALL, "--json", *more]

    text = ("--calib", place.text)
    cases: list[tuple[list[object], str]] = [
        (quantize("--calib", tmp_path / "no.txt"), "no.txt: no such file"),
        (
            quantize("--calib", short),
            "short.txt: calibration needs at least 2 sequences of 32 tokens",
        ),
        (quantize("--calib", blank), "blank.jsonl: holds no text"),
        (quantize(*text, model=tmp_path / "nowhere"), "nowhere: no such folder"),
        (quantize(*text, model=empty), "empty: cannot be loaded"),
        (quantize(*text, model=bert), "bert: not a causal language model"),
        (quantize(*text, model=t5), "t5: cannot be loaded"),
        (quantize(*text, model=bare), "bare: no tokenizer can be loaded"),
        (quantize(*text, model=broken), "broken: cannot be loaded"),
        (quantize(*text, model=lacking), f"lacking: its files lack tensor {up}"),
        (["eval", resized, "--data", place.text], "must have shape [300, 32] by its config.json"),
        (quantize(*text, "--seed", str(2**63)), "seed must be below 2^63"),
        (quantize(*text, model=place.checkpoint), "checkpoint: already quantized, by 'fgmp'"),
        (quantize(*text, "--recipe", tmp_path / "no.yaml"), "no.yaml: No such file"),
        (quantize(*text, "--recipe", recipe), "unknown key 'fp5'; the keys are fp4"),
        (quantize(*text, "--fp4", "1.5"), "fp4 must be a fraction from 0 to 1, got 1.5"),
        (quantize(*text, "--policy", "best"), "policy must be one of fisher"),
        (quantize(*text, "--clip", "maybe"), "clip must be auto, on or off, got 'maybe'"),
        (quantize(*text, "--samples", "0"), "samples must be an integer of at least 1, got 0"),
        (
            ["quantize", place.model, "-o", place.checkpoint, *text],
            "checkpoint: already exists; choose another folder",
        ),
        (
            ["quantize", place.model, "-o", short / "out", *SMALL, *text],
            "out: could not be written",
        ),
        (["eval", place.model, "--data", tmp_path / "no.txt"], "no.txt: no such file"),
        (["eval", place.model, "--data", blank], "blank.jsonl: holds no text"),
        (["eval", tmp_path / "nowhere", "--data", place.text], "nowhere: no such folder"),
        (["compare", place.model, place.model, "--data", place.text], "not an fgmp checkpoint"),
        (
            ["compare", place.checkpoint, place.checkpoint, "--data", place.text],
            "the original must not be quantized",
        ),
        (["inspect", place.model], "not an fgmp checkpoint: no quantization_config"),
        (["inspect", tmp_path / "nowhere"], "nowhere/config.json: No such file"),
        (["generate", place.model, ""], "the prompt has 0 tokens; it must have 1 to 63"),
        (
            ["generate", place.model, "x", "--kv-cache", "int4"],
            "kv cache must be one of fp8, nvfp4, mixed, got 'int4'",
        ),
        (["generate", place.model, "x" * 64], "the prompt has 64 tokens; it must have 1 to 63"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.code == 1, (arguments, done)
        assert done.out == ""
        assert "error:" in done.err and message in done.err, done.err
        assert "Traceback" not in done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["quantize"], ["frobnicate"], ["eval", "x"], ["generate", "x", "y", "--max-new-tokens", "0"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], run: Run) -> None:
    done = run(*arguments)
    assert done.code == 2 and done.out == "" and "Traceback" not in done.err


def test_help(run: Run) -> None:
    done = run("--help")
    assert done.code == 0
    for command in ("quantize", "eval", "compare", "inspect", "generate", "quickstart"):
        assert command in done.out
        assert run(command, "--help").code == 0


def test_a_damaged_checkpoint(run: Run, place: Place, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    for path in Path(place.checkpoint).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-5] ^= 4
    (folder / "model.safetensors").write_bytes(raw)
    for arguments in (
        ["inspect", folder],
        ["eval", folder, "--data", place.text],
        ["generate", folder, "The"],
        ["compare", place.model, folder, "--data", place.text],
    ):
        done = run(*arguments)
        assert done.code == 1 and "its bytes must have CRC-32" in done.err, done
        assert "Traceback" not in done.err


# Interrupted and continued.


def interrupting(title: str, after: int) -> Callable[[object], fgmp.progress.Progress]:
    """Progress that stops a run after so many steps of one stage."""
    left = [after]

    def bars(console: object) -> fgmp.progress.Progress:
        @contextmanager
        def stage(found: str, count: int) -> Iterator[Callable[[], None]]:
            def advance() -> None:
                left[0] -= found == title
                if left[0] == 0:
                    raise KeyboardInterrupt

            yield advance

        return stage

    return bars


def same_tensors(folder: Path, wanted: Path) -> bool:
    a, b = (load_file(path / "model.safetensors") for path in (folder, wanted))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_an_interrupted_run_goes_on(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = _Recorder.begin

    def counted(self: _Recorder) -> None:
        begun.append(1)
        begin(self)

    monkeypatch.setattr(_Recorder, "begin", counted)
    command = ("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text, *SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(fgmp.progress, "bars", interrupting("calibrating", 4))
        done = run(*command, "--json")
    assert done.code == 130 and done.out == ""
    state = tmp_path / ".out.calibration.safetensors"
    assert f"what is done is kept in {state}: the same command goes on from it\n" in done.err
    assert done.err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == [state]
    assert len(begun) == 4
    assert run(*command, "--json").code == 0
    assert len(begun) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(tmp_path / "out", Path(place.checkpoint))


def test_an_interrupted_compensation_goes_on(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    command = ("quantize", place.model, "-o", out, "--calib", place.text, *SMALL, "--json")
    with monkeypatch.context() as patch:
        patch.setattr(fgmp.progress, "bars", interrupting("compensating", 20))  # 6 a stage
        assert run(*command).code == 130
    kept = tmp_path / ".out.unfinished"
    assert set(tmp_path.iterdir()) == {tmp_path / ".out.calibration.safetensors", kept}
    assert len(list(kept.iterdir())) == 3
    made = []
    moments = _Run.moments
    monkeypatch.setattr(_Run, "moments", lambda *args: made.append(1) or moments(*args))
    assert run(*command).code == 0
    assert len(made) == 5  # of 8 stages
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(out, Path(place.checkpoint))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_process_is_interrupted(
    number: signal.Signals, place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    a_model(layers=4).save_pretrained(folder)
    a_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    command = [sys.executable, "-m", "fgmp.app.cli", "quantize", str(folder), "--calib", str(text)]
    command += ["-o", str(tmp_path / "out"), "--samples", "1500", "--seq-len", "64", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        shown = b""
        while b"peak memory will be" not in shown:  # then it calibrates, for many seconds
            assert select.select([process.stderr], [], [], 60)[0]
            read = os.read(process.stderr.fileno(), 4096)
            assert read, shown
            shown += read
        time.sleep(1)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == b"" and b"Traceback" not in err and b"interrupted" in shown + err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.calibration.safetensors").exists()


def test_what_cannot_be_saved_costs_no_compensation(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text, *SMALL)

    def full(*_: object) -> None:
        raise InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("fgmp.app.commands.save", full)
        done = run(*command)
    assert done.code == 1 and "the same command goes on from it" in " ".join(done.err.split())
    monkeypatch.setattr(_Run, "moments", None)  # nothing is learnt anew
    assert run(*command).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(tmp_path / "out", Path(place.checkpoint))


def test_a_bound_of_perplexity_goes_on_from_what_was_measured(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--calib", place.text, "--samples", "20", "--seq-len", "32", "--max-increase", "5%")
    assert run("quantize", place.model, "-o", tmp_path / "wanted", *small).code == 0
    packed: list[int] = []
    whole = candidates.pack_in_turn

    def stopped(*args: Any) -> dict[str, PackedWeight]:
        packed.append(1)
        if len(packed) == 4:
            raise KeyboardInterrupt
        return whole(*args)

    monkeypatch.setattr(candidates, "pack_in_turn", stopped)
    command = ("quantize", place.model, "-o", tmp_path / "out", *small)
    assert run(*command).code == 130
    files = [p.name[17:] for p in (tmp_path / ".out.unfinished").iterdir()]
    assert files == ["increase.safetensors"] * 3  # and no packed model
    assert run(*command).code == 0
    monkeypatch.setattr(candidates, "pack_in_turn", whole)
    assert same_tensors(tmp_path / "out", tmp_path / "wanted")
    count = len(packed)
    packed.clear()
    monkeypatch.setattr(candidates, "pack_in_turn", lambda *a: packed.append(1) or whole(*a))
    assert run("quantize", place.model, "-o", tmp_path / "again", *small).code == 0
    assert count == len(packed) + 1


def test_an_fp16_model_stays_one(run: Run, place: Place, tmp_path: Path) -> None:
    """It runs in fp32; what is not quantized is stored and counted as it was."""
    model = a_model().half()
    model.save_pretrained(tmp_path / "model")
    a_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--calib", place.text, *SMALL, "--max-bytes", "40k", "--tune", "1")
    done = run("quantize", tmp_path / "model", "-o", tmp_path / "out", *options, "--json").json
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert done["tensor_bytes"] == sum(t.nbytes for t in stored.values()) <= 40_000
    names = {name for name, _ in model.named_parameters()} & stored.keys()
    assert "model.embed_tokens.weight" in names
    assert {stored[name].dtype for name in names} == {torch.float16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.float16
    windows = ("--data", place.text, "--seq-len", "32", "--json")
    rows = run("compare", tmp_path / "model", tmp_path / "out", *windows).json["rows"]
    assert rows[0]["bits_per_weight"] == 16 and rows[0]["compression"] == 1
    assert run("eval", tmp_path / "out", *windows).code == 0


def test_gpt2_goes_through_too(run: Run, place: Place, tmp_path: Path) -> None:
    """Transposed weights, learned positions, a tokenizer whose vocabulary is the smaller."""
    model = make_model("gpt2")
    model.resize_token_embeddings(257)
    model.save_pretrained(tmp_path / "model")
    a_tokenizer().save_pretrained(tmp_path / "model")
    arguments = ("quantize", tmp_path / "model", "-o", tmp_path / "out", "--calib", place.text)
    assert run(*arguments, *SMALL, "--json").json["quantized_share"] > 0.8
    facts = run(
        "compare", tmp_path / "model", tmp_path / "out", "--data", place.text, "--json"
    ).json
    assert len(facts["rows"]) == 4


def test_tuning_is_told_and_stored(place: Place, run: Run, tmp_path: Path) -> None:
    options = ("--calib", place.text, *SMALL, "--fp4", "1.0", "--tune", "2")
    done = run("quantize", place.model, "-o", tmp_path / "a", *options, "--json")
    kl = done.json["tune"]["held_out_kl"]
    assert done.json["tune"]["used"] == (kl["with"] < kl["without"])
    assert run("inspect", tmp_path / "a", "--json").json["tune"] == done.json["tune"]
    assert run("inspect", place.checkpoint, "--json").json["tune"] == {}
    shown = run("quantize", place.model, "-o", tmp_path / "b", *options)
    assert shown.code == 0
    assert f"KL on held-out text {kl['without']:.5f} without" in " ".join(shown.out.split())
