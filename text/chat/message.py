"""The messages of a chat as plain values, and what a template is given of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class ChunkPart:
    """A registered chunk that stands in a message with its own tokens; named by its id, or by its name.

    ``mark``: what a template sees in its place.
    """

    chunk_id: str
    name: str = ""
    mark: str = ""


Part: TypeAlias = str | ChunkPart


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool. ``arguments``: the text of a JSON object."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Message:
    """One message. A ``role`` of "" is no turn: its parts stand as they are, outside of the template."""

    role: str
    parts: tuple[Part, ...]
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        """Its words, with marks where chunks stand."""
        return "".join(part if isinstance(part, str) else part.mark for part in self.parts)

    @property
    def fields(self) -> tuple[bytes, ...]:
        """All of it, for a digest. How its text was cut into parts is no difference, nor how its JSON is spaced."""
        calls = [(call.id, call.name, canonical_json(json.loads(call.arguments))) for call in self.tool_calls]
        return tuple(
            each.encode()
            for each in (self.role, self.text, self.reasoning, json.dumps(calls), self.tool_call_id, self.name)
        )


def canonical_json(value: Any) -> str:
    """One text for equal values."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def template_messages(messages: Sequence[Message], *, in_parts: bool = False) -> list[dict[str, Any]]:
    """The messages as templates know them. ``in_parts``: their content is a list, as some templates want it."""
    return [_template_message(message, in_parts) for message in messages]


def _template_message(message: Message, in_parts: bool) -> dict[str, Any]:
    text = message.text
    given: dict[str, Any] = {"role": message.role, "content": [{"type": "text", "text": text}] if in_parts else text}
    if message.reasoning:  # under each name that templates read
        given["reasoning_content"] = given["thinking"] = message.reasoning
    if message.tool_calls:
        given["tool_calls"] = [
            {
                **({"id": call.id} if call.id else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": json.loads(call.arguments)},
            }
            for call in message.tool_calls
        ]
    for key in ("tool_call_id", "name"):
        if value := getattr(message, key):
            given[key] = value
    return given


def template_tools(tools: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]] | None:
    """None without any: many templates ask whether there are tools by that."""
    return list(tools) or None
