"""Export a checkpoint: plan, round, measure, write.

What an export loses is measured against the checkpoint and stored in its folder:

* weights: the norm of the rounding error per linear, and for a dense export the largest relative
  error of a weight in the dtype of the files;
* activations: numbers of sites that lose their searched scales or their mix of formats;
* predictions, if there are evaluation windows: mean KL divergence per token of the export from the
  checkpoint. The export is emulated by fgmp's own operators. Other programs multiply by rounded
  reciprocals of the same scales, so their results differ in last digits.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fgmp.errors import InputError
from fgmp.evaluation.perplexity import (
    batches,
    divergence_of,
    next_token_log_probabilities,
    vocabulary_size,
)
from fgmp.export.layouts import LAYOUTS
from fgmp.export.plan import Plan, plan, require_options
from fgmp.export.rounding import ROUND, relative_error
from fgmp.formats.activation import Site
from fgmp.formats.spec import THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.convert import Replacement, packed_linears, sharing_copy
from fgmp.model.linear import MixedLinear, mixed_linears, sites
from fgmp.model.plain import obstacles, other_linear_layers, plain_tensors, skeleton
from fgmp.model.precision import stored_dtype
from fgmp.model.source import Source
from fgmp.model.store import config_of, tensors_to_save
from fgmp.pack import checkpoint
from fgmp.pack.checkpoint import CARD, RUN, SCORES
from fgmp.pack.folder import CONFIG, INDEX, weight_files
from fgmp.pack.planes import PackedWeight

RECORD = "fgmp_export.json"
"""File of an export that says what was lost."""

_THRESHOLDS = {"fp4": THRESHOLD_ALL_FP4, "fp8": THRESHOLD_ALL_FP8}


@dataclass(frozen=True)
class Export:
    """What an export contains and what it loses.

    Attributes:
        to: the target format.
        linears: number of linears by format, ``nvfp4``, ``fp8`` or ``dense``.
        weight_error: by linear, norm of the rounding error over the norm of the weight.
        max_relative_error: largest relative error of a single weight; dense exports only.
        searched_sites: activation sites whose searched scales become ``max``.
        mixed_sites: activation sites of both formats that get one.
        unquantized_sites: activation sites that are no longer quantized.
        kl: mean KL divergence per token from the checkpoint, in nats; None if not measured.
    """

    to: str
    linears: dict[str, int]
    weight_error: dict[str, float]
    max_relative_error: float | None
    searched_sites: int
    mixed_sites: int
    unquantized_sites: int
    kl: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class _Draft:
    """An export before it is measured and written.

    Attributes:
        replacement: linears that emulate the export.
        tensors: tensors of the quantized linears, by full name.
        config: ``quantization_config``; None for a dense export.
        files: further JSON files by name.
        export: what is lost, without predictions.
    """

    replacement: dict[str, nn.Module]
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None
    files: dict[str, dict[str, Any]]
    export: Export


def export(
    directory: str | Path,
    output: str | Path,
    to: str,
    *,
    mixed: str | None = None,
    model: nn.Module | None = None,
    windows: Tensor | None = None,
    advance: Callable[[], None] = lambda: None,
) -> Export:
    """Write a checkpoint in the format of another program.

    Args:
        directory: an fgmp checkpoint of a Transformers model.
        output: folder to write; must not exist, or be empty. It appears complete or not at all.
        to: ``compressed-tensors``, ``modelopt`` or ``dense``.
        mixed: ``per-layer`` rounds each site of a mixed checkpoint to one format; None refuses.
        model: the loaded checkpoint; None loads it.
        windows: evaluation windows, int64 (B, L), on which the loss is measured; None measures
            the loss of weights only.
        advance: called after each batch of windows.

    Raises:
        InputError: not an fgmp checkpoint, a target in use, or a linear that the format cannot
            represent.
        CheckpointError: the checkpoint breaks a rule.
    """
    directory, output = Path(directory), Path(output)
    require_options(to, mixed)
    checkpoint.require_free(output)
    raw = checkpoint.read_config(directory)
    if model is None:
        model = Source(str(directory)).load()
    structure = skeleton(model)
    draft = _dense(model) if to == "dense" else _packed(model, structure, to, mixed)
    result = draft.export
    if windows is not None:
        kl = _divergence(model, draft.replacement, windows, advance)
        result = Export(**{**vars(result), "kl": kl})
    others = {
        name: tensor
        for name, tensor in tensors_to_save(model).items()
        if not any(name.startswith(f"{linear}.") for linear in mixed_linears(model))
        or name.endswith(".bias")
    }
    tensors = {**others, **draft.tensors}
    if to == "dense":
        tensors = plain_tensors(structure, tensors)
    raw.pop("quantization_config")
    if draft.config is not None:
        raw["quantization_config"] = draft.config

    def write_extra(folder: Path) -> None:
        for path in _other_files(directory):
            copy = shutil.copytree if path.is_dir() else shutil.copyfile
            copy(path, folder / path.name)
        for name, content in {**draft.files, RECORD: result.to_dict()}.items():
            checkpoint.write_json(folder / name, content)

    checkpoint.write(output, tensors, raw, write_extra)
    return result


def _other_files(directory: Path) -> Iterator[Path]:
    """Files of the checkpoint that an export copies: tokenizer, generation settings and so on."""
    replaced = {CONFIG, INDEX, RUN, SCORES, CARD, *(path.name for path in weight_files(directory))}
    for path in sorted(directory.iterdir()):
        if path.name not in replaced and not path.name.startswith("."):
            yield path


def _dense(model: nn.Module) -> _Draft:
    dtype = stored_dtype(model)
    linears = mixed_linears(model)
    weights = {name: linear.weight.to(dtype) for name, linear in linears.items()}
    errors, largest = {}, 0.0
    for name, linear in linears.items():
        values, stored = linear.weight.double(), weights[name].double()
        if not stored.isfinite().all():
            raise InputError(f"{name}.weight: {dtype} cannot hold its values; the largest is "
                             f"{values.abs().max().item():.4g}")  # fmt: skip
        difference = (stored - values).abs()
        norm = values.norm().item()
        errors[name] = difference.norm().item() / norm if norm else 0.0
        relative = difference[values != 0] / values[values != 0].abs()
        largest = max(largest, relative.max().item() if relative.numel() else 0.0)
    return _Draft(
        {name: _linear(linear, weights[name]) for name, linear in linears.items()},
        {f"{name}.weight": weight for name, weight in weights.items()},
        None,
        {},
        Export("dense", {"dense": len(linears)}, errors, largest, 0, 0, len(sites(model)), None),
    )


def _linear(old: MixedLinear, weight: Tensor) -> nn.Linear:
    new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.register_parameter("bias", old.bias)
    return new


def _packed(model: nn.Module, structure: nn.Module, to: str, mixed: str | None) -> _Draft:
    linears, records = mixed_linears(model), {o: s.record for o, s in sites(model).items()}
    linears_of = {owner: site.linears for owner, site in config_of(model).sites.items()}
    names = [name for group in linears_of.values() for name in group]
    chosen = plan(linears, sites(model), linears_of, obstacles(structure, names), to, mixed)
    rounded = {n: ROUND[mode](linears[n].packed) for n, mode in chosen.modes.items()}
    layout, ignored = LAYOUTS[to], other_linear_layers(structure, names)
    tensors = {
        f"{name}.{part}": tensor
        for owner, group in linears_of.items()
        for name in group
        for part, tensor in layout.tensors(rounded[name], torch.tensor(records[owner].r)).items()
    }
    return _Draft(
        dict(packed_linears(model, rounded, _one_format(records, chosen), linears_of)),
        tensors,
        layout.configuration(chosen.modes, ignored),
        layout.files(chosen.modes, ignored),
        _losses(to, linears, rounded, records, chosen),
    )


def _one_format(records: dict[str, Site], chosen: Plan) -> dict[str, Site]:
    """Constants of the sites as readers of the export use them."""
    return {
        owner: Site(
            r=record.r,
            sensitivity=record.sensitivity,
            gamma=record.gamma,
            threshold=_THRESHOLDS[chosen.site_modes[owner]],
            rule=record.rule,
            scales="max",
        )
        for owner, record in records.items()
    }


def _losses(
    to: str,
    linears: dict[str, MixedLinear],
    rounded: dict[str, PackedWeight],
    records: dict[str, Site],
    chosen: Plan,
) -> Export:
    modes = list(chosen.modes.values())
    fp4_sites = [records[owner] for owner, mode in chosen.site_modes.items() if mode == "fp4"]
    return Export(
        to=to,
        linears={"nvfp4": modes.count("fp4"), "fp8": modes.count("fp8")},
        weight_error={n: relative_error(rounded[n], linears[n].packed) for n in chosen.modes},
        max_relative_error=None,
        searched_sites=sum(record.scales != "max" for record in fp4_sites),
        mixed_sites=sum(r.threshold not in _THRESHOLDS.values() for r in records.values()),
        unquantized_sites=0,
        kl=None,
    )


@torch.no_grad()
def _divergence(
    model: nn.Module,
    replacement: dict[str, nn.Module],
    windows: Tensor,
    advance: Callable[[], None],
) -> float:
    """Mean KL divergence per token of the emulated export from the checkpoint."""
    emulated = sharing_copy(model).eval()
    dtype = next(model.parameters()).dtype
    linears = {
        name: module.to(dtype) if isinstance(module, nn.Linear) else module
        for name, module in replacement.items()
    }
    Replacement(linears).put(emulated)
    model.eval()
    total = 0.0
    for batch in batches(windows, vocabulary_size(model)):
        reference = next_token_log_probabilities(model, batch)
        total += (
            divergence_of(next_token_log_probabilities(emulated, batch), reference).sum().item()
        )
        advance()
    return total / (windows.shape[0] * (windows.shape[1] - 1))
