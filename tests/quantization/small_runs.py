"""Small quantizing runs: watched and interrupted, their results counted by the definition.

Weights are counted block by block in the packed planes. Activations are counted by running the
resulting sites over the activations of the unquantized model.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from conftest import make_model
from torch import Tensor, nn

import fgmp
from fgmp import Recipe
from fgmp.formats.activation import quantize as quantize_activation
from fgmp.model.linear import mixed_linears, sites
from fgmp.model.losses import causal_lm_loss
from fgmp.model.select import linearize
from fgmp.model.store import tensors_to_save

POINTS = 0.01


def quantized(tokens: Tensor, family: str = "llama", **recipe: object) -> nn.Module:
    """A small model quantized with scales rounded to nearest, unless ``recipe`` says otherwise."""
    return fgmp.quantize(make_model(family), tokens, Recipe(**{"clip": "off", **recipe}))


def weight_blocks(model: nn.Module) -> tuple[int, int]:
    """FP4 blocks and all blocks of all weights."""
    flags = [m.packed.is_fp8() for m in mixed_linears(model).values()]
    return sum(int((~f).sum()) for f in flags), sum(f.numel() for f in flags)


def weight_masks(model: nn.Module) -> Tensor:
    """Which weight blocks are FP8, of all weights in one row."""
    return torch.cat([m.packed.is_fp8().flatten() for m in mixed_linears(model).values()])


@torch.no_grad()
def activation_blocks(model: nn.Module, family: str, tokens: Tensor) -> dict[str, list[int]]:
    """FP4 blocks and all blocks, by site, of the unquantized model's activations."""
    original = make_model(family)
    linearize(original)
    counts = {owner: [0, 0] for owner in sites(model)}
    for owner, site in sites(model).items():

        def count(_: nn.Module, args: tuple[Tensor], owner: str = owner, site=site) -> None:
            is_fp8 = quantize_activation(args[0], site.record).is_fp8
            counts[owner][0] += int((~is_fp8).sum())
            counts[owner][1] += is_fp8.numel()

        original.get_submodule(owner).register_forward_pre_hook(count)
    for sample in tokens:
        original(input_ids=sample[None])
    return counts


def share(counts: dict[str, list[int]]) -> float:
    """Share of FP4 blocks over all sites."""
    return sum(c[0] for c in counts.values()) / sum(c[1] for c in counts.values())


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that saving would write."""
    return sum(t.nbytes for t in tensors_to_save(model).values())


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor) -> float:
    """Nats per prediction."""
    return sum(causal_lm_loss(model, t)[0].item() for t in tokens) / tokens[:, 1:].numel()


@torch.no_grad()
def likely_tokens(tokens: Tensor, family: str = "llama") -> Tensor:
    """Windows that start as ``tokens`` do and continue as the model itself finds most likely.

    On these a random model cannot become better by chance, only worse.
    """
    model, likely = make_model(family), tokens.clone()
    for i in range(1, likely.shape[1]):
        logits = model(input_ids=likely[:, :i]).logits
        likely[:, i] = logits[:, -1].argmax(-1)
    return likely


def same_state(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same bits in every tensor."""
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(b[name], a[name]) for name in a)


@dataclass
class Stage:
    """A stage of a run: its title, its steps, those done, and sequences that the model ran."""

    title: str
    steps: int
    done: int = 0
    sequences: int = 0


@dataclass
class Watch:
    """Progress of a run on ``model``, which it interrupts where ``stop`` says.

    Attributes:
        model: its forward passes are counted, by stage.
        stop: title of a stage, how many of that title come before it, and the step after which the
            run is interrupted.
        stages: all stages so far.
    """

    model: nn.Module
    stop: tuple[str, int, int] | None = None
    stages: list[Stage] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        if self.stages:
            self.stages[-1].sequences += 1

    @contextmanager
    def __call__(self, title: str, steps: int) -> Iterator[Callable[[], None]]:
        number = len(self.of(title))
        stage = Stage(title, steps)
        self.stages.append(stage)

        def advance() -> None:
            stage.done += 1
            if self.stop == (title, number, stage.done):
                raise KeyboardInterrupt

        yield advance

    def of(self, title: str) -> list[Stage]:
        """The stages of one title, in order."""
        return [stage for stage in self.stages if stage.title == title]
