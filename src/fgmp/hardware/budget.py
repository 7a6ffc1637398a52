"""The energy of a choice of formats, before there is a checkpoint: joules against all FP8.

``fgmp hw energy`` measures lanes on one checkpoint's operands, which takes minutes. A budget has to
ask for many choices, so it takes the lanes' energies from a table, ``lanes.toml``; what each linear
does, by the formats of its pairs of blocks, comes from the model. Counted is a prefill: lanes,
totals, quantizer, buffers and DRAM, as in ``inference``.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

from fgmp.hardware.inference import LANES, PREFILL, Machine, Work, bits_of, serve
from fgmp.hardware.silicon import FP8, MIXED


@cache
def machine(kind: str) -> Machine:
    """A machine of the lanes in the table: ``mixed`` or ``fp8``."""
    table = tomllib.loads((Path(__file__).parent / "lanes.toml").read_text())[kind]
    quantizer = table.pop("quantizer")
    datapath = {"mixed": MIXED, "fp8": FP8}[kind]
    return Machine(
        name=kind,
        fj_per_op={**table, "control": 0.0},
        quantizer_fj=quantizer,
        bits=bits_of(datapath.kind),
        lanes=LANES,
        rows=1,
        reuse=datapath.reuse,
    )


def percent_of_fp8(work: Sequence[Work]) -> float:
    """Energy of a model's linears on the mixed machine, as percent of the FP8 machine's."""
    wide = [replace(linear, mix={(True, True): 1.0}) for linear in work]
    ours = sum(serve(work, machine("mixed"), PREFILL).values())
    theirs = sum(serve(wide, machine("fp8"), PREFILL).values())
    return 100 * ours / theirs
