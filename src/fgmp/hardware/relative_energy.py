"""Energy of a choice of formats relative to all FP8, before there is a checkpoint.

``fgmp hw energy`` measures lanes on the operands of one checkpoint, which takes minutes. A budget
evaluates many choices of formats, so it reads the lanes' energies from a table, ``lanes.toml``. The
number of operations of each linear, by the formats of its pairs of blocks, comes from the model.
Counted is a prefill: lanes, totals, quantizer, buffers and DRAM, as in ``inference``.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from fgmp.errors import InputError
from fgmp.formats.rules import QuantizerConfig
from fgmp.hardware.inference import LANES, PREFILL, Machine, Work, bits_of, serve
from fgmp.hardware.silicon import FP8, MIXED


@dataclass(frozen=True)
class _Table:
    """Measured energies.

    Attributes:
        lanes: fJ per operation by unit, by kind of lane.
        quantizers: fJ per block.
    """

    lanes: dict[str, dict[str, float]]
    quantizers: dict[QuantizerConfig, float]


@cache
def _table() -> _Table:
    """The table in ``lanes.toml``."""
    tables = tomllib.loads((Path(__file__).parent / "lanes.toml").read_text())
    quantizers = {
        QuantizerConfig(entry["rule"], entry["scales"], entry["sensitivities"]): entry[
            "fj_per_block"
        ]
        for entry in tables.pop("quantizer")
    }
    return _Table(tables, quantizers)


@cache
def machine(kind: str, quantizer: QuantizerConfig | None = None) -> Machine:
    """A machine with the lanes of the table.

    Args:
        kind: ``mixed`` or ``fp8``.
        quantizer: its configuration; None charges no energy for it.

    Raises:
        InputError: the energy of the quantizer was not measured.
    """
    table = _table()
    if quantizer is not None and quantizer not in table.quantizers:
        raise InputError(
            f"energies are known of quantizers for (rule, scales, sensitivities) "
            f"{'; '.join(map(str, table.quantizers))}, got {quantizer}"
        )
    datapath = {"mixed": MIXED, "fp8": FP8}[kind]
    return Machine(
        name=kind,
        fj_per_op={**table.lanes[kind], "control": 0.0},
        quantizer_fj=0.0 if quantizer is None else table.quantizers[quantizer],
        bits=bits_of(datapath.kind),
        lanes=LANES,
        rows=1,
        reuse=datapath.reuse,
    )


def percent_of_fp8(work: Sequence[Work], quantizer: QuantizerConfig) -> float:
    """Energy of a model's linears on the mixed machine, in percent of the FP8 machine's.

    Args:
        work: the linears.
        quantizer: quantizer of the mixed machine; see :func:`machine`.
    """
    wide = [replace(linear, mix={(True, True): 1.0}) for linear in work]
    mixed_energy = sum(serve(work, machine("mixed", quantizer), PREFILL).values())
    fp8_energy = sum(serve(wide, machine("fp8"), PREFILL).values())
    return 100 * mixed_energy / fp8_energy
