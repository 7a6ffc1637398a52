"""Families of models: what of each is quantized, and whether its checkpoint is the same model.

    python runs/families.py [--only NAME ...] [--json FILE]

Every family of :data:`FAMILIES` is built from a tiny configuration with random weights, written to
a folder, and quantized as ``fgmp quantize`` does, compensation included. The checkpoint is written
and loaded again. Its logits and the tokens it generates must be those of the model before writing,
bit for bit. What is not quantized is listed by name, indices as ``*``, with the reason.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from provenance import provenance
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from fgmp import InputError, Recipe, load, quantize, save
from fgmp.model.select import linearize, other_linears, output_head, routers, shared_weights
from fgmp.model.source import Source
from fgmp.model.store import config_of

VOCABULARY = 128
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "num_key_value_heads": 4,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_MAMBA2 = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "state_size": 16,
    "num_heads": 8,
    "head_dim": 16,
    "n_groups": 2,
    "chunk_size": 8,
}


def _of(model_type: str, **sizes: Any) -> Callable[[], PretrainedConfig]:
    def make() -> PretrainedConfig:
        config: PretrainedConfig = AutoConfig.for_model(model_type, **sizes)
        return config

    return make


def _as_llama(model_type: str, **more: Any) -> Callable[[], PretrainedConfig]:
    return _of(model_type, **{**_SIZES, **more})


FAMILIES: dict[str, Callable[[], PretrainedConfig]] = {
    "Llama": _as_llama("llama", tie_word_embeddings=True),
    "Mistral": _as_llama("mistral", head_dim=16),
    "Qwen2": _as_llama("qwen2"),
    "Qwen3": _as_llama("qwen3", head_dim=16),
    "Qwen3-MoE": _as_llama("qwen3_moe", head_dim=16, **_EXPERTS),
    "Mixtral": _as_llama("mixtral", **_LOCAL_EXPERTS),
    "Gemma": _as_llama("gemma", head_dim=16),
    "Gemma 2": _as_llama("gemma2", head_dim=16),
    "Gemma 3": _as_llama("gemma3_text", head_dim=16),
    "Gemma 3, vision": _of(
        "gemma3",
        text_config={**_SIZES, "head_dim": 16},
        vision_config=_VISION,
        mm_tokens_per_image=4,
        image_token_index=127,
    ),
    "GPT-2": _of("gpt2", **_GPT, bos_token_id=1, eos_token_id=2),
    "GPT-J": _of("gptj", **_GPT, rotary_dim=8, bos_token_id=1, eos_token_id=2),
    "GPT-NeoX": _as_llama("gpt_neox"),
    "GPTBigCode": _of("gpt_bigcode", **_GPT, bos_token_id=1, eos_token_id=2),
    "GPT-OSS": _as_llama("gpt_oss", head_dim=16, **_LOCAL_EXPERTS),
    "OPT": _as_llama("opt", ffn_dim=96, word_embed_proj_dim=64),
    "Bloom": _of("bloom", vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "MPT": _of("mpt", vocab_size=VOCABULARY, d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
    "Falcon, 7B": _as_llama("falcon", alibi=False, multi_query=True, parallel_attn=True),
    "Falcon, 40B": _as_llama("falcon", new_decoder_architecture=True, num_kv_heads=2),
    "Phi": _as_llama("phi", partial_rotary_factor=0.5),
    "Phi-3": _as_llama("phi3"),
    "StableLM": _as_llama("stablelm"),
    "Starcoder2": _as_llama("starcoder2"),
    "OLMo 2": _as_llama("olmo2"),
    "Cohere": _as_llama("cohere"),
    "GLM-4": _as_llama("glm4", head_dim=16),
    "SmolLM3": _as_llama("smollm3"),
    "Granite": _as_llama("granite"),
    "GraniteMoE": _as_llama("granitemoe", **_LOCAL_EXPERTS),
    "DeepSeek-V2": _as_llama("deepseek_v2", **_LATENT),
    "DeepSeek-V3": _as_llama("deepseek_v3", **_LATENT),
    "HunYuan-MoE": _as_llama("hunyuan_v1_moe", head_dim=16, num_experts=4, moe_topk=2),
    "LFM2": _as_llama(
        "lfm2", layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False
    ),
    "Mamba": _of("mamba", vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8),
    "Mamba 2": _of("mamba2", **_MAMBA2),
    "Jamba": _as_llama(
        "jamba",
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "Zamba2": _as_llama(
        "zamba2",
        num_hidden_layers=4,
        layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
        num_mem_blocks=1,
        num_key_value_heads=4,
        mamba_d_state=16,
        mamba_headdim=16,
        mamba_ngroups=1,
        chunk_size=8,
        adapter_rank=16,
        use_shared_attention_adapter=True,
    ),
}
"""Configurations by family."""


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        family: its name.
        model_class: class of Transformers.
        quantized_share: of the elements of all matrices that multiply activations.
        unquantized: reasons by name of a matrix, indices as ``*``.
        reload_equal: whether the loaded checkpoint has the same logits, bit for bit.
        generation_equal: whether it generates the same tokens.
        refused: the error, if the family is not quantized; the fields above then say nothing.
    """

    family: str
    model_class: str
    quantized_share: float = 0.0
    unquantized: dict[str, str] = field(default_factory=dict)
    reload_equal: bool = False
    generation_equal: bool = False
    refused: str = ""


def make_model(family: str) -> nn.Module:
    """A random model with weights large enough that its predictions depend on its input."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and "embed" not in name:
            parameter.data.normal_(0, 0.08)
    return model


def tokens() -> Tensor:
    """Token windows, int64 (8, 24), without the special ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY - 1, (8, 24), generator=generator)


@torch.no_grad()
def outputs(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Logits of one window, and tokens generated after its first eight."""
    window = tokens()[:1]
    logits = model(input_ids=window).logits
    options = {"max_new_tokens": 8, "do_sample": False}
    generated = model.generate(  # type: ignore[operator]
        window[:, :8], attention_mask=torch.ones_like(window[:, :8]), **options
    )
    return logits, generated


def measure(family: str, folder: Path) -> Row:
    """Quantize one family and read it back; ``folder`` is empty and takes the files."""
    model = make_model(family)
    class_name = type(model).__name__
    model.save_pretrained(folder / "source")  # type: ignore[operator]
    source = Source(str(folder / "source"))
    original = source.load()
    source.require_every_tensor(original)
    try:
        quantized = quantize(original, tokens(), Recipe(clip="off"))
    except InputError as error:
        return Row(family, class_name, refused=str(error))
    save(quantized, folder / "out")
    before, after = outputs(quantized), outputs(load(folder / "out"))
    return Row(
        family,
        class_name,
        config_of(quantized).result["quantized_share"],
        reasons(quantized, make_model(family)),
        *(torch.equal(one, other) for one, other in zip(before, after, strict=True)),
    )


def reasons(quantized: nn.Module, original: nn.Module) -> dict[str, str]:
    """Why matrices of a quantized model are not quantized, by name, indices as ``*``."""
    linearize(original)
    result = {}
    for name in config_of(quantized).result["unquantized"]:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        result[key] = _reason(original, name.rpartition(".")[0])
    return result


def _reason(original: nn.Module, name: str) -> str:
    module = original.get_submodule(name)
    embeddings = {id(m.weight) for m in original.modules() if isinstance(m, nn.Embedding)}
    if module is output_head(original):
        return f"output head{', tied' * (id(module.weight) in embeddings)}"
    if any(name == router or name.startswith(f"{router}.") for router in routers(original)):
        return "router"
    if name in (others := other_linears(original)):
        return f"{others[name]} computes something else than a linear"
    if not isinstance(module, nn.Linear):
        return f"not a linear but {type(module).__name__}"
    linears = {n: m for n, m in original.named_modules() if isinstance(m, nn.Linear)}
    if name in {n for pair in shared_weights(linears).items() for n in pair}:
        return "weight of several linears"
    return "no calibration tokens as a linear"


def sweep(names: list[str]) -> dict[str, Any]:
    """Measure these families."""
    rows = []
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(asdict(measure(name, Path(folder))))
    return {**provenance(), "transformers": transformers.__version__, "rows": rows}


def table(facts: dict[str, Any]) -> list[str]:
    """Lines of a Markdown table, and what it was made with."""
    lines = [
        "| family | class | quantized | logits after reload | generation | not quantized, why |",
        "|---" * 6 + "|",
    ]
    for row in facts["rows"]:
        cells = [row["family"], f"`{row['model_class']}`"]
        if row["refused"]:
            cells += ["0", "", "", f"all: {row['refused']}"]
        else:
            equal = (row["reload_equal"], row["generation_equal"])
            cells += [f"{row['quantized_share']:.1%}"]
            cells += ["equal" if same else "**differ**" for same in equal]
            cells.append(_listed(row["unquantized"]))
        lines.append(f"| {' | '.join(cells)} |")
    versions = f"torch {facts['torch']}, transformers {facts['transformers']}"
    return [*lines, "", f"{versions}, revision {facts['revision']}."]


def _listed(unquantized: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in unquantized.items():
        by_reason.setdefault(reason, []).append(f"`{name.removesuffix('.weight')}`")
    return "; ".join(f"{reason}: {', '.join(names)}" for reason, names in by_reason.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, too")
    args = parser.parse_args()
    facts = sweep(args.only)
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n")
    print("\n".join(table(facts)))


if __name__ == "__main__":
    main()
