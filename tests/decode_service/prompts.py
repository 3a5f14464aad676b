"""Compositions and requests for unit tests: plain values, no worker."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from chunk_store.entry import MissReason
from chunk_store.key import ChunkId, ChunkType, chunk_id
from decode_service.prompt.composition import Composition, compose
from decode_service.prompt.request_chunk import ChunkOutcome, Segment, Unpublished
from engine.kv.source import KVSource
from engine.reuse import ReuseMode
from serving.trace.stages import StageClock
from tests.fakes import FakeServed, codec

MS = 1_000_000


def segment(*ids: int, query: bool = False, by_id: bool = False, shared: bool = False, name: str = "") -> Segment:
    kind = ChunkType.QUERY if query else ChunkType.CONTEXT
    named = ChunkId("") if query and not by_id else chunk_id(codec().identity, kind, ids)
    return Segment(named, kind, ids, name, named_by_id=by_id, shared=shared)


def composed(
    *chunks: Sequence[int],
    query: Sequence[int] = (9,),
    mode: ReuseMode = ReuseMode.EXACT,
    salt: str = "",
    query_by_id: bool = False,
) -> Composition:
    served: Any = FakeServed()
    segments = [segment(*ids, name=f"n{index}") for index, ids in enumerate(chunks)]
    return compose(served, [*segments, segment(*query, query=True, by_id=query_by_id)], mode, salt)


def answered(*, first_token: bool = True) -> Any:
    """A request of chunks of 2, 3 and 4 tokens and a query of 1: from the pool, the store and computed.

    It arrived at 1 ms, was submitted at 2, admitted at 5, filled at 9, had its first token at 12 and its last at 20.
    """
    composition = composed((1, 1), (2, 2, 2), (3, 3, 3, 3), mode=ReuseMode.ANCHORED)
    outcomes = (
        ChunkOutcome(KVSource.DEVICE),
        ChunkOutcome(KVSource.STORE),
        ChunkOutcome(KVSource.COMPUTED, MissReason.EVICTED, Unpublished.STORE_FULL),
    )
    for chunk, outcome in zip(composition.chunks, outcomes, strict=True):
        chunk.outcome, chunk.level = outcome, chunk.index
    clock = StageClock(MS, 2 * MS, 5 * MS, 9 * MS, 12 * MS if first_token else 0, 20 * MS)
    return SimpleNamespace(
        request_id="r-1",
        composition=composition,
        clock=clock,
        generated=[7, 7, 7] if first_token else [],
        tail_level=2,
        answer=0,
    )
