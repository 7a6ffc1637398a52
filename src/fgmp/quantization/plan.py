"""Predict a quantizing run from a model's configuration, before weights are loaded.

The predictions are those of the run itself: :func:`fgmp.quantization.pipeline.predict_memory`,
:func:`fgmp.quantization.duration.predict` and :func:`fgmp.quantization.budget.tensor_bytes`. A run
measures their inputs in passes of the model. Here passes are of *fake tensors*, which have shapes
and dtypes but no memory: they show what autograd saves and layers return, and count operations.
Only the speed is measured, on one matrix product of the model's size and dtype. Attention and
element-wise operations, which take time too, are not in the predicted duration.

Fake tensors have no values, so tokens cannot be routed to experts. Every token's rows go through
one expert instead: shapes, bytes and operations are the same.

If a limit of memory or time is exceeded, options are tried in the order of :func:`ladder`.
"""

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils.flop_counter import FlopCounterMode

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK, FP4_BITS, FP8_BITS
from fgmp.model.losses import causal_lm_loss
from fgmp.model.observe import differentiable_inputs, ends_after, frozen
from fgmp.model.select import Experts, matrices, shared_weights
from fgmp.pack.planes import packed_bytes
from fgmp.quantization import memory
from fgmp.quantization.budget import SITE_BYTES, tensor_bytes
from fgmp.quantization.duration import DurationEstimate
from fgmp.quantization.duration import predict as predict_duration
from fgmp.quantization.memory import MemoryEstimate, fisher_bytes, saved_bytes
from fgmp.quantization.pipeline import predict_memory, select, variants
from fgmp.quantization.sequential import OutputBytes, output_bytes, stage_bytes, stored_bytes
from fgmp.quantization.task import Task
from fgmp.recipe import Recipe
from fgmp.sensitivity.histogram import HISTOGRAM_BYTES

_TOKENS = 128
"""Tokens of the fake sequence; results are scaled to others, as those of a run's own prefix."""
_LARGEST_PRODUCT = 2**24
"""Elements of the largest weight of the timed product; it exceeds most caches."""
_PRODUCTS = 5
"""Times that it is computed; the fastest counts."""
_SCORE_FILE_BYTES = 8 + 1
"""Bytes per block and variant of stored scores: a float64 score and a scale code."""
_TUNED_FILE_BYTES = 12
"""Bytes per tuned parameter of stored values and optimizer state."""
_FEWEST_SAMPLES, _SHORTEST = 32, 128
"""Smallest numbers of sequences and of tokens per sequence that are tried."""


@dataclass(frozen=True, eq=False)
class Profile:
    """A model without weights, and what a sequence costs.

    Attributes:
        model: linearized, of fake tensors, in the dtype of its passes.
        linears: linears to quantize, by name.
        saved: bytes per token that autograd saves.
        outputs: bytes of outputs per token.
        forward: operations per token of a pass up to the last quantized layer, in matrix products
            with weights.
        both: operations per token of a forward and a backward pass, likewise.
        bytes: bytes of the model's parameters and buffers.
        seconds: measured seconds per operation.
    """

    model: nn.Module
    linears: dict[str, nn.Linear]
    saved: float
    outputs: tuple[float, float]
    forward: float
    both: float
    bytes: int
    seconds: float

    @property
    def parameters(self) -> int:
        """Number of parameters, each shared one once."""
        return sum(p.numel() for p in self.model.parameters())

    @cached_property
    def shapes(self) -> list[tuple[int, int]]:
        """Shapes (N, K) of the weights to quantize, each shared one once."""
        return _shapes(self.linears)

    @property
    def quantized_parameters(self) -> int:
        """Number of weights to quantize, each shared one once."""
        return sum(n * k for n, k in self.shapes)

    @property
    def quantized_share(self) -> float:
        """Fraction of matmul parameters that are quantized."""
        return self.quantized_parameters / sum(matrices(self.model).values())

    @cached_property
    def unpacked_bytes(self) -> int:
        """Bytes of the checkpoint's tensors that are not packed weights; each linear has a site."""
        nothing = dict.fromkeys(self.linears, 0)
        packed = sum(packed_bytes(n, k, 0) for n, k in self.shapes)
        sites = sum(SITE_BYTES + linear.in_features for linear in self.linears.values())
        return tensor_bytes(self.model, self.linears, {}, nothing) - packed + sites

    def compensation(self, recipe: Recipe) -> int:
        """Bytes of moments, factors and stored outputs."""
        count, tokens = variants(recipe), recipe.seq_len
        outputs = OutputBytes(*(int(size * tokens) for size in self.outputs))
        return self._stage_bytes[count] + stored_bytes(outputs, recipe.samples, count)

    @cached_property
    def _stage_bytes(self) -> dict[int, int]:
        return {count: stage_bytes(self.model, self.linears, count) for count in (1, 2)}


@dataclass(frozen=True)
class Prediction:
    """What a run will take.

    Attributes:
        recipe: its recipe; ``seq_len`` is capped at the model's context.
        dtype: dtype of the passes.
        memory: peak memory.
        duration: seconds.
        checkpoint_bytes: bytes of the checkpoint's tensors. With a budget whose fraction of FP8
            blocks is unknown before calibration, those of all-FP8.
        resume_bytes: bytes of partial results, which are removed at the end.
        bits_per_weight: bits per quantized weight, every stored byte counted; None if unknown.
    """

    recipe: Recipe
    dtype: str
    memory: MemoryEstimate
    duration: DurationEstimate
    checkpoint_bytes: int
    resume_bytes: int
    bits_per_weight: float | None

    def fits(self, memory: int | None, seconds: float | None) -> bool:
        """Whether the run needs at most this memory, in bytes, and this time."""
        enough_memory = memory is None or self.memory.peak <= memory
        return enough_memory and (seconds is None or self.duration.total <= seconds)


def profile_of(model: nn.Module, recipe: Recipe) -> Profile:
    """Measure a model of fake tensors; call it where their mode is active.

    Args:
        model: a causal LM in the dtype of its passes; linearized in place.
        recipe: says which linears are quantized.

    Raises:
        InputError: no linear to quantize, or a model whose pass depends on values.
    """
    linears = select(model, recipe)
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = partial(_one_expert, module)  # type: ignore[method-assign]
    sample = torch.arange(_TOKENS) % 2
    try:
        last = list(linears.values())[-1]
        with frozen(model), FlopCounterMode(display=False) as forward, ends_after(last):
            causal_lm_loss(model, sample)
        inputs = differentiable_inputs(linears.values())
        with frozen(model), inputs, FlopCounterMode(display=False) as both:
            causal_lm_loss(model, sample)[0].backward()
        saved = saved_bytes(model, linears, sample, causal_lm_loss)
        outputs = output_bytes(model, linears, sample, causal_lm_loss)
    except Exception as error:  # PyTorch has several types for it
        raise InputError(
            f"{type(model).__name__}: its passes cannot be followed without weights: "
            f"{str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
        ) from error
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return Profile(
        model=model,
        linears=linears,
        saved=saved / _TOKENS,
        outputs=(outputs.blocks / _TOKENS, outputs.linears / _TOKENS),
        forward=forward.get_total_flops() / _TOKENS,
        both=both.get_total_flops() / _TOKENS,
        bytes=sum(t.nbytes for t in tensors.values()),
        seconds=_seconds_per_operation(linears, next(model.parameters()).dtype),
    )


def predict(profile: Profile, recipe: Recipe, context: int, held_out: int) -> Prediction:
    """Predict a run; call it where the mode of the profile's fake tensors is active.

    Args:
        profile: the model.
        recipe: quantization settings.
        context: the model's context length, which caps ``seq_len``.
        held_out: number of held-out sequences.
    """
    recipe = replace(recipe, seq_len=min(recipe.seq_len, context))
    tokens = recipe.seq_len
    sample = torch.zeros(tokens, dtype=torch.int64)
    task = Task(
        profile.model,
        profile.linears,
        [sample] * recipe.samples,
        [sample] * held_out,
        causal_lm_loss,
        recipe,
    )
    needed = predict_memory(
        task,
        held=memory.held_bytes(torch.device("cpu")) + profile.bytes,
        saved=int(profile.saved * tokens),
        compensation=profile.compensation(recipe) if recipe.compensate else 0,
    )
    duration = predict_duration(
        task,
        variants(recipe),
        profile.forward * tokens * profile.seconds,
        profile.both * tokens * profile.seconds,
    )
    fp8 = _fp8_fraction(recipe)
    packed = sum(
        packed_bytes(n, k, _blocks(n, k, 1.0 if fp8 is None else fp8)) for n, k in profile.shapes
    )
    checkpoint = profile.unpacked_bytes + packed
    if recipe.max_bytes is not None:
        checkpoint = min(checkpoint, recipe.max_bytes)
    return Prediction(
        recipe=recipe,
        dtype=str(next(profile.model.parameters()).dtype).removeprefix("torch."),
        memory=needed,
        duration=duration,
        checkpoint_bytes=checkpoint,
        resume_bytes=_resume_bytes(profile, recipe, packed),
        bits_per_weight=None if fp8 is None else 8 * packed / profile.quantized_parameters,
    )


def ladder(recipe: Recipe) -> Iterator[dict[str, Any]]:
    """Changes of a recipe that lower memory or time, in the order in which they are tried.

    Each is added to those before it:

        fisher: factored       F_w as factors, a small loss of quality
        clip: on               one variant of the weights instead of two
        tune: 0                no training
        samples                halved, down to 32
        seq_len                halved, down to 128
        compensate: false      no error compensation, the largest loss of quality
    """
    if recipe.fisher != "factored":
        yield {"fisher": "factored"}
    if recipe.clip == "auto":
        yield {"clip": "on"}
    if recipe.tune:
        yield {"tune": 0}
    for name, least in (("samples", _FEWEST_SAMPLES), ("seq_len", _SHORTEST)):
        value = getattr(recipe, name)
        while value // 2 >= least:
            value //= 2
            yield {name: value}
    if recipe.compensate:
        yield {"compensate": False}


def first_fit(
    predicted: Callable[[Recipe], Prediction],
    recipe: Recipe,
    memory: int | None,
    seconds: float | None,
) -> tuple[dict[str, Any], Prediction] | None:
    """First changes of a recipe with which the run fits, and its prediction; None if none do.

    Changes of :func:`ladder` are added one by one until the run fits. Those that turn out not to
    be needed are then taken back, the last ones first.

    Args:
        predicted: function from a recipe to its :class:`Prediction`.
        recipe: the recipe that does not fit.
        memory: limit in bytes, if any.
        seconds: limit, if any.
    """
    steps: list[dict[str, Any]] = []

    def changed(steps: list[dict[str, Any]]) -> tuple[dict[str, Any], Prediction]:
        changes = {key: value for step in steps for key, value in step.items()}
        return changes, predicted(replace(recipe, **changes))

    for step in ladder(recipe):
        steps.append(step)
        if changed(steps)[1].fits(memory, seconds):
            break
    else:
        return None
    for step in steps[::-1]:
        fewer = [other for other in steps if other is not step]
        if changed(fewer)[1].fits(memory, seconds):
            steps = fewer
    return changed(steps)


_SIZE = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TIME = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400}


def parsed_size(text: str) -> int:
    """Bytes of a size such as ``8G`` or ``500M``, in powers of a thousand.

    Raises:
        InputError: no such size.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kMGT]?)B?", text.strip())
    if not match or float(match[1]) == 0:
        raise InputError(f"memory must be a size such as 500M or 8G, got {text!r}")
    return round(float(match[1]) * _SIZE[match[2]])


def parsed_time(text: str) -> float:
    """Seconds of a time such as ``90s``, ``45min``, ``3h`` or ``2d``.

    Raises:
        InputError: no such time.
    """
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *(s|min|m|h|d)", text.strip())
    if not match or float(match[1]) == 0:
        raise InputError(f"time must be such as 90s, 45min, 3h or 2d, got {text!r}")
    return float(match[1]) * _TIME[match[2]]


def _one_expert(
    experts: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Experts' forward pass on fake tensors: the rows of all tokens go through the first expert."""
    count, width = top_k_index.shape[-1], hidden_states.shape[-1]
    rows = hidden_states.unsqueeze(1).expand(-1, count, -1).reshape(-1, width)
    expert: Any = experts[0]
    result: Tensor = expert.down_proj(experts._activate(expert.gate_up_proj(rows)))
    weighted = result.view(-1, count, width) * top_k_weights.unsqueeze(-1)
    return weighted.sum(1).to(hidden_states.dtype)


def _shapes(linears: dict[str, nn.Linear]) -> list[tuple[int, int]]:
    """Shapes (N, K) of the weights, each shared one once."""
    shared = shared_weights(linears)
    return [_shape(linear) for name, linear in linears.items() if name not in shared]


def _shape(linear: nn.Linear) -> tuple[int, int]:
    return linear.weight.shape[0], linear.weight.shape[1]


def _blocks(n: int, k: int, fraction: float) -> int:
    """A fraction of the blocks of a weight (N, K)."""
    return round(n * -(-k // BLOCK) * fraction)


def _fp8_fraction(recipe: Recipe) -> float | None:
    """Fraction of weight blocks in FP8; None if it is known only after calibration.

    A budget of bits is taken to give weights and activations the same.
    """
    if recipe.policy in ("fp8", "nvfp4"):
        return float(recipe.policy == "fp8")
    if recipe.bits is not None:
        return (recipe.bits - FP4_BITS) / (FP8_BITS - FP4_BITS)
    return None if recipe.budget else 1 - recipe.fp4


def _resume_bytes(profile: Profile, recipe: Recipe, packed: int) -> int:
    """Bytes of partial results; the largest file takes twice its size while it is replaced."""
    shared = shared_weights(profile.linears)
    holders = {name: m for name, m in profile.linears.items() if name not in shared}
    sums = fisher_bytes(holders, recipe.fisher)
    blocks = sum(_blocks(n, k, 1.0) for n, k in profile.shapes)
    scores = _SCORE_FILE_BYTES * blocks * variants(recipe)
    tuned = profile.parameters - profile.quantized_parameters if recipe.tune else 0
    compensated = packed * variants(recipe) if recipe.compensate else 0
    files = [sums, scores, HISTOGRAM_BYTES * len(profile.linears), compensated]
    files.append(_TUNED_FILE_BYTES * tuned)
    return sum(files) + max(files)


def _seconds_per_operation(linears: dict[str, nn.Linear], dtype: torch.dtype) -> float:
    """Measured seconds per operation of a product of the largest weight, or of a part of it."""
    n, k = max(_shapes(linears), key=lambda shape: shape[0] * shape[1])
    n = max(1, min(n, _LARGEST_PRODUCT // k))
    times = []
    with unset_fake_temporarily():
        x, weight = torch.ones(_TOKENS, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        for _ in range(_PRODUCTS):
            started = time.perf_counter()
            nn.functional.linear(x, weight)
            times.append(time.perf_counter() - started)
    return min(times) / (2 * _TOKENS * n * k)
