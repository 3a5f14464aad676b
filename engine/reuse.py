"""Reuse modes: which chunks a chunk's tokens attend to, and what follows for keys, places and masks.

mode          context of chunk i        computed at           offset in the composition
EXACT         chunks 0 .. i-1           their total length    0
ANCHORED      chunk 0 (none for i = 0)  len(chunk 0)          start - len(chunk 0)
INDEPENDENT   none                      0                     start
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

from chunk_store.key import ChunkKey, ModelIdentity, chunk_key
from chunk_store.tenant import SHARED_SALT


class ReuseMode(StrEnum):
    """A choice of context, and nothing else."""

    EXACT = "exact"
    ANCHORED = "anchored"
    INDEPENDENT = "independent"


class Exactness(StrEnum):
    """What the answer equals: plain generation, or generation under the mode's block mask."""

    EXACT_CONTEXT = "exact_context"
    EXACT_BLOCK_MASK = "exact_block_mask"


def context_indices(mode: ReuseMode, index: int) -> range:
    """Which chunks of a composition the tokens of chunk ``index`` attend to besides their own."""
    if mode is ReuseMode.EXACT:
        return range(index)
    if mode is ReuseMode.ANCHORED:
        return range(min(index, 1))
    return range(0)


def exactness(mode: ReuseMode, index: int) -> Exactness:
    """What is exact about chunk ``index``; where mode and EXACT choose the same context they are the same."""
    same = context_indices(mode, index) == range(index)
    return Exactness.EXACT_CONTEXT if same else Exactness.EXACT_BLOCK_MASK


KeyOf = Callable[[int, Sequence[ChunkKey], str], ChunkKey]


@dataclass(frozen=True)
class KeyedChunk:
    """A chunk of a composition under a mode: its KV's key, where it stands, where it was computed.

    ``shared``: it and all that it attends to are shared content, so its KV is everybody's too.
    """

    key: ChunkKey
    token_ids: tuple[int, ...]
    context: tuple[int, ...]  # indices in the composition
    start: int
    computed_start: int
    shared: bool = False

    @property
    def offset(self) -> int:
        return self.start - self.computed_start


def key_composition(
    model: ModelIdentity,
    chunks: Sequence[tuple[int, ...]],
    mode: ReuseMode,
    salt: str = "",
    shared: Sequence[bool] = (),
    key_of: KeyOf | None = None,
) -> list[KeyedChunk]:
    """Keys and places of the chunks of a composition, in order (the query is not among them).

    ``shared`` says which of them are shared content (none without it). KV is salted with ``salt``, unless the chunk
    and its whole context are shared: then it has the same key for every tenant. ``key_of`` gives the key of a chunk, by
    its index, under the keys of its context and a salt, for whoever remembers them: what ``chunk_key`` gives.
    """
    keyed: list[KeyedChunk] = []
    keys: list[ChunkKey] = []
    lengths = [len(token_ids) for token_ids in chunks]
    start = 0
    for index, token_ids in enumerate(chunks):
        context = tuple(context_indices(mode, index))
        everybodys = bool(shared) and shared[index] and all(keyed[i].shared for i in context)
        # A thousand chunks have half a million pairs: ``map`` is what keeps this short.
        before = list(map(keys.__getitem__, context))
        salted = SHARED_SALT if everybodys else salt
        key = key_of(index, before, salted) if key_of else chunk_key(model, before, token_ids, salted)
        computed_start = sum(map(lengths.__getitem__, context))
        keys.append(key)
        keyed.append(KeyedChunk(key, tuple(token_ids), context, start, computed_start, everybodys))
        start += len(token_ids)
    return keyed
