"""Tools that a chat offers, and what its answer must look like: what they are to ``client.chat``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cairn import Grammar
from cairn.client.calls import ChatOptions
from gateway.api.fields import Fields
from gateway.errors import invalid

TOOLS_MAX = 128
CHOICES = ("none", "auto", "required")
GRAMMARS = {"regex": Grammar.regex, "lark": Grammar.lark}


def read_tools(fields: Fields) -> ChatOptions:
    """``tools``, ``tool_choice`` and ``parallel_tool_calls``. Raises ``HttpError``."""
    items = fields.items("tools") or []
    if len(items) > TOOLS_MAX:
        raise invalid("tools", f"has more than {TOOLS_MAX}")
    choice = _choice(fields)
    forced = choice not in ("", "none", "auto")
    tools = [_tool(Fields(each, f"tools[{index}]"), forced) for index, each in enumerate(items)]
    parallel = fields.boolean("parallel_tool_calls")
    if parallel is False and tools and not forced and choice != "none":
        raise invalid(
            "parallel_tool_calls",
            'one call at most is certain with tool_choice "required" or a name; leave it out otherwise',
            "unsupported_parameter",
        )
    return {"tools": tools, "tool_choice": choice, "parallel_tool_calls": parallel is not False}


def flat_tools(fields: Fields) -> ChatOptions:
    """The same as responses have it: a tool is its function, and so is the one that is chosen. Raises ``HttpError``."""
    tools, choice = fields.peek("tools"), fields.peek("tool_choice")
    nested: dict[str, Any] = {"tool_choice": choice, "parallel_tool_calls": fields.take("parallel_tool_calls")}
    if isinstance(tools, list):
        nested["tools"] = [_nested(each) for each in tools]
    else:
        nested["tools"] = tools
    fields.harmless("tools", "tool_choice")
    return read_tools(Fields(nested))


def _nested(tool: Any) -> Any:
    if not isinstance(tool, dict) or "function" in tool:
        return tool
    return {"type": tool.get("type"), "function": {name: value for name, value in tool.items() if name != "type"}}


def _choice(fields: Fields) -> str:
    value = fields.take("tool_choice")
    if value is None:
        return ""
    if isinstance(value, str):
        if value not in CHOICES:
            raise invalid("tool_choice", f"must be one of {', '.join(CHOICES)} or an object that names a function")
        return value
    given = Fields(value, "tool_choice")
    given.only("type", "function", why="must be function")
    function = given.object("function")
    named = given.required("name") if function is None else function.required("name")
    if named in CHOICES:
        raise invalid("tool_choice", f"a function named {named} cannot be chosen")
    for each in (function, given):
        if each is not None:
            each.end()
    return named


def _tool(fields: Fields, forced: bool) -> Mapping[str, Any]:
    fields.only("type", "function", why="only functions are served")
    function = fields.mapping("function")
    fields.end()
    if function is None:
        raise invalid(f"{fields.path}.function", "is required")
    inner = Fields(function, f"{fields.path}.function")
    told: dict[str, Any] = {"name": inner.required("name")}
    if (words := inner.string("description")) is not None:
        told["description"] = words
    if (parameters := inner.mapping("parameters")) is not None:
        told["parameters"] = parameters
    if inner.boolean("strict") and not forced:
        raise invalid(
            inner.name("strict"),
            'arguments surely follow their schema with tool_choice "required" or a name; leave it out otherwise',
            "unsupported_parameter",
        )
    inner.end()
    return {"type": "function", "function": told}


def read_response_format(fields: Fields, name: str) -> Grammar | None:
    """What an answer must be: any text (None), a JSON object, or JSON that a schema allows. Raises ``HttpError``."""
    given = fields.object(name)
    if given is None:
        return None
    kind = given.string("type", ("text", "json_object", "json_schema"))
    grammar = None
    if kind == "json_object":
        grammar = Grammar.json_object()
    elif kind == "json_schema":
        inner = given.object("json_schema") or given  # in responses it stands beside the type
        schema = inner.mapping("schema")
        if schema is None:
            raise invalid(inner.name("schema"), "is required")
        inner.harmless("name", "description", "strict")  # it is always followed
        inner.end()
        grammar = Grammar.json_schema(schema)
    given.end()
    return grammar


def read_grammar(given: Fields) -> Grammar | None:
    """``cairn.grammar``: ``{"regex": ...}`` or ``{"lark": ...}``. Raises ``HttpError``."""
    inner = given.object("grammar")
    if inner is None:
        return None
    ways = [way for way in GRAMMARS if inner.has(way)]
    if len(ways) != 1:
        raise invalid(inner.path, "give one of regex and lark")
    grammar = GRAMMARS[ways[0]](inner.required(ways[0]))
    inner.end()
    return grammar


def only_one(one: Grammar | None, other: Grammar | None) -> Grammar | None:
    """Of two ways to say what an answer must be, the one that was used. Raises ``HttpError`` for both."""
    if one is not None and other is not None:
        raise invalid("cairn.grammar", "response_format says already what the answer must be")
    return one or other
