"""Liberty files: the subset that synthesis and power need, read and written.

Read are area, functions, pin capacitances, leakage, NLDM tables of delay and slew, and internal
power. Of power tables only those of the supply count: a table for the ground pin
(``related_pg_pin`` VSS) says where the same charge leaves. Cells that gate-level arithmetic does
not use are skipped: several outputs, latches, scan, falling edges, ``dont_use``. Set and reset of a
flip-flop are treated as tied off.

:func:`write` writes the small file that abc maps with. Energies are in fJ, times in ps,
capacitances in fF and leakage in nW, whatever the units of the file.
"""

import gzip
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fgmp.errors import InputError
from fgmp.hardware import expression
from fgmp.hardware.cells import Arc, Cell, Energy, Library, Table, constant

_STATEMENT = re.compile(
    r"""\s*(?:
        (?P<close>\}) |
        (?P<name>[\w\[\]]+)\s*(?:
            \((?P<args>[^()]*(?:\([^()]*\)[^()]*)*)\)\s*(?:(?P<open>\{)|;)? |
            :\s*(?P<value>"[^"]*"|[^;\n}]*)\s*;?
        ) | ;
    )""",
    re.VERBOSE,
)
_IDENTIFIER = re.compile(r"[A-Za-z_][\w.]*(?:\[\d+\])?")
_GROUND = re.compile(r"^(vss|gnd|vgnd|vpw)$", re.IGNORECASE)
_PREFIXES = {"f": 1e-15, "p": 1e-12, "n": 1e-9, "u": 1e-6, "m": 1e-3, "": 1.0, "k": 1e3}


@dataclass
class Group:
    """A group ``kind (names) { ... }``: simple attributes, complex attributes, inner groups."""

    kind: str
    names: tuple[str, ...]
    values: dict[str, str] = field(default_factory=dict)
    lists: dict[str, str] = field(default_factory=dict)
    groups: list["Group"] = field(default_factory=list)

    def all(self, kind: str) -> list["Group"]:
        """Inner groups of one kind."""
        return [g for g in self.groups if g.kind == kind]

    def number(self, name: str, default: float = 0.0) -> float:
        """A simple attribute as a number."""
        return float(self.values.get(name, default))


def read(path: Path) -> Library:
    """The library in a liberty file, plain or gzip.

    Raises:
        InputError: not a readable liberty file; no internal power tables; no flip-flop, inverter
            or AND gate.
    """
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8", "replace")
    except (OSError, EOFError, gzip.BadGzipFile) as error:
        raise InputError(f"{path}: cannot read this liberty file: {error}") from error
    return parse(text, str(path))


def parse(text: str, source: str = "liberty") -> Library:
    """The library in liberty text; ``source`` is its name in messages."""
    root = _groups(text, source)
    units = _Units(root, source)
    cells = [cell for group in root.all("cell") if (cell := _cell(group, units))]
    if not cells:
        raise InputError(f"{source}: holds no usable cell")
    if not any(cell.output_energy for cell in cells):
        raise InputError(
            f"{source}: has no internal_power tables, from which energies come; use a library that "
            "was characterised for power (ASAP7 and GT2N are), or the embedded one"
        )
    gates = {c.name: c for c in cells if c.function and not c.clock}
    flip_flop = _smallest(source, "flip-flop", [c for c in cells if c.clock and not c.function])
    gate = [c for c in cells if c.clock and c.function == "gate"]
    and2 = _smallest(source, "AND2", [c for c in gates.values() if _is(c, "A*B", 2)])
    return Library(
        name=root.names[0] if root.names else source,
        voltage=root.number("nom_voltage", 1.0),
        cells=gates,
        flip_flop=flip_flop,
        clock_gate=(min(gate, key=lambda c: c.area),) if gate else (flip_flop, and2),
        inverter=_smallest(source, "inverter", [c for c in gates.values() if _is(c, "!A", 1)]),
        buffer=_smallest(source, "buffer", [c for c in gates.values() if _is(c, "A", 1)]),
    )


def _is(cell: Cell, function: str, inputs: int) -> bool:
    """Whether a cell computes this function of A and B, whatever its pins are called."""
    if len(cell.capacitance) != inputs:
        return False
    return truth(cell.function, list(cell.capacitance)) == truth(function, "AB"[:inputs])


def _smallest(source: str, what: str, cells: list[Cell]) -> Cell:
    if not cells:
        raise InputError(f"{source}: holds no {what}, which every design needs")
    return min(cells, key=lambda c: c.area)


def _groups(text: str, source: str) -> Group:
    """The group ``library`` of a liberty text."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL).replace("\\\n", " ")
    stack = [Group("", ())]
    position = 0
    while match := _STATEMENT.match(text, position):
        if match.end() == position:
            break
        position = match.end()
        if match["close"]:
            if len(stack) == 1:
                raise InputError(f"{source}: a brace too many at character {position}")
            closed = stack.pop()
            if not _is_ground_power(closed):
                stack[-1].groups.append(closed)
        elif match["open"]:
            names = tuple(n.strip().strip('"') for n in match["args"].split(",") if n.strip())
            stack.append(Group(match["name"], names))
        elif match["args"] is not None:
            stack[-1].lists[match["name"]] = match["args"]
        elif match["name"]:
            stack[-1].values[match["name"]] = match["value"].strip().strip('"').strip()
    libraries = stack[0].all("library")
    if len(stack) != 1 or text[position:].strip() or len(libraries) != 1:
        line = text.count("\n", 0, position) + 1
        raise InputError(f"{source}: not a liberty file, or damaged near line {line}")
    return libraries[0]


def _is_ground_power(group: Group) -> bool:
    return group.kind == "internal_power" and bool(
        _GROUND.match(group.values.get("related_pg_pin", ""))
    )


class _Units:
    """Factors from a file's units to ps, fF, fJ and nW, and its table templates."""

    def __init__(self, root: Group, source: str) -> None:
        self.source = source
        self.time = _unit(root.values.get("time_unit", "1ns")) / 1e-12
        number, name = root.lists.get("capacitive_load_unit", "1, pf").split(",")
        self.load = float(number) * _unit("1" + name.strip().strip('"')) / 1e-15
        # Liberty defines the unit of internal energy as the load's times a square volt.
        self.energy = self.load * _unit(root.values.get("voltage_unit", "1V")) ** 2
        self.leakage = _unit(root.values.get("leakage_power_unit", "1nW")) / 1e-9
        self.templates = {
            g.names[0]: g
            for g in root.groups
            if g.kind in ("lu_table_template", "power_lut_template") and g.names
        }

    def table(self, group: Group, factor: float) -> Table:
        """The table of a group, its values times ``factor``."""
        template = self.templates.get(group.names[0] if group.names else "")
        shared = template.lists if template else {}
        order = [(template.values.get(f"variable_{i}", "") if template else "") for i in (1, 2)]
        axes = [_numbers(group.lists.get(f"index_{i}") or shared.get(f"index_{i}")) for i in (1, 2)]
        values = _numbers(group.lists.get("values")) * factor
        sizes = [max(len(axis), 1) for axis in axes]
        if values.size != sizes[0] * sizes[1]:
            return constant(float(values.mean())) if values.size else constant(0.0)
        grid = values.reshape(sizes)
        slews, loads = (axis if len(axis) else np.zeros(1) for axis in axes)
        if "cap" in order[0]:
            slews, loads, grid = loads, slews, grid.T
        return Table(slews * self.time, loads * self.load, grid)

    def first(self, group: Group, kind: str, factor: float) -> Table | None:
        """The table of the first inner group of one kind."""
        tables = group.all(kind)
        return self.table(tables[0], factor) if tables else None


def _unit(text: str) -> float:
    match = re.fullmatch(r"\s*([\d.eE+-]+)\s*([fpnumk]?)[sVWAFf]\s*", text)
    if not match:
        raise InputError(f"liberty: cannot read the unit {text!r}")
    return float(match[1]) * _PREFIXES[match[2]]


def _numbers(text: str | None) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    cleaned = (text or "").replace('"', " ").replace(",", " ").replace("\\", " ")
    return np.array(cleaned.split(), dtype=np.float64)


@dataclass(frozen=True)
class _Function:
    """Fields of :class:`Cell` that say what a cell computes or stores."""

    function: str = ""
    clock: str = ""
    data: str = ""
    inverted: bool = False


def _cell(group: Group, units: _Units) -> Cell | None:
    """The cell of a group; None if it is to be skipped."""
    pins = {_name(name): g for g in group.all("pin") for name in g.names}
    outputs = [n for n, g in pins.items() if g.values.get("direction") == "output"]
    inputs = {n: g for n, g in pins.items() if g.values.get("direction") == "input"}
    if len(outputs) != 1 or group.values.get("dont_use") == "true" or not inputs:
        return None
    output = pins[outputs[0]]
    function: _Function | None
    if group.values.get("clock_gating_integrated_cell", "").startswith("latch_posedge"):
        function = _clock_gate(inputs)
    elif group.all("ff"):
        function = _flip_flop(group.all("ff")[0], inputs, output)
    else:
        function = _combinational(group, inputs, output)
    if function is None:
        return None
    return Cell(
        name=_name(group.names[0]) if group.names else "",
        area=group.number("area"),
        leakage=_leakage(group) * units.leakage,
        capacitance={n: g.number("capacitance") * units.load for n, g in inputs.items()},
        output=outputs[0],
        arcs=_arcs(output, units),
        output_energy=_energies(output, units),
        input_energy={n: _energies(g, units) for n, g in inputs.items() if _energies(g, units)},
        max_load=output.number("max_capacitance", np.inf) * units.load,
        function=function.function,
        clock=function.clock,
        data=function.data,
        inverted=function.inverted,
    )


def _name(text: str) -> str:
    """A name of a cell or pin: it is written into files that other programs read."""
    if not _IDENTIFIER.fullmatch(text):
        raise InputError(f"liberty: names of cells and pins must be identifiers, got {text!r:.80}")
    return text


def _combinational(group: Group, inputs: dict[str, Group], output: Group) -> _Function | None:
    function = output.values.get("function", "")
    if not function or group.all("latch") or group.all("statetable"):
        return None
    try:
        expression.compiled(function, list(inputs))
    except InputError:  # of another output, of an internal state, or of a kind that is not read
        return None
    return _Function(function=function)


def _flip_flop(ff: Group, inputs: dict[str, Group], output: Group) -> _Function | None:
    clock, data = ff.values.get("clocked_on", "").strip("() "), ff.values.get("next_state", "")
    data = data.strip("() ")
    inverted_data = data.startswith("!")
    if clock not in inputs or data.lstrip("!") not in inputs:
        return None  # falling edge, scan or enable
    inverted = (output.values.get("function") == ff.names[1]) != inverted_data
    return _Function(clock=clock, data=data.lstrip("!"), inverted=inverted)


def _clock_gate(inputs: dict[str, Group]) -> _Function | None:
    clocks = [n for n, g in inputs.items() if g.values.get("clock") == "true" or "CLK" in n.upper()]
    enables = [n for n in inputs if n not in clocks and n.upper().startswith("E")]
    if not clocks or not enables:
        return None
    return _Function(clock=clocks[0], data=enables[0], function="gate")


def _leakage(group: Group) -> float:
    """The stated mean, or the mean over states."""
    stated = [
        g
        for g in group.all("leakage_power")
        if not _GROUND.match(g.values.get("related_pg_pin", ""))
    ]
    plain = [g.number("value") for g in stated if "when" not in g.values]
    if plain:
        return plain[0]
    if "cell_leakage_power" in group.values:
        return group.number("cell_leakage_power")
    return sum(g.number("value") for g in stated) / len(stated) if stated else 0.0


def _arcs(output: Group, units: _Units) -> tuple[Arc, ...]:
    arcs: list[Arc] = []
    for timing in output.all("timing"):
        kind = timing.values.get("timing_type", "combinational")
        if kind not in ("combinational", "rising_edge"):
            continue
        kinds = ("cell_rise", "cell_fall", "rise_transition", "fall_transition")
        tables = [units.first(timing, kind, units.time) for kind in kinds]
        pin = timing.values.get("related_pin", "")
        if all(tables) and not any(arc.pin == pin for arc in arcs):
            sense = timing.values.get("timing_sense", "non_unate")
            arcs.append(Arc(pin, sense, *(t for t in tables if t)))
    return tuple(arcs)


def _energies(pin: Group, units: _Units) -> tuple[Energy, ...]:
    energies = []
    for power in pin.all("internal_power"):
        rise = units.first(power, "rise_power", units.energy)
        fall = units.first(power, "fall_power", units.energy)
        both = units.first(power, "power", units.energy)
        if rise or fall or both:
            zero = both or constant(0.0)
            cause, conditional = power.values.get("related_pin", ""), "when" in power.values
            energies.append(Energy(rise or zero, fall or zero, cause, conditional))
    return tuple(energies)


def truth(function: str, pins: str | list[str]) -> tuple[bool, ...]:
    """Values of a function for all combinations of its pins, the first changing slowest."""
    evaluate = expression.compiled(function, list(pins))
    return tuple(
        bool(evaluate(*values) & 1) for values in itertools.product((0, 1), repeat=len(pins))
    )


def write(library: Library) -> str:
    """Liberty text of the combinational cells, which abc maps with."""
    lines = [
        f"library ({re.sub(r'[^A-Za-z0-9_]', '_', library.name)}) {{",
        '  delay_model : table_lookup; time_unit : "1ps"; capacitive_load_unit (1, ff);',
        '  voltage_unit : "1V"; current_unit : "1mA"; leakage_power_unit : "1nW";',
        f"  nom_voltage : {library.voltage}; default_max_transition : 10000;",
    ]
    bodies = [line for cell in library.cells.values() for line in _written(cell)]
    # abc looks up templates even for tables with axes of their own.
    for name in sorted(set(re.findall(r"\((t\d+x\d+)\)", "\n".join(bodies)))):
        sizes = [int(n) for n in name[1:].split("x")]
        axes = [", ".join(map(str, range(size))) for size in sizes]
        lines += [
            f"  lu_table_template ({name}) {{ variable_1 : input_net_transition;",
            "    variable_2 : total_output_net_capacitance;",
            f'    index_1 ("{axes[0]}"); index_2 ("{axes[1]}"); }}',
        ]
    lines += bodies
    return "\n".join([*lines, "}", ""])


def _written(cell: Cell) -> list[str]:
    lines = [f"  cell ({cell.name}) {{", f"    area : {cell.area:.8g};"]
    for pin, capacitance in cell.capacitance.items():
        lines.append(f"    pin ({pin}) {{ direction : input; capacitance : {capacitance:.8g}; }}")
    lines.append(f'    pin ({cell.output}) {{ direction : output; function : "{cell.function}";')
    if np.isfinite(cell.max_load):
        lines.append(f"      max_capacitance : {cell.max_load:.8g};")
    for arc in cell.arcs:
        lines.append(f'      timing () {{ related_pin : "{arc.pin}"; timing_sense : {arc.sense};')
        for kind, table in (
            ("cell_rise", arc.rise),
            ("cell_fall", arc.fall),
            ("rise_transition", arc.rise_slew),
            ("fall_transition", arc.fall_slew),
        ):
            lines += _written_table(kind, table)
        lines.append("      }")
    return [*lines, "    }", "  }"]


def _written_table(kind: str, table: Table) -> list[str]:
    # abc needs two axes; a table that does not depend on one is written twice along it.
    slews, loads, values = table.slews, table.loads, table.values
    if len(slews) == 1:
        slews, values = np.array([0.0, 1000.0]), np.repeat(values, 2, axis=0)
    if len(loads) == 1:
        loads, values = np.array([0.0, 1000.0]), np.repeat(values, 2, axis=1)
    rows = ", ".join('"' + ", ".join(f"{v:.6g}" for v in row) + '"' for row in values)
    axis = ['"' + ", ".join(f"{v:.6g}" for v in axis) + '"' for axis in (slews, loads)]
    return [
        f"        {kind} (t{len(slews)}x{len(loads)}) {{",
        f"          index_1 ({axis[0]}); index_2 ({axis[1]}); values ({rows}); }}",
    ]
