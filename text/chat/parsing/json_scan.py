"""A JSON value read a character at a time: each one is refused that cannot stand where it comes."""

from __future__ import annotations

import re
from collections.abc import Callable

DEPTH_MAX = 64  # what reads the arguments recurses
SPACE = " \t\r\n"
NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")

_DIGITS = "0123456789"
_HEX = _DIGITS + "abcdefABCDEF"
_WORDS = ("true", "false", "null")


class JsonScan:
    """Follows one value that is no number by itself, strictly. ``over`` after its last character."""

    def __init__(self) -> None:
        self.over = False
        self._open: list[str] = []  # objects and arrays
        self._next: Callable[[str], bool] = self._value
        self._word = ""  # so much of a number, a word or an escape
        self._in_key = False

    def take(self, character: str) -> bool:
        """Whether ``character`` can stand here. Nothing is asked after the first one that cannot."""
        return not self.over and self._next(character)

    def _value(self, c: str) -> bool:
        if c in "{[":
            self._open.append(c)
            self._next = self._first_key if c == "{" else self._first_item
            return len(self._open) <= DEPTH_MAX
        if c == '"':
            self._next = self._string
        elif c in "tfn":
            self._word, self._next = c, self._letter
        elif self._open and (c == "-" or c in _DIGITS):
            self._word, self._next = c, self._number
        else:
            return c in SPACE and bool(self._open)
        return True

    def _first_item(self, c: str) -> bool:
        if c in SPACE:
            return True
        return self._close(c) if c == "]" else self._value(c)

    def _first_key(self, c: str) -> bool:
        return self._close(c) if c == "}" else self._key(c)

    def _key(self, c: str) -> bool:
        if c == '"':
            self._in_key, self._next = True, self._string
        return c == '"' or c in SPACE

    def _colon(self, c: str) -> bool:
        if c == ":":
            self._next = self._value
        return c == ":" or c in SPACE

    def _end_value(self) -> None:
        self._next, self.over = self._after, not self._open

    def _after(self, c: str) -> bool:
        if c in "}]":
            return self._close(c)
        if c == ",":
            self._next = self._key if self._open[-1] == "{" else self._value
        return c == "," or c in SPACE

    def _close(self, c: str) -> bool:
        if self._open.pop() != ("{" if c == "}" else "["):
            return False
        self._end_value()
        return True

    def _string(self, c: str) -> bool:
        if c == "\\":
            self._next = self._escape
        elif c == '"' and self._in_key:
            self._in_key, self._next = False, self._colon
        elif c == '"':
            self._end_value()
        return c >= " "

    def _escape(self, c: str) -> bool:
        self._word, self._next = "", self._code if c == "u" else self._string
        return c in 'u"\\/bfnrt'

    def _code(self, c: str) -> bool:
        self._word += c
        if len(self._word) == 4:
            self._next = self._string
        return c in _HEX

    def _number(self, c: str) -> bool:
        if c in "+-.eE" or c in _DIGITS:
            self._word += c
            return True
        self._next = self._after
        return NUMBER.fullmatch(self._word) is not None and self._after(c)

    def _letter(self, c: str) -> bool:
        self._word += c
        if self._word in _WORDS:
            self._end_value()
        return any(word.startswith(self._word) for word in _WORDS)
