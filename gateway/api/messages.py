"""The messages of a chat as OpenAI has them."""

from __future__ import annotations

from typing import Any

from cairn import Text
from cairn.client.requests import Segment
from gateway.api.fields import Fields
from gateway.errors import invalid

MESSAGES_MAX = 1024
ROLES = ("system", "developer", "user", "assistant", "tool")
AS_SYSTEM = "developer"  # templates know it as "system"


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Checked messages. Raises ``HttpError``."""
    items = fields.items("messages")
    if not items:
        raise invalid("messages", "at least one message is required")
    if len(items) > MESSAGES_MAX:
        raise invalid("messages", f"has more than {MESSAGES_MAX}")
    return [_message(Fields(each, f"messages[{index}]")) for index, each in enumerate(items)]


def _message(fields: Fields) -> dict[str, Any]:
    role = fields.required("role")
    if role == AS_SYSTEM:
        role = "system"
    message: dict[str, Any] = {"role": role, "content": _content(fields)}
    fields.only("audio", why="audio is not served")
    fields.only("function_call", why="use tool_calls")
    fields.harmless("refusal", "annotations")
    fields.end()
    return message


def _content(fields: Fields) -> str:
    name, value = fields.name("content"), fields.take("content")
    if value is None or isinstance(value, str):
        return value or ""
    if not isinstance(value, list):
        raise invalid(name, "must be a string or a list of parts")
    return "".join(_part(Fields(each, f"{name}[{index}]")) for index, each in enumerate(value))


def _part(fields: Fields) -> str:
    kind = fields.required("type")
    if kind not in ("text", "input_text", "output_text"):
        raise invalid(fields.name("type"), "only text is served", "unsupported_parameter")
    text = fields.string("text") or ""
    fields.end()
    return text


def segments_in(messages: list[dict[str, Any]], documents: list[Segment]) -> list[Segment]:
    """Each message a segment, documents behind the system's."""
    turns = [
        Text(each["content"], "system_prompt" if each["role"] == "system" else "", each["role"]) for each in messages
    ]
    leading = next((at for at, each in enumerate(turns) if each.role != "system"), len(turns) - 1)
    return [*turns[:leading], *documents, *turns[leading:]]
