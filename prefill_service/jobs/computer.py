"""What jobs ask of whoever computes chunks: a device of its own (``own_pool.py``), or one that others use, too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from chunk_store.key import ChunkId, ChunkKey
from chunk_store.store import ChunkStore
from chunk_store.tenant import Tenant
from engine.kv.source import KVSource
from engine.served import ServedModel
from prefill_service.jobs.progress import JobProgress
from prefill_service.jobs.resolver import PrefillJob
from serving.publishing.item import Publishing
from serving.publishing.publisher import Publisher


class ChunkComputer(Protocol):
    """Makes KV of one model, and hands it to a publisher."""

    @property
    def served(self) -> ServedModel:
        """The model that computes."""

    def find_missing(self, job: PrefillJob, progress: JobProgress) -> list[int]:
        """Which needed chunks are not stored, with the reasons noted. Any thread may ask."""

    async def compute(self, job: PrefillJob, progress: JobProgress, deadline: float) -> None:
        """Returns when every needed chunk is stored, or launched and ``progress.publishing``.

        What it has to wait for before (another worker, room in the queue or the pool) it awaits until ``deadline``
        (monotonic seconds), which each chunk that comes puts off. Raises ``JobCancelled``, ``RequestError``,
        ``PoolFull`` and what stores raise. Cancelled, it ends when no thread works for the job any more.
        """

    def publishing_of(self, chunk_id: ChunkId, tenant: Tenant) -> Sequence[Publishing]:
        """The publications of a tenant's chunk that are under way here."""

    async def evict(self, keys: Sequence[ChunkKey], tenant: Tenant) -> None:
        """Drops chunks from the pool where nobody holds them."""

    async def stop(self) -> None:
        """Writes out what is computed, within its time, and ends its threads."""


def find_missing(
    store: ChunkStore, publisher: Publisher, served: ServedModel, job: PrefillJob, progress: JobProgress
) -> list[int]:
    """Which needed chunks are not stored, with the reasons noted. Any thread may ask."""
    with progress.timer.stage("lookup"):
        found = store.lookup([job.chunks[index].key for index in job.needed])
        missing = [index for index, info in zip(job.needed, found, strict=True) if info is None]
        for index in missing:
            key, name = job.chunks[index].key, job.chunk_ids[index]
            if index not in progress.misses and publisher.pending(key) is None:
                progress.misses[index] = store.miss_reason(key, name, served.identity, job.owner(index))
    for index in set(job.needed) - set(missing):
        progress.sources.setdefault(index, KVSource.STORE)
        progress.stored(index)
    return missing
