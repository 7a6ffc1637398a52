"""``fgmp plan``: from a folder with nothing but a configuration, in seconds."""

import json
from pathlib import Path
from typing import Any

import pytest

from fgmp.app import commands
from fgmp.recipe import Recipe

from .cases import Place, Run

# Shapes as published with the models.
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}
LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "dtype": "bfloat16",
}
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}


def folder_of(config: dict[str, Any], folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("config", "parameters", "quantized"),
    [
        # All but two tables of 32,000 rows and the norms: 4 projections, 3 of the MLP.
        (LLAMA_2_7B, 6_738_415_616, 32 * (4 * 4096**2 + 3 * 4096 * 11008)),
        (MIXTRAL_8X7B, 46_702_792_704, 32 * (2 * 4096 * 5120 + 8 * 3 * 4096 * 14336)),
        pytest.param(
            *(LLAMA_3_70B, 70_553_706_496, 80 * (2 * 8192 * 9216 + 3 * 8192 * 28672)),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(QWEN3_30B_A3B, 30_532_122_624, 48 * (2 * 2048 * 4608 + 128 * 3 * 2048 * 768)),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["llama-2-7b", "mixtral-8x7b", "llama-3-70b", "qwen3-30b-a3b"],
)
def test_large_models(
    config: dict[str, Any], parameters: int, quantized: int, tmp_path: Path
) -> None:
    plan = commands.plan_run(folder_of(config, tmp_path), Recipe(), dtype="stored")
    assert (plan.parameters, plan.quantized_parameters) == (parameters, quantized)
    asked, wide = plan.asked, config["dtype"] == "float16"
    assert asked.dtype == ("float32" if wide else "bfloat16")
    # 30% of blocks in FP8 are 5.55 bits, scale bytes of FP8 blocks and row counters the rest.
    assert 5.70 < asked.bits_per_weight < 5.73
    rest = 2 * (parameters - quantized)  # stored in two bytes
    assert asked.checkpoint_bytes == pytest.approx(
        asked.bits_per_weight * quantized / 8 + rest, rel=0.002
    )
    assert asked.memory.fisher == 4 * quantized
    assert asked.memory.held > (4 if wide else 2) * parameters
    assert asked.memory.peak > asked.memory.held + asked.memory.fisher


def test_fewer_layers_of_every_large_model(tmp_path: Path) -> None:
    """The shapes are followed in the default tests too, with two layers."""
    for config in (LLAMA_3_70B, QWEN3_30B_A3B):
        name = folder_of({**config, "num_hidden_layers": 2}, tmp_path)
        plan = commands.plan_run(name, Recipe(), dtype="stored")
        heads = config.get("head_dim", 128) * config["num_attention_heads"]
        keys = config.get("head_dim", 128) * config["num_key_value_heads"]
        experts, width = config.get("num_experts", 1), config["hidden_size"]
        inner = config.get("moe_intermediate_size", config["intermediate_size"])
        layer = 2 * width * (heads + keys) + experts * 3 * width * inner
        assert plan.quantized_parameters == 2 * layer


def test_json_and_lines(run: Run, tmp_path: Path) -> None:
    small = {**LLAMA_2_7B, "num_hidden_layers": 1, "hidden_size": 256, "intermediate_size": 512}
    name = folder_of({**small, "num_attention_heads": 4, "num_key_value_heads": 4}, tmp_path)
    facts = run("plan", name, "--samples", "64", "-o", tmp_path / "out", "--json").json
    assert facts.keys() == {
        *("model", "parameters", "quantized_parameters", "quantized_share", "asked"),
        *("memory_limit", "time_limit", "disk_free", "fits", "changes", "changed"),
    }
    assert facts["asked"].keys() == {
        *("samples", "seq_len", "dtype", "memory_bytes", "memory", "seconds"),
        *("seconds_calibration", "checkpoint_bytes", "resume_bytes", "bits_per_weight"),
    }
    assert (facts["fits"], facts["changes"], facts["changed"]) == (None, {}, None)
    assert facts["asked"]["samples"] == 64 and facts["disk_free"] > 0
    assert not (tmp_path / "out").exists()
    needed = facts["asked"]["memory_bytes"]
    fits = run("plan", name, "--memory", 2 * needed, "--json").json
    assert (fits["fits"], fits["changes"], fits["changed"]) == (True, {}, None)
    limited = run("plan", name, "--memory", needed - facts["asked"]["memory"]["fisher"] // 2)
    assert "not as asked, but with" in limited.words and "peak memory, then" in limited.words
    none = run("plan", name, "--time", "1s", "--memory", "1M")
    assert "no, and with no change of options that is tried" in none.words
    none = run("plan", name, "--memory", "1M", "--json").json
    assert (none["fits"], none["changes"], none["changed"]) == (False, None, None)


def test_plan_and_quantize_agree(run: Run, place: Place, tmp_path: Path) -> None:
    options = ("--samples", "6", "--seq-len", "32")
    plan = run("plan", place.model, *options, "--json").json["asked"]
    facts = run("quantize", place.model, "-o", tmp_path / "out", "--calib", place.text, *options)
    assert facts.code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert plan["checkpoint_bytes"] == pytest.approx(config["result"]["tensor_bytes"], rel=0.05)
    measured = json.loads((tmp_path / "out" / "fgmp_run.json").read_text())
    assert plan["memory_bytes"] == pytest.approx(measured["peak_bytes_predicted"], rel=0.2)


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}, (), "T5Config"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, (), "not a causal language model"),
        ({"model_type": "no-such-model"}, (), "cannot be loaded"),
        (
            {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
            (),
            "--trust-remote-code (trust_remote_code=True) runs them",
        ),
        (
            {**LLAMA_2_7B, "quantization_config": {"quant_method": "gptq", "bits": 4}},
            (),
            "already quantized, by 'gptq'",
        ),
        (LLAMA_2_7B, ("--memory", "much"), "memory must be a size such as 500M or 8G"),
        (LLAMA_2_7B, ("--time", "long"), "time must be such as 90s, 45min, 3h or 2d"),
        (LLAMA_2_7B, ("--fp4", "2"), "fp4 must be a fraction from 0 to 1"),
    ],
)
def test_refusals(
    config: dict[str, Any], options: tuple[str, ...], message: str, run: Run, tmp_path: Path
) -> None:
    done = run("plan", folder_of(config, tmp_path), *options)
    assert done.code == 1 and done.out == "" and "Traceback" not in done.err
    assert message in done.words, done.words


def test_a_folder_without_configuration_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("plan", tmp_path)
    assert done.code == 1 and "it has no config.json" in done.words
