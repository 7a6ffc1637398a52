"""What keeps its precision is tuned to what was packed: norms, biases, embeddings, an output head.

Codes are final once a model is packed, but it still has parameters that are not quantized. They
are moved so that its predictions on the calibration text come back to the original's: the mean KL
is minimised by Adam, with gradients through packed weights and straight through the quantizers of
activations (:mod:`fgmp.model.gradients`). Formats, codes and bytes stay what they are. Tuning norms
after quantization is Norm Tweaking's idea (arXiv 2309.02784), after the weights of all layers
EfficientQAT's (arXiv 2407.11062), which tunes step sizes; here scales are codes and stay.

A step takes the mean gradient of 8 sequences, run one by one. It moves a parameter by at most about
``RATE`` times its tensor's root mean square, rising over the first tenth of the steps and falling
to zero as a cosine; a tensor of zeros stays as it is. Values are kept in fp32 meanwhile and rounded
to the model's dtype at each step. Whether the result is used is decided on held-out text.
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from fgmp.candidates import Assignment, Choice, best_of, measure, told_increase
from fgmp.heldout import Trial
from fgmp.model.convert import Replacement
from fgmp.model.gradients import differentiable
from fgmp.model.linear import MixedLinear
from fgmp.recipe import Recipe
from fgmp.sensitivity.fisher import SAVE_EVERY_SECONDS, frozen, next_token_logits
from fgmp.task import Task
from fgmp.unfinished import Unfinished

RATE = 0.002
SEQUENCES_A_STEP = 8
_BETAS = (0.9, 0.95)
_WARMUP = 0.1
_PART = "tuning"


def tune(task: Task, choice: Choice, base: Mapping[str, Trial]) -> Choice:
    """The choice with tuned parameters, if that brings it nearer to the original on held-out text.

    ``facts["tune"]`` tells the held-out KL, nats a prediction, without and with. Under
    ``max_increase``, ``base`` is what was measured of all FP8, and the bound holds as it does for
    any candidate.
    """
    tuned = replace(choice.assignment, parameters=tuned_parameters(task, choice.assignment))
    trials = measure(task, {"without": choice.assignment, "with": tuned})
    used = best_of(trials, ["without", "with"], base, task.recipe.max_increase) == "with"
    figures = {name: trial.kl for name, trial in trials.items()}
    facts = choice.facts | {"tune": {"used": used, "held_out_kl": figures}}
    if not used:
        why = "brings predictions no nearer"
        if trials["with"].clearly_better(trials["without"]):
            increase = trials["with"].increase_percent(base["fp8"])
            why = (
                f"takes perplexity to {increase:+.2f}% from all-FP8's, max_increase is "
                f"{task.recipe.max_increase:g}%,"
            )
        task.report(f"tuning {why} on held-out text: it is left out")
        return Choice(choice.assignment, facts)
    if base:
        facts["budget"] = facts["budget"] | told_increase(task, trials["with"], base)
    return Choice(tuned, facts)


def tuned_parameters(task: Task, assignment: Assignment) -> dict[str, Tensor]:
    """Values of all parameters but quantized weights, by name, tuned for ``assignment``.

    The model is left as it was, also after an error.
    """
    model, samples = task.model, task.samples
    linears = assignment.replacement(model).linears
    with Replacement(linears).within(model):
        values = {name: p.detach().clone() for name, p in model.named_parameters()}
    packed = Replacement(linears, values)
    steps = _steps(len(samples), task.recipe)
    adam = _Adam(values, len(steps))
    kept = task.unfinished(assignment, task.recipe.tune)
    if kept is not None:
        adam.resume(kept)
    saved = time.monotonic()
    with ExitStack() as stack:
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
                    wanted = next_token_logits(model, samples[index]).log_softmax(-1).exp_()
                with packed.within(model), _gradients(model, adam.gradients):
                    own = next_token_logits(model, samples[index]).log_softmax(-1)
                    # KL less the entropy of what is wanted, which has no gradient.
                    loss = -torch.dot(wanted.flatten(), own.flatten())
                    (loss / (len(wanted) * len(chosen))).backward()
                advance()
            adam.step()
            if kept is not None and time.monotonic() - saved > SAVE_EVERY_SECONDS:
                adam.store(kept)
                saved = time.monotonic()
    return values


def _steps(sequences: int, recipe: Recipe) -> list[list[int]]:
    """The sequences that each step takes."""
    order = torch.Generator().manual_seed(recipe.seed)
    passes = (torch.randperm(sequences, generator=order) for _ in range(recipe.tune))
    return [chosen.tolist() for found in passes for chosen in found.split(SEQUENCES_A_STEP)]


@contextmanager
def _gradients(model: nn.Module, gathered: dict[str, Tensor | None]) -> Iterator[None]:
    """Parameters take gradients, which add to what was ``gathered`` by name, for a while."""
    parameters = {name: model.get_parameter(name) for name in gathered}
    kept = {name: parameter.grad for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.grad = gathered[name]
            parameter.requires_grad_(True)
        yield
    finally:
        for name, parameter in parameters.items():
            gathered[name] = parameter.grad
            parameter.grad = kept[name]
            parameter.requires_grad_(False)


class _Adam:
    """Adam on fp32 copies of tensors, each at a rate of its own size.

    Attributes:
        gradients: by name, to be filled between steps.
        done: steps so far.
    """

    def __init__(self, values: Mapping[str, Tensor], steps: int) -> None:
        self.values = values
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(values)
        self.copies = {n: v.to(torch.float32, copy=True) for n, v in values.items()}
        self.rates = [RATE * copy.square().mean().sqrt().item() for copy in self.copies.values()]
        groups = [{"params": [copy]} for copy in self.copies.values()]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)
        self.steps, self.done = steps, 0

    @torch.no_grad()
    def step(self) -> None:
        """Move by the gradients that have gathered, and forget them."""
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
            self.values[name].copy_(copy)

    def store(self, kept: Unfinished) -> None:
        """Keep all that the next step goes on from."""
        tensors = {"done": torch.tensor(self.done)}
        for name, copy in self.copies.items():
            moments = self.optimizer.state.get(copy, {})
            tensors |= {f"{key}.{name}": t for key, t in {"value": copy, **moments}.items()}
        kept.store(_PART, tensors)

    @torch.no_grad()
    def resume(self, kept: Unfinished) -> None:
        """Go on from what was kept, if anything was."""
        found = kept.load(_PART)
        if found is None:
            return
        try:
            self.done = int(found.pop("done"))
            for name, copy in self.copies.items():
                copy.copy_(found.pop(f"value.{name}"))
                self.values[name].copy_(copy)
            for key, tensor in found.items():
                moment, _, name = key.partition(".")
                copy = self.copies[name]
                device = "cpu" if moment == "step" else copy.device
                self.optimizer.state[copy][moment] = tensor.to(device)
        except (KeyError, RuntimeError, ValueError) as error:
            raise kept.damaged(_PART, error) from error
