"""The calls in a region of a ``response_template`` that is read as a whole."""

from __future__ import annotations

import re
from typing import Any

from transformers.utils.chat_parsing.content_parsers import process_field

from text.chat.parsing.calls import as_json
from text.chat.parsing.scan import Broken
from text.chat.parsing.xml_calls import Schemas, meant

_CLOSES = re.compile(r"</[\w-]+>$")  # in a pattern, a tag that is at its end as it stands


def calls_in(region: Any, body: str, captures: dict[str, str], schemas: Schemas) -> list[tuple[str, str]]:
    """The names and arguments of the calls in ``body``. Raises ``Broken``, also for words that would be left out."""
    if _ends_open(region, body):
        raise Broken
    try:
        value = process_field(body, region, captures)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Broken from None
    values = value if isinstance(value, list) else [value]
    if not values or _left_out(region, body):
        raise Broken
    return [_call(value, schemas, typed=region.content == "json") for value in values]


def _call(value: Any, schemas: Schemas, *, typed: bool) -> tuple[str, str]:
    """``typed``: the values are what they are; else they are text, and by their schemas perhaps numbers."""
    function = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
        raise Broken
    name, arguments = function["name"].strip(), function.get("arguments") or {}
    if not isinstance(arguments, dict):
        raise Broken
    if not typed:
        known = schemas.get(name, {})
        arguments = {
            key: meant(written, known.get(key)) if isinstance(written, str) else written
            for key, written in arguments.items()
        }
    try:
        return name, as_json(arguments)
    except (ValueError, TypeError, RecursionError):
        raise Broken from None


def _ends_open(region: Any, body: str) -> bool:
    """Whether the last member of a region is not closed, so that something would be left out.

    Looked at before the pattern: from each member that was begun it would look for what closes it, to the end.
    """
    if region.content != "xml-inline" or not body.strip():
        return False
    closes = _CLOSES.search(region.content_args["tag_pattern"])
    return closes is not None and not body.rstrip().endswith(closes[0])


def _left_out(region: Any, body: str) -> str:
    """What is in no member of a region that is read member by member."""
    if region.content == "xml-inline":
        try:
            return re.sub(region.content_args["tag_pattern"], "", body, flags=re.DOTALL).strip()
        except re.error:  # of the other module's own syntax
            return ""
    if region.content == "kv-lines":
        lines = body.split(region.content_args.get("line_sep", "\n"))
        return "".join(line for line in lines if region.content_args.get("kv_sep", ":") not in line).strip()
    return ""
