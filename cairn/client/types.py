"""What goes into a client and what comes out: frozen dataclasses that know no protobuf.

Enumerations are their lower-case names (``"context"``, ``"exact"``, ``"store"``); an empty string means
unspecified. Durations are seconds, sizes are bytes, points in time are Unix seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict

CHUNK_TYPES = ("system_prompt", "context", "code", "rag_result", "query", "turn")
REUSE_MODES = ("exact", "anchored", "independent")
CACHE_USES = ("shared", "bypass")
CHUNK_ORDERS = ("given", "canonical")
GRAMMAR_FORMS = ("json_schema", "regex", "lark", "json_object")
LIST_ORDERS = ("created", "last_used", "name")


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
class ChunkRef:
    """A registered chunk, named by its id."""

    id: str


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


@dataclass(frozen=True)
class Timings:
    """Seconds that each stage of a request took, by the service's clock; 0 where a stage did not happen."""

    queue_s: float = 0.0
    tokenize_s: float = 0.0
    lookup_s: float = 0.0
    prefill_s: float = 0.0
    publish_s: float = 0.0
    load_s: float = 0.0
    forward_s: float = 0.0
    first_token_s: float = 0.0
    decode_s: float = 0.0
    total_s: float = 0.0


@dataclass(frozen=True)
class Chunk(ChunkRef):
    """What ``prefill`` did. ``outcome`` is ``"computed"`` or ``"already_stored"``; the token counts include
    context that had to be computed or was found. ``durable``: the KV is in the store now; else it is being written."""

    key: str
    tokens: int
    outcome: str
    computed_tokens: int
    reused_tokens: int
    timings: Timings
    name: str = ""
    type: str = ""
    newly_registered: bool = False
    model_identity: str = ""
    durable: bool = True


@dataclass(frozen=True)
class StoredChunk(ChunkRef):
    """A registered chunk as the prefill service lists it. ``expires_unix_s`` None: it has no TTL."""

    type: str
    name: str
    tags: tuple[str, ...]
    tokens: int
    pinned: bool
    created_unix_s: float
    last_used_unix_s: float
    expires_unix_s: float | None
    kv_entries: int
    kv_bytes: int
    token_ids: tuple[int, ...] = ()
    text: str = ""
    shared: bool = False  # published for every tenant


@dataclass(frozen=True)
class Deleted:
    """What deleting a chunk freed."""

    kv_entries: int
    kv_bytes: int


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
class Usage:
    """Token counts; ``prompt_tokens = cached_tokens + computed_tokens``."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class SegmentReport:
    """Where the KV of one segment of the prompt came from. ``offset`` is where it stands minus where it was
    computed, in tokens; ``miss_reason`` is empty for a hit. ``unpublished`` says why KV that was computed did not go
    to the store (``"store_full"``, ``"store_unavailable"``), empty otherwise. ``given_index`` is its place among the
    segments that were sent."""

    chunk_id: str
    name: str
    type: str
    tokens: int
    cached_tokens: int
    source: str
    level: int
    offset: int
    exactness: str
    miss_reason: str
    unpublished: str = ""
    given_index: int = 0


@dataclass(frozen=True)
class ReuseReport:
    """What was reused, segment by segment, and how exact the answer is: the weakest of the segments.

    The segments stand in the order in which they were used; ``reordered``: that is not the one they were sent in.
    """

    reuse_mode: str
    exactness: str
    segments: tuple[SegmentReport, ...]
    order: str = ""
    reordered: bool = False


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
class ChatReport:
    """How a chat became chunks: into how many ``pieces`` its rendering was cut, how many answers stand as they were
    generated (``turns_kept``), and why earlier ones were rendered anew (``rendered_again``, "" if none was).

    ``tool_calls_broken``: something began like a tool call and did not end as one; what is in no call is in the text.
    """

    pieces: int
    turns_kept: int
    rendered_again: str
    tool_calls_broken: bool = False


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


@dataclass(frozen=True)
class StoreStats:
    """What the chunk store holds and how much it may hold (0: no limit)."""

    backend: str
    chunks: int
    chunks_max: int
    kv_entries: int
    kv_bytes: int
    capacity_bytes: int
    pinned_entries: int
    leased_entries: int
    evictions: int
    quarantined: int
    model_identity: str
    model_name: str


@dataclass(frozen=True)
class ModeSupport:
    """Whether the decode service's model allows a reuse mode, up to which context, and if not, why."""

    mode: str
    supported: bool
    reason: str
    context_length_max: int = 0


@dataclass(frozen=True)
class Loads:
    """How busy the decode service is now, and what its model is.

    Of several services that a client is given, numbers are the sums of all that answer, contexts those that all of them
    take, and ``replicas`` has each of them.
    """

    running: int
    waiting: int
    waiting_max: int
    batch_max: int
    pages_total: int
    pages_free: int
    pages_chunks: int
    pages_tails: int
    chunks_resident: int
    page_size: int
    model_name: str
    model_identity: str
    context_length_max: int
    context_length_declared: int
    context_length_reason: str
    modes: tuple[ModeSupport, ...] = field(default=())
    dtype: str = ""
    dtype_reason: str = ""
    attention: str = ""
    attention_reason: str = ""
    same_bits: bool = False
    same_bits_reason: str = ""
    tokenizer_identity: str = ""
    steps: int = 0
    step_bytes_read: int = 0
    step_bytes_flat: int = 0
    replicas: tuple[Replica, ...] = field(default=())


@dataclass(frozen=True)
class Replica:
    """One of several decode services. ``state``: ``"up"``, ``"away"`` (takes no requests: starts, shuts down, cannot be
    reached), ``"hangs"``, ``"differs"`` (another model: it is given nothing), ``"unknown"``; and ``why``. ``loads`` is
    what it said of itself, None if it did not."""

    address: str
    state: str
    why: str
    loads: Loads | None
