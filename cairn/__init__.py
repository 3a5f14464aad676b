"""Cairn's client: register chunks, compose them, stream an answer, and see what was reused.

with cairn.Client(prefill="127.0.0.1:50071", decode="127.0.0.1:50072") as client:
    document = client.prefill("The harbour of Tarn opened in 1911.", name="tarn")
    for delta in client.generate([document, "When did the harbour open?"]):
        print(delta.text, end="")
"""

from cairn.client.async_client import AsyncClient
from cairn.client.client import Client
from cairn.client.conversation import AsyncConversation, Conversation, Turn
from cairn.client.errors import (
    CairnError,
    Cancelled,
    Conflict,
    DeadlineExceeded,
    InvalidRequest,
    NotFound,
    Overloaded,
    ServerError,
    Unauthorized,
    Unavailable,
    Unsupported,
)
from cairn.client.generation import AsyncGeneration, Generation
from cairn.client.types import (
    ChatMessage,
    ChatReport,
    Chunk,
    ChunkRef,
    Deleted,
    Delta,
    Explanation,
    Grammar,
    Kept,
    Loads,
    Message,
    ModeSupport,
    PromptLogprob,
    Replica,
    Result,
    ReuseReport,
    SegmentReport,
    StoredChunk,
    StoreStats,
    Text,
    Timings,
    Tokens,
    ToolCall,
    ToolCallDelta,
    Usage,
)

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
