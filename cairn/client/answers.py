"""What comes of a request: pieces of an answer, the whole of it, or what it would take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from cairn.client.chunks import ChunkRef
from cairn.client.prompt import ToolCall
from cairn.client.reports import ChatReport, ReuseReport, Timings, Usage

TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]  # tokens and log-probabilities, the likeliest first


@dataclass(frozen=True)
class ToolCallDelta:
    """More of the tool call number ``index``: ``id`` and ``name`` come once, ``arguments`` are appended."""

    index: int
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    """What a stream brings at once. ``text`` may be empty while a character's bytes are incomplete.

    ``reasoning`` and ``tool_calls`` come in chats that are parsed; ``text`` has the rest.
    ``token_bytes``: with log-probabilities, the bytes of every token that has one here.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()
    index: int = 0  # of the answer, with ``n``
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptLogprob:
    """Of one token of the prompt, under the tokens that it could attend to; None if nothing stands before it there.

    ``top``: the likeliest tokens at its place, if they were asked for.
    """

    token_id: int
    logprob: float | None
    top: TopLogprobs = ()


@dataclass(frozen=True)
class Kept(ChunkRef):
    """A turn that was kept: its query and its answer are the chunk ``id``, to be named behind the same chunks.

    ``kv`` is ``"resident"`` (as it was written while the answer was generated), ``"computing"`` (behind, where only
    that gives the same bits) or ``"none"`` (when a request needs it), with the ``reason``. One that is not
    ``registered`` is sent as token ids, ``query_token_ids`` and those of the answer, with the type ``"turn"``.
    """

    registered: bool
    kv: str
    reason: str
    query_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """A finished generation. ``finish_reason`` is ``"stop"``, ``"length"``, ``"abort"`` or ``"tool_calls"``.

    ``top_logprobs``: of each generated token the likeliest at its place, if they were asked for. ``kept``: the turn as
    a chunk, if that was asked for and something was generated. ``index``: which of ``n`` answers it is; the prompt's
    tokens are counted in the first one's ``usage``. ``chat``: of a chat, how it became chunks. ``token_bytes``: with
    log-probabilities, the bytes of every token that has one. ``preemptions``: how often it gave up its pages for
    others and went on later, with the same tokens.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    usage: Usage
    reuse: ReuseReport
    timings: Timings
    seed: int
    model_name: str
    top_logprobs: tuple[TopLogprobs, ...] = ()
    kept: Kept | None = None
    index: int = 0
    prompt_logprobs: tuple[PromptLogprob, ...] = ()
    chat: ChatReport | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    token_bytes: Mapping[int, bytes] = field(default_factory=dict)
    preemptions: int = 0


@dataclass(frozen=True)
class Explanation:
    """What a request would reuse, compute and move, without running it; of a chat, how it would become chunks."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    reuse: ReuseReport
    bytes_to_load: int
    bytes_to_compute: int
    bytes_read_per_step: int
    bytes_shared_per_step: int
    chat: ChatReport | None = None
