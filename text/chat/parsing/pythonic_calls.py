"""Calls written as Python: ``[name(key="value", other=3), ...]``. Arguments are known once their call is closed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection

from text.chat.parsing.calls import Calls, as_json
from text.chat.parsing.scan import Broken, Reading, Scan

DEPTH_MAX = 64
LENGTH_MAX = 1 << 13  # characters of one call: it is parsed as a whole
_CLOSES = {")": "(", "]": "[", "}": "{"}


def read_calls(scan: Scan, calls: Calls, names: Collection[str]) -> Reading[None]:
    """Reads a list of calls of ``names``. Raises ``Broken``."""
    yield from scan.literal("[")
    yield from scan.space()
    while True:
        name = yield from scan.one_of([f"{name}(" for name in names])
        arguments = _meant("f(" + (yield from _closed(scan)))
        calls.begin(name.removesuffix("("), arguments)
        calls.end()
        yield from scan.space()
        if (yield from scan.one_of(",]")) == "]":
            break
        yield from scan.space()
    scan.put()


def _closed(scan: Scan) -> Reading[str]:
    """Reads to the bracket that closes the one before, and over it."""
    begun, brackets = scan.at, Brackets()
    while brackets.open:
        if not (yield from scan.peek()) or scan.at - begun > LENGTH_MAX:
            raise Broken
        while brackets.open and scan.at < len(scan.text):
            if not brackets.take(scan.text[scan.at]):
                raise Broken
            scan.at += 1
    return scan.text[begun : scan.at]


class Brackets:
    """Which brackets are open, behind the first: those in quotes are none."""

    def __init__(self) -> None:
        self.open = ["("]
        self._quote = ""
        self._escaped = False

    def take(self, character: str) -> bool:
        """Whether ``character`` can stand here."""
        if self._quote:
            if character == self._quote and not self._escaped:
                self._quote = ""
            self._escaped = character == "\\" and not self._escaped
        elif character in "'\"":
            self._quote = character
        elif character in "([{":
            self.open.append(character)
            return len(self.open) <= DEPTH_MAX
        elif character in _CLOSES:
            return self.open.pop() == _CLOSES[character]
        return True


def _meant(call: str) -> str:
    """The keyword arguments of a call as a JSON object. Raises ``Broken`` for others, and for what is no literal."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are none
            parsed = ast.parse(call, mode="eval").body
        if not isinstance(parsed, ast.Call) or parsed.args or any(keyword.arg is None for keyword in parsed.keywords):
            raise Broken
        words = _JsonWords()
        members = {str(keyword.arg): ast.literal_eval(words.visit(keyword.value)) for keyword in parsed.keywords}
        return as_json(members)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        raise Broken from None


class _JsonWords(ast.NodeTransformer):
    """Reads JSON's words as Python's."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        words = {"true": True, "false": False, "null": None}
        return ast.Constant(words[node.id]) if node.id in words else node
