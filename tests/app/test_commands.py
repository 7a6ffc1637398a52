"""What every command does, from arguments to result, on a tiny model and tokenizer in a folder.

Commands run in this process, through the function that the console script calls.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import normalizers
from transformers import AutoModelForCausalLM

import fgmp
from fgmp.app import commands
from fgmp.app.commands import Reporter
from fgmp.errors import InputError
from fgmp.model import precision
from fgmp.pack.planes import PackedWeight
from fgmp.pack.stream import image_bytes
from fgmp.progress import Progress
from fgmp.quantization import candidates
from fgmp.quantization.sequential import _Run
from fgmp.sensitivity.fisher import _Recorder

from .cases import (
    SMALL,
    TEXT,
    Place,
    Run,
    a_model,
    a_tokenizer,
    same_tensors,
    stored_bytes,
)


def keys(value: object) -> object:
    """The keys of nested mappings; what is below a list or number does not matter."""
    return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None


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
        "dtype",
        "text",
        "fingerprint",
        "digest",
        "seq_len",
        "bos",
    }
    assert config["calibration"]["sequences"] == 6 and config["calibration"]["seq_len"] == 32
    assert (out / "tokenizer.json").exists()


def test_eval(run: Run, place: Place) -> None:
    plain = run("eval", place.model, "--data", place.text, "--json").json
    packed = run("eval", place.checkpoint, "--data", place.text, "--seq-len", "32", "--json").json
    common = {"perplexity", "nll", "tokens", "fp4_activations", "bos"}
    assert plain.keys() == common and plain["fp4_activations"] is None
    extra = {"saturated", "drift", "quantized_share", "unquantized", "calibration_overlap"}
    assert packed.keys() == common | extra
    assert plain["tokens"] == len(TEXT) // 64 * 63
    assert packed["tokens"] == len(TEXT) // 32 * 31
    assert packed["fp4_activations"] == pytest.approx(0.7, abs=0.05)


def test_export(run: Run, place: Place, tmp_path: Path) -> None:
    out, data = tmp_path / "out", ("--data", place.text, "--seq-len", "32")
    command = ("export", place.checkpoint, "-o", out, "--to")
    done = run(*command, "modelopt", *data)
    assert done.code == 1 and "needs one format for all tensors; choose --to dense" in done.words
    assert not out.exists()
    facts = run(*command, "compressed-tensors", "--mixed", "per-layer", *data, "--json").json
    assert facts["output"] == str(out) and facts["kl"] > 0
    assert facts["bytes"] == (out / "model.safetensors").stat().st_size
    del facts["output"], facts["bytes"]
    assert json.loads((out / "fgmp_export.json").read_text()) == facts
    assert (out / "tokenizer.json").exists()
    shown = run("export", place.checkpoint, "-o", tmp_path / "dense", "--to", "dense").words
    assert "weight error none" in shown and "no longer quantized" in shown
    assert "not measured; --data TEXT measures it" in shown
    dense = run("eval", tmp_path / "dense", "--data", place.text, "--json").json
    assert dense["fp4_activations"] is None
    again = run(*command, "dense")
    assert again.code == 1 and "already exists" in again.words


def test_export_refuses_before_it_reads(run: Run, place: Place, tmp_path: Path) -> None:
    for arguments, message in (
        ((place.model, "--to", "dense"), "not an fgmp checkpoint"),
        ((place.checkpoint, "--to", "gguf"), "to must be one of"),
        ((place.checkpoint, "--to", "dense", "--data", tmp_path / "none"), "none"),
        ((place.checkpoint, "--to", "dense", "--data", place.text, "--seq-len", "1"), "at least 2"),
    ):
        done = run("export", *arguments, "-o", tmp_path / "out")
        assert done.code == 1 and message in done.words
        assert not (tmp_path / "out").exists()


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
    assert facts.keys() == {
        *("rows", "quantized_share", "unquantized", "calibration_overlap", "bos"),
        "uniform_absent",
    }
    rows = {row["name"]: row for row in facts["rows"]}
    assert list(rows) == ["original", "fp8", "nvfp4", "uniform", "fgmp"]
    assert rows["uniform"]["bits_per_weight"] <= rows["fgmp"]["bits_per_weight"]
    assert facts["uniform_absent"] is None
    assert set(facts["rows"][0]) == {
        *("name", "perplexity", "ci95", "kl", "kl_p99", "top1_agreement_percent"),
        *("bits_per_weight", "bits_per_activation"),
        *("compression", "fp4_activations", "vs_fp8_percent", "gap_recovered_percent"),
        "kl_gap_recovered_percent",
    }
    assert facts["rows"][0]["perplexity"] == pytest.approx(
        run("eval", place.model, "--data", place.text, "--json").json["perplexity"]
    )


def test_a_twin_that_cannot_be_chosen_is_absent(run: Run, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize = ("quantize", place.model, "-o", out, "--calib", place.text, *SMALL)
    assert run(*quantize, "--policy", "error").code == 0
    done = run("compare", place.model, out, "--data", place.text, "--json")
    assert [row["name"] for row in done.json["rows"]] == ["original", "fp8", "nvfp4", "fgmp"]
    assert "the checkpoint's policy is error" in done.json["uniform_absent"]
    words = run("compare", place.model, out, "--data", place.text).words
    assert words.count("the checkpoint's policy is error") == 1


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
    assert facts["path"] == place.checkpoint
    files = [*Path(place.checkpoint).glob("*.safetensors")]
    assert facts["tensors"] == len(load_file(files[0]))
    assert facts["file_bytes"] == sum(file.stat().st_size for file in files)
    assert facts["linears"] == 7
    assert set(facts) == {
        *("path", "tensors", "file_bytes", "linears", "quantized_weights", "fp8_share"),
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
        assert ("using the Fisher information in" in done.err.replace("\n", " ")) == (bits == 6.0)
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
    assert done.code == 0 and "perplexity on held-out text relative to all-FP8" in done.out
    config = json.loads((tmp_path / "enough" / "config.json").read_text())
    budget = config["quantization_config"]["result"]["budget"]
    assert budget["increase_low"] <= budget["increase_percent"] <= budget["increase_high"]


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
        (quantize(model=tmp_path / "tokens"), "a calibration on other token sequences (text, tok"),
        (quantize("--seed", "5"), "a calibration on other token sequences (text, tok"),
        (quantize("--calibration", lacking), "not a state file (File does not contain tensor"),
        (quantize("--calibration", lacking), missing),
        (quantize("--calibration", place.text), "name another file, or move this one away"),
        (quantize("--calibration", tmp_path), "is a folder, not a state file"),
        (quantize("--bits", "4.4"), "bits must be from 4.5 (all FP4) to 8 (all FP8), got 4.4"),
        (quantize("--bits", "5", "--fp4", "0.5"), "set only one of fp4, bits, max_bytes,"),
        (quantize("--max-bytes", "1k"), "max_bytes must be more than "),
        (quantize("--max-bytes", "much"), "max_bytes must be a number of bytes, with k, M or G"),
        (quantize("--max-energy", "20%"), "max_energy must be at least "),
        (quantize("--max-energy", "120%"), "max_energy must be a percentage above 0 and at most"),
        (quantize("--max-increase=-1%"), "max_increase must be a percentage of 0 or more"),
        (quantize("--bits", "5", "--policy", "error"), "bits needs policy fisher, whose scores"),
    ]
    for arguments, message in cases:
        done = run(*arguments)
        assert done.code == 1 and done.out == "" and "Traceback" not in done.err, (arguments, done)
        assert message in done.err and done.err.count("delete it") <= 1, (message, done.err)
        used = message == "max_energy must be at least "
        assert ("using the Fisher information in" in done.err) == used, done.err
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
            warned = "of the evaluation windows repeat calibration text" in done.err
            assert (done.json["calibration_overlap"] > 0) == warned == repeats
    assert run("inspect", out, "--json").json["calibration"].keys() == {
        *("sequences", "predictions", "text", "fingerprint", "seq_len", "bos", "dtype")
    }
    # Checkpoints of before remember nothing, and nothing is said.
    old = tmp_path / "old"
    shutil.copytree(out, old)
    config = json.loads((old / "config.json").read_text())
    del config["quantization_config"]["calibration"]["digest"]
    (old / "config.json").write_text(json.dumps(config))
    done = run("eval", old, "--data", place.text, "--json")
    assert done.json["calibration_overlap"] is None and "repeat calibration text" not in done.err


def test_checkpoints_are_what_the_library_makes(place: Place) -> None:
    """The command adds texts and files, no arithmetic of its own."""
    model = AutoModelForCausalLM.from_pretrained(place.model)
    text = fgmp.calibration_text(place.text, a_tokenizer(), samples=6, seq_len=32, seed=0)
    recipe = fgmp.Recipe(samples=6, seq_len=32)
    fgmp.quantize(model, text.samples, recipe, held_out=text.held_out)
    stored = load_file(Path(place.checkpoint) / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in stored.items())


def test_a_reporter_sees_every_step(place: Place, tmp_path: Path) -> None:
    """Each stage advances as often as it said, and messages come as lines."""
    stages: list[list[Any]] = []
    messages: list[str] = []

    @contextmanager
    def progress(title: str, steps: int) -> Iterator[Callable[[], None]]:
        stage = [title, steps, 0]
        stages.append(stage)

        def advance() -> None:
            stage[2] += 1

        yield advance

    reporter = Reporter(progress, messages.append)
    recipe = fgmp.Recipe(samples=16, seq_len=32)
    commands.quantize_to(place.model, tmp_path / "out", recipe, place.text, reporter)
    commands.evaluate_model(str(tmp_path / "out"), place.text, reporter=reporter)
    commands.compare_models(place.model, tmp_path / "out", place.text, reporter=reporter)
    titles = [title for title, _, _ in stages]
    assert titles[0] == "calibrating" and titles[-7:] == [
        *("evaluating", "comparing original", "choosing uniform formats", "comparing fp8"),
        *("comparing nvfp4", "comparing uniform", "comparing fgmp"),
    ]
    assert "compensating" in titles and len(titles) >= 7
    for title, steps, advanced in stages:
        assert advanced == steps > 0, title
    assert messages and all("\n" not in message for message in messages)


def test_generated_text_is_streamed(place: Place) -> None:
    """The stream gets the prompt and the text, word by word, and the result has the text alone."""
    pieces: list[str] = []
    generation = commands.generate_text(place.model, "The ", 12, 2.0, 3, pieces.append)
    assert "".join(pieces) == "The " + generation.text
    assert len(pieces) > 1
    again = commands.generate_text(place.model, "The ", 12, 2.0, 3)
    assert again.text == generation.text and again.tokens == generation.tokens <= 12


def test_a_window_is_no_longer_than_2048(place: Place) -> None:
    """Unless one is asked for, within the model's context."""
    model = a_model()
    assert commands._window_length(model, None) == 64
    model.config.max_position_embeddings = 8192
    assert commands._window_length(model, None) == 2048
    assert commands._window_length(model, 4096) == 4096


def test_drift_beyond_3_points_is_warned_of(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The site with the largest drift is named; a site without tokens is not counted."""
    model = fgmp.load(place.checkpoint)
    messages: list[str] = []
    drift = {"a": 0.03, "b": -0.031, "c": 0.25, "d": float("nan")}
    monkeypatch.setattr(commands.comparison, "drift", lambda *_: drift)
    commands._warn_of_drift(model, Reporter(message=messages.append))
    (message,) = messages
    assert "of 2 sites is more than 3 points off" in message
    assert message.endswith("c is furthest, +25.0 points")
    drift.update(b=-0.02, c=0.01)
    commands._warn_of_drift(model, Reporter(message=messages.append))
    assert len(messages) == 1


def test_a_short_text_is_remarked_on(run: Run, place: Place, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text(TEXT[:200])
    arguments = ("quantize", place.model, "-o", tmp_path / "out", "--calib", text, *SMALL)
    done = run(*arguments, "--json")
    assert "gives 5 sequences of 32 tokens, fewer than the 6 requested" in done.err
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


# Interrupted and continued.


def part_of(file: Path) -> str:
    """Name of a stage or its part, which follows the fingerprint in a file's name."""
    return file.stem[17:]


def interrupting(title: str, after: int) -> Callable[[object], Progress]:
    """Progress that stops a run after so many steps of one stage."""
    left = [after]

    def bars(console: object) -> Progress:
        @contextmanager
        def stage(stage_title: str, steps: int) -> Iterator[Callable[[], None]]:
            def advance() -> None:
                left[0] -= stage_title == title
                if left[0] == 0:
                    raise KeyboardInterrupt

            yield advance

        return stage

    return bars


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
        patch.setattr("fgmp.app.reporter.bars", interrupting("calibrating", 4))
        done = run(*command, "--json")
    assert done.code == 130 and done.out == ""
    resume = tmp_path / ".out.unfinished"
    assert f"partial results are kept in {resume}: the same command resumes\n" in done.err
    assert done.err.endswith("interrupted\n")
    assert list(tmp_path.iterdir()) == [resume]
    assert [part_of(file) for file in resume.iterdir()] == ["calibration"]
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
        patch.setattr("fgmp.app.reporter.bars", interrupting("compensating", 20))  # 6 a stage
        assert run(*command).code == 130
    resume = tmp_path / ".out.unfinished"
    assert list(tmp_path.iterdir()) == [resume]
    parts = Counter(part_of(file) for file in resume.iterdir())
    assert parts.pop("calibration") == parts.pop("activation-scores") == 1
    assert parts.pop("weight-scores-searched") == parts.pop("weight-scores-nearest") == 1
    assert parts == {"stage-00000": 1, "stage-00001": 1, "stage-00002": 1}
    stages = []
    moments = _Run.moments
    monkeypatch.setattr(_Run, "moments", lambda *a, **k: stages.append(1) or moments(*a, **k))
    monkeypatch.setattr(_Recorder, "begin", None)  # nothing is calibrated anew
    assert run(*command).code == 0
    assert len(stages) == 1  # of 4, each for both variants
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(out, Path(place.checkpoint))


def test_what_cannot_be_saved_costs_no_compensation(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text, *SMALL)

    def full(*_: object, **__: object) -> None:
        raise InputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr("fgmp.app.commands.save", full)
        done = run(*command)
    assert done.code == 1 and "the same command resumes" in done.words
    monkeypatch.setattr(_Run, "moments", None)  # nothing is learnt anew
    assert run(*command).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert same_tensors(tmp_path / "out", Path(place.checkpoint))


def test_a_bound_of_perplexity_goes_on_from_what_was_measured(
    run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = ("--calib", place.text, "--samples", "20", "--seq-len", "32", "--max-increase", "5%")
    assert run("quantize", place.model, "-o", tmp_path / "expected", *small).code == 0
    packed: list[int] = []
    whole = candidates.pack_in_turn

    def stopped(*args: Any, **options: Any) -> dict[str, dict[str, PackedWeight]]:
        packed.append(1)
        if len(packed) == 4:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(candidates, "pack_in_turn", stopped)
    command = ("quantize", place.model, "-o", tmp_path / "out", *small)
    assert run(*command).code == 130
    parts = Counter(part_of(file) for file in (tmp_path / ".out.unfinished").iterdir())
    assert parts["increase"] == 3
    assert not any(part.startswith("stage") for part in parts)  # no packed model
    assert run(*command).code == 0
    monkeypatch.setattr(candidates, "pack_in_turn", whole)
    assert same_tensors(tmp_path / "out", tmp_path / "expected")
    count = len(packed)
    packed.clear()
    monkeypatch.setattr(
        candidates, "pack_in_turn", lambda *a, **k: packed.append(1) or whole(*a, **k)
    )
    assert run("quantize", place.model, "-o", tmp_path / "again", *small).code == 0
    assert count == len(packed) + 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_model_stays_one(
    dtype: torch.dtype, run: Run, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in fp32; what is not quantized is stored and counted as it was."""
    monkeypatch.setattr(precision, "has_bf16_arithmetic", lambda: False)
    model = a_model().to(dtype)
    model.save_pretrained(tmp_path / "model")
    a_tokenizer().save_pretrained(tmp_path / "model")
    options = ("--calib", place.text, *SMALL, "--max-bytes", "40k", "--tune", "1")
    done = run("quantize", tmp_path / "model", "-o", tmp_path / "out", *options, "--json").json
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert done["tensor_bytes"] == sum(t.nbytes for t in stored.values()) <= 40_000
    names = {name for name, _ in model.named_parameters()} & stored.keys()
    assert "model.embed_tokens.weight" in names
    assert {stored[name].dtype for name in names} == {dtype}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert config["quantization_config"]["calibration"]["dtype"] == "float32"
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
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
    assert len(facts["rows"]) == 5


def test_tuning_is_told_and_stored(place: Place, run: Run, tmp_path: Path) -> None:
    options = ("--calib", place.text, *SMALL, "--fp4", "1.0", "--tune", "2")
    done = run("quantize", place.model, "-o", tmp_path / "a", *options, "--json")
    kl = done.json["tune"]["held_out_kl"]
    assert done.json["tune"]["used"] == (kl["with"] < kl["without"])
    assert run("inspect", tmp_path / "a", "--json").json["tune"] == done.json["tune"]
    assert run("inspect", place.checkpoint, "--json").json["tune"] == {}
    shown = run("quantize", place.model, "-o", tmp_path / "b", *options)
    assert shown.code == 0
    assert f"KL on held-out text {kl['without']:.5f} without" in shown.words
