"""One attempt at a job: found stored, published from the pool, computed behind its context, or busy elsewhere."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import StoreFull
from chunk_store.store import Busy, Stored
from engine.kv.source import KVSource
from engine.plan import Window
from engine.reuse import ReuseMode
from engine.sight import Sight
from prefill_service.jobs.attempt import OTHERS_TURN, BusyFor, EndOf, RoomFor, Wait
from prefill_service.jobs.progress import ChunkMade, JobCancelled, JobProgress
from prefill_service.jobs.resolver import PrefillJob
from serving.errors import Unsupported
from serving.trace.stages import StageTimer
from tests.fakes import LAYOUT
from tests.prefill_service.fake_worker import FakeWorker, held_writes


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.close()


@pytest.fixture
def other(bench: FakeWorker, tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.close()


def counted(progress: JobProgress, job: PrefillJob) -> dict[KVSource, int]:
    return dict(progress.tokens(job))


def test_what_is_missing_is_computed_behind_its_context_and_published(bench: FakeWorker) -> None:
    first = bench.job(5, 6)
    job = bench.job(7, 8, 9, context=(first.chunk_id,))
    wait_s, progress = bench.attempt(job)
    assert wait_s is None and counted(progress, job) == {KVSource.COMPUTED: 5}
    assert [ids for ids, _ in bench.runner.computed] == [(5, 6), (7, 8, 9)]
    behind = bench.runner.computed[1][1]
    assert [(chunk.tokens, chunk.offset) for chunk in behind] == [(2, 0)]
    assert set(progress.misses.values()) == {MissReason.NOT_STORED}
    assert {"lookup", "prefill"} <= progress.timer.spent_ns().keys()
    assert bench.stored(job) == bench.stored(job) is not None


def test_what_is_stored_is_left_alone(bench: FakeWorker) -> None:
    job = bench.job(5, 6)
    bench.attempt(job)
    bench.runner.computed.clear()
    wait_s, progress = bench.attempt(job)
    assert wait_s is None and counted(progress, job) == {KVSource.STORE: 2} and not progress.misses
    assert bench.computer.find_missing(job, JobProgress(StageTimer())) == [] and not bench.runner.computed


def test_what_is_resident_is_published_without_computing(bench: FakeWorker) -> None:
    job = bench.job(5, 6)
    bench.attempt(job)
    content = bench.stored(job)
    bench.store.delete_chunks([job.chunk_id])
    job, bench.runner.computed = bench.job(5, 6), []
    _, progress = bench.attempt(job)
    assert counted(progress, job) == {KVSource.DEVICE: 2} and not bench.runner.computed
    assert bench.stored(job) == content


def test_stored_context_of_a_missing_chunk_is_loaded(bench: FakeWorker, other: FakeWorker) -> None:
    first = bench.job(5, 6)
    bench.attempt(first)
    job = other.job(7, context=(first.chunk_id,))
    _, progress = other.attempt(job)
    assert counted(progress, job) == {KVSource.STORE: 2, KVSource.COMPUTED: 1}
    assert [ids for ids, _ in other.runner.computed] == [(7,)] and "load" in progress.timer.spent_ns()
    chunk = other.residents.find(first.key)
    assert chunk is not None and chunk.ready
    assert other.runner.pool.run_planes(chunk.run, 2)[0][:, 0, 0].tolist() == [5.0, 6.0]


def test_stored_context_that_is_damaged_is_computed_again(bench: FakeWorker, other: FakeWorker, tmp_path: Path) -> None:
    first = bench.job(5, 6)
    bench.attempt(first)
    (path,) = (path for path in tmp_path.glob("data/**/*") if path.is_file())
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    job = other.job(7, context=(first.chunk_id,))
    _, progress = other.attempt(job)
    assert counted(progress, job) == {KVSource.COMPUTED: 3}
    assert progress.misses[0] is MissReason.VERIFY_FAILED and other.stored(job) is not None


def test_what_another_worker_computes_is_waited_for(bench: FakeWorker, other: FakeWorker) -> None:
    job = bench.job(5, 6)
    claim = other.store.begin(job.key)
    assert not isinstance(claim, Busy | Stored)
    with claim:
        wait_s, progress = bench.attempt(job)
        assert isinstance(wait_s, BusyFor) and wait_s.seconds > 0 and not bench.runner.computed and not progress.sources
    wait_s, progress = bench.attempt(job)
    assert wait_s is None and counted(progress, job) == {KVSource.COMPUTED: 2}


@pytest.mark.parametrize(
    ("mode", "computed"),
    [(ReuseMode.EXACT, [(5,)]), (ReuseMode.ANCHORED, [(5,), (7,)]), (ReuseMode.INDEPENDENT, [(5,), (7,)])],
)
def test_what_another_worker_computes_holds_up_what_attends_to_it_alone(
    bench: FakeWorker, other: FakeWorker, mode: ReuseMode, computed: list[tuple[int, ...]]
) -> None:
    job = bench.composition((5,), (6,), (7,), mode=mode)
    claim = other.store.begin(job.chunks[1].key)
    assert not isinstance(claim, Busy | Stored)
    with claim:
        wait, progress = bench.attempt(job)
        assert isinstance(wait, BusyFor) and [ids for ids, _ in bench.runner.computed] == computed
        assert set(progress.sources) == ({0} if mode is ReuseMode.EXACT else {0, 2})
    wait, _ = bench.attempt(job)
    assert wait is None and sorted(ids for ids, _ in bench.runner.computed) == [(5,), (6,), (7,)]


def test_a_long_composition_needs_no_more_pages_at_once_than_its_chunks_attend_to(bench: FakeWorker) -> None:
    contents = [(n, n, n) for n in range(20)]
    assert len(contents) > bench.residents.pool.chunk_pages
    job = bench.composition(*contents, mode=ReuseMode.INDEPENDENT)
    progress = JobProgress(StageTimer())
    wait: Wait | None = OTHERS_TURN
    while wait is not None:
        wait = bench.computer.attempt(job, progress, [])
        assert bench.publisher.flush(30), "what is written gives its pages back"
        bench.idle()
    assert len(bench.runner.computed) == len(contents) and set(progress.sources.values()) == {KVSource.COMPUTED}


def test_between_two_chunks_another_tenant_goes_first(bench: FakeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
    job = bench.composition((5,), (6,), (7,), mode=ReuseMode.EXACT)
    monkeypatch.setattr(bench.device, "others_wait", lambda tenant: True)
    progress = JobProgress(StageTimer())
    with held_writes():
        waits = [bench.computer.attempt(job, progress, []) for _ in range(3)]
    assert waits == [OTHERS_TURN, OTHERS_TURN, None]
    assert [ids for ids, _ in bench.runner.computed] == [(5,), (6,), (7,)], "each once"


def test_what_the_store_does_not_take_is_not_computed_for_nobody(bench: FakeWorker) -> None:
    job = bench.composition((5,), (6,), (7,), mode=ReuseMode.INDEPENDENT)
    told: list[ChunkMade] = []
    progress = JobProgress(StageTimer(), told.append, durable=True)
    progress.refusal = StoreFull("full")
    assert bench.computer.attempt(job, progress, []) is None and not bench.runner.computed
    assert [(made.index, made.durable, made.unpublished) for made in told] == [
        (index, False, progress.refusal) for index in range(3)
    ]
    lent = JobProgress(StageTimer())
    lent.refusal = StoreFull("full")
    assert bench.computer.attempt(job, lent, []) is None and len(bench.runner.computed) == 3


def test_what_another_worker_stored_meanwhile_is_taken_from_it(bench: FakeWorker, other: FakeWorker) -> None:
    """Stored between the look-up and the claim."""
    first = bench.job(5, 6)
    job = bench.job(7, context=(first.chunk_id,))
    missing = JobProgress(StageTimer())
    assert bench.computer.find_missing(job, missing) == [0, 1]
    other.attempt(other.job(5, 6))
    bench.computer.find_missing = lambda *_: [0, 1]
    wait_s, progress = bench.attempt(job)
    assert wait_s is None and counted(progress, job) == {KVSource.STORE: 2, KVSource.COMPUTED: 1}


def test_what_is_on_its_way_into_the_store_is_used_where_it_is(bench: FakeWorker) -> None:
    first = bench.job(5, 6)
    with held_writes():
        progress = JobProgress(StageTimer())
        assert bench.computer.attempt(first, progress, []) is None
        assert not progress.all_stored and bench.store.lookup([first.key]) == [None]
        job = bench.job(7, context=(first.chunk_id,))
        behind = JobProgress(StageTimer())
        assert bench.computer.attempt(job, behind, []) is None
        assert counted(behind, job) == {KVSource.DEVICE: 2, KVSource.COMPUTED: 1}
        assert behind.publishing[0] is progress.publishing[0] and set(behind.misses) == {1}
    bench.idle()
    assert progress.all_stored and behind.all_stored and bench.stored(job) is not None
    assert [ids for ids, _ in bench.runner.computed] == [(5, 6), (7,)]


def test_what_left_the_pool_before_it_was_stored_is_waited_for(bench: FakeWorker) -> None:
    first = bench.job(5, 6)
    with held_writes():
        assert bench.computer.attempt(first, JobProgress(StageTimer()), []) is None
        publishing = bench.publisher.pending(first.key)
        assert publishing is not None
        chunk = bench.residents.find(first.key)
        assert chunk is not None
        bench.residents.let_move(chunk)  # as where KV passes through staging memory
        assert bench.residents.evict(first.key)
        job = bench.job(7, context=(first.chunk_id,))
        with pytest.MonkeyPatch.context() as copying:  # and before it is all there
            copying.setattr(bench.publisher, "in_memory", lambda _: False)
            assert bench.computer.attempt(job, JobProgress(StageTimer()), []) == EndOf(publishing)
        alone = JobProgress(StageTimer())
        assert bench.computer.attempt(first, alone, []) is None, "nobody needs it resident"
        assert alone.publishing == {0: publishing}
        bench.publisher._items[first.key].still = False
    assert bench.publisher.flush(30)
    wait, progress = bench.attempt(job)
    assert wait is None and counted(progress, job) == {KVSource.STORE: 2, KVSource.COMPUTED: 1}


def test_without_room_in_the_queue_nothing_is_claimed_or_computed(tmp_path: Path) -> None:
    nbytes = LAYOUT.nbytes(2)
    bench = FakeWorker(tmp_path, room=nbytes)
    first, second = bench.job(5, 6), bench.job(7, 8)
    with held_writes():
        assert bench.computer.attempt(first, JobProgress(StageTimer()), []) is None
        assert bench.computer.attempt(second, JobProgress(StageTimer()), []) == RoomFor(nbytes)
        assert len(bench.runner.computed) == 1
        claim = bench.store.begin(second.key)
        assert not isinstance(claim, Busy | Stored)
        claim.abort()
        asked = bench.publisher.ask(nbytes)
    places = [asked.result(30)]
    assert bench.computer.attempt(second, JobProgress(StageTimer()), places) is None and not places
    bench.idle()
    assert bench.stored(second) is not None
    bench.close()


def test_a_pool_full_of_what_is_written_is_waited_for(bench: FakeWorker) -> None:
    with held_writes():
        for name in (1, 2):
            assert bench.computer.attempt(bench.job(*[name] * 32), JobProgress(StageTimer()), []) is None
        job = bench.job(*[3] * 32)
        assert isinstance(bench.computer.attempt(job, JobProgress(StageTimer()), []), BusyFor)
    assert bench.publisher.flush(30)
    wait, _ = bench.attempt(job)
    assert wait is None and bench.stored(job) is not None


def test_a_cancelled_job_ends_between_two_chunks(bench: FakeWorker) -> None:
    first = bench.job(5, 6)
    job = bench.job(7, context=(first.chunk_id,))
    progress = JobProgress(StageTimer())
    bench.runner.before = progress.cancelled.set
    with pytest.raises(JobCancelled):
        bench.computer.attempt(job, progress, [])
    bench.idle()
    assert counted(progress, job) == {KVSource.COMPUTED: 2} and bench.stored(first) is not None


def test_a_forward_that_fails_leaves_nothing_held_and_no_claim(bench: FakeWorker, other: FakeWorker) -> None:
    job = bench.job(5, 6)

    def fail() -> None:
        raise RuntimeError("device")

    bench.runner.before = fail
    with pytest.raises(RuntimeError, match="device"):
        bench.computer.attempt(job, JobProgress(StageTimer()), [])
    bench.idle()
    wait_s, _ = other.attempt(job)
    assert wait_s is None and other.stored(job) is not None


def test_context_out_of_sight_is_neither_loaded_nor_held(tmp_path: Path) -> None:
    """Chunks of 8 tokens each, with a window of 10: a chunk's rows see 9 tokens before it, two chunks."""
    contents = [tuple(range(8 * n, 8 * n + 8)) for n in range(8)]
    one, two = (FakeWorker(tmp_path, sight=Sight((Window(10),))) for _ in range(2))
    try:
        job = one.composition(*contents[:6], mode=ReuseMode.EXACT)
        wait, progress = one.attempt(job)
        assert wait is None and counted(progress, job) == {KVSource.COMPUTED: 48}
        assert [ids for ids, _ in one.runner.computed] == contents[:6]
        for index, (_, behind) in enumerate(one.runner.computed):
            seen = [8 * place for place in range(max(0, index - 2), index)]
            assert [(chunk.start, chunk.tokens, chunk.offset) for chunk in behind] == [(at, 8, 0) for at in seen]
        positions = [rows.sequence.position for batch in one.runner.batches for rows in batch]
        assert positions == [8 * index for index in range(6)]
        job = two.composition(*contents[:7], mode=ReuseMode.EXACT)
        _, progress = two.attempt(job)
        assert counted(progress, job) == {KVSource.STORE: 48, KVSource.COMPUTED: 8}
        assert progress.brought == {4, 5} and len(two.residents) == 3
    finally:
        one.close()
        two.close()


def test_a_context_longer_than_the_pool_is_computed_behind_what_is_seen_of_it(tmp_path: Path) -> None:
    """The pool has 64 tokens, four of these chunks."""
    contents = [tuple(range(n, n + 16)) for n in range(12)]
    worker = FakeWorker(tmp_path, sight=Sight((Window(20),)))
    worker.computer.served.context_length_max = 512  # type: ignore[misc]
    try:
        job = worker.composition(*contents, mode=ReuseMode.EXACT)
        asyncio.run(worker.computer.compute(job, JobProgress(StageTimer()), time.monotonic() + 30))
        worker.idle()
        assert [ids for ids, _ in worker.runner.computed] == contents
        assert worker.computer.find_missing(job, JobProgress(StageTimer())) == []
        with pytest.raises(Unsupported, match="needs 18 pages"):
            worker.composition(*contents[:2], tuple(range(40)), mode=ReuseMode.EXACT)
    finally:
        worker.close()
