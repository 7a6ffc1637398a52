"""The command line: options, help, tables, errors, exit codes and signals.

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
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, T5Config, T5ForConditionalGeneration

from .cases import SMALL, TEXT, Place, Run, a_model, a_tokenizer


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


def test_tables_for_people(run: Run, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = run("quantize", place.model, "-o", out, "--calib", place.text, *SMALL)
    assert shown.code == 0 and "FP4 blocks" in shown.out and "quantized" in shown.out
    assert "peak memory will be about" in shown.err and "FP4 blocks" not in shown.err
    lines = run("eval", place.checkpoint, "--data", place.text).out
    assert "perplexity" in lines and "% of blocks" in lines and "matmul parameters" in lines
    assert lines.count("model.layers") == 1 and "{" not in lines  # the furthest site's, not each
    assert "perplexity" in run("eval", place.model, "--data", place.text).out
    assert "fgmp" in run("compare", place.model, place.checkpoint, "--data", place.text).out
    assert "bytes verified" in run("inspect", place.checkpoint).out


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
    for command in ("quantize", "eval", "compare", "inspect", "export", "generate", "quickstart"):
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_real_process_is_interrupted(
    number: signal.Signals, place: Place, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    a_model(layers=4).save_pretrained(folder)
    a_tokenizer().save_pretrained(folder)
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    command = [sys.executable, "-m", "fgmp", "quantize", str(folder), "--calib", str(text)]
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
    (state,) = (tmp_path / ".out.unfinished").iterdir()
    assert state.name.endswith("-calibration.safetensors")
