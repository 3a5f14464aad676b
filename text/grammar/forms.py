"""The forms that a grammar can have, each made one of llguidance's; schemas are checked first (``json_schema``)."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Literal

from llguidance import LLMatcher

from text import json_schema
from text.errors import TextRefused

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

Form = Literal["json_schema", "regex", "lark", "json_object"]

WRITING: JsonCompileOptions = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
_INLINE = re.compile(r"%json\s*")


def _of_schema(source: str) -> str:
    schema = json_schema.parse(source)
    json_schema.check(schema)
    if schema is False:
        raise TextRefused("at the root: false allows nothing")
    return LLMatcher.grammar_from_json_schema(json.dumps({} if schema is True else schema), overrides=WRITING)


def _of_object(source: str) -> str:
    return LLMatcher.grammar_from_json_schema('{"type": "object"}', overrides=WRITING)


def _of_regex(source: str) -> str:
    if not source:
        raise TextRefused("is empty")
    return LLMatcher.grammar_from_regex(source)


def _of_lark(source: str) -> str:
    """With the schemas in it checked, and written in our form."""
    made, at = "", 0
    for found in _INLINE.finditer(source):
        if found.start() < at:  # within a schema
            continue
        line = source.count("\n", 0, found.start()) + 1
        try:
            _, length = json.JSONDecoder().raw_decode(source[found.end() :])
            schema = json_schema.parse(source[found.end() : found.end() + length])
            json_schema.check(schema)
            if schema is False:
                raise TextRefused("false allows nothing")
        except (TextRefused, RecursionError, ValueError) as error:
            raise TextRefused(f"line {line}, the schema behind %json: {error}") from None
        written = json.dumps({**({} if schema is True else schema), "x-guidance": WRITING})
        made += source[at : found.end()] + written
        at = found.end() + length
    return LLMatcher.grammar_from_lark(made + source[at:])


GRAMMARS = {"json_schema": _of_schema, "json_object": _of_object, "regex": _of_regex, "lark": _of_lark}
