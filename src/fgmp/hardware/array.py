"""Parameters of the accelerator: how many lanes, how they are fed, what fits.

``lanes`` weight rows meet ``rows`` activation rows in ``lanes * rows`` lanes, one block of each
per cycle. A weight block stays in its lanes for ``datapath.reuse`` cycles while as many activation
blocks pass, so an activation tile has ``rows * reuse`` rows. A linear runs as

    for each activation tile           quantized once, during the computation of the previous tile
        for each tile of weight rows   loaded during the computation of the previous tile
            for each block of K
                for each slot          one cycle: lanes * rows pairs of blocks

The lanes wait for the quantizer unless N >= rows * lanes, for weights unless there are many
tokens, and for the epilogue unless K / 16 >= lanes. :meth:`Array.cycles` counts cycles of work
alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from fgmp.errors import InputError
from fgmp.formats.activation import Site, power_codes
from fgmp.formats.rules import RULES, QuantizerConfig
from fgmp.formats.spec import BLOCK
from fgmp.hardware.datapath import Datapath

if TYPE_CHECKING:
    from fgmp.hardware.rtl.accelerator import Accelerator


def rtl_rules() -> tuple[str, ...]:
    """Names of the rules that have hardware."""
    return tuple(name for name, rule in RULES.items() if rule.rtl)


def require_rtl(config: QuantizerConfig) -> None:
    """Refuse a quantizer without hardware.

    Raises:
        InputError: with the rules that have hardware.
    """
    if not RULES[config.rule].rtl:
        raise InputError(
            f"quantizer: rule must be one with hardware ({', '.join(rtl_rules())}), "
            f"got {config.rule!r}"
        )


def sensitivities_of(sites: Iterable[Site]) -> str:
    """The narrowest of ``formats.rules.SENSITIVITIES`` that holds those of all sites."""
    powers = all(torch.equal(s.sensitivity, power_codes(s.sensitivity)) for s in sites)
    return "powers" if powers else "e4m3"


@dataclass(frozen=True, kw_only=True)
class Array:
    """Parameters of an accelerator.

    Attributes:
        datapath: the lanes; ``kind`` must be ``mixed``.
        lanes: weight rows at a time.
        rows: activation rows at a time.
        outputs_max: maximum number of rows of a weight; the size of the bias memory.
        quantizer: configuration of the quantizer, whose rule must have hardware.
    """

    datapath: Datapath = field(default_factory=lambda: Datapath(k_max=4096))
    lanes: int = 4
    rows: int = 1
    outputs_max: int = 4096
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)

    def __post_init__(self) -> None:
        def require(holds: bool, constraint: str, value: object) -> None:
            if not holds:
                raise InputError(f"array: {constraint}, got {value!r}")

        require(self.datapath.kind == "mixed", "kind must be 'mixed'", self.datapath.kind)
        require(self.lanes >= 1, "lanes must be 1 or more", self.lanes)
        require(self.rows >= 1, "rows must be 1 or more", self.rows)
        require(self.outputs_max >= 1, "outputs_max must be 1 or more", self.outputs_max)
        require_rtl(self.quantizer)

    @property
    def groups_max(self) -> int:
        """Blocks in the longest row."""
        return self.datapath.k_max // BLOCK

    @property
    def tile_rows(self) -> int:
        """Activation rows in a tile."""
        return self.rows * self.datapath.reuse

    def require_fits(self, name: str, n: int, k: int) -> None:
        """Refuse a linear whose shape the buffers cannot hold.

        Raises:
            InputError: with the linear, the limit and the parameter that sets it.
        """
        for dimension, size, limit, parameter in (
            ("K", k, self.groups_max * BLOCK, "k_max"),
            ("N", n, self.outputs_max, "outputs_max"),
        ):
            if size > limit:
                raise InputError(
                    f"{name}: {dimension} must be at most {limit} for this array, got {size}; "
                    f"choose a larger {parameter}"
                )

    def require_rules(self, name: str, site: Site) -> None:
        """Refuse a site that needs another quantizer.

        A quantizer for all E4M3 sensitivities also takes powers of two.

        Raises:
            InputError: with the site and the parameter to change.
        """
        config, sensitivities = self.quantizer, sensitivities_of([site])
        for parameter, value, expected, fits in (
            ("rule", site.rule, config.rule, site.rule == config.rule),
            ("scales", site.scales, config.scales, site.scales == config.scales),
            (
                "sensitivities",
                sensitivities,
                config.sensitivities,
                config.sensitivities in ("e4m3", sensitivities),
            ),
        ):
            if not fits:
                raise InputError(
                    f"{name}: {parameter} must be {expected!r} for this array, got {value!r}"
                )

    def cycles(self, n: int, k: int, tokens: int) -> int:
        """Cycles in which the lanes compute a linear, without waits."""
        groups, slots = -(-k // BLOCK), -(-tokens // self.rows)
        return -(-n // self.lanes) * groups * slots

    def create(self) -> "Accelerator":
        """The hardware."""
        from fgmp.hardware.rtl.accelerator import Accelerator

        return Accelerator(self)
