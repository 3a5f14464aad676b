"""Stored context is read beside the steps: others compute meanwhile, pages stay while they are written."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from engine.kv.source import KVSource
from prefill_service.jobs.progress import JobProgress
from serving.errors import Unavailable
from serving.trace.stages import StageTimer
from tests.prefill_service.fake_worker import FakeWorker


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FakeWorker]:
    """A worker whose store has the KV of chunk (5, 6), and whose pool does not."""
    with_it = FakeWorker(tmp_path)
    with_it.attempt(with_it.job(5, 6))
    with_it.close()
    made = FakeWorker(tmp_path)
    yield made
    made.loads_idle()
    made.close()


@contextmanager
def held_reads(bench: FakeWorker) -> Iterator[threading.Event]:
    """Entries that are read inside the block are read behind it; the event tells that one was begun."""
    begun, go_on, land = threading.Event(), threading.Event(), bench.store.land

    def waiting(*args: Any) -> Any:
        begun.set()
        assert go_on.wait(30)
        return land(*args)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench.store, "land", waiting)
        try:
            yield begun
        finally:
            go_on.set()


async def compute(bench: FakeWorker, *ids: int, context: tuple[str, ...] = (), within_s: float = 20.0) -> JobProgress:
    progress = JobProgress(StageTimer())
    await bench.computer.compute(bench.job(*ids, context=context), progress, time.monotonic() + within_s)
    return progress


def test_others_compute_while_a_chunk_is_read(bench: FakeWorker) -> None:
    async def body() -> None:
        first = bench.job(5, 6)
        with held_reads(bench) as begun:
            behind = asyncio.create_task(compute(bench, 7, context=(first.chunk_id,)))
            assert await asyncio.to_thread(begun.wait, 30)
            also = asyncio.create_task(compute(bench, 8, context=(first.chunk_id,)))
            await compute(bench, 1, 1)
            assert [ids for ids, _ in bench.runner.computed] == [(1, 1)]
            chunk = bench.residents.find(first.key)
            assert chunk is not None and chunk.holders and not chunk.ready
        assert (await behind).sources == {0: KVSource.STORE, 1: KVSource.COMPUTED}
        assert (await also).sources == {0: KVSource.STORE, 1: KVSource.COMPUTED}

    asyncio.run(asyncio.wait_for(body(), 60))


def test_who_goes_away_leaves_the_pages_until_they_are_read(bench: FakeWorker) -> None:
    async def body() -> None:
        first = bench.job(5, 6)
        with held_reads(bench) as begun:
            behind = asyncio.create_task(compute(bench, 7, context=(first.chunk_id,)))
            assert await asyncio.to_thread(begun.wait, 30)
            behind.cancel()
            with pytest.raises(asyncio.CancelledError):
                await behind
            chunk = bench.residents.find(first.key)
            assert chunk is not None and chunk.holders, "a file is still read into them"
            with pytest.raises(Unavailable, match="has not given"):
                await compute(bench, 7, context=(first.chunk_id,), within_s=0.05)

    asyncio.run(asyncio.wait_for(body(), 60))
    bench.loads_idle()
    chunk = bench.residents.find(bench.job(5, 6).key)
    assert chunk is not None and chunk.ready and chunk.holders == 0


def test_what_cannot_be_read_is_computed_by_who_needs_it(bench: FakeWorker, tmp_path: Path) -> None:
    (path,) = (path for path in tmp_path.glob("data/**/*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    progress = asyncio.run(compute(bench, 7, context=(bench.job(5, 6).chunk_id,)))
    assert progress.sources == {0: KVSource.COMPUTED, 1: KVSource.COMPUTED} and progress.unreadable == {0}
