"""Sequential error compensation (GPTQ), in order of execution.

A linear is packed so that its output on quantized inputs q is close to the original's on x. In the
final model, q carries the errors of all earlier linears. So q comes from a model in which those are
packed already, and x from the original. The linear then also compensates earlier errors.
Several *variants* of the quantized model are packed side by side. They share the original's runs
and, before anything is packed, the moments H and their factor.

A *stage* is a set of sites that are compensated together. Sites share a stage if they are in the
same decoder layer (an entry of the model's outermost module list; ``block`` in this file) and have
the same name within it, apart from indices of inner lists, such as those of experts. A site outside
of all such lists is a stage of its own. Sites whose linears share a weight share a stage, too,
which comes where the first of them would. Sites of a stage do not compensate each other's errors.

Each stage runs the samples through all models, up to the stage's inputs. To keep the cost from
growing with the square of the depth, outputs of finished blocks are stored, and from then on a
block returns them without running. The original runs to the end of a block in the block's last
stage; a variant, whose last linears are not packed by then, runs the block once more in the pass of
the next stage. This shortcut is valid if a block's output is all that later blocks depend on. The
first sample checks that in every stage, against one run without shortcuts. If the check fails, all
shortcuts are dropped and every pass runs whole models: slow, and correct. The same holds for a loss
that runs the model twice.

In a variant's block, linears of earlier stages read the same inputs in each pass. Their outputs are
cached, up to half a gigabyte per variant, and not computed again. It does not hold if a shared
weight brings a site into a stage before sites that precede it in the model are packed: its inputs
still change. So no outputs of linears of such a stage are cached.

Finished stages can be stored on disk. A resumed run installs their weights instead of accumulating
moments; the pass of the first stage that is not stored runs all earlier layers once.

Routers of the quantized models repeat the choices of the original's, so that each expert sees the
same tokens in all of them.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fgmp.formats.activation import Site
from fgmp.model.convert import Replacement, packed_linears
from fgmp.model.linear import ActivationSite
from fgmp.model.losses import Loss
from fgmp.model.observe import PassEnded, ends_after, frozen, observed_inputs
from fgmp.model.select import routers, shared_weights
from fgmp.pack.planes import PackedWeight
from fgmp.quantization.sharing import joined, readers, weights_by_readers
from fgmp.sensitivity.moments import MOMENT_BYTES, Moments, Source, add_moments, new_moments
from fgmp.storage.resume import PartialResults

PackStage = Callable[..., dict[str, PackedWeight]]
"""Packs a stage: maps (lists of linear names, one per group of weights with the same inputs;
``moments`` by the first name of each list) to packed weights by linear."""

Variants = dict[str, dict[str, PackedWeight]]
"""Packed weights by variant and linear."""

_FACTOR_MATRICES = 1
"""fp32 matrices held beside H and D while a weight is packed: the root."""

_CACHED_BYTES = 1 << 29
"""Limit on the bytes of cached outputs of packed linears, per variant."""

_SAMPLED = 4096
"""Number of elements per tensor that the check of cached outputs compares."""
_TOLERANCE = 2.0**-8
"""Relative distance allowed between two runs of the same computation: one rounding to bf16."""


@dataclass(frozen=True)
class Stage:
    """Sites that are compensated together.

    Attributes:
        block: name of their module-list entry, such as ``model.layers.0``; empty if in none.
        owners: the sites, each named by its first linear.
        in_order: whether every site that runs before one of these is in this stage or an earlier
            one. False if a shared weight merged sites of several kinds.
    """

    block: str
    owners: list[str]
    in_order: bool = True


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
        kinds = {(block_of(model, owner), stage_kind(model, owner)) for owner in group}
        blocks = {block for block, _ in kinds}
        merged.append(Stage(blocks.pop() if len(blocks) == 1 else "", group, len(kinds) == 1))
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


class OutputBytes(NamedTuple):
    """Bytes of outputs on one sample, of which compensation stores those of all samples.

    Attributes:
        blocks: of one block per module list, the largest.
        linears: of all linears of a block, the largest.
    """

    blocks: int
    linears: int


def bytes_needed(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    variants: int = 1,
) -> int:
    """Bytes of the largest stage's moments and factors, and of stored outputs.

    Assumes that all samples are as large as the first.
    """
    outputs = output_bytes(model, linears, samples[0], loss)
    return stage_bytes(model, linears, variants) + stored_bytes(outputs, len(samples), variants)


def stored_bytes(outputs: OutputBytes, samples: int, variants: int) -> int:
    """Bytes of the outputs that compensation stores, of the original and of all variants."""
    per_variant = min(samples * outputs.linears, _CACHED_BYTES)
    return (1 + variants) * samples * outputs.blocks + variants * per_variant


@torch.no_grad()
def output_bytes(
    model: nn.Module, linears: dict[str, nn.Linear], sample: Any, loss: Loss
) -> OutputBytes:
    """Sizes of outputs on one sample; its tensors may be fake."""
    outputs: dict[str, int] = {}  # bytes of a block's output on one sample, by block
    of_linears: dict[str, int] = {}  # bytes of its linears' outputs on one sample, by block

    def measure(sizes: dict[str, int], name: str, _: nn.Module, __: Any, out: Any) -> None:
        sizes[name] = sizes.get(name, 0) + sum(t.nbytes for t in _tensors(out))

    blocks = {block_of(model, name) for name in linears} - {""}
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        for sizes, names in (
            (outputs, {b: b for b in blocks}),
            (of_linears, _blocks(model, linears)),
        ):
            for name, counted_as in names.items():
                hook = partial(measure, sizes, counted_as)
                stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        loss(model, sample)
    lists: dict[str, int] = {}
    for block, size in outputs.items():
        lists[_parent(block)] = max(lists.get(_parent(block), 0), size)
    return OutputBytes(sum(lists.values()), max(of_linears.values(), default=0))


def _blocks(model: nn.Module, linears: Iterable[str]) -> dict[str, str]:
    """Block of each linear that is in one."""
    blocks = {name: block_of(model, name) for name in linears}
    return {name: block for name, block in blocks.items() if block}


def stage_bytes(model: nn.Module, linears: dict[str, nn.Linear], variants: int = 1) -> int:
    """Bytes of the largest stage's moments, and of the factors of the widest input.

    An upper bound: which linears share an input is not known yet, so each counts its own moments.
    """
    widths = {name: linear.in_features**2 for name, linear in linears.items()}
    shared = shared_weights(linears)
    together = readers({name: [name] for name in linears}, shared).values()
    moments = max(
        sum(widths[name] for name in stage.owners if name not in shared)
        for stage in stages(model, list(linears), together)
    )
    return variants * MOMENT_BYTES * moments + 4 * _FACTOR_MATRICES * max(widths.values())


@torch.no_grad()
def pack_in_turn(
    model: nn.Module,
    linears_of: Mapping[str, list[str]],
    sites: Mapping[str, Site],
    samples: Sequence[Any] | Tensor,
    loss: Loss,
    packers: Mapping[str, PackStage],
    advance: Callable[[], None] = lambda: None,
    results: PartialResults | None = None,
    *,
    shared: Mapping[str, str] | None = None,
) -> Variants:
    """Pack all variants stage by stage; the model is left as it was, also after an error.

    Args:
        model: the original, linearized.
        linears_of: linears by the owner of their site, sites in order of execution.
        sites: constants of the sites.
        samples, loss: as for calibration.
        packers: by variant, what packs the linears of a stage, given the moments of their inputs.
        advance: called after each sample of each stage.
        results: stages that this run packed before an interruption; later ones are added.
        shared: maps each linear that uses an earlier linear's weight to that earlier linear.
    """
    shared = shared or {}
    packed: Variants = {variant: {} for variant in packers}
    todo = stages(model, list(linears_of), readers(linears_of, shared).values())
    last_of = {block_of(model, owner): stage for stage in todo for owner in stage.owners}
    with frozen(model):
        run = _Run(model, samples, loss, linears_of, list(packers), shared)
        for number, stage in enumerate(todo):
            groups = {owner: linears_of[owner] for owner in stage.owners}
            by_readers = weights_by_readers(groups, shared)
            is_last = stage.block != "" and stage is last_of[stage.block]
            weights = _restored(results, number, by_readers, model, list(packers))
            if weights is None:
                moments = run.moments(stage, sites, advance, closes=is_last)
                weights = {
                    variant: pack_stage(by_readers, moments=moments.pop(variant))
                    for variant, pack_stage in packers.items()
                }
                if results is not None:
                    results.store(_part(number), _planes(weights))
            else:
                for _ in samples:
                    advance()
            run.finish(stage, weights, sites)
            if is_last:
                run.close(stage.block)
            for variant, more in weights.items():
                packed[variant] |= more
    return packed


def _restored(
    results: PartialResults | None,
    number: int,
    groups: Iterable[list[str]],
    model: nn.Module,
    variants: Sequence[str],
) -> Variants | None:
    """Weights of a stage that was packed before, on the devices of the weights they replace."""
    state = results.load(_part(number)) if results else None
    if results is None or state is None:
        return None
    names = [name for group in groups for name in group]
    planes: dict[str, dict[str, dict[str, Tensor]]] = {v: {n: {} for n in names} for v in variants}
    try:
        for key, tensor in state.tensors.items():
            variant, _, rest = key.partition(":")
            name, _, plane = rest.rpartition(".")
            device = next(model.get_submodule(name).parameters()).device
            planes[variant][name][plane] = tensor.to(device)
        return {
            variant: {name: PackedWeight(**named) for name, named in weights.items()}
            for variant, weights in planes.items()
        }
    except (AttributeError, KeyError, TypeError) as error:
        results.unusable(_part(number), error)
        return None


def _planes(variants: Variants) -> dict[str, Tensor]:
    return {
        f"{variant}:{name}.{plane}": tensor
        for variant, weights in variants.items()
        for name, weight in weights.items()
        for plane, tensor in weight.tensors().items()
    }


def _part(number: int) -> str:
    return f"stage {number:05d}"


class _Stream:
    """State of one model, the original or a variant: packed linears and cached outputs.

    Attributes:
        linears: packed linears; none in the original.
        closing: blocks that run once more, to store their outputs.
        closed: blocks that return stored outputs.
        outputs: stored outputs, by list of blocks and sample.
        linear_outputs: outputs of packed linears of the open block, by linear and sample.
        linear_bytes: bytes of ``linear_outputs``.
    """

    def __init__(self) -> None:
        self.linears: dict[str, nn.Module] = {}
        self.closing: list[str] = []
        self.closed: list[str] = []
        self.outputs: dict[tuple[str, int], Any] = {}
        self.linear_outputs: dict[tuple[str, int], Tensor] = {}
        self.linear_bytes = 0

    def close(self) -> None:
        """Let blocks whose outputs are stored return these."""
        self.closed += self.closing
        self.closing = []

    def cache(self, name: str, index: int, output: Tensor) -> None:
        """Cache the output of a linear on a sample, if there is room."""
        if self.linear_bytes + output.nbytes <= _CACHED_BYTES:
            self.linear_outputs[name, index] = output.clone()
            self.linear_bytes += output.nbytes

    def forget(self) -> None:
        """Drop all that is stored."""
        self.closing, self.closed, self.linear_bytes = [], [], 0
        self.outputs.clear()
        self.linear_outputs.clear()


class _Run:
    """The original model and its variants packed so far; they share what is not packed."""

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Any] | Tensor,
        loss: Loss,
        linears_of: Mapping[str, list[str]],
        variants: Sequence[str],
        shared: Mapping[str, str],
    ) -> None:
        self.model, self.samples, self.loss = model, samples, loss
        self.linears_of, self.shared = linears_of, shared
        self.reusable: set[str] = set()  # packed linears whose inputs do not change any more
        self.routers = routers(model)
        self.original = _Stream()
        self.variants = {variant: _Stream() for variant in variants}
        self.shortcuts = True
        self.full_inputs: dict[str, list[Tensor]] = {}  # of the first sample, without shortcuts
        self.routed: dict[tuple[str, int], list[Any]] = {}  # by router of the original and sample

    def moments(
        self,
        stage: Stage,
        sites: Mapping[str, Site],
        advance: Callable[[], None],
        *,
        closes: bool,
    ) -> dict[str, dict[str, Moments]]:
        """Moments of a stage's inputs over all samples, by variant and first weight of a group.

        A group has the weights that the same sites read; its moments are sums over these sites.
        ``closes`` says that the stage is its block's last: the original then stores its outputs.
        """
        sources, modules = {}, {}
        # Before anything is packed, variants read the same inputs: H is summed once, and shared.
        agree = not any(stream.linears for stream in self.variants.values())
        first = next(iter(self.variants))
        moments: dict[str, dict[str, Moments]] = {variant: {} for variant in self.variants}
        linears_of = {owner: self.linears_of[owner] for owner in stage.owners}
        owners_of = readers(linears_of, self.shared)
        read_by: dict[str, list[str]] = {owner: [] for owner in stage.owners}
        for holder, *others in weights_by_readers(linears_of, self.shared):
            linears = {name: self.model.get_submodule(name) for name in (holder, *others)}
            weights = {n: m.weight for n, m in linears.items() if isinstance(m.weight, Tensor)}
            k, device = weights[holder].shape[1], weights[holder].device
            sources[holder] = Source(weights)
            for variant, by_holder in moments.items():
                if agree and variant != first:
                    by_holder[holder] = moments[first][holder].variant()
                else:
                    by_holder[holder] = new_moments(k, device, sources[holder])
            for owner in owners_of[holder]:
                modules[owner] = ActivationSite(sites[owner]).to(device)
                read_by[owner].append(holder)
        if closes and self.shortcuts:
            self.original.closing.append(stage.block)
        for index in range(len(self.samples)):
            original = self._inputs(stage, index, self.original)
            if index == 0 and self.shortcuts:
                self._check_shortcuts(stage, original)
            for variant, stream in self.variants.items():
                quantized = self._inputs(stage, index, stream)
                for owner, site in modules.items():
                    for x, y in zip(original[owner], quantized[owner], strict=False):
                        if y.numel():
                            q = site(y).float() * site.record.t
                            # A router that was not recognized may have chosen other tokens here.
                            # Then x and q cannot be paired, and q's unquantized value stands for x.
                            original_x = x if x.shape == y.shape else y
                            for holder in read_by[owner]:
                                add_moments(
                                    moments[variant][holder],
                                    original_x,
                                    q,
                                    sources[holder],
                                    to_h=variant == first or not agree,
                                )
            advance()
        for stream in (self.original, *self.variants.values()):
            stream.close()
        return moments

    def finish(self, stage: Stage, weights: Variants, sites: Mapping[str, Site]) -> None:
        """Run the variants with these packed weights of a stage from now on."""
        linears_of = {owner: self.linears_of[owner] for owner in stage.owners}
        for variant, packed in weights.items():
            linears = packed_linears(self.model, packed, sites, linears_of, self.shared)
            self.variants[variant].linears |= linears
            if stage.in_order:
                self.reusable |= linears.keys()

    def close(self, block: str) -> None:
        """Let the models store this block's outputs in the next pass, if they have not yet.

        To be called when the block's last stage is packed.
        """
        if self.shortcuts:
            for stream in (self.original, *self.variants.values()):
                if block not in stream.closed:
                    stream.closing.append(block)

    def _check_shortcuts(self, stage: Stage, inputs: dict[str, list[Tensor]]) -> None:
        """Compare the first sample's ``inputs`` with a run without shortcuts.

        If they differ, drop all shortcuts and replace ``inputs``.
        """
        self.shortcuts = False
        if not self.full_inputs:
            everything = Stage("", list(self.linears_of))
            self.full_inputs = self._inputs(everything, 0, self.original, take=_sampled)
        # A layer that is only a container never runs, and stores nothing.
        stored = all(
            (_parent(block), 0) in self.original.outputs for block in self.original.closing
        )
        self.shortcuts = stored and all(
            len(inputs[owner]) == len(self.full_inputs[owner]) <= 1
            and all(map(_close, self.full_inputs[owner], map(_sampled, inputs[owner])))
            for owner in stage.owners
        )
        if not self.shortcuts:
            for stream in (self.original, *self.variants.values()):
                stream.forget()
            inputs |= self._inputs(stage, 0, self.original)

    def _inputs(
        self,
        stage: Stage,
        index: int,
        stream: _Stream,
        take: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> dict[str, list[Tensor]]:
        """Inputs of a stage's sites on one sample, one tensor per call, each through ``take``."""
        seen: dict[str, list[Tensor]] = {owner: [] for owner in stage.owners}
        to_the_end = stage.block in stream.closing

        def note(owner: str, x: Tensor) -> None:
            seen[owner].append(take(x))
            if self.shortcuts and all(seen.values()) and not to_the_end:
                raise PassEnded

        with ExitStack() as stack:
            linears = stream.linears
            if self.shortcuts:
                closed = set(stream.closed)
                linears = {
                    n: m for n, m in linears.items() if block_of(self.model, n) not in closed
                }
            stack.enter_context(Replacement(linears).within(self.model))
            if self.shortcuts:
                self._reuse_linears(stack, stream, linears, index)
                self._take_shortcuts(stack, stage.block, stream, index)
            self._share_routing(stack, stream, index)
            stack.enter_context(observed_inputs(self.model, stage.owners, note))
            with suppress(PassEnded):
                self.loss(self.model, self.samples[index])
        return seen

    def _take_shortcuts(self, stack: ExitStack, last: str, stream: _Stream, index: int) -> None:
        """Closed blocks return stored outputs, closing ones store theirs, ``last`` ends the run."""

        def store(block: str, _: nn.Module, __: Any, out: Any) -> None:
            stream.outputs[_parent(block), index] = copy.deepcopy(out)

        for block in stream.closed:
            output = stream.outputs[_parent(block), index]
            stack.enter_context(_returning(self.model.get_submodule(block), output))
        for block in stream.closing:
            module = self.model.get_submodule(block)
            stack.callback(module.register_forward_hook(partial(store, block)).remove)
        if last:
            stack.enter_context(ends_after(self.model.get_submodule(last)))

    def _reuse_linears(
        self, stack: ExitStack, stream: _Stream, linears: Mapping[str, nn.Module], index: int
    ) -> None:
        """Linears with cached outputs return them; other outputs are cached for later passes."""

        def cache(name: str, _: nn.Module, __: Any, out: Tensor) -> None:
            stream.cache(name, index, out)

        for name, module in linears.items():
            closes = block_of(self.model, name) in stream.closing
            output = stream.linear_outputs.get((name, index))
            if output is not None:
                stack.enter_context(_returning(module, output))
                if closes:
                    stream.linear_bytes -= stream.linear_outputs.pop((name, index)).nbytes
            elif name in self.reusable and block_of(self.model, name) and not closes:
                stack.callback(module.register_forward_hook(partial(cache, name)).remove)

    def _share_routing(self, stack: ExitStack, stream: _Stream, index: int) -> None:
        """Routers of the original record what they return; those of the variants repeat it."""
        recorded: dict[str, list[Any]] = {}
        to_repeat = {name: iter(self.routed.get((name, index), [])) for name in self.routers}

        def record(name: str, _: nn.Module, __: Any, out: Any) -> None:
            recorded.setdefault(name, []).append(out)
            self.routed[name, index] = recorded[name]

        def repeat(name: str, *_: Any) -> Any:
            return next(to_repeat[name], None)

        for name in self.routers:
            router = self.model.get_submodule(name)
            hook = partial(record if stream is self.original else repeat, name)
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
    """Up to 4,096 elements of a tensor, (n,), at positions fixed by its size."""
    flat, generator = x.flatten(), torch.Generator().manual_seed(0)
    if len(flat) <= _SAMPLED:
        return flat.clone()
    return flat[torch.randint(len(flat), (_SAMPLED,), generator=generator).to(x.device)]


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape:
        return False
    distance = torch.linalg.vector_norm((x - y).float())
    return bool(distance <= _TOLERANCE * torch.linalg.vector_norm(x.float()))
