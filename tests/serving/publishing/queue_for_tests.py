"""A publisher over a small pool of the CPU and a real store, with a device thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from prometheus_client import CollectorRegistry

from chunk_store.entry import EntryHeader
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.layout import KVLayout
from chunk_store.open import open_store
from chunk_store.store import Busy, Publication, Stored
from chunk_store.tenant import NO_LIMITS, TenantLimits
from engine.kv.pool import PagedKVPool
from engine.kv.resident import ResidentChunk, ResidentChunks
from serving.publishing.item import Publishing
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.publishing.room import Place
from serving.publishing.staging import Staging
from tests.fakes import LAYOUT, MODEL

TOKENS = 8
NBYTES = LAYOUT.nbytes(TOKENS)
WAIT_S = 30.0


class Gate:
    """Writes that go through stop here until they are let on."""

    def __init__(self) -> None:
        self.entered, self.open = threading.Semaphore(0), threading.Event()


class GatedPublication:
    """A publication whose ``write`` waits at a gate; or raises ``fails``."""

    def __init__(self, publication: Publication, gate: Gate, fails: Exception | None = None) -> None:
        self._publication = publication
        self._gate = gate
        self._fails = fails

    def write(self, header: EntryHeader, buffers: Sequence[memoryview], *, limits: TenantLimits = NO_LIMITS) -> None:
        self._gate.entered.release()
        assert self._gate.open.wait(WAIT_S)
        if self._fails is not None:
            raise self._fails
        self._publication.write(header, buffers, limits=limits)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._publication, name)

    def __enter__(self) -> GatedPublication:
        self._publication.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._publication.__exit__(*error)


class Queue:
    """The parts, and chunks whose bytes say which they are."""

    def __init__(
        self,
        store: Path | str,
        *,
        room: int = 3,
        threads: int = 2,
        staged: int | None = None,
        layout: KVLayout = LAYOUT,
        tokens: int = TOKENS,
        pages: int | None = None,
    ) -> None:
        """``store``: a directory, or a URL. ``pages``: of four tokens; room for eight chunks if nobody says."""
        self.layout, self.tokens = layout, tokens
        self.nbytes = layout.nbytes(tokens)
        self.store = open_store(f"file://{store}" if isinstance(store, Path) else store)
        pages = pages or 8 * -(-tokens // 4)
        self.residents = ResidentChunks(PagedKVPool(layout, pages=pages, chunk_pages=pages, page_size=4))
        self.device = ThreadPoolExecutor(1, thread_name_prefix="device")
        self.registry = CollectorRegistry()
        pool = self.residents.pool
        self.publisher = Publisher(
            self.residents,
            self.store,
            post=self.device.submit,
            nbytes_max=room * self.nbytes,
            threads=threads,
            metrics=PublicationMetrics(self.registry, "tiny"),
            staging=None if staged is None else Staging(staged * self.nbytes, pool.device),
        )
        self.gate = Gate()

    def header(self, name: int) -> EntryHeader:
        key, chunk_id = ChunkKey(f"{name:064x}"), ChunkId(f"{name:064x}")
        return EntryHeader(key, chunk_id, MODEL, self.layout, (name,) * self.tokens, ())

    def compute(self, name: int) -> ResidentChunk:
        """A chunk in the pool that nobody holds, as after an attempt at a job."""

        def run() -> ResidentChunk:
            chunk = self.residents.reserve(self.header(name).key, self.tokens)
            for plane in self.residents.pool.run_planes(chunk.run, self.tokens):
                plane.fill_(float(name))
            chunk.ready = True
            self.residents.release(chunk)
            return chunk

        return self.device.submit(run).result(WAIT_S)

    def claim(self, name: int) -> Publication:
        answer = self.store.begin(self.header(name).key)
        assert not isinstance(answer, Stored | Busy)
        return answer

    def publish(
        self, name: int, *, gated: bool = False, fails: Exception | None = None, asked: Future[Place] | None = None
    ) -> Publishing:
        """Computes a chunk and hands it to the publisher, in the device thread; with room, or what was ``asked``."""
        chunk = self.compute(name)
        place = self.publisher.try_reserve(self.nbytes) if asked is None else asked
        assert place is not None
        claim: Any = self.claim(name)
        if gated or fails is not None:
            claim = GatedPublication(claim, self.gate, fails)
        header, submit = self.header(name), self.publisher.submit
        held = self.publisher.claims.hold(header.key, claim)
        return self.device.submit(submit, place, header, chunk, held).result(WAIT_S)

    def stored(self, name: int) -> list[float] | None:
        """What the store has: the distinct values of its bytes."""
        header = self.header(name)
        target = [bytearray(size) for size in self.layout.plane_nbytes(self.tokens)]
        if self.store.load(header.key, header.token_ids, [memoryview(buffer) for buffer in target]) is not None:
            return None
        return sorted(
            {float(value) for buffer in target for value in torch.frombuffer(buffer, dtype=torch.float32).unique()}
        )

    def idle(self) -> None:
        """Nothing is held, and every page and byte is accounted for."""
        self.device.submit(lambda: None).result(WAIT_S)
        self.residents.check_integrity()
        assert self.residents.held == 0 and self.publisher.room.taken == 0
        assert not self.publisher.all_pending()

    def failures(self, reason: str) -> float | None:
        labels = {"model_name": "tiny", "reason": reason}
        return self.registry.get_sample_value("cairn_publication_failures_total", labels)

    def value(self, name: str) -> float | None:
        return self.registry.get_sample_value(name, {"model_name": "tiny"})

    def close(self) -> None:
        """Ends it all, with nothing left over."""
        self.gate.open.set()
        self.publisher.stop(WAIT_S)
        self.idle()
        self.device.shutdown()
        self.store.close()
