"""Compensation in order of execution: each stage learns from inputs that finished stages make.

A layer is packed to give on quantized inputs q what the original gives on x. In the model that
comes out, q carries the errors of all layers before, so q is taken from a model in which those are
packed already and x from the original: the layer then makes up for what came before, too. A *stage*
is the sites that are taken together. They are of one block (an entry of the model's outermost
module list, as decoder layers are) and have one name but for places in lists within it, as experts
have; elsewhere each site is a stage. Sites that wrongly share one cost accuracy, not correctness.

Every stage runs the samples through both models, up to the stage's inputs. So that this does not
grow with the square of the depth, a block whose stages are done is run for the last time in the
pass of the next one, which keeps its outputs; from then on it gives those back and runs nothing.
That takes a model whose blocks hand on all there is in their outputs. Whether it is one is seen on
the first sample, stage by stage, beside one run without shortcuts; if not, none is taken any more
and everything is run anew, which is slow and right. The same goes for losses that run the model
twice.

Finished stages may be kept on disk. An interrupted run that goes on puts their weights in place and
learns nothing from them again: the next stage's pass runs all blocks before it once.

Routers of the quantized model repeat what those of the original chose. Tokens could not be paired
otherwise, and an expert is asked for the tokens that are meant for it.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.formats.activation import Site
from fgmp.model.convert import Replacement, packed_linears
from fgmp.model.linear import ActivationSite
from fgmp.model.select import routers
from fgmp.pack.planes import PackedWeight
from fgmp.sensitivity.fisher import Loss, frozen
from fgmp.sensitivity.moments import MOMENT_BYTES, Moments, add_moments, new_moments
from fgmp.unfinished import Unfinished

PackStage = Callable[..., dict[str, PackedWeight]]
"""(linears of a stage, those of one site together, moments=by a site's owner) to their weights."""

_FACTOR_MATRICES = 5
"""H, C, the inverse, its factor and the transfer, float64, while they are being made."""

_SOME = 4096
_TOLERANCE = 2.0**-8
"""Relative distance that two runs of one thing may have: a rounding to bf16."""


@dataclass(frozen=True)
class Stage:
    """Sites, by owner, that are compensated together; ``block`` is empty outside of any."""

    block: str
    owners: list[str]


def stages(model: nn.Module, owners: Sequence[str]) -> list[Stage]:
    """Part sites, given in order of execution, into stages."""
    found: dict[tuple[str, str], Stage] = {}
    for owner in owners:
        entries = list(_list_entries(model, owner))
        kind = owner
        for entry in reversed(entries[1:]):
            kind = f"{_parent(entry)}.*{kind.removeprefix(entry)}"
        block = entries[0] if entries else ""
        found.setdefault((block, kind), Stage(block, [])).owners.append(owner)
    return list(found.values())


def block_of(model: nn.Module, name: str) -> str:
    """The entry of the outermost module list that a linear lies in; empty if in none."""
    return next(_list_entries(model, name), "")


def _list_entries(model: nn.Module, name: str) -> Iterator[str]:
    """Entries of module lists that a linear lies in, from the outside in; not the linear itself."""
    parts = name.split(".")
    for depth in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            yield ".".join(parts[: depth + 1])


@torch.no_grad()
def bytes_needed(
    model: nn.Module, linears: dict[str, nn.Linear], samples: Sequence[Any] | Tensor, loss: Loss
) -> int:
    """Of the largest stage's moments and factors, and of the outputs kept of a block.

    All samples are taken to be as large as the first.
    """
    outputs: dict[str, int] = {}

    def measure(parent: str, _: nn.Module, __: Any, out: Any) -> None:
        outputs[parent] = max(outputs.get(parent, 0), sum(t.nbytes for t in _tensors(out)))

    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for block in {block_of(model, name) for name in linears} - {""}:
            hook = partial(measure, _parent(block))
            stack.callback(model.get_submodule(block).register_forward_hook(hook).remove)
        loss(model, samples[0])
    return stage_bytes(model, linears) + 2 * len(samples) * sum(outputs.values())


def stage_bytes(model: nn.Module, linears: dict[str, nn.Linear]) -> int:
    """Of the largest stage's moments, and of the factors of the widest input.

    Moments are counted for every linear, since which of them share an input is not known yet: an
    upper bound.
    """
    widths = {name: linear.in_features**2 for name, linear in linears.items()}
    moments = max(sum(widths[n] for n in stage.owners) for stage in stages(model, list(linears)))
    return MOMENT_BYTES * moments + 8 * _FACTOR_MATRICES * max(widths.values())


@torch.no_grad()
def pack_in_turn(
    model: nn.Module,
    linears_of: Mapping[str, list[str]],
    records: Mapping[str, Site],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    pack_stage: PackStage,
    advance: Callable[[], None] = lambda: None,
    kept: Unfinished | None = None,
) -> dict[str, PackedWeight]:
    """Pack stage by stage; the model is left as it was, also after an error.

    Args:
        model: the original, linearized.
        linears_of: linears by the owner of their site, sites in order of execution.
        records: constants of the sites.
        samples, loss: as calibration had them.
        pack_stage: makes weights of moments.
        advance: called after each sample of each stage.
        kept: stages of this very run that were packed before it was interrupted, and where those
            that follow are kept.
    """
    packed: dict[str, PackedWeight] = {}
    todo = stages(model, list(linears_of))
    with frozen(model):
        run = _Run(model, samples, loss, list(linears_of))
        for number, stage in enumerate(todo):
            groups = {owner: linears_of[owner] for owner in stage.owners}
            weights = _kept(kept, number, groups, model)
            if weights is None:
                moments = run.moments(stage, records, advance)
                weights = pack_stage(groups.values(), moments=moments)
                if kept is not None:
                    kept.store(_part(number), _planes(weights))
            else:
                for _ in samples:
                    advance()
            run.finish(weights, records, groups)
            if stage.block not in {"", *(later.block for later in todo[number + 1 :])}:
                run.close(stage.block)
            packed |= weights
    return packed


def _kept(
    kept: Unfinished | None, number: int, groups: Mapping[str, list[str]], model: nn.Module
) -> dict[str, PackedWeight] | None:
    """Weights of a stage that was packed before, on the devices of those they replace."""
    found = None if kept is None else kept.load(_part(number))
    if kept is None or found is None:
        return None
    planes: dict[str, dict[str, Tensor]] = {n: {} for group in groups.values() for n in group}
    try:
        for key, tensor in found.items():
            name, _, plane = key.rpartition(".")
            device = next(model.get_submodule(name).parameters()).device
            planes[name][plane] = tensor.to(device)
        return {name: PackedWeight(**named) for name, named in planes.items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise kept.damaged(_part(number), error) from error


def _planes(weights: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    return {f"{n}.{plane}": t for n, w in weights.items() for plane, t in w.tensors().items()}


def _part(number: int) -> str:
    return f"stage {number:05d}"


class _StageReached(Exception):
    """Ends a forward pass that has shown all that it was run for."""


class _Run:
    """The original model and the one quantized so far, which share all that is not packed."""

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Any] | Tensor,
        loss: Loss,
        owners: list[str],
    ) -> None:
        self.model, self.samples, self.loss = model, samples, loss
        self.owners = owners
        self.routers = routers(model)
        self.packed: dict[str, nn.Module] = {}  # linears of the quantized model, so far
        self.short = True
        self.whole: dict[str, list[Tensor]] = {}  # of the first sample, see below
        self.closing: list[str] = []  # blocks to run once more, for their outputs
        self.closed: list[str] = []  # blocks that give back kept outputs
        self.outputs: dict[tuple[str, bool, int], Any] = {}  # by list of blocks, model, sample
        self.chosen: dict[str, list[Any]] = {}  # what routers of the original gave, by call

    def moments(
        self, stage: Stage, records: Mapping[str, Site], advance: Callable[[], None]
    ) -> dict[str, Moments]:
        """Moments of a stage's inputs over all samples."""
        moments, sites = {}, {}
        for owner in stage.owners:
            weight = self.model.get_submodule(owner).weight
            assert isinstance(weight, Tensor)
            moments[owner] = new_moments(weight.shape[1], weight.device)
            sites[owner] = ActivationSite(records[owner]).to(weight.device)
        for index in range(len(self.samples)):
            wanted = self._inputs(stage, index, quantized=False)
            if index == 0 and self.short:
                self._judge_shortcuts(stage, wanted)
            found = self._inputs(stage, index, quantized=True)
            for owner, site in sites.items():
                for x, own in zip(wanted[owner], found[owner], strict=False):
                    if own.numel():
                        q = site(own).float() * site.record.t
                        # A router without a known name may have sent other tokens.
                        add_moments(moments[owner], x if x.shape == own.shape else own, q)
            advance()
        self.closed += self.closing
        self.closing = []
        return moments

    def finish(
        self,
        weights: dict[str, PackedWeight],
        records: Mapping[str, Site],
        linears_of: Mapping[str, list[str]],
    ) -> None:
        """From now on the quantized model runs with these."""
        self.packed |= packed_linears(self.model, weights, records, linears_of)

    def close(self, block: str) -> None:
        """No stage of this block is to come."""
        if self.short:
            self.closing.append(block)

    def _judge_shortcuts(self, stage: Stage, short: dict[str, list[Tensor]]) -> None:
        """Give up shortcuts, also in ``short``, if the first sample's inputs show them wrong."""
        self.short = False
        if not self.whole:
            self.whole = self._inputs(Stage("", self.owners), 0, quantized=False, take=_some)
        self.short = all(
            len(short[owner]) == len(self.whole[owner]) <= 1
            and all(map(_alike, self.whole[owner], map(_some, short[owner])))
            for owner in stage.owners
        )
        if not self.short:
            self.closing, self.closed = [], []
            self.outputs.clear()
            short |= self._inputs(stage, 0, quantized=False)

    def _inputs(
        self,
        stage: Stage,
        index: int,
        *,
        quantized: bool,
        take: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> dict[str, list[Tensor]]:
        """What is to ``take`` of what one sample sends to a stage's sites, call by call."""
        seen: dict[str, list[Tensor]] = {owner: [] for owner in stage.owners}

        def note(owner: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[owner].append(take(args[0]))
            if self.short and all(seen.values()):
                raise _StageReached

        with ExitStack() as stack:
            if quantized:
                stack.enter_context(Replacement(self.packed).within(self.model))
            if self.short:
                self._take_shortcuts(stack, stage.block, quantized, index)
            self._share_choices(stack, quantized)
            for owner in stage.owners:
                linear = self.model.get_submodule(owner)
                stack.callback(linear.register_forward_pre_hook(partial(note, owner)).remove)
            with suppress(_StageReached):
                self.loss(self.model, self.samples[index])
        return seen

    def _take_shortcuts(self, stack: ExitStack, last: str, quantized: bool, index: int) -> None:
        """Closed blocks give back what they gave, closing ones are noted, ``last`` is the end."""

        def keep(block: str, _: nn.Module, __: Any, out: Any) -> None:
            self.outputs[_parent(block), quantized, index] = copy.deepcopy(out)

        def stop(*_: Any) -> None:
            raise _StageReached

        for block in self.closed:
            kept = self.outputs[_parent(block), quantized, index]
            stack.enter_context(_answering(self.model.get_submodule(block), kept))
        for block in self.closing:
            module = self.model.get_submodule(block)
            stack.callback(module.register_forward_hook(partial(keep, block)).remove)
        if last:
            stack.callback(self.model.get_submodule(last).register_forward_hook(stop).remove)

    def _share_choices(self, stack: ExitStack, quantized: bool) -> None:
        def record(name: str, _: nn.Module, __: Any, out: Any) -> None:
            self.chosen[name].append(out)

        def repeat(name: str, *_: Any) -> Any:
            return self.chosen[name].pop(0) if self.chosen[name] else None

        for name in self.routers:
            router = self.model.get_submodule(name)
            if not quantized:
                self.chosen[name] = []
            hook = partial(repeat if quantized else record, name)
            stack.callback(router.register_forward_hook(hook).remove)


@contextmanager
def _answering(module: nn.Module, output: Any) -> Iterator[None]:
    """A module that runs nothing and returns a copy of ``output``, for a while."""
    before = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: copy.deepcopy(output)
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


def _parent(block: str) -> str:
    return block.rpartition(".")[0]


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of what a module returned."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for part in value.values() for t in _tensors(part))
    elif isinstance(value, list | tuple):
        yield from (t for part in value for t in _tensors(part))


def _some(x: Tensor) -> Tensor:
    """Up to 4,096 of its elements, (n,): at random places, the same for the same size."""
    flat, source = x.flatten(), torch.Generator().manual_seed(0)
    if len(flat) <= _SOME:
        return flat.clone()
    return flat[torch.randint(len(flat), (_SOME,), generator=source).to(x.device)]


def _alike(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    distance = torch.linalg.vector_norm((x - y).float())
    return bool(distance <= _TOLERANCE * torch.linalg.vector_norm(x.float()))
