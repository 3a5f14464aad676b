"""Between the messages of a chat in ``decode.proto`` and plain values: what stands in them, within bounds."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from decode_service.api.tool_choice import tools_offered
from decode_service.prompt.chat_prompt import ChatPrompt, ChatRequest
from protos import decode_pb2
from serving.errors import InvalidRequest
from serving.rpc.field_bounds import ContentBudget, check_count, check_id, check_label
from text.chat.message import ChunkPart, Message, Part, ToolCall
from text.chat.template import RESERVED

MESSAGES_MAX = 1024
PARTS_MAX = 1024  # of all messages
TOOLS_MAX = 128
TOOL_CALLS_MAX = 128  # of a message
JSON_DEPTH_MAX = 64
# Also one that does not end: without it each quote of such a text would be looked at to the end of the text.
_STRINGS = re.compile(r'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_BRACKETS = re.compile(r"[\[\]{}]")


def check_either(request: decode_pb2.GenerateRequest) -> None:
    """Raises ``InvalidRequest`` for a request of both kinds."""
    if request.HasField("chat") and request.segments:
        raise InvalidRequest("a request has either segments or a chat", field="chat", remedy="leave one out")


def chat_in(chat: decode_pb2.Chat, budget: ContentBudget) -> ChatRequest:
    """A chat as plain values, within ``budget``. Raises ``InvalidRequest`` naming the message."""
    check_count("chat.messages", chat.messages, MESSAGES_MAX, "leave the oldest out")
    check_count("chat.tools", chat.tools, TOOLS_MAX)
    if not any(message.role for message in chat.messages):
        raise InvalidRequest("at least one with a role is needed", field="chat.messages")
    parts = sum(len(message.content) for message in chat.messages)
    if parts > PARTS_MAX:
        raise InvalidRequest(f"{parts} parts are more than {PARTS_MAX}", field="chat.messages", remedy="join some")
    messages = tuple(_message_in(f"chat.messages[{index}]", each, budget) for index, each in enumerate(chat.messages))
    if chat.continue_last_message and (messages[-1].role != "assistant" or messages[-1].tool_calls):
        raise InvalidRequest(
            "only an assistant's message without tool calls can go on",
            field=f"chat.messages[{len(messages) - 1}]",
            remedy="leave continue_last_message out",
        )
    tools = tuple(_object_in(f"chat.tools[{index}]", text, budget) for index, text in enumerate(chat.tools))
    arguments = _object_in("chat.template_arguments", chat.template_arguments or "{}", budget)
    for name in RESERVED:
        if name in arguments:
            raise InvalidRequest(f"{name!r} is set by the service", field="chat.template_arguments")
    return ChatRequest(messages, tools_offered(chat, tools), arguments, chat.continue_last_message)


def chat_out(chat: ChatPrompt) -> decode_pb2.ChatReport:
    return decode_pb2.ChatReport(pieces=chat.pieces, turns_kept=chat.turns_kept, rendered_again=chat.rendered_again)


def _message_in(field: str, message: decode_pb2.ChatMessage, budget: ContentBudget) -> Message:
    for name in ("role", "tool_call_id", "name"):
        check_label(f"{field}.{name}", getattr(message, name))
    budget.take_text(f"{field}.reasoning", message.reasoning)
    parts = tuple(_part_in(f"{field}.content[{number}]", part, budget) for number, part in enumerate(message.content))
    check_count(f"{field}.tool_calls", message.tool_calls, TOOL_CALLS_MAX)
    calls = tuple(_call_in(f"{field}.tool_calls[{n}]", call, budget) for n, call in enumerate(message.tool_calls))
    if not message.role and (calls or message.reasoning or not all(parts) or not parts):
        raise InvalidRequest(
            "is empty", field=f"{field}.role", remedy="without one a message is texts and chunks alone"
        )
    return Message(message.role, parts, message.reasoning, calls, message.tool_call_id, message.name)


def _part_in(field: str, part: decode_pb2.ContentPart, budget: ContentBudget) -> Part:
    kind = part.WhichOneof("part")
    if kind == "text":
        budget.take_text(f"{field}.text", part.text)
        return part.text
    if kind == "chunk_id" and part.chunk_id:
        check_id(f"{field}.chunk_id", part.chunk_id)
        return ChunkPart(part.chunk_id)
    if kind == "chunk_name" and part.chunk_name:
        check_label(f"{field}.chunk_name", part.chunk_name)
        return ChunkPart("", part.chunk_name)
    raise InvalidRequest("give one of text, chunk_id and chunk_name", field=field)


def _call_in(field: str, call: decode_pb2.ToolCall, budget: ContentBudget) -> ToolCall:
    check_label(f"{field}.id", call.id)
    check_label(f"{field}.name", call.name)
    if not call.name:
        raise InvalidRequest("is empty", field=f"{field}.name", remedy="name the tool that was called")
    _object_in(f"{field}.arguments", call.arguments or "{}", budget)
    return ToolCall(call.id, call.name, call.arguments or "{}")


def _object_in(field: str, text: str, budget: ContentBudget) -> dict[str, Any]:
    """A JSON object, nested within a bound."""
    budget.take_text(field, text)
    depth = deepest = 0
    for bracket in _BRACKETS.findall(_STRINGS.sub("", text)):  # before it is parsed: parsing goes as deep
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > JSON_DEPTH_MAX:
        raise InvalidRequest(f"is nested deeper than {JSON_DEPTH_MAX}", field=field)
    try:
        value = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except ValueError as error:
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise InvalidRequest(f"is no JSON ({said})", field=field, remedy="give a JSON object") from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"is a JSON {type(value).__name__}", field=field, remedy="give a JSON object")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is none of its values")
