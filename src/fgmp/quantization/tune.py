"""Tune the unquantized parameters: norms, biases, embeddings, an output head.

The codes of a packed model are final; its other parameters are not. They are trained to minimize
the mean KL divergence from the original's predictions on the calibration set. Adam gets gradients
of the dequantized weights, with the straight-through estimator (STE) for activation quantizers
(:mod:`fgmp.model.gradients`). Formats, codes and sizes do not change. Norm Tweaking (arXiv
2309.02784) tunes norms after quantization; EfficientQAT (arXiv 2407.11062) tunes step sizes after
all layers are quantized. Here scales are stored as codes and stay fixed.

The batch size is 8 sequences, whose gradients are accumulated one by one. A step changes a
parameter by at most about ``RATE`` times the root mean square of its tensor. The learning rate
warms up over the first tenth of the steps, then decays to zero as a cosine. A tensor of zeros does
not change. Values are fp32 during training, and rounded after each step to the dtype in which the
model's files store them. Held-out text decides whether the result is used.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fgmp.model.convert import Replacement
from fgmp.model.gradients import differentiable
from fgmp.model.linear import MixedLinear
from fgmp.model.losses import next_token_logits
from fgmp.model.observe import frozen
from fgmp.model.precision import stored_dtypes
from fgmp.quantization.candidates import Choice, Tuning, best_of, measure, with_increase
from fgmp.quantization.held_out import HeldOutMetrics
from fgmp.quantization.install import Assignment
from fgmp.quantization.task import Task
from fgmp.recipe import Recipe
from fgmp.storage.resume import SAVE_EVERY_SECONDS, PartialResults, Periodic, uninterrupted

RATE = 0.002
SEQUENCES_PER_STEP = 8
_BETAS = (0.9, 0.95)
_WARMUP = 0.1
_PART = "tuning"


def tune(task: Task, choice: Choice, fp8: HeldOutMetrics | None) -> Choice:
    """Tune the chosen assignment; keep the result if it is closer to the original.

    Args:
        task: the run; its recipe has the number of epochs.
        choice: from ``candidates.choose``.
        fp8: held-out metrics of the all-FP8 model if the budget is ``max_increase``, else None; the
            bound holds for tuned parameters as for any candidate.

    Returns:
        ``choice``, with tuned parameters if they are used, and held-out KL without and with them.
    """
    tuned = replace(choice.assignment, parameters=tuned_parameters(task, choice.assignment))
    metrics = measure(task, {"without": choice.assignment, "with": tuned})
    bound = task.recipe.max_increase
    used = best_of(metrics, ["without", "with"], fp8, bound) == "with"
    outcome = Tuning(used, {name: m.kl for name, m in metrics.items()})
    if not used:
        task.report(f"{_reason(metrics, fp8, bound)}: tuned parameters are not used")
        return replace(choice, tune=outcome)
    budget = (
        choice.budget if fp8 is None else with_increase(task, choice.budget, metrics["with"], fp8)
    )
    return replace(choice, assignment=tuned, budget=budget, tune=outcome)


def _reason(
    metrics: Mapping[str, HeldOutMetrics], fp8: HeldOutMetrics | None, bound: float | None
) -> str:
    """Why tuned parameters are not used."""
    tuned = metrics["with"]
    if fp8 is not None and tuned.clearly_better(metrics["without"]):
        return (
            f"tuning took held-out perplexity to {tuned.increase_percent(fp8):+.2f}% relative to "
            f"all-FP8, above the max_increase of {bound:g}%"
        )
    return "tuning did not bring predictions on held-out text closer to the original's"


def tuned_parameters(task: Task, assignment: Assignment) -> dict[str, Tensor]:
    """Tuned values of all parameters but quantized weights, by name.

    The model is left as it was, also after an error.
    """
    model, samples = task.model, task.samples
    linears = assignment.replacement(model).linears
    with Replacement(linears).within(model):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
        stored = stored_dtypes(model)
    packed = Replacement(linears, values)
    steps = _steps(len(samples), task.recipe)
    adam = _Adam(values, stored, len(steps))
    results = task.partial_results(assignment, task.recipe.tune)
    if results:
        adam.resume(results)
    periodic, resumed = Periodic(SAVE_EVERY_SECONDS), adam.done
    with ExitStack() as stack:
        if results:
            stack.callback(_store_progress, adam, results, resumed)
        stack.enter_context(frozen(model))
        stack.enter_context(
            differentiable(m for m in linears.values() if isinstance(m, MixedLinear))
        )
        advance = stack.enter_context(task.progress("tuning", task.recipe.tune * len(samples)))
        for _ in range(sum(len(chosen) for chosen in steps[: adam.done])):
            advance()
        for chosen in steps[adam.done :]:
            for index in chosen:
                with torch.no_grad():
                    target = next_token_logits(model, samples[index]).log_softmax(-1).exp_()
                with packed.within(model), _gradients(model, adam.gradients):
                    own = next_token_logits(model, samples[index]).log_softmax(-1)
                    # KL less the target's entropy, which has no gradient.
                    loss = -torch.dot(target.flatten(), own.flatten())
                    (loss / (len(target) * len(chosen))).backward()
                advance()
            with uninterrupted():
                adam.step()
            if results and periodic.due():
                adam.store(results)
    return values


def _store_progress(adam: "_Adam", results: PartialResults, resumed: int) -> None:
    """Store the state at the end and on an interruption, unless it lies within a step."""
    if adam.whole and adam.done > resumed:
        adam.store(results)


def _steps(sequences: int, recipe: Recipe) -> list[list[int]]:
    """Indices of the sequences of each step."""
    generator = torch.Generator().manual_seed(recipe.seed)
    passes = (torch.randperm(sequences, generator=generator) for _ in range(recipe.tune))
    return [chosen.tolist() for order in passes for chosen in order.split(SEQUENCES_PER_STEP)]


@contextmanager
def _gradients(model: nn.Module, gathered: dict[str, Tensor | None]) -> Iterator[None]:
    """Within this context parameters accumulate gradients into ``gathered``, by name."""
    parameters = {name: model.get_parameter(name) for name in gathered}
    before = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = gathered[name]
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            gathered[name] = parameter.grad
            parameter.grad = before[name]
            parameter.requires_grad_(False)


class _Adam:
    """Adam on fp32 copies of tensors; the rate of each is proportional to its root mean square.

    Attributes:
        gradients: accumulated between steps, by name.
        done: steps so far.
        whole: whether the last of them was completed; a second Ctrl-C can end it half-way.
    """

    def __init__(
        self, values: Mapping[str, Tensor], stored: Mapping[str, torch.dtype], steps: int
    ) -> None:
        self.values, self.stored = values, stored
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(values)
        self.copies = {n: v.to(torch.float32, copy=True) for n, v in values.items()}
        self.rates = [RATE * copy.square().mean().sqrt().item() for copy in self.copies.values()]
        groups = [{"params": [copy]} for copy in self.copies.values()]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)
        self.steps, self.done, self.whole = steps, 0, True

    @torch.no_grad()
    def step(self) -> None:
        """Apply the accumulated gradients and clear them."""
        self.whole = False
        for name, copy in self.copies.items():
            gradient = self.gradients[name]
            copy.grad = None if gradient is None else gradient.float()
            self.gradients[name] = None
        rising = min(1.0, (self.done + 1) / (_WARMUP * self.steps))
        falling = (1 + math.cos(math.pi * self.done / self.steps)) / 2
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * (rising * falling)
        self.optimizer.step()
        self.done += 1
        for name, copy in self.copies.items():
            copy.grad = None
            self.values[name].copy_(copy.to(self.stored[name]))
        self.whole = True

    def store(self, results: PartialResults) -> None:
        """Store all that the next step depends on."""
        tensors: dict[str, Tensor] = {}
        for name, copy in self.copies.items():
            moments = self.optimizer.state.get(copy, {})
            tensors |= {f"{key}.{name}": t for key, t in {"value": copy, **moments}.items()}
        results.store(_PART, tensors, {"done": self.done})

    @torch.no_grad()
    def resume(self, results: PartialResults) -> None:
        """Continue from a stored state, if there is one."""
        state = results.load(_PART)
        if state is None:
            return
        self.done = int(state.facts["done"])
        for key, tensor in state.tensors.items():
            kind, _, name = key.partition(".")
            copy = self.copies[name]
            if kind == "value":
                copy.copy_(tensor)
                self.values[name].copy_(copy.to(self.stored[name]))
            else:
                device = "cpu" if kind == "step" else copy.device
                self.optimizer.state[copy][kind] = tensor.to(device)
