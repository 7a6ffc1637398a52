"""Train the demonstration model that ships in ``fgmp.demo``, a 3.7M-parameter Llama, and others.

    python runs/train.py --work WORK --out src/fgmp/demo/model
    python runs/train.py --model gpt-neox --steps 700 --work WORK --out gpt-neox

Text: docstrings of the standard library and of the packages installed beside it (the model
card lists them with their versions), minus every paragraph that shares ten words in a row
with ``pydoc_data.topics``, the evaluation text. Hidden matrices are trained with Muon, the
rest with AdamW; the learning rate is constant, then falls linearly to zero over the last
``--decay`` share of the steps. WORK keeps the token stream and a resumable state: run the
same command again after an interruption and it goes on where it stopped.
"""

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import sysconfig
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

from fgmp.demo.text import docstrings, standard_library, topics

CONTEXT = 512
VOCABULARY = 2048
COMMON = {
    "vocab_size": VOCABULARY,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "demo": LlamaConfig(
        **COMMON,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
    "gpt-neox": GPTNeoXConfig(
        **COMMON,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        tie_word_embeddings=True,
    ),
    "llama-30m": LlamaConfig(
        **COMMON,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        rms_norm_eps=1e-6,
        tie_word_embeddings=True,
    ),
}
"""What can be trained, by the value of ``--model``; the last one wants a GPU."""
STANDARD_LIBRARY_REPEATS = 3


def corpus(work: Path) -> tuple[np.ndarray, dict]:
    """Token stream (uint16) of the training text, and what it was made of; cached in ``work``."""
    tokens_file, facts_file = work / "tokens.npy", work / "corpus.json"
    if facts_file.exists():
        return np.load(tokens_file, mmap_mode="r"), json.loads(facts_file.read_text())
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    library = list(docstrings(standard_library()))
    documents = list(docstrings(packages)) + library * STANDARD_LIBRARY_REPEATS
    order = np.random.default_rng(0).permutation(len(documents))
    documents = [documents[i] for i in order]

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
    ).save_pretrained(work / "tokenizer")
    encoded = tokenizer.encode_batch(documents)
    tokens = np.concatenate([np.array([0, *e.ids], dtype=np.uint16) for e in encoded])
    np.save(tokens_file, tokens)
    facts = {
        "documents": len(documents),
        "characters": sum(map(len, documents)),
        "standard_library_characters": sum(map(len, library)),
        "tokens": len(tokens),
        "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        "python": platform.python_version(),
        "packages": sorted(
            f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()
        ),
    }
    facts_file.write_text(json.dumps(facts, indent=1))
    return tokens, facts


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(
            matrices, lr=lr, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_on(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean next-token loss in nats over ``windows``, int64 (B, CONTEXT)."""
    model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in windows.split(8):
            with torch.autocast("cpu", torch.bfloat16):
                total += model(input_ids=batch, labels=batch).loss.item() * len(batch)
    model.train()
    return total / len(windows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=CONFIGS, default="demo")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16, help="sequences a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of steps that decay")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    tokens, facts = corpus(args.work)
    print(f"{facts['tokens'] / 1e6:.1f}M tokens, {facts['characters'] / 1e6:.1f}M characters")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    held_out = torch.tensor(tokenizer(topics())["input_ids"])
    held_out = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    model = AutoModelForCausalLM.from_config(CONFIGS[args.model], dtype=torch.float32)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.2f}M parameters")
    opts = optimizers(model, args.lr)
    state_file = args.work / "state.pt"
    start, seconds = 0, 0.0
    if state_file.exists():
        state = torch.load(state_file)
        model.load_state_dict(state["model"])
        for opt, saved in zip(opts, state["opts"], strict=True):
            opt.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
    step_fn = torch.compile(model)

    begun = time.perf_counter() - seconds
    for step in range(start, args.steps):
        share_left = (args.steps - step) / args.steps
        lr = args.lr * min(1.0, (step + 1) / 50, share_left / args.decay)
        # A generator of the step alone, so that a resumed run sees the same batches.
        rng = np.random.default_rng((args.seed, step))
        at = rng.integers(0, len(tokens) - CONTEXT, args.batch)
        batch = torch.from_numpy(np.stack([tokens[i : i + CONTEXT] for i in at]).astype(np.int64))
        with torch.autocast("cpu", torch.bfloat16):
            loss = step_fn(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr
            opt.step()
            opt.zero_grad()
        if step % 20 == 0:
            rate = (
                (step + 1 - start) * args.batch * CONTEXT / (time.perf_counter() - begun - seconds)
            )
            print(f"step {step} loss {loss.item():.4f} lr {lr:.2e} {rate:.0f} tokens/s", flush=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            seconds_now = time.perf_counter() - begun
            torch.save(
                {
                    "model": model.state_dict(),
                    "opts": [o.state_dict() for o in opts],
                    "step": step + 1,
                    "seconds": seconds_now,
                },
                args.work / "state.tmp",
            )
            (args.work / "state.tmp").replace(state_file)
            held = loss_on(model, held_out[:48])
            print(f"step {step + 1} topics {held:.4f} after {seconds_now:.0f} s", flush=True)

    final = loss_on(model, held_out)
    model.to(torch.bfloat16).save_pretrained(args.out)
    AutoConfig.from_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts |= {
        "parameters": count,
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * CONTEXT,
        "learning_rate": args.lr,
        "seed": args.seed,
        "topics_loss_nats": final,
        "topics_perplexity": math.exp(final),
        "seconds": time.perf_counter() - begun,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"topics: {final:.4f} nats, perplexity {math.exp(final):.2f}")


if __name__ == "__main__":
    main()
