"""Which tools a chat offers, and how what its answer says is told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from decode_service.prompt.chat_prompt import ChatPrompt
from protos import decode_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import check_label
from text.chat.parsing.choice import AnswerReader
from text.chat.parsing.parts import ReplyParser
from text.chat.parsing.xml_calls import schemas_of

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


def reply_parser(chat: decode_pb2.Chat, prompt: ChatPrompt | None, reader: AnswerReader) -> ReplyParser | None:
    """What tells an answer apart; None where that was not asked for."""
    if prompt is None or not chat.parse:
        return None
    begun = _words(prompt.request.messages[-1].parts) if prompt.request.go_on else ""
    return reader.parser(prompt.request.tools, opening=prompt.opening, begun=begun)


def _words(parts: Sequence[Any]) -> str:
    """The words of a message, without its chunks."""
    return "".join(part for part in parts if isinstance(part, str))
