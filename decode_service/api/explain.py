"""What a request would reuse, compute and move, without running it."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from chunk_store.store import ChunkStore
from decode_service.prompt.composition import Composition
from decode_service.sequence import ChunkOutcome
from decode_service.worker import DecodeWorker
from engine.kv.source import KVSource

SNAPSHOT_S = 10.0  # a step, at most, passes before the device thread looks


@dataclass(frozen=True)
class Explanation:
    """Sources as they would be now, miss reasons by index, and bytes."""

    outcomes: tuple[ChunkOutcome, ...]
    missing: dict[int, MissReason]
    cached_tokens: int
    nbytes_to_load: int
    nbytes_to_compute: int
    nbytes_per_step: int
    nbytes_shared: int


def explain(worker: DecodeWorker, store: ChunkStore, composition: Composition, *, bypass: bool = False) -> Explanation:
    """Asks the device thread what is resident and the store what it has.

    Raises ``TimeoutError``, or ``Unavailable`` once the device thread has ended.
    """
    if bypass:
        computed = tuple(ChunkOutcome(KVSource.COMPUTED) for _ in composition.chunks)
        return _weigh(worker, composition, computed, {}, set())
    resident, in_use = _snapshot(worker, composition)
    infos = store.lookup([chunk.key for chunk in composition.chunks])
    model = worker.model
    missing: dict[int, MissReason] = {}
    outcomes: list[ChunkOutcome] = []
    met: set[ChunkKey] = set()
    for index, (chunk, info) in enumerate(zip(composition.chunks, infos, strict=True)):
        if index in resident or chunk.key in met:  # the second time it stands here, it will be resident
            outcomes.append(ChunkOutcome(KVSource.DEVICE))
        elif info is not None:
            outcomes.append(ChunkOutcome(KVSource.STORE))
        else:
            chunk_id = composition.parts[index].chunk_id
            missing[index] = store.miss_reason(chunk.key, chunk_id, model, composition.owner(index))
            outcomes.append(ChunkOutcome(KVSource.COMPUTED))
        met.add(chunk.key)
    return _weigh(worker, composition, tuple(outcomes), missing, in_use)


def _weigh(
    worker: DecodeWorker,
    composition: Composition,
    outcomes: tuple[ChunkOutcome, ...],
    missing: dict[int, MissReason],
    in_use: set[int],
) -> Explanation:
    """Adds up tokens and bytes."""
    layout = worker.residents.pool.layout

    def nbytes(sources: set[KVSource], indices: set[int] | None = None) -> int:
        return sum(
            layout.nbytes(len(chunk.token_ids))
            for index, chunk in enumerate(composition.chunks)
            if outcomes[index].source in sources and (indices is None or index in indices)
        )

    tail = layout.nbytes(len(composition.tail))
    return Explanation(
        outcomes=outcomes,
        missing=missing,
        cached_tokens=sum(composition.visible(i) for i, o in enumerate(outcomes) if o.source is not KVSource.COMPUTED),
        nbytes_to_load=nbytes({KVSource.STORE}),
        nbytes_to_compute=nbytes({KVSource.COMPUTED}) + tail,
        nbytes_per_step=nbytes(set(KVSource)) + tail,
        nbytes_shared=nbytes(set(KVSource), in_use),
    )


def _snapshot(worker: DecodeWorker, composition: Composition) -> tuple[set[int], set[int]]:
    """Indices of the chunks that are resident, and of those that running requests read."""
    resident: set[int] = set()
    in_use: set[int] = set()
    looked = threading.Event()

    def look() -> None:
        for index, keyed in enumerate(composition.chunks):
            chunk = worker.residents.find(keyed.key)
            if chunk is not None:
                resident.add(index)
                if chunk.holders:
                    in_use.add(index)
        looked.set()

    worker.call(look)
    if not looked.wait(SNAPSHOT_S):
        raise TimeoutError("the device thread is busy; try again")
    return resident, in_use
