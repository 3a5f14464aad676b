"""What a request that keeps its turn leaves in the pool: the KV of its query and its answer, as that of one chunk.

    tail    query | answer .......... |        pages of the sequence, which go back when it ends
              |  copied on the device, by the device thread
    run     query | answer .......... |        without a name: how much of the answer counts is not known yet
              |  named by whoever answers the request, once its end is settled (a stop string ends it earlier)
    chunk   query | answer ...|                resident, under the key that the next request looks for

A query and its answer are one part of the attention of the answer's rows, as the tokens of one chunk are; so where a
chunk's rows have the bits of a tail's (``Keep.copies``), what was written is what a prefill of that chunk would write.

All of this runs in the device thread.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from chunk_store.key import ChunkId, ChunkKey
from engine.kv.resident import PoolFull, ResidentChunk, ResidentChunks

if TYPE_CHECKING:  # it is part of a sequence
    from decode_service.scheduling.sequence import Sequence


class KeptKV(StrEnum):
    """What there is of a kept turn's KV when its answer is over."""

    RESIDENT = "resident"
    COMPUTING = "computing"
    NONE = "none"


class NotKept(StrEnum):
    """Why a turn is not registered, or its KV not kept."""

    POOL_FULL = "pool_full"
    QUEUE_FULL = "queue_full"
    STORE_FULL = "store_full"
    STORE_UNAVAILABLE = "store_unavailable"


@dataclass(frozen=True)
class Kept:
    """What became of a turn. ``query``: its token ids, which those of the answer follow."""

    chunk_id: ChunkId
    query: tuple[int, ...]
    registered: bool
    kv: KeptKV
    why: NotKept | None = None


@dataclass(eq=False)
class Keep:
    """That a request keeps its turn, and what its tail has become.

    ``copies``: whether a chunk of so many tokens has the bits of a tail. ``left`` is held by nobody but this.
    """

    copies: Callable[[int], bool]
    left: ResidentChunk | None = None
    pool_full: bool = False
    forgotten: bool = False  # nobody waits for the answer any more


def leave(residents: ResidentChunks, sequence: Sequence) -> None:
    """A sequence ends that keeps its turn: its tail is copied while its pages are its own, if there is room.

    Not the tail of a full hit: all but the last token of its query lies in a chunk, and was read as one.
    """
    keep, composition = sequence.keep, sequence.composition
    if keep is None or keep.forgotten or not sequence.generated or composition.query is None:
        return
    if sequence.pages_gone or not sequence.tail_pages:  # given back, or up: the turn is computed as a chunk, as such
        return
    tokens = min(sequence.tail_tokens, len(composition.tail) + len(sequence.generated))
    if not keep.copies(tokens):
        return
    try:
        keep.left = residents.reserve(ChunkKey(f"kept:{uuid.uuid4()}"), tokens)
    except PoolFull:
        keep.pool_full = True
        return
    residents.pool.copy_tail(sequence.tail_pages, keep.left.run, tokens)


def name(residents: ResidentChunks, keep: Keep, key: ChunkKey, tokens: int) -> ResidentChunk | None:
    """What was left becomes the chunk of a key, ready and still held; None where that key is here already."""
    chunk, keep.left = keep.left, None
    if chunk is None:
        return None
    if residents.find(key) is not None:
        residents.release(chunk)
        return None
    residents.rename(chunk, key, tokens)
    chunk.ready = True
    return chunk


def forget(residents: ResidentChunks, keep: Keep) -> None:
    """Nobody waits for the answer: what was left goes, and nothing is left any more. Harmless after ``name``."""
    keep.forgotten = True
    chunk, keep.left = keep.left, None
    if chunk is not None:
        residents.release(chunk)
