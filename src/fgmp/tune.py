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
from fgmp.sensitivity.fisher import frozen, next_token_logits
from fgmp.task import Task

RATE = 0.002
SEQUENCES_A_STEP = 8
_BETAS = (0.9, 0.95)
_WARMUP = 0.1


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
    steps = task.recipe.tune * math.ceil(len(samples) / SEQUENCES_A_STEP)
    adam = _Adam(values, steps)
    order = torch.Generator().manual_seed(task.recipe.seed)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.enter_context(
            differentiable(m for m in linears.values() if isinstance(m, MixedLinear))
        )
        advance = stack.enter_context(task.progress("tuning", task.recipe.tune * len(samples)))
        for _ in range(task.recipe.tune):
            for chosen in torch.randperm(len(samples), generator=order).split(SEQUENCES_A_STEP):
                for index in chosen.tolist():
                    with torch.no_grad():
                        wanted = next_token_logits(model, samples[index]).log_softmax(-1).exp_()
                    with packed.within(model), _gradients(model, adam.gradients):
                        own = next_token_logits(model, samples[index]).log_softmax(-1)
                        # KL less the entropy of what is wanted, which has no gradient.
                        loss = -torch.dot(wanted.flatten(), own.flatten())
                        (loss / (len(wanted) * len(chosen))).backward()
                    advance()
                adam.step()
    return values


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
    """

    def __init__(self, values: Mapping[str, Tensor], steps: int) -> None:
        self.values = values
        self.gradients: dict[str, Tensor | None] = dict.fromkeys(values)
        self.copies = {n: v.to(torch.float32, copy=True) for n, v in values.items()}
        groups = [
            {"params": [copy], "lr": RATE * copy.square().mean().sqrt().item()}
            for copy in self.copies.values()
        ]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)

        def rate(step: int) -> float:
            rising = min(1.0, (step + 1) / (_WARMUP * steps))
            return rising * (1 + math.cos(math.pi * step / steps)) / 2

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    @torch.no_grad()
    def step(self) -> None:
        """Move by the gradients that have gathered, and forget them."""
        for name, copy in self.copies.items():
            gradient = self.gradients[name]
            copy.grad = None if gradient is None else gradient.float()
            self.gradients[name] = None
        self.optimizer.step()
        self.schedule.step()
        for name, copy in self.copies.items():
            copy.grad = None
            self.values[name].copy_(copy)
