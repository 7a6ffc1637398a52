"""Error compensation in order of execution, stage by stage.

A layer is packed so that its output on quantized inputs q is close to the original's on x. In the
final model, q carries the errors of all earlier layers. So q comes from a model in which those
layers are packed already, and x from the original: the layer compensates for earlier errors, too.

A *stage* is a set of sites that are compensated together. Sites share a stage if they lie in one
block (an entry of the model's outermost module list, such as a decoder layer) and have the same
name within it, apart from indices of inner lists, such as experts. Outside of any block each site
is a stage. Grouping too many sites costs accuracy, not correctness. Sites that read one shared
weight share a stage, too, at the place of the first of them.

Each stage runs the samples through both models, up to the stage's inputs. To keep the cost from
growing with the square of the depth, a finished block runs one last time, in the pass of the next
stage. Its outputs are stored, and from then on it returns them without running. This shortcut is
valid if a block's output is all that later blocks depend on. The first sample checks that in every
stage, against one run without shortcuts. If the check fails, all shortcuts are dropped and every
pass runs the whole model: slow, and correct. The same holds for a loss that runs the model twice.

Finished stages can be stored on disk. A resumed run installs their weights and computes no moments
for them; the next stage's pass runs all earlier blocks once.

Routers of the quantized model repeat the choices of the original's, so that each expert sees the
same tokens in both models.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.formats.activation import Site
from fgmp.model.convert import Replacement, packed_linears
from fgmp.model.linear import ActivationSite
from fgmp.model.losses import Loss
from fgmp.model.observe import frozen, observed_inputs
from fgmp.model.select import routers, shared_weights
from fgmp.pack.planes import PackedWeight
from fgmp.quantization.sharing import joined, readers, summed_moments, weights_by_readers
from fgmp.sensitivity.moments import MOMENT_BYTES, Moments, add_moments, new_moments
from fgmp.storage.resume import PartialResults

PackStage = Callable[..., dict[str, PackedWeight]]
"""(linears of a stage grouped by site, moments= by site owner) to packed weights by linear."""

_FACTOR_MATRICES = 5
"""float64 matrices held at once by ``factorize``: H, C, the inverse, its factor, the transfer."""

_SAMPLED = 4096
"""Elements of a tensor that the check of shortcuts compares."""
_TOLERANCE = 2.0**-8
"""Relative distance allowed between two runs of the same computation: one rounding to bf16."""


@dataclass(frozen=True)
class Stage:
    """Sites, by owner, that are compensated together; ``block`` is empty outside of all blocks."""

    block: str
    owners: list[str]


def stages(
    model: nn.Module, owners: Sequence[str], together: Iterable[Collection[str]] = ()
) -> list[Stage]:
    """Group sites, given in order of execution, into stages.

    Args:
        model: contains the sites.
        owners: owners of all sites.
        together: sets of owners that must share a stage.
    """
    by_kind: dict[tuple[str, str], Stage] = {}
    for owner in owners:
        block = block_of(model, owner)
        kind = stage_kind(model, owner)
        by_kind.setdefault((block, kind), Stage(block, [])).owners.append(owner)
    merged = []
    for group in joined([*(stage.owners for stage in by_kind.values()), *together]):
        blocks = {block_of(model, owner) for owner in group}
        merged.append(Stage(blocks.pop() if len(blocks) == 1 else "", group))
    return merged


def stage_kind(model: nn.Module, name: str) -> str:
    """Name of a linear with ``*`` for indices of lists inside its block, such as of experts."""
    kind = name
    for entry in reversed(list(_list_entries(model, name))[1:]):
        kind = f"{_parent(entry)}.*{kind.removeprefix(entry)}"
    return kind


def block_of(model: nn.Module, name: str) -> str:
    """Entry of the outermost module list that holds a linear; empty if none does."""
    return next(_list_entries(model, name), "")


def _list_entries(model: nn.Module, name: str) -> Iterator[str]:
    """Entries of module lists that hold a linear, outermost first, without the linear itself."""
    parts = name.split(".")
    for depth in range(1, len(parts) - 1):
        if isinstance(model.get_submodule(".".join(parts[:depth])), nn.ModuleList):
            yield ".".join(parts[: depth + 1])


@torch.no_grad()
def bytes_needed(
    model: nn.Module, linears: dict[str, nn.Linear], samples: Sequence[Any] | Tensor, loss: Loss
) -> int:
    """Bytes of the largest stage's moments and factors, and of a block's stored outputs.

    Assumes that all samples are as large as the first.
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
    """Bytes of the largest stage's moments, and of the factors of the widest input.

    An upper bound: which linears share an input is not known yet, so each counts its own moments.
    """
    widths = {name: linear.in_features**2 for name, linear in linears.items()}
    together = readers({name: [name] for name in linears}, shared_weights(linears)).values()
    todo = stages(model, list(linears), together)
    moments = max(sum(widths[n] for n in stage.owners) for stage in todo)
    return MOMENT_BYTES * moments + 8 * _FACTOR_MATRICES * max(widths.values())


@torch.no_grad()
def pack_in_turn(
    model: nn.Module,
    linears_of: Mapping[str, list[str]],
    sites: Mapping[str, Site],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    pack_stage: PackStage,
    advance: Callable[[], None] = lambda: None,
    results: PartialResults | None = None,
    *,
    shared: Mapping[str, str] | None = None,
) -> dict[str, PackedWeight]:
    """Pack stage by stage; the model is left as it was, also after an error.

    Args:
        model: the original, linearized.
        linears_of: linears by the owner of their site, sites in order of execution.
        sites: constants of the sites.
        samples, loss: as for calibration.
        pack_stage: packs the linears of a stage, given the moments of their inputs.
        advance: called after each sample of each stage.
        results: stages that this run packed before an interruption; later ones are added.
        shared: linears that use the weight of another, and the name of that one, by name.
    """
    shared = shared or {}
    packed: dict[str, PackedWeight] = {}
    todo = stages(model, list(linears_of), readers(linears_of, shared).values())
    with frozen(model):
        run = _Run(model, samples, loss, list(linears_of))
        for number, stage in enumerate(todo):
            groups = {owner: linears_of[owner] for owner in stage.owners}
            by_readers = weights_by_readers(groups, shared)
            weights = _restored(results, number, by_readers, model)
            if weights is None:
                moments = summed_moments(run.moments(stage, sites, advance), groups, shared)
                weights = pack_stage(by_readers, moments=moments)
                if results is not None:
                    results.store(_part(number), _planes(weights))
            else:
                for _ in samples:
                    advance()
            run.finish(weights, sites, groups, shared)
            if stage.block not in {"", *(later.block for later in todo[number + 1 :])}:
                run.close(stage.block)
            packed |= weights
    return packed


def _restored(
    results: PartialResults | None, number: int, groups: Sequence[list[str]], model: nn.Module
) -> dict[str, PackedWeight] | None:
    """Weights of a stage that was packed before, on the devices of the weights they replace."""
    state = results.load(_part(number)) if results else None
    if results is None or state is None:
        return None
    planes: dict[str, dict[str, Tensor]] = {n: {} for group in groups for n in group}
    try:
        for key, tensor in state.tensors.items():
            name, _, plane = key.rpartition(".")
            device = next(model.get_submodule(name).parameters()).device
            planes[name][plane] = tensor.to(device)
        return {name: PackedWeight(**named) for name, named in planes.items()}
    except (AttributeError, KeyError, TypeError) as error:
        results.unusable(_part(number), error)
        return None


def _planes(weights: Mapping[str, PackedWeight]) -> dict[str, Tensor]:
    return {f"{n}.{plane}": t for n, w in weights.items() for plane, t in w.tensors().items()}


def _part(number: int) -> str:
    return f"stage {number:05d}"


class _StageReached(Exception):
    """Ends a forward pass once every input of interest has been seen."""


class _Run:
    """The original model and the one packed so far; they share everything that is not packed."""

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
        self.packed: dict[str, nn.Module] = {}  # linears of the quantized model so far
        self.shortcuts = True
        self.full_inputs: dict[str, list[Tensor]] = {}  # of the first sample, without shortcuts
        self.closing: list[str] = []  # blocks that run once more, to store their outputs
        self.closed: list[str] = []  # blocks that return stored outputs
        self.outputs: dict[tuple[str, bool, int], Any] = {}  # by list of blocks, model, sample
        self.routed: dict[str, list[Any]] = {}  # outputs of the original's routers, by call

    def moments(
        self, stage: Stage, sites: Mapping[str, Site], advance: Callable[[], None]
    ) -> dict[str, Moments]:
        """Moments of a stage's inputs over all samples."""
        moments, modules = {}, {}
        for owner in stage.owners:
            weight = self.model.get_submodule(owner).weight
            assert isinstance(weight, Tensor)
            moments[owner] = new_moments(weight.shape[1], weight.device)
            modules[owner] = ActivationSite(sites[owner]).to(weight.device)
        for index in range(len(self.samples)):
            original = self._inputs(stage, index, quantized=False)
            if index == 0 and self.shortcuts:
                self._check_shortcuts(stage, original)
            quantized = self._inputs(stage, index, quantized=True)
            for owner, module in modules.items():
                for x, y in zip(original[owner], quantized[owner], strict=False):
                    if y.numel():
                        q = module(y).float() * module.record.t
                        # A router without a known name may have sent other tokens.
                        add_moments(moments[owner], x if x.shape == y.shape else y, q)
            advance()
        self.closed += self.closing
        self.closing = []
        return moments

    def finish(
        self,
        weights: dict[str, PackedWeight],
        sites: Mapping[str, Site],
        linears_of: Mapping[str, list[str]],
        shared: Mapping[str, str],
    ) -> None:
        """Run the quantized model with these packed weights from now on."""
        self.packed |= packed_linears(self.model, weights, sites, linears_of, shared)

    def close(self, block: str) -> None:
        """Note that this block has no further stages."""
        if self.shortcuts:
            self.closing.append(block)

    def _check_shortcuts(self, stage: Stage, inputs: dict[str, list[Tensor]]) -> None:
        """Compare the first sample's ``inputs`` with a run without shortcuts.

        If they differ, drop all shortcuts and replace ``inputs``.
        """
        self.shortcuts = False
        if not self.full_inputs:
            everything = Stage("", self.owners)
            self.full_inputs = self._inputs(everything, 0, quantized=False, take=_sampled)
        # A block that is only a container never runs, and stores nothing.
        stored = all((_parent(block), False, 0) in self.outputs for block in self.closing)
        self.shortcuts = stored and all(
            len(inputs[owner]) == len(self.full_inputs[owner]) <= 1
            and all(map(_close, self.full_inputs[owner], map(_sampled, inputs[owner])))
            for owner in stage.owners
        )
        if not self.shortcuts:
            self.closing, self.closed = [], []
            self.outputs.clear()
            inputs |= self._inputs(stage, 0, quantized=False)

    def _inputs(
        self,
        stage: Stage,
        index: int,
        *,
        quantized: bool,
        take: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> dict[str, list[Tensor]]:
        """Inputs of a stage's sites on one sample, one tensor per call, each through ``take``."""
        seen: dict[str, list[Tensor]] = {owner: [] for owner in stage.owners}

        def note(owner: str, x: Tensor) -> None:
            seen[owner].append(take(x))
            if self.shortcuts and all(seen.values()):
                raise _StageReached

        with ExitStack() as stack:
            if quantized:
                stack.enter_context(Replacement(self.packed).within(self.model))
            if self.shortcuts:
                self._take_shortcuts(stack, stage.block, quantized, index)
            self._share_routing(stack, quantized)
            stack.enter_context(observed_inputs(self.model, stage.owners, note))
            with suppress(_StageReached):
                self.loss(self.model, self.samples[index])
        return seen

    def _take_shortcuts(self, stack: ExitStack, last: str, quantized: bool, index: int) -> None:
        """Closed blocks return stored outputs, closing ones store theirs, ``last`` ends the run."""

        def store(block: str, _: nn.Module, __: Any, out: Any) -> None:
            self.outputs[_parent(block), quantized, index] = copy.deepcopy(out)

        def stop(*_: Any) -> None:
            raise _StageReached

        for block in self.closed:
            output = self.outputs[_parent(block), quantized, index]
            stack.enter_context(_returning(self.model.get_submodule(block), output))
        for block in self.closing:
            module = self.model.get_submodule(block)
            stack.callback(module.register_forward_hook(partial(store, block)).remove)
        if last:
            stack.callback(self.model.get_submodule(last).register_forward_hook(stop).remove)

    def _share_routing(self, stack: ExitStack, quantized: bool) -> None:
        def record(name: str, _: nn.Module, __: Any, out: Any) -> None:
            self.routed[name].append(out)

        def repeat(name: str, *_: Any) -> Any:
            return self.routed[name].pop(0) if self.routed[name] else None

        for name in self.routers:
            router = self.model.get_submodule(name)
            if not quantized:
                self.routed[name] = []
            hook = partial(repeat if quantized else record, name)
            stack.callback(router.register_forward_hook(hook).remove)


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Within this context the module returns a copy of ``output`` without running."""
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
    """All tensors in a module's output."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from (t for part in value.values() for t in _tensors(part))
    elif isinstance(value, list | tuple):
        yield from (t for part in value for t in _tensors(part))


def _sampled(x: Tensor) -> Tensor:
    """Up to 4,096 elements of a tensor, (n,), at random places that depend on its size alone."""
    flat, generator = x.flatten(), torch.Generator().manual_seed(0)
    if len(flat) <= _SAMPLED:
        return flat.clone()
    return flat[torch.randint(len(flat), (_SAMPLED,), generator=generator).to(x.device)]


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    distance = torch.linalg.vector_norm((x - y).float())
    return bool(distance <= _TOLERANCE * torch.linalg.vector_norm(x.float()))
