"""Texts, prompts and paths that a command must refuse before any work, and windows that start with
a beginning-of-sequence token."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

import fgmp
from fgmp.app import commands
from fgmp.data import digest
from fgmp.errors import InputError

from .cases import SMALL, TEXT, Place, Run, a_model, a_tokenizer


@pytest.fixture(scope="module")
def with_bos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose tokenizer puts a beginning-of-sequence token, id 1, before a text."""
    folder = tmp_path_factory.mktemp("with_bos")
    tokenizer = a_tokenizer()
    start = tokenizer.convert_ids_to_tokens(1)
    tokenizer.bos_token = start
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, 1)]
    )
    a_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"][0] == 1
    return folder


@pytest.fixture(scope="module")
def unknown_token(tmp_path_factory: pytest.TempPathFactory, place: Place) -> tuple[Path, Path]:
    """Folder of a model whose tokenizer has one token more, and a text with it."""
    folder = tmp_path_factory.mktemp("unknown")
    a_model().save_pretrained(folder)
    tokenizer = a_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    text = folder / "text.txt"
    text.write_text(TEXT[:70] + "<extra>" + TEXT * 2)
    return folder, text


def test_windows_start_with_bos_as_the_tokenizer_does(
    with_bos: Path, place: Place, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(
        commands, "prepare", lambda model, samples, *_, **__: seen.append(samples) or stop()
    )
    for option, expected in (((), True), (("--bos",), True), (("--no-bos",), False)):
        quantize = ("quantize", with_bos, "-o", tmp_path / "out", "--calib", place.text, *SMALL)
        assert run(*quantize, *option).code == 1
        assert bool((seen[-1][:, 0] == 1).all()) == expected
        assert (seen[-1] == 1).sum() in ([6] if expected else [0, 1])
    done = run("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text, "--bos")
    assert done.code == 1 and "the tokenizer has no beginning-of-sequence token" in done.words


def stop() -> None:
    raise InputError("seen")


@pytest.mark.parametrize("option", ["--bos", "--no-bos"])
def test_compare_uses_the_windows_of_calibration(
    option: str, with_bos: Path, place: Place, run: Run, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    quantize = ("quantize", with_bos, "-o", out, "--calib", place.text, *SMALL, option)
    assert run(*quantize, "--clip", "off").code == 0
    bos = option == "--bos"
    config_file = out / "config.json"
    config = json.loads(config_file.read_text())
    calibration = config["quantization_config"]["calibration"]
    assert calibration["bos"] is bos
    tokenizer = AutoTokenizer.from_pretrained(with_bos)
    text = fgmp.calibration_text(place.text, tokenizer, samples=6, seq_len=32, seed=0, bos=bos)
    assert calibration["fingerprint"] == text.fingerprint
    assert calibration["digest"] == digest(torch.cat([text.samples, text.held_out]), tokenizer)

    def original(*options: str) -> float:
        rows = run("compare", with_bos, out, "--data", place.text, *options, "--json").json["rows"]
        return float(rows[0]["perplexity"])

    assert original() == original(option) != original("--no-bos" if bos else "--bos")
    evaluated = {
        options: run("eval", with_bos, "--data", place.text, *options, "--json").json["perplexity"]
        for options in ((), ("--bos",), ("--no-bos",))
    }
    assert evaluated[()] == evaluated[("--bos",)] != evaluated[("--no-bos",)]
    assert original() == pytest.approx(evaluated[(option,)], rel=1e-6)
    del calibration["bos"]  # such as from the library, which does not know: as the tokenizer does
    config_file.write_text(json.dumps(config))
    assert original() == original("--bos")


def test_ids_outside_the_embedding_are_refused(
    unknown_token: tuple[Path, Path], run: Run, tmp_path: Path
) -> None:
    folder, text = unknown_token
    fault = "token id 257 in sequence {}, token {}, but the model's embedding has 257 rows"
    done = run("eval", folder, "--data", text, "--seq-len", "32", "--json")
    assert done.code == 1 and f"text {text}: {fault.format(2, 6)}" in done.words and not done.out
    done = run("generate", folder, "fox <extra>", "--json")
    assert done.code == 1 and f"the prompt: {fault.format(0, 4)}" in done.words
    out = tmp_path / "out"
    done = run("quantize", folder, "-o", out, "--calib", text, "--seq-len", "32")
    assert done.code == 1 and fault.split("{}")[0] in done.words and "calibrating" not in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["samples", "held_out"])
@pytest.mark.parametrize("token", [257, -1])
def test_the_library_refuses_ids_outside_the_embedding(name: str, token: int) -> None:
    sets = {"samples": torch.ones(4, 16).long(), "held_out": torch.ones(2, 16).long()}
    sets[name][1, 7] = token
    fault = rf"^{name}: token id {token} in sequence 1, token 7, but .* has 257 rows$"
    with pytest.raises(InputError, match=fault):
        fgmp.quantize(a_model(), sets["samples"], held_out=sets["held_out"])


def test_compare_refuses_ids_outside_the_embedding(
    unknown_token: tuple[Path, Path], place: Place, run: Run, tmp_path: Path
) -> None:
    folder, text = unknown_token
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(place.checkpoint, checkpoint)
    done = run("compare", folder, checkpoint, "--data", text, "--seq-len", "32", "--json")
    assert done.code == 1 and f"text {text}: token id 257 in sequence 2, token 6" in done.words


def test_bytes_that_are_not_utf8_are_refused_before_work(
    place: Place, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "Source", None)  # nothing may be loaded
    bad = os.fsdecode(b"\xff")
    done = run("generate", place.model, f"ab{bad}c")
    assert done.code == 1 and "the prompt is not valid UTF-8 at character 2" in done.words
    done = run("quantize", place.model, "-o", f"{tmp_path}/{bad}", "--calib", place.text)
    assert done.code == 1 and "the path is not valid UTF-8 at character" in done.words
    options = ("-o", tmp_path / "out", "--calibration", f"{tmp_path}/{bad}")
    done = run("quantize", place.model, *options, "--calib", place.text)
    assert done.code == 1 and "the path is not valid UTF-8 at character" in done.words
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_text_may_have_any_name(place: Place, run: Run, tmp_path: Path) -> None:
    text = tmp_path / os.fsdecode(b"t\xff.txt")
    try:
        shutil.copy(place.text, text)
    except OSError:
        pytest.skip("file names must be UTF-8 here")
    quantize = ("quantize", place.model, "-o", tmp_path / "out", "--calib", text, *SMALL)
    run(*quantize, "--clip", "off", "--json").json  # noqa: B018 - raises unless the exit code is 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["calibration"]["text"] == "t?.txt"


def test_windows_fit_a_model_that_names_its_context_otherwise(
    place: Place, run: Run, tmp_path: Path
) -> None:
    from transformers import MptConfig

    torch.manual_seed(0)
    config = MptConfig(d_model=32, n_heads=2, n_layers=1, vocab_size=257, max_seq_len=48)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mpt")
    a_tokenizer().save_pretrained(tmp_path / "mpt")
    facts = run("eval", tmp_path / "mpt", "--data", place.text, "--json").json
    assert facts["tokens"] == len(TEXT) // 48 * 47
