"""The messages of a chat as OpenAI has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.api.fields import Fields
from gateway.errors import invalid

MESSAGES_MAX = 1024
AS_SYSTEM = "developer"  # templates know it as "system"
CHUNK_PART = "cairn_chunk"
TEXT_PARTS = ("text", "input_text", "output_text")
REASONING = ("reasoning_content", "reasoning")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Checked messages. Raises ``HttpError``."""
    items = fields.items("messages")
    if not items:
        raise invalid("messages", "at least one message is required")
    if len(items) > MESSAGES_MAX:
        raise invalid("messages", f"has more than {MESSAGES_MAX}")
    return [message_of(Fields(each, f"messages[{index}]")) for index, each in enumerate(items)]


def with_documents(messages: list[dict[str, Any]], documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Documents behind the messages of the system, before the conversation."""
    leading = next((at for at, each in enumerate(messages) if each["role"] != "system"), len(messages))
    return [*messages[:leading], *documents, *messages[leading:]]


def message_of(fields: Fields) -> dict[str, Any]:
    """One message, checked. Raises ``HttpError``."""
    role = fields.required("role")
    message: dict[str, Any] = {
        "role": "system" if role == AS_SYSTEM else role,
        "content": content_of(fields, "content"),
    }
    for name in ("name", "tool_call_id"):
        if (words := fields.string(name)) is not None:
            message[name] = words
    reasoning = [words for name in REASONING if (words := fields.string(name))]
    if reasoning:
        message["reasoning_content"] = reasoning[0]
    if (calls := fields.items("tool_calls")) is not None:
        message["tool_calls"] = [
            _call(Fields(each, fields.name(f"tool_calls[{index}]"))) for index, each in enumerate(calls)
        ]
    fields.only("audio", why="audio is not served")
    fields.only("function_call", why="use tool_calls")
    fields.harmless("refusal", "annotations")
    fields.end()
    return message


def _call(fields: Fields) -> dict[str, Any]:
    fields.only("type", "function", why="only functions are served")
    fields.harmless("index")
    function = fields.object("function")
    if function is None:
        raise invalid(fields.name("function"), "is required")
    call = {"name": function.required("name"), "arguments": function.string("arguments") or "{}"}
    function.end()
    read = {"id": fields.string("id") or "", "type": "function", "function": call}
    fields.end()
    return read


def content_of(fields: Fields, field: str) -> str | list[dict[str, Any]]:
    """A text, or parts. Raises ``HttpError``."""
    name, value = fields.name(field), fields.take(field)
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise invalid(name, "must be a string or a list of parts")
    return [_part(Fields(each, f"{name}[{index}]")) for index, each in enumerate(value)]


def _part(fields: Fields) -> dict[str, Any]:
    """Words, or a registered chunk: ``{"type": "cairn_chunk", "id": ...}`` or with its ``name``."""
    kind = fields.required("type")
    if kind == CHUNK_PART:
        ways = [way for way in ("id", "name") if fields.has(way)]
        if len(ways) != 1:
            raise invalid(fields.path, "give one of id and name")
        part = {"type": "chunk", ways[0]: fields.required(ways[0])}
    elif kind in TEXT_PARTS:
        part = {"type": "text", "text": fields.string("text") or ""}
        fields.harmless("annotations", "logprobs")
    else:
        raise invalid(fields.name("type"), f"must be text or {CHUNK_PART}", "unsupported_parameter")
    fields.end()
    return part
