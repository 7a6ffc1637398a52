"""Boolean functions of cells: precedence, both inversions, and what is refused."""

import itertools

import numpy as np
import pytest

from fgmp.errors import InputError
from fgmp.hardware.expression import compiled

PINS = ["A", "B", "C"]


@pytest.mark.parametrize(
    ("function", "meaning"),
    [
        ("A", lambda a, b, c: a),
        ("!A", lambda a, b, c: 1 - a),
        ("A'", lambda a, b, c: 1 - a),
        ("(A B)'", lambda a, b, c: 1 - a * b),
        ("!A'", lambda a, b, c: a),
        ("A B + C", lambda a, b, c: a * b | c),
        ("A+B*C", lambda a, b, c: a | b * c),
        ("A | B & C", lambda a, b, c: a | b * c),
        ("(A+B)(C)", lambda a, b, c: (a | b) * c),
        ("A B ^ C", lambda a, b, c: a * (b ^ c)),
        ("A ^ B C", lambda a, b, c: (a ^ b) * c),
        ("!A ^ B", lambda a, b, c: (1 - a) ^ b),
        ("A !B", lambda a, b, c: a * (1 - b)),
        ("1", lambda a, b, c: 1),
        ("A*0+C", lambda a, b, c: c),
    ],
)
def test_operators_and_their_order(function: str, meaning: object) -> None:
    evaluate = compiled(function, PINS)
    for values in itertools.product((0, 1), repeat=3):
        assert evaluate(*values) & 1 == meaning(*values)  # type: ignore[operator]
        words = [np.uint64(2**64 - 1) if v else np.uint64(0) for v in values]
        assert int(evaluate(*words)) == (2**64 - 1) * meaning(*values)  # type: ignore[operator]


@pytest.mark.parametrize(
    "function", ["", "A +", "(A", "A)", "D", "A @ B", "*A", "A + + B", "__import__", "A.b", "'A"]
)
def test_what_is_no_function_of_the_pins_is_refused(function: str) -> None:
    with pytest.raises(InputError, match="liberty: function"):
        compiled(function, PINS)


def test_nesting_without_end_is_refused() -> None:
    with pytest.raises(InputError, match="nested too deep"):
        compiled("(" * 100_000 + "A" + ")" * 100_000, PINS)
