"""Decide the format of every linear of an export, before any work.

The formats of other programs have one format per linear, for its weight and its input alike. vLLM
fuses linears that read one tensor and requires one format of them. So the unit of the decision is
the site:

* a site whose weights and activations are all FP4, or all FP8, keeps its format;
* any other site is *mixed*. Under ``--mixed per-layer`` all its linears become FP8 if more than
  half of their weight blocks are FP8, and NVFP4 otherwise.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK, THRESHOLD_ALL_FP4, THRESHOLD_ALL_FP8
from fgmp.model.linear import ActivationSite, MixedLinear

TARGETS = ("compressed-tensors", "modelopt", "dense")
PER_LAYER = "per-layer"

_ACTIVATION_MODES = {THRESHOLD_ALL_FP4: "fp4", THRESHOLD_ALL_FP8: "fp8"}
_NAMES = {"fp4": "all FP4", "fp8": "all FP8", "mixed": "FP4 and FP8 blocks"}


@dataclass(frozen=True)
class Plan:
    """Modes of an export: ``fp4`` or ``fp8``.

    Attributes:
        modes: mode of every linear, by name.
        site_modes: mode of every site, by owner.
    """

    modes: dict[str, str]
    site_modes: dict[str, str]

    @property
    def is_uniform(self) -> bool:
        """Whether all linears have one mode."""
        return len(set(self.modes.values())) == 1


def require_options(target: str, mixed: str | None) -> None:
    """Check the names of the target format and of the treatment of mixed checkpoints.

    Raises:
        InputError: an unknown name, or one that does not apply to the target.
    """
    if target not in TARGETS:
        raise InputError(f"to must be one of {', '.join(TARGETS)}, got {target!r}")
    if mixed not in (None, PER_LAYER):
        raise InputError(f"mixed must be {PER_LAYER}, got {mixed!r}")
    if mixed and target != "compressed-tensors":
        raise InputError(f"mixed {PER_LAYER} needs the target compressed-tensors, got {target}")


def plan(
    linears: Mapping[str, MixedLinear],
    sites: Mapping[str, ActivationSite],
    linears_of: Mapping[str, list[str]],
    obstacles: Mapping[str, str],
    target: str,
    mixed: str | None,
) -> Plan:
    """Choose a mode for every site and its linears.

    Args:
        linears, sites: of the quantized model, by name and by owner.
        linears_of: names of the linears that read each site.
        obstacles: reasons why a linear cannot be packed, from ``model.plain.obstacles``.
        target: ``compressed-tensors`` or ``modelopt``.
        mixed: None to refuse mixed checkpoints, or :data:`PER_LAYER`.

    Raises:
        InputError: names the first linear that the target cannot represent.
    """
    for name, reason in obstacles.items():
        raise InputError(f"{name}: {target} cannot represent it: {reason}; choose --to dense")
    site_modes: dict[str, str] = {}
    for owner, names in linears_of.items():
        own = {name: linears[name].packed.mode for name in names}
        threshold = int(sites[owner].threshold.item())
        activations = _ACTIVATION_MODES.get(threshold, "mixed")
        if mixed is None:
            _require_uniform(target, own, owner, activations, site_modes)
            site_modes[owner] = activations
        else:
            site_modes[owner] = _majority(linears[name] for name in names)
    modes = {name: site_modes[owner] for owner, names in linears_of.items() for name in names}
    for name, mode in modes.items():
        k = linears[name].in_features
        if mode == "fp4" and k % BLOCK:
            raise InputError(
                f"{name}.weight: K must be a multiple of {BLOCK} in NVFP4 of {target}, got {k}; "
                "choose --to dense"
            )
    return Plan(modes, site_modes)


def _require_uniform(
    target: str,
    weight_modes: Mapping[str, str],
    owner: str,
    activations: str,
    earlier: Mapping[str, str],
) -> None:
    tensors = {f"{name}.weight": mode for name, mode in weight_modes.items()}
    tensors[f"{owner}.input_site"] = activations
    first = next(iter(earlier.values()), next(iter(weight_modes.values())))
    for name, mode in tensors.items():
        if mode == "mixed" or mode != first:
            other = "" if mode == "mixed" else f", others {_NAMES[first]}"
            raise InputError(
                f"{name}: has {_NAMES[mode]}{other}, and {target} needs one format for all "
                "tensors; choose --to dense, or --to compressed-tensors --mixed per-layer"
            )


def _majority(linears: Iterable[MixedLinear]) -> str:
    fp8, blocks = 0, 0
    for linear in linears:
        is_fp8 = linear.packed.is_fp8()
        fp8, blocks = fp8 + int(is_fp8.sum()), blocks + is_fp8.numel()
    return "fp8" if 2 * fp8 > blocks else "fp4"
