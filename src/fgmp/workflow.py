"""What the commands do, from names of models and texts to plain results.

Each function is one command without its parsing and printing.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from fgmp.data import (
    choose_windows,
    digest,
    evaluation_windows,
    overlap_with,
    read_documents,
    tokenize,
)
from fgmp.demo.text import docstrings, standard_library
from fgmp.errors import FGMPError, InputError
from fgmp.evaluation import compare as comparison
from fgmp.evaluation.compare import Row
from fgmp.evaluation.perplexity import batches
from fgmp.evaluation.perplexity import evaluate as evaluate_windows
from fgmp.model.cache import PackedCache, packed_cache, require_kind
from fgmp.model.linear import sites
from fgmp.model.source import context_length, is_quantized, load_model, load_tokenizer
from fgmp.model.store import config_of, save
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import QUANT_METHOD
from fgmp.pipeline import least_bytes, quantize, uniform
from fgmp.progress import Stages, silent
from fgmp.recipe import Recipe
from fgmp.unfinished import forget

_LONGEST_WINDOW = 2048
_DRIFT_WARNING = 0.03
_CACHE_SAMPLES, _CACHE_SEQ_LEN = 8, 256
"""Calibration of a KV cache: largest magnitudes and one quantile need no more."""


@dataclass(frozen=True)
class Reporter:
    """Where progress and remarks go; the default is nowhere."""

    stages: Stages = silent
    line: Callable[[str], None] = lambda text: None


@dataclass(frozen=True)
class Comparison:
    """Rows, the share of matmul parameters that is quantized, the matrices that are not, and the
    share of windows that repeat calibration text, where the checkpoint knows it."""

    rows: list[Row]
    quantized_share: float | None
    unquantized: list[str]
    calibration_overlap: float | None = None


def coverage(model: torch.nn.Module) -> dict[str, Any]:
    """``quantized_share`` and ``unquantized`` of a packed model."""
    result = config_of(model).result
    return {
        "quantized_share": result.get("quantized_share"),
        "unquantized": result.get("unquantized", []),
    }


def quantize_to(
    model_name: str,
    output: Path,
    recipe: Recipe,
    calibration: str | None = None,
    reporter: Reporter | None = None,
    saved: Path | None = None,
) -> dict[str, Any]:
    """Quantize a model by name and write the checkpoint; the summary that the command prints.

    ``saved`` is a file that keeps the calibration for other recipes on the same model and text.
    """
    reporter = reporter or Reporter()
    started = time.perf_counter()
    checkpoint.require_free(output)
    target = output.absolute()
    if saved is not None and not saved.exists():
        checkpoint.require_writable(saved)
        if target in (saved.absolute(), *saved.absolute().parents):
            raise InputError(f"{saved}: lies in {output}, which must be empty until the end")
    if is_quantized(model_name):
        raise InputError(f"model {model_name}: already quantized, by {QUANT_METHOD!r}")
    # The text comes before the model, whose loading may take minutes.
    source = calibration or "docstrings of the Python library"
    documents = read_documents(calibration) if calibration else docstrings(standard_library())
    tokenizer = load_tokenizer(model_name)
    stream = tokenize(list(documents), tokenizer)
    model = load_model(model_name)
    seq_len = min(recipe.seq_len, context_length(model))
    text = choose_windows(
        stream, samples=recipe.samples, seq_len=seq_len, seed=recipe.seed, source=source
    )
    if len(text.samples) < text.asked:
        reporter.line(
            f"the calibration text gives {len(text.samples)} sequences of {seq_len} tokens, "
            f"fewer than the {text.asked} asked for"
        )
    checkpoint.require_space(output, least_bytes(model, recipe))
    state = saved or target.parent / f".{target.name}.calibration.safetensors"
    unfinished = target.parent / f".{target.name}.unfinished"
    try:
        quantize(
            model,
            text.samples,
            recipe,
            held_out=text.held_out,
            state=state,
            reuse=saved is not None,
            unfinished=unfinished,
            progress=reporter.stages,
            report=reporter.line,
        )
        config = config_of(model)
        config.calibration.update(
            text=Path(calibration).name if calibration else "docstrings",
            fingerprint=text.fingerprint,
            seq_len=seq_len,
            # The held-out slice decided too, so a figure on it would be flattered as well.
            digest=digest(torch.cat([text.samples, text.held_out]), tokenizer),
        )
        save(model, output, tokenizer)
    except (KeyboardInterrupt, FGMPError):
        kept = [str(path) for path in (state, unfinished) if path.exists() and path != saved]
        if kept:
            reporter.line(
                f"what is done is kept in {' and '.join(kept)}: the same command goes on from it"
            )
        raise
    forget(unfinished)
    if saved is None:
        state.unlink(missing_ok=True)
    result = config.result
    return {
        "output": str(output),
        "fp4_fraction": {
            "weights": result["fp4_weights"],
            "activations": result["fp4_activations"],
        },
        **coverage(model),
        "bits_per_weight": result["bits_per_weight"],
        "bytes": sum(f.stat().st_size for f in checkpoint.tensor_files(output)),
        "tensor_bytes": result["tensor_bytes"],
        "budget": result["budget"],
        "clip": result["clip"],
        "uniform": result["uniform"],
        "tune": result.get("tune", {}),
        "seconds": time.perf_counter() - started,
        "peak_bytes": result["peak_bytes"],
    }


def evaluate_model(
    name: str,
    data: str,
    seq_len: int | None = None,
    reporter: Reporter | None = None,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a model or checkpoint by name, with a packed KV cache if ``kv_cache`` says."""
    reporter = reporter or Reporter()
    if kv_cache:
        require_kind(kv_cache)
    documents = read_documents(data)  # before the model, whose loading may take minutes
    tokenizer, model = load_tokenizer(name), load_model(name)
    windows = evaluation_windows(data, tokenizer, _window_length(model, seq_len), documents)
    cache = _packed_cache(model, tokenizer, kv_cache) if kv_cache else None
    stored = 0

    comparison.start_counting(model)
    with reporter.stages("evaluating", len(batches(windows))) as advance:

        def count() -> None:
            nonlocal stored
            stored += cache.nbytes if cache else 0
            advance()

        losses = evaluate_windows(model, windows, count, cache)
    quantized = bool(sites(model))
    facts: dict[str, Any] = {
        "perplexity": losses.perplexity,
        "nll": losses.nll,
        "tokens": losses.tokens,
        "fp4_activations": comparison.activation_fraction(model) if quantized else None,
    }
    if cache:
        facts |= _cache_facts(kv_cache, stored / windows.numel(), cache)
    if quantized:
        _warn_of_drift(model, reporter)
        facts["saturated"] = comparison.saturated_elements(model)
        facts["drift"] = comparison.drift(model, _calibrated(model))
        facts["calibration_overlap"] = _warn_of_overlap(model, windows, tokenizer, reporter)
        facts |= coverage(model)
    return facts


def compare_models(
    model_name: str,
    directory: Path,
    data: str,
    seq_len: int | None = None,
    reporter: Reporter | None = None,
) -> Comparison:
    """Original, all-FP8, all-NVFP4 and the checkpoint in ``directory``, on the same windows."""
    reporter = reporter or Reporter()
    checkpoint.read_config(directory)
    if is_quantized(model_name):
        raise InputError(f"model {model_name}: the original must not be quantized")
    documents = read_documents(data)
    tokenizer = load_tokenizer(model_name)
    original, mixed = load_model(model_name), load_model(str(directory))
    windows = evaluation_windows(data, tokenizer, _window_length(original, seq_len), documents)
    models = {
        "fp8": uniform(load_model(model_name), mixed, "fp8", 0.0),
        "nvfp4": uniform(load_model(model_name), mixed, "nvfp4", 1.0),
        "fgmp": mixed,
    }
    rows = comparison.compare(original, models, windows, reporter.stages)
    _warn_of_drift(mixed, reporter)
    repeated = _warn_of_overlap(mixed, windows, tokenizer, reporter)
    return Comparison(rows, **coverage(mixed), calibration_overlap=repeated)


def generate_text(
    name: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    stream: Callable[[str], None] | None = None,
    kv_cache: str | None = None,
) -> dict[str, Any]:
    """Continue a prompt; ``stream`` gets the text as it comes.

    The KV cache keeps the model's precision unless ``kv_cache`` names a packed one.
    """
    if kv_cache:
        require_kind(kv_cache)
    tokenizer, model = load_tokenizer(name), load_model(name)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    room = context_length(model) - length
    if length == 0 or room < 1:
        raise InputError(f"the prompt has {length} tokens; it must have 1 to {length + room - 1}")
    cache = _packed_cache(model, tokenizer, kv_cache) if kv_cache else None
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {}
    started = time.perf_counter()
    ids = model.generate(  # type: ignore[operator]
        **inputs,
        max_new_tokens=min(max_new_tokens, room),
        streamer=_Streamer(tokenizer, stream) if stream else None,
        pad_token_id=tokenizer.eos_token_id,
        **({"past_key_values": cache} if cache else {}),
        **(sampling or {"do_sample": False}),
    )
    seconds = time.perf_counter() - started
    made = ids[0, length:]
    return {
        "text": tokenizer.decode(made, skip_special_tokens=True),
        "tokens": len(made),
        "tokens_per_second": len(made) / seconds,
        **(_cache_facts(kv_cache, cache.bytes_per_token, cache) if cache else {}),
    }


def _packed_cache(model: torch.nn.Module, tokenizer: Any, kind: str | None) -> PackedCache:
    """An empty packed KV cache; its scales come from docstrings of the Python library."""
    assert kind is not None
    stream = tokenize(list(docstrings(standard_library())), tokenizer)
    length = min(_CACHE_SEQ_LEN, context_length(model))
    text = choose_windows(
        stream, samples=_CACHE_SAMPLES, seq_len=length, seed=0, source="docstrings"
    )
    return packed_cache(model, text.samples, kind)


def _cache_facts(kind: str | None, bytes_per_token: float, cache: PackedCache) -> dict[str, Any]:
    return {
        "kv_cache": kind,
        "kv_bytes_per_token": bytes_per_token,
        "kv_bytes_per_token_bf16": cache.values_per_token * torch.bfloat16.itemsize,
    }


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands finished words to a function."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._write = write

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self._write(text)


def _window_length(model: torch.nn.Module, asked: int | None) -> int:
    if asked is not None and asked < 2:
        raise InputError(f"seq-len must be at least 2, got {asked}")
    context = context_length(model)
    if asked is not None and asked > context:
        raise InputError(f"seq-len must fit the model's context of {context}, got {asked}")
    return asked or min(context, _LONGEST_WINDOW)


def _calibrated(model: torch.nn.Module) -> dict[str, float]:
    return {owner: site.fp4_fraction for owner, site in config_of(model).sites.items()}


def _warn_of_drift(model: torch.nn.Module, reporter: Reporter) -> None:
    """Say which sites keep far more or fewer blocks in FP4 here than on the calibration text."""
    moved = {
        name: by
        for name, by in comparison.drift(model, _calibrated(model)).items()
        if abs(by) > _DRIFT_WARNING and math.isfinite(by)
    }
    if moved:
        worst = max(moved, key=lambda name: abs(moved[name]))
        reporter.line(
            f"warning: {len(moved)} sites run in FP4 for a share more than 3 points off their "
            f"calibrated one; the furthest is {worst}, {100 * moved[worst]:+.1f} points"
        )


def _warn_of_overlap(
    model: torch.nn.Module, windows: torch.Tensor, tokenizer: Any, reporter: Reporter
) -> float | None:
    """Say which share of the windows repeats text that the model was calibrated on."""
    known = config_of(model).calibration.get("digest")
    if not isinstance(known, str):
        return None
    share = overlap_with(known, windows, tokenizer)
    if share:
        reporter.line(
            f"warning: {share:.1%} of the evaluation windows or more repeat text that the model "
            "was calibrated on; their figures flatter it"
        )
    return share
