"""How models write calls and reasoning: what begins them, and who reads what follows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from text.chat.parsing.calls import Calls, call_id, mistral_id
from text.chat.parsing.json_calls import read_arguments, read_call
from text.chat.parsing.pythonic_calls import read_calls
from text.chat.parsing.scan import Broken, Reading, Scan
from text.chat.parsing.writing import (
    Frame,
    Writing,
    json_call,
    member_call,
    named_call,
    numbered_call,
    python_call,
)
from text.chat.parsing.xml_calls import Schemas, read_arg_pairs, read_function

NAME_MAX = 256  # characters
_NAME = re.compile(r"[\w.:/-]+")  # where it stands between tags

ReadCalls: TypeAlias = Callable[[Scan, Calls, Schemas], Reading[None]]


@dataclass(frozen=True)
class Form:
    """How answers of one family of models are written.

    ``openers``: what a call begins with anywhere, and who reads on behind it. ``first``: who looks for calls where the
    answer begins. ``reasoning``: pairs of tags. ``layout``: tags that say nothing by themselves.
    """

    name: str
    openers: Mapping[str, ReadCalls] = field(default_factory=dict)
    first: ReadCalls | None = None
    reasoning: Mapping[str, str] = field(default_factory=lambda: {"<think>": "</think>"})
    layout: tuple[str, ...] = ()
    closers: tuple[str, ...] = ()  # what else its readers look for
    writing: Writing | None = None  # of calls; None: none that a grammar could say
    make_id: Callable[[], str] = call_id

    @property
    def tags(self) -> tuple[str, ...]:
        """All words that a parser must see, special tokens or not."""
        return (*self.openers, *self.reasoning, *self.reasoning.values(), *self.layout, *self.closers)


def _hermes(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``<tool_call>{"name": ..., "arguments": ...}</tool_call>``, or with a function in tags inside."""
    yield from scan.space()
    if (yield from scan.peek()) == "{":
        yield from read_call(scan, calls)
    else:
        yield from scan.literal("<function=")
        yield from read_function(scan, calls, schemas)
    yield from _close(scan, "</tool_call>")


def _close(scan: Scan, closer: str) -> Reading[None]:
    """Reads what closes a call that is whole; an answer may end without it."""
    scan.put()
    yield from scan.space()
    if (yield from scan.peek()):
        yield from scan.literal(closer)
    scan.put()


def _bare_function(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from read_function(scan, calls, schemas)
    scan.put()


def _glm(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from scan.space()
    yield from read_arg_pairs(scan, calls, schemas, "</tool_call>")
    scan.put()


def _list(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``[{"name": ..., "arguments": ...}, ...]``"""
    yield from scan.literal("[")
    yield from scan.space()
    while True:
        yield from read_call(scan, calls)
        yield from scan.space()
        if (yield from scan.one_of(",]")) == "]":
            break
        yield from scan.space()
    scan.put()


def _mistral(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """Behind ``[TOOL_CALLS]``: a list, or a name and its arguments."""
    yield from scan.space()
    if (yield from scan.peek()) == "[":
        yield from _list(scan, calls, schemas)
        return
    name = yield from _word(scan)
    found = yield from scan.one_of(("[CALL_ID]", "[ARGS]", "{"))
    if found == "[CALL_ID]":
        yield from _word(scan)
        yield from scan.literal("[ARGS]")
    if found == "{":
        scan.at -= 1
    yield from scan.space()
    yield from read_arguments(scan, calls, name)
    scan.put()


def _word(scan: Scan) -> Reading[str]:
    """A name up to a bracket."""
    word = ""
    while (character := (yield from scan.peek())) and (character.isalnum() or character in "_-. \n:"):
        word, scan.at = word + character, scan.at + 1
    return _checked(word)


def _checked(name: str) -> str:
    """Raises ``Broken`` for what is no tool's name."""
    if _NAME.fullmatch(name.strip()) is None:
        raise Broken
    return name.strip()


def _list_with_closer(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from scan.space()
    yield from _list(scan, calls, schemas)
    yield from scan.space()
    if (yield from scan.peek()) == "<":
        yield from scan.literal("<|/tool_call|>")
    scan.put()


def _cohere(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from scan.space()
    yield from _list(scan, calls, schemas)
    yield from _close(scan, "<|END_ACTION|>")


def _deepseek(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``name<sep>{...}``, or ``function<sep>name`` and the arguments in a fence."""
    name = yield from scan.until("<｜tool▁sep｜>", NAME_MAX)
    yield from scan.space()
    fence = (yield from scan.peek()) != "{"
    if fence:
        name = yield from scan.until("```json", NAME_MAX)
        yield from scan.space()
    yield from read_arguments(scan, calls, _checked(name))
    scan.put()
    yield from scan.space()
    if fence and (yield from scan.peek()):
        yield from scan.literal("```")
    yield from _close(scan, "<｜tool▁call▁end｜>")


def _kimi(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``functions.name:0<begin>{...}<end>``"""
    name = (yield from scan.until("<|tool_call_argument_begin|>", NAME_MAX)).strip()
    name = name.removeprefix("functions.").rpartition(":")[0] or name
    yield from scan.space()
    yield from read_arguments(scan, calls, _checked(name))
    yield from _close(scan, "<|tool_call_end|>")


def _llama_json(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``{"name": ..., "parameters": ...}`` and nothing else, or several of them with ``;`` between."""
    yield from _python_tag(scan)
    while (yield from scan.peek()) == "{":
        yield from read_call(scan, calls, schemas)
        yield from scan.space()
        if (yield from scan.peek()) in tuple(";,"):
            scan.at += 1
            yield from scan.space()
    if not calls.whole:
        raise Broken


def _llama_python(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    yield from _python_tag(scan)
    yield from read_calls(scan, calls, schemas)


def _lfm(scan: Scan, calls: Calls, schemas: Schemas) -> Reading[None]:
    """``[name(key="value")]`` between tags."""
    yield from scan.space()
    yield from read_calls(scan, calls, schemas)
    yield from _close(scan, "<|tool_call_end|>")


def _python_tag(scan: Scan) -> Reading[None]:
    yield from scan.space()
    if (yield from scan.peek()) == "<":
        yield from scan.one_of(("<|python_tag|>", "<|python_start|>"))
        yield from scan.space()


HERMES = Form(
    "hermes",
    {"<tool_call>": _hermes},
    closers=("</tool_call>",),
    writing=Writing(json_call("<tool_call>\n", "\n</tool_call>"), Frame(between="\n")),
)
QWEN_CODER = Form(
    "qwen-coder",
    {"<tool_call>": _hermes, "<function=": _bare_function},
    closers=("</tool_call>",),
    writing=Writing(
        member_call(
            "<tool_call>\n<function={}>\n",
            ("<parameter=", ">"),
            ("\n", "\n</parameter>\n"),
            "</function>\n</tool_call>",
        ),
        Frame(between="\n"),
    ),
)
GLM = Form(
    "glm",
    {"<tool_call>": _glm},
    closers=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    writing=Writing(
        member_call(
            "<tool_call>{}\n", ("<arg_key>", "</arg_key>\n"), ("<arg_value>", "</arg_value>\n"), "</tool_call>"
        ),
        Frame(between="\n"),
    ),
)
MISTRAL = Form(
    "mistral",
    {"[TOOL_CALLS]": _mistral},
    reasoning={"[THINK]": "[/THINK]", "<think>": "</think>"},
    closers=("[ARGS]", "[CALL_ID]"),
    writing=Writing(json_call("", ""), Frame("[TOOL_CALLS][", ", ", "]")),
    make_id=mistral_id,
)
MISTRAL_NAMED = replace(MISTRAL, name="mistral-named", writing=Writing(named_call("[TOOL_CALLS]", "[ARGS]", "")))
BAR_LIST = Form(
    "list behind <|tool_call|>",
    {"<|tool_call|>": _list_with_closer},
    closers=("<|/tool_call|>",),
    writing=Writing(json_call("", ""), Frame("<|tool_call|>[", ", ", "]")),
)
_DEEPSEEK_AROUND = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
DEEPSEEK = Form(
    "deepseek",
    {"<｜tool▁call▁begin｜>": _deepseek},
    layout=_DEEPSEEK_AROUND,
    closers=("<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    writing=Writing(
        named_call("<｜tool▁call▁begin｜>function<｜tool▁sep｜>", "\n```json\n", "\n```<｜tool▁call▁end｜>"),
        Frame(_DEEPSEEK_AROUND[0], "\n", _DEEPSEEK_AROUND[1]),
    ),
)
DEEPSEEK_NAMED = replace(
    DEEPSEEK,
    name="deepseek-named",
    writing=Writing(
        named_call("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        Frame(_DEEPSEEK_AROUND[0], "", _DEEPSEEK_AROUND[1]),
    ),
)
_KIMI_AROUND = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
KIMI = Form(
    "kimi",
    {"<|tool_call_begin|>": _kimi},
    layout=_KIMI_AROUND,
    closers=("<|tool_call_argument_begin|>", "<|tool_call_end|>"),
    writing=Writing(numbered_call, Frame(_KIMI_AROUND[0], "", _KIMI_AROUND[1])),
)
LLAMA_JSON = Form(
    "llama-json",
    first=_llama_json,
    closers=("<|python_tag|>",),
    writing=Writing(json_call("", "", "parameters"), Frame(between="; ")),
)
LLAMA_PYTHON = Form(
    "llama-python",
    first=_llama_python,
    closers=("<|python_tag|>", "<|python_start|>", "<|python_end|>"),
    writing=Writing(python_call, Frame("[", ", ", "]")),
)

LFM = Form(
    "lfm",
    {"<|tool_call_start|>": _lfm},
    closers=("<|tool_call_end|>",),
    writing=Writing(python_call, Frame("<|tool_call_start|>[", ", ", "]<|tool_call_end|>")),
)
COHERE = Form(
    "cohere",
    {"<|START_ACTION|>": _cohere},
    reasoning={"<|START_THINKING|>": "<|END_THINKING|>"},
    closers=("<|END_ACTION|>",),
    writing=Writing(json_call("", "", "parameters", "tool_name"), Frame("<|START_ACTION|>[", ", ", "]<|END_ACTION|>")),
)


def form_of(template: str, vocabulary: Mapping[str, Any]) -> Form:
    """The form that a chat template asks the model to write; Hermes' where nothing says another."""

    def says(*tags: str) -> bool:
        return any(tag in template or tag in vocabulary for tag in tags)

    if says("[TOOL_CALLS]"):
        return MISTRAL_NAMED if says("[ARGS]") else MISTRAL
    if says("<｜tool▁call▁begin｜>"):
        return DEEPSEEK if "```json" in template or "<｜tool▁sep｜>" not in template else DEEPSEEK_NAMED
    if says("<|tool_call_begin|>"):
        return KIMI
    if says("<|tool_call_start|>"):
        return LFM
    if says("<|START_ACTION|>"):
        return COHERE
    if "<tool_call>" in template:
        if "<arg_key>" in template:
            return GLM
        return QWEN_CODER if "<function=" in template else HERMES
    if "<|tool_call|>" in template:
        return BAR_LIST
    if "[func_name1(" in template:
        return LLAMA_PYTHON
    if '"parameters"' in template and says("<|python_tag|>"):
        return LLAMA_JSON
    return HERMES
