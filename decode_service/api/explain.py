"""What a request would reuse, compute and move, without running it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from chunk_store.key import ChunkKey
from chunk_store.store import ChunkStore
from decode_service.device.worker import DecodeWorker
from decode_service.prompt.composition import Composition
from decode_service.prompt.request_chunk import ChunkOutcome, RequestChunk
from engine.kv.source import KVSource

SNAPSHOT_S = 10.0  # a step, at most, passes before the device thread looks


@dataclass(frozen=True)
class Explanation:
    """What a request would move, in bytes."""

    nbytes_to_load: int
    nbytes_to_compute: int
    nbytes_per_step: int
    nbytes_shared: int


def explain(worker: DecodeWorker, store: ChunkStore, composition: Composition, *, bypass: bool = False) -> Explanation:
    """Notes in each chunk of ``composition`` where its KV would come from now, and adds up what that costs.

    Asks the device thread what is resident and the store what it has. Raises ``TimeoutError``, or ``Unavailable`` once
    the device thread has ended.
    """
    if bypass:
        for chunk in composition.chunks:
            chunk.outcome = ChunkOutcome(KVSource.COMPUTED)
        return _weigh(worker, composition, set())
    resident, in_use = _snapshot(worker, composition)
    infos = store.lookup([chunk.key for chunk in composition.chunks])
    met: set[ChunkKey] = set()
    for chunk, info in zip(composition.chunks, infos, strict=True):
        if chunk in resident or chunk.key in met:  # the second time it stands here, it will be resident
            chunk.outcome = ChunkOutcome(KVSource.DEVICE)
        elif info is not None:
            chunk.outcome = ChunkOutcome(KVSource.STORE)
        else:
            missing = store.miss_reason(chunk.key, chunk.segment.chunk_id, worker.model, chunk.tenant)
            chunk.outcome = ChunkOutcome(KVSource.COMPUTED, missing)
        met.add(chunk.key)
    return _weigh(worker, composition, in_use)


def _weigh(worker: DecodeWorker, composition: Composition, in_use: set[RequestChunk]) -> Explanation:
    """Adds up bytes."""
    layout = worker.runner.pool.layout
    nbytes = {chunk: layout.nbytes(len(chunk.token_ids)) for chunk in composition.chunks}

    def nbytes_from(source: KVSource) -> int:
        return sum(size for chunk, size in nbytes.items() if chunk.outcome and chunk.outcome.source is source)

    tail = layout.nbytes(len(composition.tail))
    prompt = composition.prompt_tokens
    first = worker.sight.first(prompt - 1)
    return Explanation(
        nbytes_to_load=nbytes_from(KVSource.STORE),
        nbytes_to_compute=nbytes_from(KVSource.COMPUTED) + tail,
        nbytes_per_step=layout.nbytes(prompt - first),
        nbytes_shared=sum(
            layout.nbytes(max(0, start + len(chunk.token_ids) - max(start, first)))
            for start, chunk in zip(composition.starts, composition.chunks, strict=True)
            if chunk in in_use
        ),
    )


def _snapshot(worker: DecodeWorker, composition: Composition) -> tuple[set[RequestChunk], set[RequestChunk]]:
    """The chunks that are resident, and of those the ones that running requests read."""
    resident: set[RequestChunk] = set()
    in_use: set[RequestChunk] = set()
    looked = threading.Event()

    def look() -> None:
        for chunk in composition.chunks:
            found = worker.residents.find(chunk.key)
            if found is not None:
                resident.add(chunk)
                if found.holders:
                    in_use.add(chunk)
        looked.set()

    worker.call(look)
    if not looked.wait(SNAPSHOT_S):
        raise TimeoutError("the device thread is busy; try again")
    return resident, in_use
