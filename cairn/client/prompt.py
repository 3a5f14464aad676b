"""What a prompt is made of: segments, or the messages of a chat; and what its answer must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cairn.client.chunks import ChunkRef

REUSE_MODES = ("exact", "anchored", "independent")
CACHE_USES = ("shared", "bypass")
CHUNK_ORDERS = ("given", "canonical")
GRAMMAR_FORMS = ("json_schema", "regex", "lark", "json_object")


class Message(TypedDict):
    """One thing that was said in a conversation."""

    role: str
    content: str


@dataclass(frozen=True)
class Text:
    """A segment of a prompt given as text. With a ``role`` it is rendered as one turn of the chat template."""

    text: str
    type: str = ""
    role: str = ""


@dataclass(frozen=True)
class Tokens:
    """A segment of a prompt given as token ids."""

    ids: Sequence[int]
    type: str = ""


@dataclass(frozen=True)
class ToolCall:
    """A call of a tool that a model asks for. ``arguments``: the text of a JSON object, unless it was cut off."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatMessage:
    """A message of a chat. ``content``: words, a chunk, or a list of both, in order.

    With a role of "" it is no turn: what it holds stands where it is, outside of the model's chat template.
    """

    role: str
    content: str | ChunkRef | Sequence[str | ChunkRef] = ""
    reasoning: str = ""
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str = ""
    name: str = ""


@dataclass(frozen=True)
class Grammar:
    """What an answer must be, in full unless ``max_tokens`` cuts it off; made by one of the four functions."""

    form: str
    source: str = ""

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str) -> Grammar:
        """JSON that a schema allows: an object of Python, or JSON as text."""
        return cls("json_schema", schema if isinstance(schema, str) else json.dumps(schema))

    @classmethod
    def json_object(cls) -> Grammar:
        """Any JSON object."""
        return cls("json_object")

    @classmethod
    def regex(cls, expression: str) -> Grammar:
        """A text that a regular expression (Rust's syntax, without look-around) matches as a whole."""
        return cls("regex", expression)

    @classmethod
    def lark(cls, grammar: str) -> Grammar:
        """A text that a grammar in llguidance's form of Lark gives, from its rule ``start``."""
        return cls("lark", grammar)
