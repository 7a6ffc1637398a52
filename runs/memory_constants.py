"""Measure the constants by which ``fgmp.quantization.memory`` predicts the peak of a run.

    python runs/memory_constants.py [--rows N] [--columns K] [--vocabulary V] [--seq-len T] [--json]

``bytes_per_element``: memory for scoring, compensating and packing one weight (N, K), in addition
to it and its Fisher information, divided by its elements. Scores and packed planes, which stay, are
subtracted.

``logits_copies``: memory for a step of quantizing a tiny Llama with a large vocabulary, in addition
to what the prediction counts separately, divided by the bytes of one sequence's logits in fp32.

Both are resident memory by the kernel's count: the peak of the step less what was held before.
"""

import argparse
import ctypes
import gc
import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from provenance import provenance
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from fgmp import Recipe
from fgmp.assign.compensate import Factors, compensated, factorize
from fgmp.assign.frontier import Fractions
from fgmp.assign.policy import POLICIES
from fgmp.assign.weights import ScoredWeights, score_weights
from fgmp.formats.rules import recipe_rules
from fgmp.model.convert import Replacement
from fgmp.model.losses import causal_lm_loss, sampled_label_loss
from fgmp.pack.planes import pack
from fgmp.quantization import memory
from fgmp.quantization.candidates import pack_candidates
from fgmp.quantization.held_out import held_out_metrics
from fgmp.quantization.pipeline import prepare
from fgmp.quantization.scoring import score
from fgmp.quantization.tune import tuned_parameters
from fgmp.sensitivity.fisher import calibrate

CPU = torch.device("cpu")
NAME = "weight"


def return_free_memory() -> None:
    """Let the C library return freed memory to the system, where it can."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def extra_bytes(step: Callable[[], Any]) -> tuple[int, Any]:
    """Peak resident bytes of a step less those held before, and its result."""
    gc.collect()
    return_free_memory()
    memory.reset_peak(CPU)
    before = memory.held_bytes(CPU)
    result = step()
    return memory.peak_bytes(CPU) - before, result


# One weight.


def bytes_per_element(rows: int, columns: int) -> dict[str, float]:
    """Bytes per element of the steps of assignment on one weight."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    fisher = torch.rand(rows, columns, generator=generator)
    sizes = {}
    for rule in recipe_rules():
        for scales in ("nearest", "searched"):
            step = partial(scored, weight, fisher, rule, scales == "searched")
            extra, result = extra_bytes(step)
            stays = result.scales[NAME].nbytes + result.scores[NAME].nbytes
            sizes[f"scoring, rule {rule}, scales {scales}"] = extra - stays
    is_fp8 = result.scores[NAME] > result.scores[NAME].median()
    t = result.t[NAME]
    x = torch.randn(2 * columns, columns, generator=generator)
    root = factorize(x.T @ x)
    assert root is not None
    factors = Factors(root, torch.zeros_like(weight))
    for label, sensitivity in (("nearest", None), ("searched", fisher)):
        extra, codes = extra_bytes(partial(compensated, weight, factors, is_fp8, t, sensitivity))
        sizes[f"compensating, scales {label}"] = extra
    sizes["packing"], _ = extra_bytes(partial(pack, codes, is_fp8))
    return {label: size / (rows * columns) for label, size in sizes.items()}


def scored(weight: Tensor, fisher: Tensor, rule: str, clipped: bool) -> ScoredWeights:
    """Score one weight."""
    policy = POLICIES["fisher"]
    return score_weights(
        {NAME: weight}, {NAME: fisher}, [[NAME]], policy, rule=rule, clipped=clipped
    )


# The logits of one sequence.


def tiny_llama(vocabulary: int, seq_len: int, dtype: torch.dtype) -> LlamaForCausalLM:
    """Random Llama whose logits are larger than everything else."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=seq_len,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def logits_copies(vocabulary: int, seq_len: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes of the steps that compute logits, over those of one sequence's logits in fp32.

    What the prediction counts apart is subtracted: sums of F_w, the working set, tuning's copies of
    parameters.
    """
    model = tiny_llama(vocabulary, seq_len, dtype)
    samples = torch.randint(vocabulary, (2, seq_len), generator=torch.Generator().manual_seed(1))
    recipe = Recipe(clip="off", compensate=False, tune=1, samples=1, seq_len=seq_len)
    task = prepare(model, samples[:1], recipe, held_out=samples[1:]).task
    sizes = {}
    for label, loss in (("model", sampled_label_loss), ("text", causal_lm_loss)):
        counted = memory.estimate(task.model, task.linears, samples[0], loss, 0.0)
        extra, calibration = extra_bytes(
            partial(calibrate, task.model, task.linears, task.samples, loss)
        )
        sizes[f"calibrating, labels {label}"] = extra - counted.fisher - counted.working
    same = {"original": Replacement({})}
    sizes["comparing"], _ = extra_bytes(
        partial(held_out_metrics, task.model, same, task.held_out, causal_lm_loss)
    )
    scores = score(task, calibration)
    (assignment,) = pack_candidates(
        task, scores, calibration.weights, Fractions(0.7, 0.7), scores.variants
    ).values()
    counted = memory.estimate(task.model, task.linears, samples[0], causal_lm_loss, 0.0, tuned=True)
    extra, _ = extra_bytes(partial(tuned_parameters, task, assignment))
    sizes["tuning"] = extra - counted.tuning - counted.working
    one = 4 * seq_len * vocabulary
    return {label: size / one for label, size in sizes.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--columns", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=50_000)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args()
    logging.disable_progress_bar()
    facts: dict[str, Any] = {
        **provenance(),
        "shape": [args.rows, args.columns],
        "vocabulary": args.vocabulary,
        "seq_len": args.seq_len,
        "bytes_per_element": bytes_per_element(args.rows, args.columns),
        "logits_copies": {
            str(dtype).removeprefix("torch."): logits_copies(args.vocabulary, args.seq_len, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        },
    }
    if args.json:
        print(json.dumps(facts, indent=1))
        return
    for label, size in facts["bytes_per_element"].items():
        print(f"{label:<45} {size:6.1f} bytes per element")
    for dtype, copies in facts["logits_copies"].items():
        for label, count in copies.items():
            print(f"{f'{label}, {dtype}':<45} {count:6.2f} copies of the logits")


if __name__ == "__main__":
    main()
