"""From a request's parts to a composition: token ids, keys, places and limits; no protobuf, no tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chunk_store.key import ChunkId, ChunkType
from chunk_store.tenant import DEFAULT_TENANT, SHARED_TENANT, Tenant, tenant_of
from engine.reuse import Exactness, KeyedChunk, ReuseMode, exactness, key_composition
from engine.served import ServedModel


@dataclass(frozen=True)
class Part:
    """One segment with its tokens. ``chunk_id`` is "" for an inline query; ``shared`` if it is everybody's content."""

    chunk_id: ChunkId
    type: ChunkType
    token_ids: tuple[int, ...]
    name: str = ""
    named_by_id: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Composition:
    """A tenant's prompt.

    ``chunks[i]`` is the keyed form of ``parts[i]``; the parts behind the last chunk, if any, are the query.
    ``tail`` holds the tokens that are computed for this request alone. On a full hit the tail is the last
    token of the last chunk, of which ``visible(i)`` then leaves out one token.
    """

    parts: tuple[Part, ...]
    mode: ReuseMode
    chunks: tuple[KeyedChunk, ...]
    tail: tuple[int, ...]
    tenant: Tenant = DEFAULT_TENANT

    def owner(self, index: int) -> Tenant:
        """Whose KV that of chunk ``index`` is."""
        return SHARED_TENANT if self.chunks[index].shared else self.tenant

    @property
    def prompt_tokens(self) -> int:
        return sum(len(part.token_ids) for part in self.parts)

    def token_ids(self) -> list[int]:
        """The whole prompt."""
        return [token for part in self.parts for token in part.token_ids]

    @property
    def full_hit(self) -> bool:
        """Whether the query itself is a chunk with KV of its own, so that only its last token is computed."""
        return len(self.chunks) == len(self.parts)

    @property
    def tail_start(self) -> int:
        """The global position of the first tail token."""
        return self.prompt_tokens - len(self.tail)

    def visible(self, index: int) -> int:
        """Tokens of chunk ``index`` that are read from the pool."""
        tokens = len(self.chunks[index].token_ids)
        return tokens - 1 if self.full_hit and index == len(self.chunks) - 1 else tokens

    def exactness(self, index: int) -> Exactness:
        """Of part ``index``; the query sees everything in every mode."""
        return exactness(self.mode, index) if index < len(self.chunks) else Exactness.EXACT_CONTEXT


def compose(served: ServedModel, parts: Sequence[Part], mode: ReuseMode, salt: str) -> Composition:
    """Keys the parts of a request; the last is the query.

    A query named by its chunk id has KV under its EXACT context and is reused there; in the other modes no
    key covers what it saw, so it is computed. Raises ``ValueError`` naming the segment and the remedy.
    """
    if not parts:
        raise ValueError("segments: at least one is needed; the last is the query")
    for index, part in enumerate(parts):
        if not part.token_ids:
            what = "the query is empty; it needs at least one token" if index == len(parts) - 1 else "it is empty"
            raise ValueError(f"segments[{index}]: {what}")
        too_large = max(part.token_ids)
        if too_large >= served.vocabulary:
            raise ValueError(
                f"segments[{index}]: token id {too_large} is outside the model's vocabulary of {served.vocabulary}"
            )
    reuse_query = mode is ReuseMode.EXACT and parts[-1].named_by_id
    cached = parts if reuse_query else parts[:-1]
    shared = [part.shared for part in cached]
    chunks = key_composition(served.identity, [part.token_ids for part in cached], mode, salt, shared)
    tail = parts[-1].token_ids[-1:] if reuse_query else parts[-1].token_ids
    return Composition(tuple(parts), mode, tuple(chunks), tail, tenant_of(salt))


def answer_tokens(served: ServedModel, composition: Composition, max_tokens: int | None, default: int) -> int:
    """How many tokens the answer may have. Raises ``ValueError`` if prompt and answer exceed the model's limit.

    An unset ``max_tokens`` takes ``default`` or what is left; a set one is never shortened silently.
    """
    limit, prompt = served.limit(composition.mode), composition.prompt_tokens
    room = limit.tokens - prompt
    if room < 1:
        raise ValueError(
            f"segments: {prompt} prompt tokens leave no room for an answer in the model's context, limited to {limit}; "
            "use fewer or shorter chunks"
        )
    if max_tokens is None:
        return min(default, room)
    if max_tokens > room:
        raise ValueError(
            f"sampling.max_tokens: {max_tokens} with {prompt} prompt tokens exceeds the model's context; at most "
            f"{room} are left (limited to {limit})"
        )
    return max_tokens
