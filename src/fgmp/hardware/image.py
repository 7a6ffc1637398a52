"""The accelerator's input: the memory image of a linear and of its activations.

The linears of a site read one tensor and share one weight scale. Their rows are therefore
concatenated to one weight, and the activation is quantized once for all of them.

The image is a header and sections that begin at multiples of 16 bytes; integers are little-endian.
:data:`SECTIONS` lists them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import MULTIPLIER_BITS, Site, fl32
from fgmp.formats.codec import to_blocks
from fgmp.formats.spec import BLOCK
from fgmp.pack.planes import PackedWeight
from fgmp.pack.stream import to_image

ALIGNMENT = 16
NO_BIAS = -0.0
"""Bias of a linear without one: the only value that changes no sum."""

_R_LIMIT = 2.0**100
_HEADER = (
    *("outputs", "groups", "tokens", "r_significand", "r_exponent", "threshold"),
    *("scale_significand", "scale_exponent"),
)

SECTIONS: Final = {
    "header": (f"{8 * len(_HEADER)}", f"int64 each: {', '.join(_HEADER)}"),
    "flags": ("ceil(N G / 8)", "of the streamed image (docs/format.md, section 5)"),
    "blocks": ("9 or 16 each, N G of them", "of the streamed image"),
    "biases": ("4 N", "fp32; -0 where a linear has none"),
    "sensitivities": ("16 G", "E4M3 codes; 0 in the padding of the last block"),
    "activations": ("32 G M", "bf16, row by row; 0 in the padding of each row's last block"),
    "results": ("2 N M", "bf16, row by row; written by the accelerator's user"),
}
"""Sections of the memory image in order: bytes and content. N output features, G = ceil(K / 16)
blocks in a row, M tokens; each begins at a multiple of 16."""


@dataclass(frozen=True)
class LinearImage:
    """A linear, or all linears of a site, in the accelerator's form.

    Attributes:
        n: output features.
        k: input features.
        site: constants of the input.
        scale: fl32(t_w * t_x).
        flags: flag bytes of the streamed image.
        blocks: block bytes of the streamed image.
        biases: fp32 (N,).
    """

    n: int
    k: int
    site: Site
    scale: float
    flags: bytes
    blocks: bytes
    biases: Tensor

    @classmethod
    def of(
        cls, name: str, site: Site, linears: Sequence[tuple[PackedWeight, Tensor | None]]
    ) -> "LinearImage":
        """The image of the linears that read ``site``, with their biases.

        Args:
            name: name of the linear or site, for errors.
            site: constants of the input.
            linears: weights with their biases.

        Raises:
            InputError: the hardware cannot compute it: a multiplier beyond 2**100, a scale or a
                bias that is not finite.
        """

        def require(holds: bool, constraint: str, value: object) -> None:
            if not holds:
                raise InputError(f"{name}: the accelerator needs {constraint}, got {value}")

        inside = 1 / _R_LIMIT <= site.r <= _R_LIMIT
        require(inside, "a multiplier from 2**-100 to 2**100", site.r)
        scale = fl32(linears[0][0].t.item() * site.t)
        require(math.isfinite(scale), "a finite product of the tensor scales", scale)
        biases = [
            torch.full((weight.n,), NO_BIAS) if bias is None else bias.detach().float()
            for weight, bias in linears
        ]
        for bias in biases:
            require(bool(bias.isfinite().all()), "finite biases", "a value that is not")
        images = [_flags_and_blocks(weight) for weight, _ in linears]
        return cls(
            n=sum(weight.n for weight, _ in linears),
            k=linears[0][0].k,
            site=site,
            scale=scale,
            flags=np.packbits(np.concatenate([f for f, _ in images]), bitorder="little").tobytes(),
            blocks=b"".join(blocks for _, blocks in images),
            biases=torch.cat(biases),
        )

    @property
    def groups(self) -> int:
        """Blocks in a row."""
        return -(-self.k // BLOCK)

    def constants(self, tokens: int) -> dict[str, int]:
        """The header's fields; exponents and the threshold may be negative."""
        r, r_exponent = normalised(self.site.r, MULTIPLIER_BITS)
        scale, scale_exponent = normalised(self.scale, 24)
        fields = (self.n, self.groups, tokens, r, r_exponent, self.site.threshold)
        return dict(zip(_HEADER, (*fields, scale, scale_exponent), strict=True))

    def sensitivities(self) -> npt.NDArray[np.uint8]:
        """Codes of the per-channel sensitivities, uint8 (G, 16), zero in the padding."""
        codes = to_blocks(self.site.sensitivity)
        return codes.cpu().numpy()

    def memory(self, x: Tensor) -> bytes:
        """The whole image for the activations ``x`` (tokens, K), with room for the results."""
        parts = self.sections(x).values()
        return b"".join(part + bytes(-len(part) % ALIGNMENT) for part in parts)

    def sections(self, x: Tensor) -> dict[str, bytes]:
        """Parts of :meth:`memory` before alignment, by the names of :data:`SECTIONS`."""
        header = self.constants(len(x)).values()
        parts = (
            b"".join(value.to_bytes(8, "little", signed=True) for value in header),
            self.flags,
            self.blocks,
            self.biases.numpy().tobytes(),
            self.sensitivities().tobytes(),
            activation_words(x).tobytes(),
            bytes(2 * self.n * len(x)),
        )
        return dict(zip(SECTIONS, parts, strict=True))


def activation_words(x: Tensor) -> npt.NDArray[np.uint16]:
    """bf16 activations in blocks, uint16 (tokens, G, 16), zeros in the padding."""
    blocks = to_blocks(x.to(torch.bfloat16)).contiguous().view(torch.int16)
    return blocks.cpu().numpy().view(np.uint16)


def normalised(value: float, bits: int) -> tuple[int, int]:
    """Significand and exponent of a float, ``significand * 2**(exponent - bits + 1)``.

    The significand's first of ``bits`` bits is set; both are 0 for 0.
    """
    if value == 0:
        return 0, 0
    exponent = math.frexp(value)[1] - 1
    significand = Fraction(value) / Fraction(2) ** (exponent - bits + 1)
    assert significand.denominator == 1
    return int(significand), exponent


def _flags_and_blocks(weight: PackedWeight) -> tuple[npt.NDArray[np.uint8], bytes]:
    """One flag per block, and the block bytes, of a weight's streamed image."""
    image = to_image(weight)
    flags = weight.is_fp8().flatten().cpu().numpy().astype(np.uint8)
    return flags, image[-(-len(flags) // 8) :]
