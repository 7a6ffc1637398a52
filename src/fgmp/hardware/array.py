"""The accelerator's parameters: how many lanes, how they are fed, what fits.

``lanes`` weight rows meet ``rows`` activation rows in ``lanes * rows`` lanes, a block of each a
cycle. A weight block stays in its lanes for ``datapath.reuse`` cycles while as many activation
blocks pass, so that an activation tile has ``rows * reuse`` rows. A linear runs as

    for each activation tile           quantized once, while the one before is computed
        for each tile of weight rows   loaded while the one before is computed
            for each block of K
                for each slot          a cycle: lanes * rows block pairs

Nothing waits where N >= rows * lanes (for the quantizer), tokens are many (for the weights) and
K / 16 >= lanes (for the epilogue); :meth:`Array.cycles` counts the cycles of work alone.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from fgmp.errors import InputError
from fgmp.formats.activation import SCALES, Site, power_codes
from fgmp.formats.spec import BLOCK
from fgmp.hardware.datapath import Datapath

if TYPE_CHECKING:
    from fgmp.hardware.rtl.accelerator import Accelerator


RULES: Final = ("difference", "benefit", "truncated")
"""Rules of ``formats.activation.RULES`` that there is a quantizer for."""


SENSITIVITIES: Final = ("e4m3", "powers")
"""All codes, or those that are powers of two."""


def sensitivities_of(sites: Iterable[Site]) -> str:
    """The narrowest of :data:`SENSITIVITIES` that holds those of all sites."""
    powers = all(torch.equal(s.sensitivity, power_codes(s.sensitivity)) for s in sites)
    return "powers" if powers else "e4m3"


@dataclass(frozen=True, kw_only=True)
class Array:
    """Parameters of an accelerator.

    Attributes:
        datapath: the lanes; ``kind`` must be ``mixed``.
        lanes: weight rows at a time.
        rows: activation rows at a time.
        outputs_max: the most rows that a weight may have; the bias memory's size.
        rule: what the quantizer decides by, one of :data:`RULES`.
        scales: what it chooses FP4 block scales from, a key of ``formats.activation.SCALES``.
        sensitivities: that it multiplies by, one of :data:`SENSITIVITIES`.
    """

    datapath: Datapath = field(default_factory=lambda: Datapath(k_max=4096))
    lanes: int = 4
    rows: int = 1
    outputs_max: int = 4096
    rule: str = "difference"
    scales: str = "max"
    sensitivities: str = "e4m3"

    def __post_init__(self) -> None:
        def require(holds: bool, rule: str, value: object) -> None:
            if not holds:
                raise InputError(f"array: {rule}, got {value!r}")

        require(self.datapath.kind == "mixed", "kind must be 'mixed'", self.datapath.kind)
        require(self.lanes >= 1, "lanes must be 1 or more", self.lanes)
        require(self.rows >= 1, "rows must be 1 or more", self.rows)
        require(self.outputs_max >= 1, "outputs_max must be 1 or more", self.outputs_max)
        require(self.rule in RULES, f"rule must be one of {RULES}", self.rule)
        require(self.scales in SCALES, f"scales must be one of {tuple(SCALES)}", self.scales)
        require(
            self.sensitivities in SENSITIVITIES,
            f"sensitivities must be one of {SENSITIVITIES}",
            self.sensitivities,
        )

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
            InputError: naming the linear, the limit and the parameter that sets it.
        """
        for what, found, most, parameter in (
            ("K", k, self.groups_max * BLOCK, "k_max"),
            ("N", n, self.outputs_max, "outputs_max"),
        ):
            if found > most:
                raise InputError(
                    f"{name}: {what} must be at most {most} for this array, got {found}; "
                    f"choose a larger {parameter}"
                )

    def require_rules(self, name: str, site: Site) -> None:
        """Refuse a site that another quantizer is for.

        Raises:
            InputError: naming the site and the parameter to change.
        """
        for parameter, found, ours in (
            ("rule", site.rule, self.rule),
            ("scales", site.scales, self.scales),
            ("sensitivities", sensitivities_of([site]), self.sensitivities),
        ):
            if found not in (ours, "powers" if ours == "e4m3" else ours):
                raise InputError(
                    f"{name}: {parameter} must be {ours!r} for this array, got {found!r}"
                )

    def cycles(self, n: int, k: int, tokens: int) -> int:
        """Cycles in which the lanes work on a linear, without any wait."""
        groups, slots = -(-k // BLOCK), -(-tokens // self.rows)
        return -(-n // self.lanes) * groups * slots

    def create(self) -> "Accelerator":
        """The hardware."""
        from fgmp.hardware.rtl.accelerator import Accelerator

        return Accelerator(self)
