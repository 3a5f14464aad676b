"""A prefill worker without a model: real store, pool and resolver; the runner writes token ids."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from chunk_store.open import open_store
from chunk_store.publication import SharedPublication
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode
from engine.sight import EVERYTHING, Sight
from prefill_service.jobs.attempt import LoadOf, Wait
from prefill_service.jobs.own_pool import OwnPool
from prefill_service.jobs.progress import JobProgress
from prefill_service.jobs.resolver import ChunkRequest, CompositionRequest, PrefillJob, Resolver
from prefill_service.worker import DeviceThread
from serving.publishing.metrics import PublicationMetrics
from serving.publishing.publisher import Publisher
from serving.publishing.staging import Staging
from serving.trace.stages import StageTimer
from tests.fakes import FakeRunner, FakeServed, codec, small_pool


class FakeWorker:
    """A computer over a store; two of them on one root are two workers."""

    def __init__(
        self, root: Path, *, room: int | None = None, sight: Sight = EVERYTHING, staged: int | None = None
    ) -> None:
        served, pool = FakeServed(sight=sight), small_pool()
        self.store = open_store(f"file://{root}")
        self.resolver = Resolver(self.store, served, codec(), pool)  # type: ignore[arg-type]
        self.runner = FakeRunner(pool)
        self.residents = ResidentChunks(pool)
        self.device = DeviceThread()
        self.registry = CollectorRegistry()
        self.publisher = Publisher(
            self.residents,
            self.store,
            post=self.device.post,
            nbytes_max=room or 2**20,
            threads=2,
            metrics=PublicationMetrics(self.registry, "tiny"),
            staging=None if staged is None else Staging(staged, pool.device),
        )
        self.computer = OwnPool(
            served,  # type: ignore[arg-type]
            self.runner,
            self.residents,
            self.store,
            self.device,
            self.publisher,
        )

    def job(self, *ids: int, context: tuple[str, ...] = (), mode: ReuseMode = ReuseMode.EXACT) -> PrefillJob:
        return self.resolver.register(ChunkRequest(token_ids=ids, context=context, mode=mode), StageTimer())

    def composition(self, *contents: tuple[int, ...], mode: ReuseMode, salt: str = "") -> PrefillJob:
        """A job for all chunks of a composition."""
        ids = [self.resolver.register(ChunkRequest(token_ids=each, salt=salt), StageTimer()) for each in contents]
        request = CompositionRequest(tuple(job.chunk_id for job in ids), tuple(range(len(ids))), mode, salt)
        return self.resolver.compose(request, StageTimer())

    def attempt(self, job: PrefillJob) -> tuple[Wait | None, JobProgress]:
        """One attempt, and what it handed to the publisher is stored."""
        progress = JobProgress(StageTimer())
        wait = self.computer.attempt(job, progress, [])
        if isinstance(wait, LoadOf):
            asyncio.run(self.computer.compute(job, progress, time.monotonic() + 30))
            wait = None
        self.idle()
        return wait, progress

    def idle(self) -> None:
        """Nothing is on its way or held, and every page is accounted for."""
        assert self.publisher.flush(30)
        with suppress(RuntimeError):  # the thread has ended
            self.device._thread.submit(lambda: None).result(30)
        self.residents.check_integrity()
        assert self.residents.held == 0 and self.publisher.room.taken == 0

    def loads_idle(self) -> None:
        """What was being read is read, and nothing is held."""
        for _, reading in list(self.computer.loads._begun.values()):
            wait([reading], 30)
        self.idle()

    def close(self) -> None:
        self.publisher.stop(30)
        self.device.close()
        self.store.close()

    def forget_pool(self) -> None:
        for index in list(self.residents._chunks):
            assert self.residents.evict(index)

    def stored(self, job: PrefillJob) -> bytes | None:
        tokens = job.chunks[-1].token_ids
        layout = self.computer.served.layout
        target = [memoryview(bytearray(size)) for size in layout.plane_nbytes(len(tokens))]
        return None if self.store.load(job.key, tokens, target) else b"".join(target)


@contextmanager
def held_writes() -> Iterator[None]:
    """Publications that begin to write inside the block go on behind it."""
    go_on = threading.Event()
    write = SharedPublication.write

    def waiting(self: SharedPublication, *args: Any, **named: Any) -> None:
        assert go_on.wait(30)
        write(self, *args, **named)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(SharedPublication, "write", waiting)
        try:
            yield
        finally:
            go_on.set()
