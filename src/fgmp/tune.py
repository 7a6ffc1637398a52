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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace

import torch
from torch import Tensor, nn

from fgmp.candidates import Assignment, Choice, measure
from fgmp.model.convert import put
from fgmp.model.gradients import differentiable
from fgmp.model.linear import MixedLinear
from fgmp.sensitivity.fisher import frozen, next_token_logits
from fgmp.task import Task

RATE = 0.002
SEQUENCES_A_STEP = 8
_BETAS = (0.9, 0.95)
_WARMUP = 0.1


def tune(task: Task, choice: Choice) -> Choice:
    """The choice with tuned parameters, if that brings it nearer to the original on held-out text.

    ``facts["tune"]`` tells the held-out KL, nats a prediction, without and with.
    """
    tuned = replace(choice.assignment, parameters=tuned_parameters(task, choice.assignment))
    trials = measure(task, {"without": choice.assignment, "with": tuned})
    used = trials["with"].clearly_better(trials["without"])
    if not used:
        task.report("tuning brought predictions on held-out text no nearer: it is left out")
    figures = {name: trial.kl for name, trial in trials.items()}
    facts = choice.facts | {"tune": {"used": used, "held_out_kl": figures}}
    return Choice(tuned if used else choice.assignment, facts)


def tuned_parameters(task: Task, assignment: Assignment) -> dict[str, Tensor]:
    """Values of all parameters but quantized weights, by name, tuned for ``assignment``.

    Those of the outermost module itself are left out: it cannot be replaced. The model is left as
    it was, also after an error.
    """
    model, samples = task.model, task.samples
    quantized = {f"{name}.weight" for name in task.linears}
    start = {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if "." in name and name not in quantized
    }
    modules = replace(assignment, parameters={n: v.clone() for n, v in start.items()}).modules(
        model
    )
    originals = {name: model.get_submodule(name) for name in modules}
    packed = [module for module in modules.values() if isinstance(module, MixedLinear)]
    steps = task.recipe.tune * math.ceil(len(samples) / SEQUENCES_A_STEP)
    order = torch.Generator().manual_seed(task.recipe.seed)
    try:
        with ExitStack() as stack:
            stack.enter_context(frozen(model))
            put(model, modules)
            stack.enter_context(frozen(model))
            stack.enter_context(differentiable(packed))
            parameters = {name: model.get_parameter(name) for name in start}
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            adam = _Adam(parameters, steps)
            advance = stack.enter_context(task.progress("tuning", task.recipe.tune * len(samples)))
            for _ in range(task.recipe.tune):
                for chosen in torch.randperm(len(samples), generator=order).split(SEQUENCES_A_STEP):
                    for index in chosen.tolist():
                        put(model, originals)
                        with torch.no_grad():
                            wanted = next_token_logits(model, samples[index]).log_softmax(-1)
                        put(model, modules)
                        own = next_token_logits(model, samples[index]).log_softmax(-1)
                        kl = nn.functional.kl_div(own, wanted, reduction="sum", log_target=True)
                        (kl / (len(wanted) * len(chosen))).backward()
                        advance()
                    adam.step()
    finally:
        put(model, originals)
    return {name: p.detach().clone() for name, p in parameters.items()}


class _Adam:
    """Adam on fp32 copies of parameters, each tensor at a rate of its own size."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], steps: int) -> None:
        self.parameters = list(parameters.values())
        self.copies = [p.detach().float().clone() for p in self.parameters]
        groups = [
            {"params": [copy], "lr": RATE * copy.square().mean().sqrt().item()}
            for copy in self.copies
        ]
        self.optimizer = torch.optim.Adam(groups, betas=_BETAS)

        def rate(step: int) -> float:
            rising = min(1.0, (step + 1) / (_WARMUP * steps))
            return rising * (1 + math.cos(math.pi * step / steps)) / 2

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)

    @torch.no_grad()
    def step(self) -> None:
        """Move by the gradients that have gathered, and forget them."""
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            gradient = parameter.grad
            copy.grad = None if gradient is None else gradient.float()
            parameter.grad = None
        self.optimizer.step()
        self.schedule.step()
        for parameter, copy in zip(self.parameters, self.copies, strict=True):
            parameter.copy_(copy)
