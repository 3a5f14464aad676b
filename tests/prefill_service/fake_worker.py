"""A prefill worker without a model: real store, pool and resolver; the runner writes token ids."""

from __future__ import annotations

from pathlib import Path

from chunk_store.open import open_store
from engine.kv.resident import ResidentChunks
from engine.reuse import ReuseMode
from prefill_service.jobs.computer import ChunkComputer, JobProgress
from prefill_service.jobs.resolver import ChunkRequest, PrefillJob, Resolver
from serving.trace.stages import StageTimer
from tests.fakes import FakeRunner, FakeServed, codec, small_pool


class FakeWorker:
    """A computer over a store; two of them on one root are two workers."""

    def __init__(self, root: Path) -> None:
        served, pool = FakeServed(), small_pool()
        self.store = open_store(f"file://{root}")
        self.resolver = Resolver(self.store, served, codec(), pool)  # type: ignore[arg-type]
        self.runner = FakeRunner(pool)
        self.residents = ResidentChunks(pool)
        self.computer = ChunkComputer(served, self.runner, self.residents, self.store)  # type: ignore[arg-type]

    def job(self, *ids: int, context: tuple[str, ...] = (), mode: ReuseMode = ReuseMode.EXACT) -> PrefillJob:
        return self.resolver.register(ChunkRequest(token_ids=ids, context=context, mode=mode), StageTimer())

    def attempt(self, job: PrefillJob) -> tuple[float | None, JobProgress]:
        progress = JobProgress(StageTimer())
        wait_s = self.computer.attempt(job, progress)
        self.idle()
        return wait_s, progress

    def idle(self) -> None:
        self.residents.check_integrity()
        assert self.residents.held == 0

    def forget_pool(self) -> None:
        for index in list(self.residents._chunks):
            assert self.residents.evict(index)

    def stored(self, job: PrefillJob) -> bytes | None:
        tokens = job.chunks[-1].token_ids
        layout = self.computer.served.layout
        target = [memoryview(bytearray(size)) for size in layout.plane_nbytes(len(tokens))]
        return None if self.store.load(job.key, tokens, target) else b"".join(target)
