"""From a request's segments to a composition: token ids, keys, places and limits; no protobuf, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import TYPE_CHECKING

from chunk_store.key import ChunkId, ChunkKey, ChunkType, chunk_key
from chunk_store.tenant import DEFAULT_TENANT, SHARED_TENANT, Tenant, tenant_of
from decode_service.prompt.chat_prompt import ChatPrompt
from decode_service.prompt.memory import KeyMemory
from decode_service.prompt.order import ChunkOrder
from decode_service.prompt.request_chunk import RequestChunk, Segment
from engine.reuse import Exactness, ReuseMode, exactness, key_composition
from serving.errors import InvalidRequest
from serving.resolving import check_vocabulary

if TYPE_CHECKING:  # a request's prompt is plain values; only its making asks a model
    from engine.served import ServedModel


@dataclass(frozen=True, eq=False)
class Composition:
    """One request's prompt, of a tenant.

    ``query`` follows the ``chunks``; it is None if the last chunk is the query (a full hit).
    ``tail`` holds the tokens that are computed for this request alone. On a full hit that is the last token of the
    last chunk, which is not read from the pool then. ``order``: what the caller asked for; the chunks stand in it.
    ``chat``: how a chat became it.
    """

    chunks: tuple[RequestChunk, ...]
    query: Segment | None
    mode: ReuseMode
    tail: tuple[int, ...]
    tenant: Tenant = DEFAULT_TENANT
    order: ChunkOrder = ChunkOrder.GIVEN
    chat: ChatPrompt | None = None

    @cached_property
    def segments(self) -> list[Segment]:
        """All of the prompt, in order."""
        return [*(chunk.segment for chunk in self.chunks), *([] if self.query is None else [self.query])]

    @property
    def reordered(self) -> bool:
        """Whether the chunks stand in another order than they were given in."""
        return any(chunk.given_index != chunk.index for chunk in self.chunks)

    @property
    def context(self) -> list[Segment]:
        """The segments before the query."""
        return self.segments[:-1]

    @cached_property
    def prompt_tokens(self) -> int:
        return sum(len(segment.token_ids) for segment in self.segments)

    def token_ids(self) -> list[int]:
        """The whole prompt."""
        return [token for segment in self.segments for token in segment.token_ids]

    def again(self) -> Composition:
        """The same prompt for another sequence, which has its own account of the chunks."""
        return replace(self, chunks=tuple(replace(chunk) for chunk in self.chunks))

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The global position of each chunk's first token."""
        return tuple(accumulate((len(chunk.token_ids) for chunk in self.chunks[:-1]), initial=0))[: len(self.chunks)]

    @property
    def tail_start(self) -> int:
        """The global position of the first tail token."""
        return self.prompt_tokens - len(self.tail)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the prompt whose KV is reused."""
        return sum(chunk.cached_tokens for chunk in self.chunks)

    def exactness(self, chunk: RequestChunk) -> Exactness:
        """Of one of its chunks; a query sees everything in every mode."""
        return exactness(self.mode, chunk.index)


def compose(
    served: ServedModel,
    given: Sequence[Segment],
    mode: ReuseMode,
    salt: str,
    memory: KeyMemory | None = None,
    order: Sequence[int] | None = None,
) -> Composition:
    """Keys the segments of a request; the last is the query. ``order``: their indices as they are to stand.

    A query named by its chunk id has KV under its EXACT context and is reused there; in the other modes no
    key covers what it saw, so it is computed. ``memory`` is the served model's, of what such requests worked out
    before; chunk ids must then be those of their content. Raises ``InvalidRequest`` naming the segment and the remedy.
    """
    _check_tokens(served, given, tenant_of(salt), memory)
    segments = given if order is None else [given[index] for index in order]
    asked = ChunkOrder.GIVEN if order is None else ChunkOrder.CANONICAL
    tenant, query = tenant_of(salt), segments[-1]
    full_hit = mode is ReuseMode.EXACT and query.named_by_id
    cached = segments if full_hit else segments[:-1]
    shared = [segment.shared for segment in cached]

    def key_of(index: int, context: Sequence[ChunkKey], salted: str) -> ChunkKey:
        make = partial(chunk_key, served.identity, context, cached[index].token_ids, salted)
        return memory.key(cached[index].chunk_id, context, salted, make) if memory else make()

    contents = [segment.token_ids for segment in cached]
    keyed = key_composition(served.identity, contents, mode, salt, shared, key_of)
    chunks = tuple(
        RequestChunk(
            index=index,
            segment=segment,
            key=key.key,
            context=key.context,
            offset=key.offset,
            tenant=SHARED_TENANT if key.shared else tenant,
            visible=len(segment.token_ids) - (full_hit and index == len(cached) - 1),
            given=None if order is None else order[index],
        )
        for index, (segment, key) in enumerate(zip(cached, keyed, strict=True))
    )
    if full_hit:
        return Composition(chunks, None, mode, query.token_ids[-1:], tenant, asked)
    return Composition(chunks, query, mode, query.token_ids, tenant, asked)


def compose_turn(
    served: ServedModel, before: Composition, turn: Segment, salt: str, memory: KeyMemory | None = None
) -> Composition:
    """The chunks before the query of ``before``, and ``turn`` behind them, with the keys that requests give them later.

    It has no query and no tail: its chunks are all that can be asked of it.
    """
    following = Segment(ChunkId(""), ChunkType.QUERY, turn.token_ids[:1])
    composition = compose(served, [*before.context, turn, following], before.mode, salt, memory)
    return replace(composition, query=None, tail=())


def _check_tokens(served: ServedModel, segments: Sequence[Segment], tenant: Tenant, memory: KeyMemory | None) -> None:
    if not segments:
        raise InvalidRequest("at least one is needed; the last is the query", field="segments")
    for index, segment in enumerate(segments):
        field = f"segments[{index}]"
        if not segment.token_ids and index == len(segments) - 1:
            raise InvalidRequest("the query is empty", field=field, remedy="it needs at least one token")
        if not segment.token_ids:
            raise InvalidRequest("it is empty", field=field)
        if memory is None or not segment.chunk_id:
            largest = max(segment.token_ids)
        else:
            largest = memory.largest(segment.chunk_id, SHARED_TENANT if segment.shared else tenant, segment.token_ids)
        check_vocabulary(largest, field, served.vocabulary)


def answer_tokens(served: ServedModel, composition: Composition, max_tokens: int | None, default: int) -> int:
    """How many tokens the answer may have. Raises ``InvalidRequest`` if prompt and answer exceed the model's limit.

    An unset ``max_tokens`` takes ``default`` or what is left; a set one is never shortened silently.
    """
    limit, prompt = served.limit(composition.mode), composition.prompt_tokens
    room = limit.tokens - prompt
    if room < 1:
        raise InvalidRequest(
            f"{prompt} prompt tokens leave no room for an answer in the model's context, limited to {limit}",
            field="segments" if composition.chat is None else "chat.messages",
            remedy="use fewer or shorter chunks" if composition.chat is None else "leave the oldest messages out",
        )
    if max_tokens is None:
        return min(default, room)
    if max_tokens > room:
        raise InvalidRequest(
            f"{max_tokens} with {prompt} prompt tokens exceeds the model's context",
            field="sampling.max_tokens",
            remedy=f"at most {room} are left (limited to {limit})",
        )
    return max_tokens
