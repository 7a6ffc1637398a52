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

from fgmp.errors import InputError
from fgmp.hardware.inference import LANES, PREFILL, Machine, Work, bits_of, serve
from fgmp.hardware.silicon import FP8, MIXED


@cache
def machine(kind: str, quantizer: str | None = None) -> Machine:
    """A machine of the lanes in the table: ``mixed`` or ``fp8``, which is charged no quantizer.

    Raises:
        InputError: no energy is known of the ``quantizer``, "rule, scales, sensitivities".
    """
    tables = tomllib.loads((Path(__file__).parent / "lanes.toml").read_text())
    table, quantizers = tables[kind], tables["quantizer"]
    if quantizer is not None and quantizer not in quantizers:
        raise InputError(
            f"energies are known of quantizers for (rule, scales, sensitivities) "
            f"{'; '.join(quantizers)}, got {quantizer}"
        )
    datapath = {"mixed": MIXED, "fp8": FP8}[kind]
    return Machine(
        name=kind,
        fj_per_op={**table, "control": 0.0},
        quantizer_fj=0.0 if quantizer is None else quantizers[quantizer],
        bits=bits_of(datapath.kind),
        lanes=LANES,
        rows=1,
        reuse=datapath.reuse,
    )


def percent_of_fp8(work: Sequence[Work], quantizer: str) -> float:
    """Energy of a model's linears on the mixed machine, as percent of the FP8 machine's.

    Args:
        work: the linears.
        quantizer: see :func:`machine`.
    """
    wide = [replace(linear, mix={(True, True): 1.0}) for linear in work]
    ours = sum(serve(work, machine("mixed", quantizer), PREFILL).values())
    theirs = sum(serve(wide, machine("fp8"), PREFILL).values())
    return 100 * ours / theirs
