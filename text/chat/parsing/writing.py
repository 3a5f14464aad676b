"""Grammars of answers that are calls, as the model writes them: Lark, in llguidance's dialect.

A form says how one call is written (``WriteCall``) and what stands before, between and behind calls (``Frame``).
Literal words become tokens where they are special ones, for a grammar takes these by their ids alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

CALLS_MAX = 16
_META = "\\.+*?()|[]{}^$/"  # of regular expressions
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class Frame:
    """What stands around calls. ``many``: whether more than one can be written."""

    before: str = ""
    between: str = ""
    after: str = ""
    many: bool = True


class Lark:
    """Expressions of a grammar, for a vocabulary with these special tokens."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        words = sorted(special, key=len, reverse=True)
        self._pattern = re.compile("(" + "|".join(map(re.escape, words)) + ")") if words else None

    def words(self, text: str) -> str:
        """Exactly this text; "" stands for nothing."""
        pieces = self._pattern.split(text) if self._pattern else [text]
        return " ".join(map(self._piece, filter(None, pieces)))

    def _piece(self, piece: str) -> str:
        known = self._special.get(piece)
        return json.dumps(piece, ensure_ascii=False) if known is None else f"<[{known}]>"

    def words_up_to(self, end: str) -> str:
        """Words without ``<``, and ``end``: one expression, for it would not be seen where words could go on."""
        pieces = list(filter(None, self._pattern.split(end) if self._pattern else [end]))
        if pieces[0] not in self._special and pieces[0].strip():
            closing = "".join({"\n": "\\n"}.get(c, f"\\{c}" if c in _META else c) for c in pieces.pop(0))
            return " ".join((f"/[^<]*{closing}/", *map(self._piece, pieces)))
        return f"/[^<]*/ {self.words(end.lstrip())}"

    def json(self, schema: Mapping[str, Any]) -> str:
        return f"%json {json.dumps(schema)}"

    def rest(self, name: str, end: str) -> str:
        """A rule: anything up to ``end``, and that."""
        if end in self._special:
            return f"{name}: /(?s:.*)/ {self.words(end)}"
        return f"{name}[suffix={json.dumps(end, ensure_ascii=False)}]: /(?s:.*)/"


WriteCall: TypeAlias = Callable[[Lark, str, Mapping[str, Any]], str]


@dataclass(frozen=True)
class Writing:
    """How a form writes calls."""

    call: WriteCall
    frame: Frame = Frame()


def parameters_of(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of a tool's arguments, which are an object."""
    parameters = tool.get("function", tool).get("parameters")
    return {**parameters, "type": "object"} if isinstance(parameters, Mapping) and parameters else ANY_OBJECT


def calls_grammar(
    writing: Writing,
    tools: Sequence[tuple[str, Mapping[str, Any]]],
    special: Mapping[str, int],
    *,
    many: bool,
    reasoning: tuple[str, str] | None = None,
) -> str:
    """Lark of an answer that calls one of ``tools`` (names and schemas), or, with ``many``, any number of them.

    ``reasoning``: what begins it, "" if the prompt has begun it, and what ends it; it may come before the calls.
    """
    lark, frame = Lark(special), writing.frame
    rules = [f"call{number}: {writing.call(lark, *tool)}" for number, tool in enumerate(tools)]
    rules.append("call: " + " | ".join(f"call{number}" for number in range(len(tools))))
    calls = "call"
    if many and frame.many:
        calls += f" ({lark.words(frame.between)} call){{0,{CALLS_MAX - 1}}}"
    start = [lark.words(frame.before), calls, lark.words(frame.after)]
    if reasoning is not None:
        begins, ends = reasoning
        rules.append(lark.rest("thought", ends))
        rules.append(f"reasoning: {lark.words(begins)} thought /[ \\n]{{0,2}}/")
        start.insert(0, "reasoning?" if begins else "reasoning")
    return "\n".join([f"start: {' '.join(filter(None, start))}", *rules]) + "\n"


# -- how one call is written ------------------------------------------------------------------------
def json_call(before: str, after: str, key: str = "arguments", name_key: str = "name") -> WriteCall:
    """``before``, an object with the name first, ``after``."""

    def write(lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        head = f'{before}{{"{name_key}": {json.dumps(name, ensure_ascii=False)}, "{key}": '
        return " ".join((lark.words(head), lark.json(schema), lark.words("}" + after)))

    return write


def named_call(before: str, middle: str, after: str) -> WriteCall:
    """``before``, the name, ``middle``, the arguments, ``after``."""

    def write(lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        return " ".join(
            filter(None, (lark.words(before + name + middle), lark.json(schema), after and lark.words(after)))
        )

    return write


def numbered_call(lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
    """As Kimi writes it: which call it is stands behind the name."""
    begin = lark.words(f"<|tool_call_begin|>functions.{name}:")
    middle, after = lark.words("<|tool_call_argument_begin|>"), lark.words("<|tool_call_end|>")
    return f"{begin} /[0-9]{{1,2}}/ {middle} {lark.json(schema)} {after}"


def member_call(before: str, key: tuple[str, str], value: tuple[str, str], after: str) -> WriteCall:
    """``before``, with the name in it (``{}``), each argument between tags, ``after``."""

    def write(lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        pieces = [lark.words(before.replace("{}", name))]
        required = schema.get("required") or ()
        for member, of in (schema.get("properties") or {}).items():
            written = f"{lark.words(key[0] + member + key[1] + value[0])} {_member(lark, of, schema, value[1])}"
            pieces.append(f"({written})" + ("" if member in required else "?"))
        return " ".join((*pieces, lark.words(after)))

    return write


def _member(lark: Lark, schema: Any, whole: Mapping[str, Any], end: str) -> str:
    """The value of one argument and ``end``: words where its schema is a string's, else JSON."""
    of: Mapping[str, Any] = schema if isinstance(schema, Mapping) else {}
    choices = [of["const"]] if "const" in of else of.get("enum")
    if isinstance(choices, list) and choices and all(isinstance(choice, str) and choice for choice in choices):
        return f"({' | '.join(map(lark.words, choices))}) {lark.words(end)}"
    typed = isinstance(schema, Mapping) and not {"anyOf", "oneOf", "allOf", "$ref"} & of.keys()
    types = of.get("type", "string" if typed else "")
    if types == "string" or (isinstance(types, list) and "string" in types):
        return lark.words_up_to(end)
    return f"{lark.json(_with_defs(of, whole))} {lark.words(end)}"


def python_call(lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
    """``name(key=value, ...)`` with JSON's values; what is not required comes behind what is."""
    required = schema.get("required") or ()
    members = sorted((schema.get("properties") or {}).items(), key=lambda member: member[0] not in required)
    written = [
        f"{lark.words((', ' if number else '') + member + '=')} {lark.json(_with_defs(of, schema))}"
        for number, (member, of) in enumerate(members)
    ]
    needed = sum(member in required for member, _ in members)
    optional = "".join(f"({each} " for each in written[needed:]) + ")?" * len(written[needed:])
    return " ".join((lark.words(f"{name}("), *written[:needed], optional, lark.words(")")))


def _with_defs(schema: Any, whole: Mapping[str, Any]) -> Mapping[str, Any]:
    own = schema if isinstance(schema, Mapping) else {}
    return {**own, **{key: whole[key] for key in ("$defs", "definitions") if key in whole}}
