"""Tiny models that vLLM knows, as checkpoints: every kind of layer and every packing mode.

vLLM's attention on CPUs takes head sizes in multiples of 32, so these models are wider than those
of the other tests.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import fgmp
from fgmp.recipe import Recipe

DEMO = Path(fgmp.__file__).parent / "demo" / "model"
CONTEXT = 128
_SIZES = {
    "vocab_size": 257,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
_MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: LlamaConfig(**_SIZES),
    "qwen2": lambda: Qwen2Config(**{**_SIZES, "tie_word_embeddings": True}),
    "qwen3": lambda: Qwen3Config(**_SIZES),
    "gemma3": lambda: Gemma3TextConfig(
        **{**_SIZES, "tie_word_embeddings": True, "pad_token_id": 0},
        query_pre_attn_scalar=32,
        sliding_window=32,
        architectures=["Gemma3ForCausalLM"],
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=257,
        n_embd=128,
        n_layer=2,
        n_head=4,
        n_positions=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    ),
    "opt": lambda: OPTConfig(
        vocab_size=257,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ),
    "mixtral": lambda: MixtralConfig(**_SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(**_SIZES, **_MIXTURE),
}

_QUICK = {"compensate": False, "clip": "off"}
RECIPES = {
    "mixed": Recipe(fp4=0.7, **_QUICK),
    "nearly-fp4": Recipe(fp4=0.995, **_QUICK),
    "fp4": Recipe(policy="nvfp4", **_QUICK),
    "fp8": Recipe(policy="fp8", **_QUICK),
    "head": Recipe(fp4=0.7, include=("*", "lm_head"), **_QUICK),
}
"""Recipes by name: every mode, q, k and v of different modes, and a quantized output head."""


def a_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and one for the end."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def write_random(
    folder: Path,
    family: str,
    recipe: Recipe = RECIPES["mixed"],
    changes: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of a model with random weights.

    Args:
        folder: to write.
        family: a key of :data:`FAMILIES`.
        recipe: how it is quantized.
        changes: values that the model's configuration has instead.
    """
    torch.manual_seed(0)
    config = FAMILIES[family]()
    config.update(dict(changes or {}))
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data.normal_(0, 0.08)
        elif name.endswith(".bias"):
            parameter.data.normal_(0, 0.1)
    tokens = torch.randint(1, 257, (6, 32), generator=torch.Generator().manual_seed(0))
    fgmp.save(fgmp.quantize(model, tokens, recipe), folder, a_tokenizer())
    return folder


def write_trained(folder: Path, recipe: Recipe) -> Path:
    """Write a checkpoint of the demonstration model, whose predictions have clear margins."""
    model = AutoModelForCausalLM.from_pretrained(DEMO)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer((DEMO / "MODEL_CARD.md").read_text()).input_ids[: 8 * 64]
    fgmp.save(fgmp.quantize(model, torch.tensor(ids).view(8, 64), recipe), folder, tokenizer)
    return folder
