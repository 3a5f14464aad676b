"""Calls whose arguments stand between tags, one by one: what they are is known of the tool's schema."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from text.chat.parsing.calls import Calls, as_json
from text.chat.parsing.scan import Broken, Reading, Scan

KEY_MAX = 256  # characters

Schemas = Mapping[str, Mapping[str, Any]]  # the parameters' schemas of each tool, by its name


def schemas_of(tools: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The schemas of the parameters of tools, in the form of OpenAI or bare; what is none is left out."""
    found: dict[str, dict[str, Any]] = {}
    for tool in tools:
        function = tool.get("function", tool)
        if isinstance(function, dict) and isinstance(function.get("name"), str):
            parameters = function.get("parameters")
            properties = parameters.get("properties") if isinstance(parameters, dict) else None
            found[function["name"]] = properties if isinstance(properties, dict) else {}
    return found


class Members:
    """The arguments of a call as they become known: each goes out as more of one JSON object."""

    def __init__(self, calls: Calls, name: str, schemas: Schemas) -> None:
        self._calls = calls
        self._name = name
        self._schemas = schemas.get(name, {})
        self._seen: set[str] = set()

    def begin(self) -> None:
        self._calls.begin(self._name)

    def add(self, key: str, written: str) -> None:
        """Raises ``Broken`` for one that was there already."""
        if key in self._seen:
            raise Broken
        value = as_json(meant(written, self._schemas.get(key)))
        self._calls.more(f"{', ' if self._seen else '{'}{as_json(key)}: {value}")
        self._seen.add(key)

    def end(self) -> None:
        self._calls.more("}" if self._seen else "{}")
        self._calls.end()


def meant(written: str, schema: Any) -> Any:
    """A value by its schema: text where that allows a string or says nothing, else the JSON that it is, if it is."""
    said = schema.get("type") if isinstance(schema, dict) else None
    types = [said] if isinstance(said, str) else said
    if not isinstance(types, list):
        types = [] if isinstance(schema, dict) and ("anyOf" in schema or "oneOf" in schema) else ["string"]
    if "string" in types:
        return written
    try:
        return json.loads(written.strip(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        return {"true": True, "false": False, "none": None}.get(written.strip().lower(), written)


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def read_function(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """Reads what follows ``<function=``: the name, parameters, ``</function>``. Raises ``Broken``."""
    name = yield from _name(scan, ">")
    members = Members(calls, name, schemas)
    members.begin()
    yield from scan.space()
    while (yield from scan.one_of(("<parameter=", "</function>"))) == "<parameter=":
        key = yield from _name(scan, ">")
        written = yield from scan.until("</parameter>")
        members.add(key, written.removeprefix("\n").removesuffix("\n"))
        yield from scan.space()
    members.end()


def read_arg_pairs(scan: Scan, calls: Calls, schemas: Schemas, end: str) -> Reading[None]:
    """Reads the name, then pairs of ``<arg_key>`` and ``<arg_value>``, then ``end``. Raises ``Broken``."""
    name = ""
    while (character := (yield from scan.peek())) not in ("", "\n", "<"):
        name, scan.at = name + character, scan.at + 1
    members = Members(calls, _checked(name.strip()), schemas)
    yield from scan.space()
    ends = ("<arg_key>", end)
    found = yield from scan.one_of(ends)
    members.begin()
    while found != end:
        key = _checked((yield from scan.until("</arg_key>", KEY_MAX)).strip())
        yield from scan.space()
        yield from scan.literal("<arg_value>")
        members.add(key, (yield from scan.until("</arg_value>")))
        yield from scan.space()
        found = yield from scan.one_of(ends)
    members.end()


def _name(scan: Scan, end: str) -> Reading[str]:
    name = ""
    while (character := (yield from scan.peek())) not in ("", "\n", "<", end):
        name, scan.at = name + character, scan.at + 1
    yield from scan.literal(end)
    return _checked(name.strip())


def _checked(name: str) -> str:
    if not name:
        raise Broken
    return name
