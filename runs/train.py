"""Train the demonstration model that ships in ``fgmp.demo``, a 3.7M-parameter Llama, and others.

    python runs/train.py --work WORK --out src/fgmp/demo/model
    python runs/train.py --model gpt-neox --steps 700 --work WORK --out gpt-neox

Text: docstrings of the standard library and of the packages installed beside it (the model card
lists them with their versions), minus every paragraph that shares ten words in a row with
``pydoc_data.topics``, the evaluation text. Hidden matrices are trained with Muon, the rest with
AdamW. The learning rate is constant, then falls linearly to zero over the last ``--decay`` share of
the steps. WORK holds the token stream and a resumable state: the same command resumes after an
interruption.
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
from typing import Any

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
"""Models by the value of ``--model``; the last one needs a GPU."""

STANDARD_LIBRARY_REPEATS = 3
"""How often the standard library's docstrings are in the training text."""


def train_tokenizer(documents: list[str], folder: Path) -> Tokenizer:
    """Train a byte-level BPE tokenizer and save it to ``folder``."""
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
    ).save_pretrained(folder)
    return tokenizer


def corpus(work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Token stream (uint16) of the training text, and facts about it; cached in ``work``."""
    tokens_file, facts_file = work / "tokens.npy", work / "corpus.json"
    if facts_file.exists():
        return np.load(tokens_file, mmap_mode="r"), json.loads(facts_file.read_text())
    packages = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    library = list(docstrings(standard_library()))
    documents = list(docstrings(packages)) + library * STANDARD_LIBRARY_REPEATS
    order = np.random.default_rng(0).permutation(len(documents))
    documents = [documents[i] for i in order]

    tokenizer = train_tokenizer(documents, work / "tokenizer")
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
    """Muon for hidden matrices, AdamW for the rest."""
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


def batch_at(step: int, tokens: np.ndarray, sequences: int, seed: int) -> torch.Tensor:
    """Sequences of a step, int64 (sequences, CONTEXT); a function of the step, also if resumed."""
    rng = np.random.default_rng((seed, step))
    at = rng.integers(0, len(tokens) - CONTEXT, sequences)
    return torch.from_numpy(np.stack([tokens[i : i + CONTEXT] for i in at]).astype(np.int64))


class Training:
    """A model in training, its optimizers, and the file from which it resumes.

    Args:
        args: options of the command.

    Attributes:
        step, seconds: steps done, and the time they took.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.file = args, args.work / "state.pt"
        self.model = AutoModelForCausalLM.from_config(CONFIGS[args.model], dtype=torch.float32)
        self.optimizers = optimizers(self.model, args.lr)
        self.step, self.seconds = 0, 0.0
        if self.file.exists():
            self.resume()

    def resume(self) -> None:
        """Continue from the stored state."""
        state = torch.load(self.file)
        self.model.load_state_dict(state["model"])
        for optimizer, stored in zip(self.optimizers, state["opts"], strict=True):
            optimizer.load_state_dict(stored)
        self.step, self.seconds = state["step"], state["seconds"]

    def store(self) -> None:
        """Store the state, replacing what was there in one step."""
        draft = self.args.work / "state.tmp"
        torch.save(
            {
                "model": self.model.state_dict(),
                "opts": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
            },
            draft,
        )
        draft.replace(self.file)

    def learning_rate(self) -> float:
        """Rate of the next step: warm-up over 50 steps, constant, linear decay to zero."""
        share_left = (self.args.steps - self.step) / self.args.steps
        return self.args.lr * min(1.0, (self.step + 1) / 50, share_left / self.args.decay)

    def run(self, tokens: np.ndarray, held_out: torch.Tensor) -> None:
        """Train to the last step; print the loss and the loss on ``held_out``, int64 (B, CONTEXT).

        Stores the state every hundred steps.
        """
        forward = torch.compile(self.model)
        first, before = self.step, self.seconds
        started = time.perf_counter() - before
        for step in range(first, self.args.steps):
            batch = batch_at(step, tokens, self.args.batch, self.args.seed)
            lr = self.learning_rate()
            loss = self.update(forward, batch, lr)
            self.step, self.seconds = step + 1, time.perf_counter() - started
            if step % 20 == 0:
                rate = (self.step - first) * self.args.batch * CONTEXT / (self.seconds - before)
                print(f"step {step} loss {loss:.4f} lr {lr:.2e} {rate:.0f} tokens/s", flush=True)
            if self.step % 100 == 0 or self.step == self.args.steps:
                self.store()
                topics_loss = loss_on(self.model, held_out[:48])
                print(f"step {self.step} topics {topics_loss:.4f} after {self.seconds:.0f} s")

    def update(self, forward: Any, batch: torch.Tensor, lr: float) -> float:
        """Take one step; returns its loss in nats."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = forward(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", choices=CONFIGS, default="demo")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--batch", type=int, default=16, help="sequences per step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--decay", type=float, default=0.3, help="share of steps that decay")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokens, facts = corpus(args.work)
    print(f"{facts['tokens'] / 1e6:.1f}M tokens, {facts['characters'] / 1e6:.1f}M characters")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(args.work / "tokenizer")
    held_out = torch.tensor(tokenizer(topics())["input_ids"])
    held_out = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)

    training = Training(args)
    model = training.model
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f}M parameters")
    training.run(tokens, held_out)

    topics_loss = loss_on(model, held_out)
    model.to(torch.bfloat16).save_pretrained(args.out)
    AutoConfig.from_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    facts |= {
        "parameters": parameters,
        "steps": args.steps,
        "tokens_seen": args.steps * args.batch * CONTEXT,
        "learning_rate": args.lr,
        "seed": args.seed,
        "topics_loss_nats": topics_loss,
        "topics_perplexity": math.exp(topics_loss),
        "seconds": training.seconds,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"topics: {topics_loss:.4f} nats, perplexity {math.exp(topics_loss):.2f}")


if __name__ == "__main__":
    main()
