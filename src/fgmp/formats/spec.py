"""Constants of the formats, for software and hardware; does not import torch.

E2M1 and E4M3 are described by their bits. Their grids and maxima (6, 448 and 2688 = 6 * 448) and
the integers of the decision are computed from those. The Python packages read the constants here.
The C++ kernels repeat a few (``kernels/cpu/abi.h``, ``block.h``, ``quantize.h``): they compile
without Python, and tests compare them with the definition.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Final


@dataclass(frozen=True, kw_only=True)
class Minifloat:
    """Sign-magnitude float of at most eight bits: sign, exponent, mantissa, high to low.

    The exponent is biased, and 0 means subnormal. There is no infinity. With ``has_nan``, the code
    whose exponent and mantissa bits are all set is NaN; every other code is finite.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_nan: bool

    @property
    def bits(self) -> int:
        """Bits of a code, the sign bit included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_bit(self) -> int:
        """Code of negative zero: the sign bit alone."""
        return 1 << (self.exponent_bits + self.mantissa_bits)

    @cached_property
    def magnitudes(self) -> tuple[float, ...]:
        """Values of the finite non-negative codes, in code order, which is ascending."""
        finite = self.sign_bit - (1 if self.has_nan else 0)
        return tuple(float(self.magnitude(code)) for code in range(finite))

    def magnitude(self, code: int) -> Fraction:
        """Exact value of a finite code whose sign bit is not set."""
        exponent, mantissa = divmod(code, 1 << self.mantissa_bits)
        if exponent:
            mantissa += 1 << self.mantissa_bits
        return mantissa * Fraction(2) ** (max(exponent, 1) - self.bias - self.mantissa_bits)

    @property
    def max(self) -> float:
        """Largest finite value."""
        return self.magnitudes[-1]

    @property
    def max_code(self) -> int:
        """Code of the largest finite value."""
        return len(self.magnitudes) - 1

    @property
    def smallest(self) -> float:
        """Smallest positive value, a subnormal."""
        return self.magnitudes[1]

    @property
    def nan_code(self) -> int:
        """Code of the NaN with a positive sign.

        Raises:
            ValueError: the format has none.
        """
        if not self.has_nan:
            raise ValueError(f"{self.name} has no NaN")
        return self.sign_bit - 1


E2M1: Final = Minifloat(name="E2M1", exponent_bits=2, mantissa_bits=1, bias=1, has_nan=False)
E4M3: Final = Minifloat(name="E4M3", exponent_bits=4, mantissa_bits=3, bias=7, has_nan=True)

BLOCK: Final = 16
"""Values in a block, consecutive along the dot-product dimension K."""

FP8_FACTOR: Final = int(E2M1.max)
"""An FP8 element decodes to FP8_FACTOR * e4m3 * t, an FP4 element to e2m1 * s * t with the same t.
With this factor the largest value of a tensor is exactly E4M3's maximum in FP8."""

UNIT_MAX: Final = E2M1.max * E4M3.max
"""Largest decoded magnitude over the tensor scale t: 2688."""

UNIT_BITS: Final = 10
"""Decoded values are integer multiples of 2**-UNIT_BITS * t: E2M1's smallest magnitude is 2**-1,
that of a block scale 2**-9."""

SENSITIVITY_BITS: Final = 9
"""Sensitivities are integer multiples of 2**-SENSITIVITY_BITS, E4M3's smallest value."""

SCORE_BITS: Final = 2 * UNIT_BITS + SENSITIVITY_BITS
"""An integer score S stands for S * 2**-SCORE_BITS * t**2 * gamma of the loss."""

SCALE_MIN_CODE: Final = 0x01
SCALE_MAX_CODE: Final = E4M3.max_code
"""Range of FP4 block scales and of sensitivities: positive finite E4M3 codes, 0x01 to 0x7E."""

FP8_BLOCK: Final = E4M3.sign_bit
"""Scale byte that marks an FP8 block: 0x80, which is no valid block scale."""

THRESHOLD_ALL_FP8: Final = -1
THRESHOLD_ALL_FP4: Final = 2**63 - 1
"""Thresholds that make every block FP8, or FP4: a block is FP8 if and only if S > threshold."""

FP4_BITS: Final = E2M1.bits + E4M3.bits / BLOCK
FP8_BITS: Final = float(E4M3.bits)
FLAG_BITS: Final = 1 / BLOCK
"""Bits per value in the streamed image: FP4 with its block scale, FP8, and the flag."""


def stream_bits(fp4_fraction: float) -> float:
    """Bits per value of a mixed stream, flags included (arXiv 2504.14152).

    Args:
        fp4_fraction: fraction of FP4 blocks, 0 to 1.
    """
    return fp4_fraction * FP4_BITS + (1 - fp4_fraction) * FP8_BITS + FLAG_BITS
