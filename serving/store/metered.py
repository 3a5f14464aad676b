"""A chunk store with a meter at its door: what is read and written, how long it takes and how reads end."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram

from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.key import ChunkKey
from chunk_store.landing import Landing
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Claim, Publication, Stored
from chunk_store.tenant import NO_LIMITS, TenantLimits
from serving.trace.buckets import SHORT_SECONDS_BUCKETS

READ = "ok"
WRITE_OUTCOMES = ("ok", "failed")


class StoreMeter:
    """Counters of one process's reads and writes. Every outcome is there from the start."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"cairn_store_{name}", text, ["model_name", *labels], registry=registry)

        def seconds(name: str, text: str) -> Histogram:
            name = f"cairn_store_{name}_seconds"
            return Histogram(name, text, ["model_name"], registry=registry, buckets=SHORT_SECONDS_BUCKETS)

        self._reads = counter("reads", "Entries read, by how it ended: ok or why not.", "outcome")
        self._writes = counter("writes", "Entries written, by how it ended.", "outcome")
        self._read_bytes = counter("read_bytes", "Bytes of KV read and verified.").labels(model_name)
        self._written_bytes = counter("written_bytes", "Bytes of KV written and committed.").labels(model_name)
        self._read_seconds = seconds("read", "Reading and verifying one entry.").labels(model_name)
        self._write_seconds = seconds("write", "Writing and committing one entry.").labels(model_name)
        self._model = model_name
        for outcome in (READ, *(reason.value for reason in MissReason)):
            self._reads.labels(model_name, outcome)
        for outcome in WRITE_OUTCOMES:
            self._writes.labels(model_name, outcome)

    def read(self, reason: MissReason | None, nbytes: int, seconds: float) -> None:
        self._reads.labels(self._model, READ if reason is None else reason.value).inc()
        self._read_seconds.observe(seconds)
        if reason is None:
            self._read_bytes.inc(nbytes)

    def written(self, nbytes: int, seconds: float) -> None:
        self._writes.labels(self._model, "ok").inc()
        self._written_bytes.inc(nbytes)
        self._write_seconds.observe(seconds)

    def write_failed(self) -> None:
        self._writes.labels(self._model, "failed").inc()


class MeteredStore(SharedStore):
    """``store`` with its loads and publications metered; nothing else is different."""

    def __init__(self, store: SharedStore, meter: StoreMeter) -> None:
        super().__init__(store.ledger, store.blobs)
        self._meter = meter

    def land(self, key: ChunkKey, token_ids: Sequence[int], landing: Landing) -> MissReason | None:
        began = time.perf_counter()
        reason = super().land(key, token_ids, landing)
        self._meter.read(reason, sum(landing.sizes), time.perf_counter() - began)
        return reason

    def begin(self, key: ChunkKey, *, ttl_s: float = 30.0) -> Publication | Stored | Busy:
        answer = super().begin(key, ttl_s=ttl_s)
        return answer if isinstance(answer, Stored | Busy) else MeteredPublication(answer, self._meter)


class MeteredPublication:
    """A publication that tells the meter how its write ended; see ``Publication``."""

    def __init__(self, publication: Publication, meter: StoreMeter) -> None:
        self._publication = publication
        self._meter = meter
        self._nbytes = 0
        self._seconds = 0.0

    @property
    def claim(self) -> Claim | None:
        return self._publication.claim

    def renew(self) -> None:
        self._publication.renew()

    def write(self, header: EntryHeader, buffers: Sequence[memoryview], *, limits: TenantLimits = NO_LIMITS) -> None:
        began = time.perf_counter()
        try:
            self._publication.write(header, buffers, limits=limits)
        except Exception:
            self._meter.write_failed()
            raise
        self._nbytes, self._seconds = header.nbytes, time.perf_counter() - began

    def commit(self) -> EntryInfo:
        began = time.perf_counter()
        try:
            info = self._publication.commit()
        except Exception:
            self._meter.write_failed()
            raise
        self._meter.written(self._nbytes, self._seconds + time.perf_counter() - began)
        return info

    def abort(self) -> None:
        self._publication.abort()

    def __enter__(self) -> Self:
        self._publication.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._publication.__exit__(kind, error, trace)
