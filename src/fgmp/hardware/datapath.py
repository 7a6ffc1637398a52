"""Parameters of a lane: one record that computes in Python and creates the hardware.

Per cycle, a lane multiplies a block of 16 weights by a block of 16 activations and adds the result
to one of ``reuse`` running totals. Decoded values are integers (docs/numerics.md, section 6),

    FP4 element    (e2m1 / 2**-1) * (s / 2**-9)        in units of 2**-10 t
    FP8 element    12 * (e4m3 / 2**-9)                 12 = 6 * 2**-9 / 2**-10

so that a pair of blocks contributes ``gain * sum(a_int * w_int)`` to the total A, with ``a_int``
and ``w_int`` the element codes as integers and

    gain = (s_a or 12) * (s_w or 12)

:meth:`Datapath.contributions` computes this with the tables of the format records;
:meth:`Datapath.create` creates the lane that computes it with shifters and adders. Widths of both
follow from the largest magnitudes of the records.

There are two baseline lanes. A lane for FP8 alone has no factor 6, no flag and no scale: its total
counts units of 36 * 2**-18. A lane for FP4 alone has no flag.
"""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.spec import BLOCK, E2M1, E4M3, FP8_FACTOR, UNIT_BITS, Minifloat
from fgmp.pack.planes import BlockCodes

if TYPE_CHECKING:
    from fgmp.hardware.rtl.lane import Lane

FORMATS: Final = {"mixed": (E2M1, E4M3), "fp4": (E2M1,), "fp8": (E4M3,)}
"""Block formats of a lane by its kind."""

CUTS: Final = ("significands", "products", "sums", "scaled")
"""Steps after which a pipeline register may stand: products of significands, shift of the products
into place, their sum, the gain."""

ADDITIONS: Final = ("complement", "apart")
"""Additions of signed products. In two's complement a negative product sets all bits above it, and
most of the adders toggle whenever a sign changes. Adding positive and negative products apart takes
twice the adders and less energy: the recommended lane takes 51.3 instead of 63.1 fJ per operation
(runs/design_points.py; docs/energy.md, section 3)."""

ACCUMULATORS: Final = ("exact", "fp32")


def integer(fmt: Minifloat, code: int) -> int:
    """A code without its sign, in units of the format's smallest value.

    The NaN code counts as if it were finite, as in a decoder without that case; outputs of its row
    are NaN whatever the lane computes.
    """
    return int(fmt.magnitude(code) / Fraction(fmt.smallest))


def integer_max(fmt: Minifloat) -> int:
    """The largest of :func:`integer` over all codes."""
    return integer(fmt, fmt.sign_bit - 1)


FP8_GAIN: Final = int(FP8_FACTOR * Fraction(E4M3.smallest) * 2**UNIT_BITS)
"""Value of an FP8 integer's last bit in units of 2**-10: 12."""

assert Fraction(E2M1.smallest) * Fraction(E4M3.smallest) * 2**UNIT_BITS == 1


def signed_bits(magnitude: int) -> int:
    """Width in two's complement of every integer from -``magnitude`` to ``magnitude``."""
    return magnitude.bit_length() + 1


@dataclass(frozen=True)
class Unit:
    """One dot-product unit and its format on either side.

    Attributes:
        activation: format of the activation's elements.
        weight: format of the weight's elements.
        fp8_gain: factor of an FP8 side; 12, or 1 in a lane for FP8 alone.
    """

    activation: Minifloat
    weight: Minifloat
    fp8_gain: int

    @property
    def name(self) -> str:
        """Name such as ``fp4xfp8``, the activation's format first."""
        return f"fp{self.activation.bits}xfp{self.weight.bits}"

    @property
    def exchanged(self) -> str:
        """The name with the sides exchanged."""
        return f"fp{self.weight.bits}xfp{self.activation.bits}"

    @property
    def sum_max(self) -> int:
        """Bound of ``sum(a_int * w_int)`` over a block."""
        return BLOCK * integer_max(self.activation) * integer_max(self.weight)

    @property
    def constant_gain(self) -> int:
        """The part of the gain that is the same for all blocks."""
        return math.prod(self.fp8_gain for s in (self.activation, self.weight) if s is E4M3)

    @property
    def scales(self) -> int:
        """Number of block scales in the gain: one per FP4 side."""
        return sum(side is E2M1 for side in (self.activation, self.weight))

    @property
    def contribution_max(self) -> int:
        """Bound of the contribution of one pair of blocks."""
        return self.sum_max * self.constant_gain * math.prod([integer_max(E4M3)] * self.scales)


@dataclass(frozen=True, kw_only=True)
class Datapath:
    """Parameters of a lane.

    Attributes:
        kind: ``mixed``, or a baseline: ``fp8`` or ``fp4`` alone.
        k_max: the longest dot product that cannot overflow the accumulator.
        reuse: activation blocks that meet a weight block before the next one, a power of two; the
            lane has as many running totals.
        cuts: pipeline registers, some of :data:`CUTS`. Operands and totals always have registers.
        fp8_cuts: pipeline registers of the FP8 by FP8 unit of a mixed lane, as many as ``cuts``.
            Its gain is a constant, so an earlier register is of more use than one behind the gain.
            None: ``cuts``.
        addition: one of :data:`ADDITIONS`.
        shared: one unit computes both FP4 by FP8 and FP8 by FP4, with its operands exchanged.
        gated: a unit that is not selected holds its operands; otherwise it sees every pair.
        accumulator: ``exact`` integers, or ``fp32``, which rounds every contribution and sum.
    """

    kind: str = "mixed"
    k_max: int = 16384
    reuse: int = 16
    cuts: tuple[str, ...] = ("sums", "scaled")
    fp8_cuts: tuple[str, ...] | None = None
    addition: str = "apart"
    shared: bool = False
    gated: bool = True
    accumulator: str = "exact"

    def __post_init__(self) -> None:
        def require(holds: bool, constraint: str, value: object) -> None:
            if not holds:
                raise InputError(f"datapath: {constraint}, got {value!r}")

        require(self.kind in FORMATS, f"kind must be one of {sorted(FORMATS)}", self.kind)
        require(self.k_max >= BLOCK, f"k_max must be {BLOCK} or more", self.k_max)
        power = self.reuse > 0 and self.reuse & (self.reuse - 1) == 0
        require(power, "reuse must be a power of two", self.reuse)
        for name, cuts in (("cuts", self.cuts), ("fp8_cuts", self.fp8_cuts or ())):
            ordered = tuple(cut for cut in CUTS if cut in cuts)
            require(cuts == ordered, f"{name} must be some of {CUTS}, in order", cuts)
        if self.fp8_cuts is not None:
            require(self.kind == "mixed", "only a mixed lane has fp8_cuts", self.fp8_cuts)
            as_many = len(self.fp8_cuts) == len(self.cuts)
            require(as_many, f"fp8_cuts must be {len(self.cuts)}, as cuts", self.fp8_cuts)
        require(self.addition in ADDITIONS, f"addition must be one of {ADDITIONS}", self.addition)
        known = self.accumulator in ACCUMULATORS
        require(known, f"accumulator must be one of {ACCUMULATORS}", self.accumulator)

    @property
    def formats(self) -> tuple[Minifloat, ...]:
        """Element formats of the blocks that the lane takes."""
        return FORMATS[self.kind]

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The dot-product units: one per pair of formats; if shared, one for both mixed pairs."""
        gain = FP8_GAIN if E2M1 in self.formats else 1
        units = tuple(Unit(a, w, gain) for a in self.formats for w in self.formats)
        dropped = (E2M1, E4M3) if self.shared else None
        return tuple(unit for unit in units if (unit.activation, unit.weight) != dropped)

    def cuts_of(self, unit: Unit) -> tuple[str, ...]:
        """Pipeline registers of a unit."""
        fp8_cuts = self.cuts if self.fp8_cuts is None else self.fp8_cuts
        return self.cuts if unit.scales else fp8_cuts

    def computes(self, unit: Unit) -> tuple[str, ...]:
        """Names of the pairs of formats that a unit computes, the activation's first."""
        return (unit.name, unit.exchanged) if self.exchanges(unit) else (unit.name,)

    def exchanges(self, unit: Unit) -> bool:
        """Whether a unit also takes its formats with the sides exchanged."""
        return self.shared and unit.activation is not unit.weight

    @property
    def total_unit(self) -> Fraction:
        """Unit of the total, over t_w t_x: 2**-20, or 36 * 2**-18 for FP8 alone."""
        if E2M1 in self.formats:
            return Fraction(1, 2 ** (2 * UNIT_BITS))
        return (FP8_FACTOR * Fraction(E4M3.smallest)) ** 2

    @property
    def total_max(self) -> int:
        """Bound of the total of ``k_max`` products of finite values."""
        factors = {E2M1: integer(E4M3, E4M3.max_code), E4M3: self.units[-1].fp8_gain}
        element = max(integer(side, side.max_code) * factors[side] for side in self.formats)
        return self.k_max * element**2

    @property
    def total_bits(self) -> int:
        """Width of an accumulator."""
        return signed_bits(self.total_max) if self.accumulator == "exact" else 32

    @property
    def contribution_bits(self) -> int:
        """Width of the contribution of one pair of blocks."""
        return signed_bits(max(unit.contribution_max for unit in self.units))

    @property
    def latency(self) -> int:
        """Cycles from a pair of blocks at the ports to the total that includes it."""
        return 2 + len(self.cuts)

    def contributions(self, activation: BlockCodes, weight: BlockCodes) -> Tensor:
        """Contributions of pairs of blocks to their totals.

        Args:
            activation: blocks (...), broadcast against those of ``weight``.
            weight: blocks (...).

        Returns:
            int64 (...), exact, in units of :attr:`total_unit`.
        """
        a, a_gain = self._integers(activation)
        w, w_gain = self._integers(weight)
        return (a * w).sum(-1) * a_gain * w_gain

    def totals(self, contributions: Tensor) -> Tensor:
        """Accumulate ``contributions``, int64 (..., G), in order.

        Returns:
            int64 (...), exact; or fp32 (...), with each contribution and each sum rounded once.
            The error is at most ``((1 + 2**-24)**G - 1) * sum |contribution|``.
        """
        if self.accumulator == "exact":
            return contributions.sum(-1)
        # A contribution has fewer than 53 bits, so the conversion through float64 rounds once.
        terms = contributions.double().float().unbind(-1)
        return sum(terms[1:], terms[0])

    def _integers(self, blocks: BlockCodes) -> tuple[Tensor, Tensor]:
        """Elements as integers, int64 (..., 16), and gains of the blocks, int64 (...)."""
        fp4, fp8 = (
            _table(side)[blocks.codes.long() & side.sign_bit * 2 - 1] for side in (E2M1, E4M3)
        )
        scale = _table(E4M3)[blocks.scale.long() & E4M3.sign_bit - 1]
        fp8_gain = torch.tensor(self.units[-1].fp8_gain)
        elements = torch.where(blocks.is_fp8.unsqueeze(-1), fp8, fp4)
        return elements, torch.where(blocks.is_fp8, fp8_gain, scale)

    def create(self) -> "Lane":
        """The hardware."""
        from fgmp.hardware.rtl.lane import Lane

        return Lane(self)


def _table(fmt: Minifloat) -> Tensor:
    """Signed integer of every code, int64, in code order."""
    positive = torch.tensor([integer(fmt, code) for code in range(fmt.sign_bit)])
    return torch.cat([positive, -positive])
