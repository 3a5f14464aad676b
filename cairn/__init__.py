"""Cairn's client: register chunks, compose them, stream an answer, and see what was reused.

with cairn.Client(prefill="127.0.0.1:50071", decode="127.0.0.1:50072") as client:
    document = client.prefill("The harbour of Tarn opened in 1911.", name="tarn")
    for delta in client.generate([document, "When did the harbour open?"]):
        print(delta.text, end="")
"""

from cairn.client.answers import Delta, Explanation, Kept, PromptLogprob, Result, ToolCallDelta
from cairn.client.async_client import AsyncClient
from cairn.client.chunks import Chunk, ChunkRef, Deleted, StoredChunk, StoreStats
from cairn.client.client import Client
from cairn.client.conversation import AsyncConversation, Conversation, Turn
from cairn.client.errors import (
    CairnError,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    Mismatch,
    NotFound,
    Overloaded,
    ServerError,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from cairn.client.generation import AsyncGeneration, Generation
from cairn.client.loads import Loads, ModeSupport, Replica
from cairn.client.prompt import ChatMessage, Grammar, Message, Text, Tokens, ToolCall
from cairn.client.reports import ChatReport, ReuseReport, SegmentReport, Timings, Usage

__all__ = [
    "AsyncClient",
    "AsyncConversation",
    "AsyncGeneration",
    "CairnError",
    "Cancelled",
    "ChatMessage",
    "ChatReport",
    "Chunk",
    "ChunkRef",
    "Client",
    "Conflict",
    "Conversation",
    "DeadlineExceeded",
    "Deleted",
    "Delta",
    "Explanation",
    "Generation",
    "Grammar",
    "InvalidRequest",
    "Kept",
    "Loads",
    "Message",
    "Mismatch",
    "ModeSupport",
    "NotFound",
    "Overloaded",
    "PromptLogprob",
    "Replica",
    "Result",
    "ReuseReport",
    "SegmentReport",
    "ServerError",
    "StoreStats",
    "StoredChunk",
    "Text",
    "Timings",
    "Tokens",
    "ToolCall",
    "ToolCallDelta",
    "Turn",
    "Unauthorized",
    "Unavailable",
    "Unsupported",
    "Usage",
]
