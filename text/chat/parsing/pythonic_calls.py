"""Calls written as Python: ``[name(key="value", other=3), ...]``. Arguments are known once their call is closed."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Collection

from text.chat.parsing.calls import Calls, as_json
from text.chat.parsing.scan import Broken, Reading, Scan

DEPTH_MAX = 64
LENGTH_MAX = 1 << 16  # characters of one call: it is parsed as a whole
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
    read: list[str] = []
    opened, quote, escaped = ["("], "", False
    while opened:
        character = yield from scan.peek()
        if not character or len(read) == LENGTH_MAX:
            raise Broken
        if quote:
            quote = "" if character == quote and not escaped else quote
            escaped = character == "\\" and not escaped
        elif character in "'\"":
            quote = character
        elif character in "([{" and len(opened) < DEPTH_MAX:
            opened.append(character)
        elif character in "([{" or (character in _CLOSES and opened.pop() != _CLOSES[character]):
            raise Broken
        read.append(character)
        scan.at += 1
    return "".join(read)


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
