"""One attempt at a job: found stored, published from the pool, computed behind its context, or busy elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import ClaimLost
from chunk_store.store import Busy, Stored
from engine.kv.source import KVSource
from prefill_service.jobs.computer import CLAIM_LOST_RETRY_S, JobCancelled, JobProgress
from prefill_service.jobs.resolver import PrefillJob
from serving.trace.stages import StageTimer
from tests.prefill_service.fake_worker import FakeWorker


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.store.close()


@pytest.fixture
def other(bench: FakeWorker, tmp_path: Path) -> Iterator[FakeWorker]:
    made = FakeWorker(tmp_path)
    yield made
    made.store.close()


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
    assert {"lookup", "prefill", "publish"} <= progress.timer.spent_ns().keys()
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
        assert wait_s is not None and wait_s > 0 and not bench.runner.computed and not progress.sources
    wait_s, progress = bench.attempt(job)
    assert wait_s is None and counted(progress, job) == {KVSource.COMPUTED: 2}


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


def test_a_lost_claim_is_tried_again_soon_and_nothing_is_computed_twice(
    bench: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = bench.job(5, 6)

    def lost(*_: object, **__: object) -> None:
        raise ClaimLost("taken")

    with monkeypatch.context() as patched:
        patched.setattr("prefill_service.jobs.computer._Attempt._write", lost)
        wait_s, _ = bench.attempt(job)
    assert wait_s == CLAIM_LOST_RETRY_S and len(bench.runner.computed) == 1
    progress = JobProgress(StageTimer(), sources={0: KVSource.COMPUTED})
    assert bench.computer.attempt(job, progress) is None
    assert counted(progress, job) == {KVSource.COMPUTED: 2}, "what this job computed stays computed"
    assert len(bench.runner.computed) == 1


def test_a_cancelled_job_ends_between_two_chunks(bench: FakeWorker) -> None:
    first = bench.job(5, 6)
    job = bench.job(7, context=(first.chunk_id,))
    progress = JobProgress(StageTimer())
    bench.runner.before = progress.cancelled.set
    with pytest.raises(JobCancelled):
        bench.computer.attempt(job, progress)
    bench.idle()
    assert counted(progress, job) == {KVSource.COMPUTED: 2} and bench.stored(first) is not None


def test_a_forward_that_fails_leaves_nothing_held_and_no_claim(bench: FakeWorker, other: FakeWorker) -> None:
    job = bench.job(5, 6)

    def fail() -> None:
        raise RuntimeError("device")

    bench.runner.before = fail
    with pytest.raises(RuntimeError, match="device"):
        bench.computer.attempt(job, JobProgress(StageTimer()))
    bench.idle()
    wait_s, _ = other.attempt(job)
    assert wait_s is None and other.stored(job) is not None
