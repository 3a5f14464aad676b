"""Which tools a chat offers, and how what its answer says is told apart."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from decode_service.prompt.chat_prompt import ChatPrompt
from protos import decode_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import check_label
from text import json_schema
from text.chat.parsing.choice import AnswerReader
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.writing import parameters_of
from text.chat.parsing.xml_calls import schemas_of
from text.errors import TextRefused

NAME = re.compile(r"[\w.:-]{1,256}")  # of a tool that is to be called: it stands in words of other meaning

AUTO = ("", "auto")
NONE = "none"
REQUIRED = "required"

Tools = tuple[Mapping[str, Any], ...]


def tools_offered(chat: decode_pb2.Chat, tools: Tools) -> Tools:
    """The tools that the model is told of: none, if none is to be called.

    Raises ``InvalidRequest`` for a choice that no answer could follow.
    """
    choice = chat.tool_choice
    check_label("chat.tool_choice", choice)
    if choice in AUTO:
        return tools
    if choice == NONE:
        return ()
    known = schemas_of(tools)
    if not known:
        raise InvalidRequest(
            f"{choice!r} needs tools", field="chat.tool_choice", remedy="define them, each with a name, or leave it out"
        )
    if choice != REQUIRED and choice not in known:
        raise InvalidRequest(
            f"no tool is named {choice!r}", field="chat.tool_choice", remedy="name one, or give auto, none or required"
        )
    return tools


def forces_call(chat: decode_pb2.Chat) -> bool:
    """Whether the answer must call a tool."""
    return chat.tool_choice not in (*AUTO, NONE)


def check_forced(request: decode_pb2.GenerateRequest) -> None:
    """Raises ``InvalidRequest`` for an answer that would have to follow two grammars."""
    if forces_call(request.chat) and request.HasField("grammar"):
        raise InvalidRequest(
            f"chat.tool_choice {request.chat.tool_choice!r} says already what the answer must be",
            field="grammar",
            remedy="leave one of them out",
        )


def calls_source(chat: decode_pb2.Chat, prompt: ChatPrompt, reader: AnswerReader) -> str:
    """Lark of the calls that the answer must consist of. Raises ``InvalidRequest`` naming the tool."""
    wanted: list[Mapping[str, Any]] = []
    for index, tool in enumerate(prompt.request.tools):
        name = next(iter(schemas_of([tool])), "")
        if chat.tool_choice not in (REQUIRED, name):
            continue
        if NAME.fullmatch(name) is None:
            raise InvalidRequest(
                "no grammar can say this name", field=f"chat.tools[{index}].function.name", remedy="use letters and _"
            )
        try:
            json_schema.check(parameters_of(tool))
        except TextRefused as error:
            raise InvalidRequest(str(error), field=f"chat.tools[{index}].function.parameters") from None
        wanted.append(tool)
    many = chat.parallel_tool_calls and chat.tool_choice == REQUIRED
    try:
        return reader.calls_grammar(wanted, many=many, opening=prompt.opening, begun=_begun(prompt))
    except TextRefused as error:
        raise InvalidRequest(str(error), field="chat.tool_choice", remedy="give auto") from None


def reply_parser(chat: decode_pb2.Chat, prompt: ChatPrompt | None, reader: AnswerReader) -> ReplyParser | None:
    """What tells an answer apart; None where that was not asked for."""
    if prompt is None or not chat.parse:
        return None
    return reader.parser(prompt.request.tools, opening=prompt.opening, begun=_begun(prompt))


def _begun(prompt: ChatPrompt) -> str:
    """What the answer goes on from."""
    return _words(prompt.request.messages[-1].parts) if prompt.request.go_on else ""


def _words(parts: Sequence[Any]) -> str:
    """The words of a message, without its chunks."""
    return "".join(part for part in parts if isinstance(part, str))
