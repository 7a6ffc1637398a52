"""Shared by all tests: small random models of every supported family, and quiet threads."""

import os
import signal
from collections.abc import Callable, Generator
from typing import Any

import pytest
import torch

# Triton kernels run on CPU tensors where no GPU is. Transformers imports Triton, which reads this.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

# A background job starts with Ctrl-C ignored; tests that send it need it back.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Tests run side by side in several processes; more threads than cores makes each 30 times slower.
torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"

_SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    "qwen2": lambda: Qwen2Config(**_SIZES, num_key_value_heads=2),
    "qwen3": lambda: Qwen3Config(**_SIZES, num_key_value_heads=2, head_dim=16),
    "gpt2": lambda: GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "opt": lambda: OPTConfig(
        vocab_size=128,
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=64,
    ),
    "mixtral": lambda: MixtralConfig(
        **_SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    ),
}


def make_model(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model with weights large enough that its predictions depend on its input."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data.normal_(0, 0.08)
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Token windows, int64 (8, 24)."""
    return torch.randint(128, (8, 24), generator=torch.Generator().manual_seed(1))


# --- Skips -------------------------------------------------------------------------------------
# A skipped test argues nothing. Where CI=true, a skip for a reason that is not listed here is a
# failure.

ALLOWED_SKIPS = (
    *("FGMP_LIBERTY", "needs a GPU", "needs Icarus", "needs Verilator"),
    *("needs an ARM compiler", "needs chromium"),
)
"""Parts of the reasons for which a test may be skipped in CI: what a checkout cannot hold."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    return _refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport]:
    return _refuse_skip((yield))


def _refuse_skip(report: Any) -> Any:
    expected = hasattr(report, "wasxfail")
    if os.environ.get("CI") != "true" or not report.skipped or expected:
        return report
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    if not any(allowed in reason for allowed in ALLOWED_SKIPS):
        report.outcome = "failed"
        report.longrepr = f"{reason}: not one of the reasons to skip in CI, {ALLOWED_SKIPS}"
    return report
