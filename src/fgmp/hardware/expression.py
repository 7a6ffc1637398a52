"""Boolean functions of cells, as liberty files write them: parsed into a tree and evaluated.

Names in a file are data and never become source code. Operators, the tightest first: inversion
(``!`` before, ``'`` after), ``^``, AND (``*``, ``&`` or nothing between operands), OR (``+``,
``|``); parentheses; the constants 0 and 1.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from fgmp.errors import InputError

_TOKEN = re.compile(r"\s*(?:(?P<name>[A-Za-z_][\w.\[\]]*)|(?P<symbol>[01!'()*&+|^]))")
_AND, _OR = "*&", "+|"

Evaluate = Callable[[Sequence[Any]], Any]
"""Values of the pins, in order, to the value of the function."""


def compiled(function: str, pins: Sequence[str]) -> Callable[..., Any]:
    """A function of integers or arrays of words, one argument per pin, in the order of ``pins``.

    Raises:
        InputError: the function cannot be parsed, or names another pin.
    """
    parser = _Parser(function, {pin: index for index, pin in enumerate(pins)})
    try:
        evaluate = parser.whole()
    except RecursionError as error:
        raise InputError(f"liberty: function {function:.80} is nested too deep") from error
    return lambda *values: evaluate(values)


def _tokens(function: str) -> list[str]:
    tokens, position = [], 0
    text = function.rstrip()
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise InputError(f"liberty: function {function!r:.80} cannot be read at {position}")
        tokens.append(match.group("name") or match.group("symbol"))
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over the tokens of one function."""

    def __init__(self, function: str, index: dict[str, int]) -> None:
        self.function, self.index = function, index
        self.tokens, self.at = _tokens(function), 0

    def whole(self) -> Evaluate:
        evaluate = self._or()
        if self.at < len(self.tokens):
            raise self._error()
        return evaluate

    def _peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def _take(self) -> str:
        token = self._peek()
        self.at += 1
        return token

    def _or(self) -> Evaluate:
        left = self._and()
        while self._peek() and self._peek() in _OR:
            self._take()
            left = _either(left, self._and())
        return left

    def _and(self) -> Evaluate:
        left = self._xor()
        while token := self._peek():
            if token in _AND:
                self._take()
            elif token in _OR or token in ")^'":
                break
            left = _both(left, self._xor())
        return left

    def _xor(self) -> Evaluate:
        left = self._inverted()
        while self._peek() == "^":
            self._take()
            left = _differ(left, self._inverted())
        return left

    def _inverted(self) -> Evaluate:
        if self._peek() == "!":
            self._take()
            return _not(self._inverted())
        value = self._operand()
        while self._peek() == "'":
            self._take()
            value = _not(value)
        return value

    def _operand(self) -> Evaluate:
        token = self._take()
        if token == "(":
            value = self._or()
            if self._take() != ")":
                raise self._error()
            return value
        if token == "0":
            return lambda values: values[0] ^ values[0] if values else 0
        if token == "1":
            return lambda values: ~(values[0] ^ values[0]) if values else ~0
        if token not in self.index:
            raise self._error()
        index = self.index[token]
        return lambda values: values[index]

    def _error(self) -> InputError:
        known = ", ".join(self.index)
        return InputError(
            f"liberty: function {self.function!r:.80} must be made of the pins {known:.80} and of "
            f"!, ', ^, *, &, +, |, 0, 1 and parentheses"
        )


def _not(value: Evaluate) -> Evaluate:
    return lambda values: ~value(values)


def _both(left: Evaluate, right: Evaluate) -> Evaluate:
    return lambda values: left(values) & right(values)


def _either(left: Evaluate, right: Evaluate) -> Evaluate:
    return lambda values: left(values) | right(values)


def _differ(left: Evaluate, right: Evaluate) -> Evaluate:
    return lambda values: left(values) ^ right(values)
