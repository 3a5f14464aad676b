"""Calls written as JSON: ``{"name": ..., "arguments": {...}}``, or the arguments alone behind a name."""

from __future__ import annotations

import json
from collections.abc import Collection

from text.chat.parsing.calls import Calls
from text.chat.parsing.json_scan import NUMBER, JsonScan
from text.chat.parsing.scan import Broken, Reading, Scan

_ARGUMENTS = ("arguments", "parameters")
_NAMES = ("name", "tool_name")
_OTHERS = ("id", "type")


def read_arguments(scan: Scan, calls: Calls, name: str) -> Reading[None]:
    """Reads a JSON object, the arguments of a call of ``name``; they go out as they come. Raises ``Broken``."""
    if (yield from scan.peek()) != "{":
        raise Broken
    calls.begin(name)
    yield from _follow(scan, calls)
    calls.end()


def read_call(scan: Scan, calls: Calls, names: Collection[str] | None = None) -> Reading[None]:
    """Reads one object that says the name and the arguments, in any order. Raises ``Broken``.

    With ``names`` it must be one of these, and other members are no call's: for forms that an answer which is JSON
    by itself would be mistaken for.
    """
    yield from scan.literal("{")
    name, arguments = "", None
    seen: set[str] = set()
    yield from scan.space()
    while True:
        key = yield from _string(scan)
        key = "arguments" if key in _ARGUMENTS else "name" if key in _NAMES else key
        if key in seen or (names is not None and key not in ("name", "arguments", *_OTHERS)):
            raise Broken
        seen.add(key)
        yield from scan.space()
        yield from scan.literal(":")
        yield from scan.space()
        if key == "name":
            name = yield from _string(scan)
            if not name or (names is not None and name not in names):
                raise Broken
            if arguments is not None:
                _whole(calls, name, arguments)
        elif key == "arguments" and name and (yield from scan.peek()) == "{":
            yield from read_arguments(scan, calls, name)
        elif key == "arguments":
            arguments = yield from _arguments(scan)
            if name:
                _whole(calls, name, arguments)
        else:
            yield from _value(scan)
        yield from scan.space()
        if (yield from scan.one_of(",}")) == "}":
            break
        yield from scan.space()
    if not name or (names is not None and "arguments" not in seen):
        raise Broken
    if "arguments" not in seen:
        _whole(calls, name, "{}")
    scan.put()


def _whole(calls: Calls, name: str, arguments: str) -> None:
    calls.begin(name, arguments)
    calls.end()


def _arguments(scan: Scan) -> Reading[str]:
    """Arguments as one text: an object, one that is written in a string, or null. Raises ``Broken``."""
    written = yield from _value(scan)
    if written == "null":
        return "{}"
    if written.startswith('"'):
        written = _encodable(str(json.loads(written)).strip())
        try:
            meant = json.loads(written) if written else {}
        except (ValueError, RecursionError):
            raise Broken from None
        if not isinstance(meant, dict):
            raise Broken
        return written or "{}"
    if not written.startswith("{"):
        raise Broken
    return written


def _string(scan: Scan) -> Reading[str]:
    if (yield from scan.peek()) != '"':
        raise Broken
    return _encodable(str(json.loads((yield from _follow(scan)))))


def _encodable(text: str) -> str:
    """Raises ``Broken`` for half of a surrogate pair, which no UTF-8 can say."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Broken from None
    return text


def _value(scan: Scan) -> Reading[str]:
    """Any value, as it is written. Raises ``Broken``."""
    first = yield from scan.peek()
    if not first or first not in "-0123456789":
        return (yield from _follow(scan))
    number = ""
    while (character := (yield from scan.peek())) and character in "0123456789+-.eE":
        number, scan.at = number + character, scan.at + 1
    if NUMBER.fullmatch(number) is None:
        raise Broken
    return number


def _follow(scan: Scan, calls: Calls | None = None) -> Reading[str]:
    """Reads a value that is no number, and returns it; with ``calls`` it goes out as more arguments, as it comes."""
    value, fits, read = JsonScan(), True, []
    while fits and not value.over:
        fits = bool((yield from scan.peek()))
        begun = scan.at
        while fits and not value.over and scan.at < len(scan.text):
            fits = value.take(scan.text[scan.at])
            scan.at += fits
        new = scan.text[begun : scan.at]
        if calls is None:
            read.append(new)
        elif new:
            calls.more(new)
    if not fits:
        raise Broken
    return "".join(read)
