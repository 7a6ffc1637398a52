"""Liberty files: units, tables, what is skipped, and what is refused."""

import gzip
import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from fgmp.errors import InputError
from fgmp.hardware import gates, liberty
from fgmp.hardware.cells import Table, embedded

LIBERTY = Path(os.environ.get("FGMP_LIBERTY", "no-folder"))
"""asap7_rvt_tt.lib.gz and gt2n.lib.gz lie there."""

TEXT = """
/* a comment { with braces } */
library (tiny) {
  time_unit : "1ns"; voltage_unit : "1V"; capacitive_load_unit (1, pf);
  leakage_power_unit : "1uW"; nom_voltage : 0.5;
  power_lut_template (p) { variable_1 : input_transition_time;
    variable_2 : total_output_net_capacitance; index_1 ("0.1, 0.3"); index_2 ("0.001, 0.003"); }
  cell (inv) { area : 2;
    leakage_power () { value : 5; related_pg_pin : VDD; }
    leakage_power () { value : 99; related_pg_pin : VSS; }
    pin (A) { direction : input; capacitance : 0.002;
      internal_power () { related_pg_pin : VSS; rise_power (scalar) { values ("77"); } } }
    pin (Y) { direction : output; function : "A'" ; }
  }
  cell (not) { area : 1; cell_leakage_power : 0.004;
    pin (A) { direction : input; capacitance : 0.002; }
    pin (Y) { direction : output; function : "(!A)";
      timing () { related_pin : "A"; timing_sense : negative_unate;
        cell_rise (scalar) { values ("0.01"); } cell_fall (scalar) { values ("0.02"); }
        rise_transition (scalar) { values ("0.03"); } fall_transition (scalar) { values ("0.04"); }
      }
      internal_power () { related_pin : "A"; related_pg_pin : VSS;
        rise_power (p) { values ("9, 9", "9, 9"); } fall_power (p) { values ("9, 9", "9, 9"); } }
      internal_power () { related_pin : "A"; related_pg_pin : VDD;
        rise_power (p) { values ("1, 2", \\
                                 "3, 4"); }
        fall_power (p) { values ("0, 0", "0, 0"); } }
    }
  }
  cell (buf) { area : 2; pin (A) { direction : input; capacitance : 0.001; }
    pin (Y) { direction : output; function : "A"; } }
  cell (and) { area : 3; pin (A) { direction : input; capacitance : 0.001; }
    pin (B) { direction : input; capacitance : 0.001; }
    pin (Y) { direction : output; function : "A B"; } }
  cell (lost) { area : 0.1; dont_use : true; pin (A) { direction : input; }
    pin (Y) { direction : output; function : "A"; } }
  cell (ff) { area : 9; ff (IQ, IQN) { clocked_on : "CK"; next_state : "!D"; }
    pin (CK) { direction : input; clock : true; capacitance : 0.004; }
    pin (D) { direction : input; capacitance : 0.003; }
    pin (Q) { direction : output; function : "IQN"; } }
}
"""


def without(text: str, start: str) -> str:
    """The text less the cell that begins like this."""
    head, _, tail = text.partition(start)
    depth = itertools.accumulate({"{": 1, "}": -1}.get(character, 0) for character in tail)
    return head + tail[list(depth).index(-1) + 1 :]


def tiny() -> str:
    return without(TEXT, "cell (inv) {")


def test_units_become_ps_ff_fj_and_nw() -> None:
    library = liberty.parse(tiny())
    cell = library.cells["not"]
    assert library.voltage == 0.5
    assert cell.capacitance == pytest.approx({"A": 2.0})
    assert cell.leakage == pytest.approx(4.0)
    assert cell.arcs[0].rise.at(1, 1) == pytest.approx(10.0)
    assert cell.arcs[0].fall_slew.at(1, 1) == pytest.approx(40.0)
    # 1 pf * 1 V^2 is 1 pJ; the corners of the table, then its middle.
    rise = cell.output_energy[0].rise
    corners = [rise.at(s, c) for s in (100, 300) for c in (1, 3)]
    assert corners == pytest.approx([1000, 2000, 3000, 4000])
    assert rise.at(200, 2) == pytest.approx(2500)
    assert cell.output_energy[0].at(200, 2) == pytest.approx(1250)


def test_tables_of_the_ground_pin_do_not_count() -> None:
    cell = liberty.parse(tiny()).cells["not"]
    assert len(cell.output_energy) == 1


def test_a_flip_flop_that_stores_and_shows_the_complement_is_not_inverted() -> None:
    library = liberty.parse(tiny())
    assert (library.flip_flop.data, library.flip_flop.clock) == ("D", "CK")
    assert not library.flip_flop.inverted
    shown = liberty.parse(tiny().replace('"!D"', '"D"'))
    assert shown.flip_flop.inverted


def test_without_a_clock_gate_one_is_built() -> None:
    library = liberty.parse(tiny())
    assert [cell.name for cell in library.clock_gate] == ["ff", "and"]


def test_the_smallest_buffer_is_not_one_that_says_dont_use() -> None:
    assert liberty.parse(tiny()).buffer.name == "buf"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (without(tiny(), 'internal_power () { related_pin : "A"; related_pg_pin : VDD;'), "power"),
        (without(tiny(), "cell (ff) {"), "flip-flop"),
        (without(tiny(), "cell (and) {"), "AND2"),
        (tiny()[:-20], "damaged"),
        ("hello", "not a liberty file"),
        ("library (x) { }", "no usable cell"),
        (tiny().replace('"1ns"', '"1 second"'), "unit"),
    ],
)
def test_refusals_say_what_is_wrong(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        liberty.parse(text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.lib.gz"
    path.write_bytes(gzip.compress(TEXT.encode())[:100])
    for bad in (path, tmp_path / "absent.lib"):
        with pytest.raises(InputError, match=str(bad)):
            liberty.read(bad)


def test_what_is_written_for_abc_reads_back() -> None:
    library = embedded()
    text = liberty.write(library)
    # No energies in it, which abc does not need; add one so that it reads as a library.
    power = 'internal_power () { related_pin : "A"; power (scalar) { values ("1"); } } timing ()'
    flop = TEXT[TEXT.index("cell (ff)") : TEXT.rindex("}")]
    again = liberty.parse(text.replace("timing ()", power, 1).rstrip()[:-1] + flop + "}")
    assert set(again.cells) == set(library.cells)
    for name, cell in library.cells.items():
        other = again.cells[name]
        assert other.function == cell.function
        assert other.capacitance == pytest.approx(cell.capacitance)
        for mine, theirs in zip(cell.arcs, other.arcs, strict=True):
            assert theirs.rise.at(3, 17) == pytest.approx(mine.rise.at(3, 17))


def test_every_gate_computes_what_its_name_says() -> None:
    meant = {
        "INV": lambda a: not a,
        "BUF": lambda a: a,
        "NAND2": lambda a, b: not (a and b),
        "NAND3": lambda a, b, c: not (a and b and c),
        "NOR2": lambda a, b: not (a or b),
        "NOR3": lambda a, b, c: not (a or b or c),
        "AND2": lambda a, b: a and b,
        "OR2": lambda a, b: a or b,
        "AOI21": lambda a, b, c: not ((a and b) or c),
        "OAI21": lambda a, b, c: not ((a or b) and c),
        "AOI22": lambda a, b, c, d: not ((a and b) or (c and d)),
        "OAI22": lambda a, b, c, d: not ((a or b) and (c or d)),
        "XOR2": lambda a, b: a != b,
        "XNOR2": lambda a, b: a == b,
        "MUX2": lambda a, b, s: b if s else a,
    }
    for name, cell in embedded().cells.items():
        pins = list(cell.capacitance)
        values = liberty.truth(cell.function, pins)
        expected = meant[name.split("_")[0]]
        for index, value in enumerate(values):
            bits = [bool(index >> (len(pins) - 1 - i) & 1) for i in range(len(pins))]
            assert value == expected(*bits), (name, bits)


def test_tables_go_on_beyond_their_ends() -> None:
    table = Table(np.array([1.0, 2.0]), np.array([0.0, 1.0]), np.array([[0.0, 1.0], [2.0, 3.0]]))
    assert table.at(3.0, 2.0) == pytest.approx(6.0)
    assert table.at(0.0, 0.0) == pytest.approx(-2.0)


@pytest.mark.parametrize("name", ["asap7_rvt_tt", "gt2n"])
def test_real_libraries(name: str) -> None:
    path = LIBERTY / f"{name}.lib.gz"
    if not path.exists():
        pytest.skip("FGMP_LIBERTY names no folder with this library")
    library = liberty.read(path)
    assert library.voltage == pytest.approx(0.7)
    assert all(cell.arcs and cell.output_energy for cell in library.cells.values() if cell.arcs)
    inverter = library.inverter
    # A small inverter at either node: some 0.1 to 1 fF, and less than a femtojoule.
    assert 0.1 < sum(inverter.capacitance.values()) < 1
    assert 0 <= inverter.output_energy[0].at(20, 1) < 1


def test_all_names_of_a_group_of_pins_count() -> None:
    text = tiny().replace(
        "cell (and) {",
        "cell (or) { area : 1; pin (A, B) { direction : input; capacitance : 0.001; }"
        ' pin (Y) { direction : output; function : "A+B"; } } cell (and) {',
    )
    assert list(liberty.parse(text).cells["or"].capacitance) == ["A", "B"]


def test_a_pin_may_have_the_name_of_a_keyword() -> None:
    text = tiny().replace(
        "cell (and) {",
        "cell (is) { area : 1; pin (in) { direction : input; capacitance : 0.001; }"
        ' pin (lambda) { direction : output; function : "!in"; } } cell (and) {',
    )
    library = liberty.parse(text)
    (value,) = [gates.functions(library)["is"](np.uint64(0))]
    assert value == np.uint64(2**64 - 1)


def test_a_name_from_a_file_is_never_run(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    name = f'B=__import__("os").system("touch {trap}")'
    text = tiny().replace(
        "cell (and) {",
        f"cell (trap) {{ area : 1; pin ({name}) {{ direction : input; capacitance : 0.001; }}"
        " pin (A) { direction : input; capacitance : 0.001; }"
        ' pin (Y) { direction : output; function : "A"; } } cell (and) {',
    )
    with pytest.raises(InputError, match="names of cells and pins must be identifiers"):
        gates.functions(liberty.parse(text))
    assert not trap.exists()
