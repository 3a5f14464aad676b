"""A chat's messages as protobuf: dictionaries as OpenAI's clients send them, or ``ChatMessage``. Touches no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from cairn.client.chunks import ChunkRef
from cairn.client.errors import InvalidRequest, invalid
from cairn.client.prompt import ChatMessage, ToolCall
from protos import decode_pb2

ChatMessageLike: TypeAlias = ChatMessage | Mapping[str, Any]

_REFUSED = ("audio", "function_call")  # of OpenAI's messages, where something stands in them
_KEYS = frozenset(
    ("role", "content", "reasoning", "reasoning_content", "thinking", "tool_calls", "tool_call_id", "name")
) | {"refusal", "annotations", *_REFUSED}
_REASONING = ("reasoning_content", "reasoning", "thinking")


def chat_field(
    messages: Sequence[ChatMessageLike],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    tool_choice: str = "",
    template_arguments: Mapping[str, Any] | None = None,
    continue_last_message: bool = False,
    parse: bool = True,
    parallel_tool_calls: bool = False,
) -> decode_pb2.Chat:
    """A ``Chat``. Raises ``InvalidRequest`` naming the message."""
    if isinstance(messages, str | Mapping | ChatMessage) or not messages:
        raise invalid("messages", "give a list of at least one message")
    if isinstance(tools, str | Mapping):
        raise invalid("tools", "give a list of definitions")
    return decode_pb2.Chat(
        messages=[_message(message, f"messages[{index}]") for index, message in enumerate(messages)],
        tools=[_json(tool, f"tools[{index}]") for index, tool in enumerate(tools)],
        template_arguments=_json(template_arguments, "template_arguments") if template_arguments else "",
        continue_last_message=continue_last_message,
        parse=parse,
        tool_choice=tool_choice,
        parallel_tool_calls=parallel_tool_calls,
    )


def _message(message: ChatMessageLike, field: str) -> decode_pb2.ChatMessage:
    if isinstance(message, ChatMessage):
        message = {name: getattr(message, name) for name in ChatMessage.__dataclass_fields__}
    if not isinstance(message, Mapping) or "role" not in message:
        raise invalid(field, f"must be a dictionary with a role and content, not {message!r:.80}")
    for key in message:
        if key not in _KEYS:
            raise invalid(f"{field}.{key}", f"is none of {', '.join(sorted(_KEYS))}")
        if key in _REFUSED and message[key]:
            raise invalid(f"{field}.{key}", "is not supported")
    reasoning = next((message[key] for key in _REASONING if message.get(key)), "")
    calls = message.get("tool_calls") or ()
    try:
        return decode_pb2.ChatMessage(
            role=message["role"],
            content=list(_parts(message.get("content"), f"{field}.content")),
            reasoning=reasoning,
            tool_calls=[_call(call, f"{field}.tool_calls[{index}]") for index, call in enumerate(calls)],
            tool_call_id=message.get("tool_call_id") or "",
            name=message.get("name") or "",
        )
    except InvalidRequest:
        raise
    except (TypeError, ValueError) as error:
        raise invalid(field, str(error)) from error


def _parts(content: Any, field: str) -> Iterator[decode_pb2.ContentPart]:
    if content is None or content == "":
        return
    if isinstance(content, str | ChunkRef | Mapping):
        content = [content]
    for index, part in enumerate(content):
        yield _part(part, f"{field}[{index}]")


def _part(part: Any, field: str) -> decode_pb2.ContentPart:
    if isinstance(part, str):
        return decode_pb2.ContentPart(text=part)
    if isinstance(part, ChunkRef):
        return decode_pb2.ContentPart(chunk_id=part.id)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return decode_pb2.ContentPart(text=part["text"])
    if kind == "chunk" and isinstance(part.get("id"), str):
        return decode_pb2.ContentPart(chunk_id=part["id"])
    if kind == "chunk" and isinstance(part.get("name"), str):
        return decode_pb2.ContentPart(chunk_name=part["name"])
    raise invalid(field, f"must be a text, a chunk, or a part of type text or chunk, not {part!r:.80}")


def _call(call: Any, field: str) -> decode_pb2.ToolCall:
    if isinstance(call, ToolCall):
        return decode_pb2.ToolCall(id=call.id, name=call.name, arguments=call.arguments)
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or "name" not in function:
        raise invalid(field, f"must have a function with a name and arguments, not {call!r:.80}")
    arguments = function.get("arguments") or "{}"
    if not isinstance(arguments, str):
        arguments = _json(arguments, f"{field}.function.arguments")
    return decode_pb2.ToolCall(id=call.get("id") or "", name=function["name"], arguments=arguments)


def _json(value: Any, field: str) -> str:
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise invalid(field, f"cannot be written as JSON: {error}") from error
