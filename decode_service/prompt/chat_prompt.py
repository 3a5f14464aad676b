"""What a chat asks for and what became of it, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from chunk_store.key import ChunkType, digest
from chunk_store.tenant import Tenant
from text.chat.message import Message, ToolCall, canonical_json


@dataclass(frozen=True)
class ChatRequest:
    """A conversation as asked for. ``fields[i]`` names a message in errors. ``go_on``: from its last message's end."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    go_on: bool = False


@dataclass(frozen=True)
class Said:
    """An answer as its caller was given it: what he sends as a message when the chat goes on."""

    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class KeptSegment:
    """What stood in a prompt: a chunk that its caller named, or packed token ids."""

    type: ChunkType
    chunk_id: str
    packed: bytes

    @property
    def nbytes(self) -> int:
        return len(self.packed) + 256  # and what Python makes of it


@dataclass(frozen=True)
class ChatPrompt:
    """How a chat became segments.

    ``kept_segments`` of them are remembered, with ``turns_kept`` answers as they were generated, under the name
    ``kept``. ``opening``: the words of the template that open the answer. ``text_length`` and ``text_digest`` are of
    all that was rendered, these included.
    """

    tenant: Tenant
    request: ChatRequest
    pieces: int
    turns_kept: int
    kept_segments: int
    kept: str
    rendered_again: str
    opening: str
    text_length: int
    text_digest: str

    def name_with(self, said: Said) -> str:
        """What the chat is remembered under once it is answered."""
        messages = self.request.messages
        if self.request.go_on:
            last = messages[-1]
            parts = (*last.parts, said.text)
            whole = Message("assistant", parts, last.reasoning, said.tool_calls, last.tool_call_id, last.name)
            return chat_names(self.tenant, self.request, [*messages[:-1], whole])[-1]
        answer = Message("assistant", (said.text,), said.reasoning, said.tool_calls)
        return chat_names(self.tenant, self.request, [*messages, answer])[-1]


def chat_names(tenant: Tenant, chat: ChatRequest, messages: Sequence[Message]) -> list[str]:
    """The name of each beginning of a chat: of none of its messages, of the first, of the first two, and so on."""
    given = (tenant, canonical_json(chat.tools), canonical_json(chat.arguments))
    names = [digest("cairn.chat.v1", [each.encode() for each in given])]
    for message in messages:
        names.append(digest("cairn.chat.message.v1", [names[-1].encode(), *message.fields]))
    return names


def text_digest(text: str) -> str:
    return digest("cairn.chat.text.v1", [text.encode()])
