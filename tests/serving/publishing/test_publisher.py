"""Write-behind: bits, order, what is held meanwhile, failures by reason, a full queue, draining."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chunk_store.errors import QuotaFull, StoreFull, StoreUnavailable
from chunk_store.landing import Buffers
from chunk_store.store import Busy, Stored
from serving.errors import Cancelled, Overloaded, Unavailable
from serving.publishing.item import Publishing
from tests.serving.publishing.queue_for_tests import NBYTES, WAIT_S, Queue


@pytest.fixture(params=[None, 2], ids=["in place", "staged"])
def queue(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Queue]:
    """Both ways out: read where it is, as on a CPU, and through staging memory, as from a device."""
    made = Queue(tmp_path, staged=request.param)
    yield made
    made.close()


def never() -> bool:
    return False


def test_entries_are_written_behind_with_the_bits_of_the_pages(queue: Queue) -> None:
    for name in range(1, 9):
        queue.publisher.reserve(NBYTES, time.monotonic() + WAIT_S, never).give_back()
        info = queue.publish(name)
        info.computed.result(WAIT_S)
        if name % 3 == 0:
            assert info.result(WAIT_S).nbytes == NBYTES
    assert queue.publisher.flush(WAIT_S)
    queue.idle()
    assert [queue.stored(name) for name in range(1, 9)] == [[float(name)] for name in range(1, 9)]
    assert queue.value("cairn_publication_bytes_total") == 8 * NBYTES
    assert queue.value("cairn_publication_seconds_count") == 8
    assert queue.value("cairn_publication_queue_bytes") == 0


def test_while_it_is_written_its_key_is_pending_and_its_bytes_count(queue: Queue) -> None:
    future = queue.publish(1, gated=True)
    key, chunk_id = queue.header(1).key, queue.header(1).chunk_id
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    assert queue.publisher.pending(key) is future and queue.publisher.pending(queue.header(2).key) is None
    assert queue.publisher.pending_of(chunk_id, queue.header(1).tenant) == [future]
    assert queue.value("cairn_publication_queue_bytes") == NBYTES
    assert isinstance(queue.store.begin(key), Busy) and queue.store.lookup([key]) == [None]
    assert not future.cancel()
    queue.gate.open.set()
    assert future.result(WAIT_S).key == key
    assert queue.publisher.pending(key) is None and isinstance(queue.store.begin(key), Stored)


def test_pages_are_held_where_they_are_until_they_are_read(tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    future = queue.publish(1, gated=True)
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    chunk = queue.residents.find(queue.header(1).key)
    assert chunk is not None and (chunk.holders, chunk.still) == (1, 1)
    assert not queue.residents.evict(chunk.key)
    queue.gate.open.set()
    future.result(WAIT_S)
    queue.idle()
    assert queue.residents.evict(chunk.key)
    queue.close()


def test_staged_pages_may_go_before_the_entry_is_written(tmp_path: Path) -> None:
    queue = Queue(tmp_path, staged=2)
    future = queue.publish(1, gated=True)
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    queue.device.submit(lambda: None).result(WAIT_S)
    chunk = queue.residents.find(queue.header(1).key)
    assert chunk is not None and chunk.holders == 0 and queue.residents.evict(chunk.key)
    queue.compute(2)  # over the same pages
    queue.gate.open.set()
    future.result(WAIT_S)
    assert queue.stored(1) == [1.0]
    queue.close()


@pytest.mark.parametrize(
    "error, reason",
    [
        (StoreFull("full"), "store_full"),
        (QuotaFull("quota"), "quota_full"),
        (StoreUnavailable("gone"), "store_unavailable"),
        (RuntimeError("ours"), "internal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_failure_costs_durability_alone_and_is_counted_by_reason(
    queue: Queue, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    queue.gate.open.set()
    future = queue.publish(1, fails=error)
    assert future.exception(WAIT_S) is error and future.computed.exception(WAIT_S) is None
    assert queue.failures(reason) == 1 and "is not stored" in caplog.text
    queue.idle()
    claim = queue.claim(1)  # at once: nobody waits for a claim to run out
    claim.abort()
    assert queue.residents.find(queue.header(1).key) is not None
    assert queue.publish(2).result(WAIT_S) and queue.stored(2) == [2.0]


def test_a_full_queue_holds_back_who_would_compute_more(queue: Queue) -> None:
    futures = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    assert queue.publisher.try_reserve(NBYTES) is None
    with pytest.raises(Overloaded, match="wait to be written") as full:
        queue.publisher.reserve(NBYTES, time.monotonic() + 0.05, never)
    assert full.value.retry_after_s
    gone = threading.Event()
    gone.set()
    with pytest.raises(Cancelled):
        queue.publisher.reserve(NBYTES, time.monotonic() + WAIT_S, gone.is_set)
    asked = queue.publisher.ask(NBYTES)
    queue.gate.open.set()
    asked.result(WAIT_S).give_back()
    for future in futures:
        future.result(WAIT_S)
    assert queue.value("cairn_publication_wait_seconds_count") == 3


def test_stopping_writes_out_what_is_queued(queue: Queue) -> None:
    futures = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    threading.Timer(0.1, queue.gate.open.set).start()
    assert queue.publisher.stop(WAIT_S)
    assert all(future.done() for future in futures)
    assert [queue.stored(name) for name in (1, 2, 3)] == [[1.0], [2.0], [3.0]]
    with pytest.raises(Unavailable, match="shutting down"):
        queue.publisher.try_reserve(NBYTES)


def test_who_waits_for_room_is_told_of_the_end(queue: Queue) -> None:
    for name in (1, 2, 3):
        queue.publish(name, gated=True)
    asked = queue.publisher.ask(NBYTES)
    queue.gate.open.set()
    queue.publisher.stop(WAIT_S)
    outcome = asked.exception(WAIT_S)
    if outcome is None:  # room had come before
        asked.result().give_back()
    else:
        assert isinstance(outcome, Unavailable)


def test_draining_has_an_end_and_what_is_dropped_is_claimed_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(tmp_path, threads=1)
    monkeypatch.setattr("serving.publishing.publisher.STOP_S", 0.2)
    futures = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    assert not queue.publisher.stop(0.1)
    assert not futures[0].done(), "what is being written is not cut"
    queue.gate.open.set()
    assert futures[0].result(WAIT_S)
    for future in futures[1:]:
        assert isinstance(future.exception(WAIT_S), Unavailable)
    queue.idle()
    assert queue.failures("shutdown") == 2
    assert [queue.stored(name) for name in (1, 2, 3)] == [[1.0], None, None]
    queue.claim(2).abort()
    queue.device.shutdown()
    queue.store.close()


def waiting(queue: Queue, *names: int) -> list[Publishing]:
    """Hands on computed chunks that have no room yet."""
    futures = []
    for name in names:
        asked = queue.publisher.ask_behind(NBYTES)
        assert asked is not None and not asked.done()
        futures.append(queue.publish(name, gated=True, asked=asked))
    return futures


def test_what_is_computed_waits_for_room_in_the_pool_and_is_read_where_it_is_then(queue: Queue) -> None:
    first = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    behind = waiting(queue, 4, 5, 6)
    assert queue.publisher.ask_behind(NBYTES) is None, "what waits is bounded, too"
    assert all(each.computed.result(WAIT_S) is None and not each.done() for each in behind)
    assert queue.publisher.pending(queue.header(5).key) is behind[1]

    def move() -> int:
        """Chunk 4 leaves the pool, and those behind it move down over its place."""
        assert queue.residents.evict(queue.header(4).key)
        queue.residents._compact()
        return queue.residents.moves

    assert queue.device.submit(move).result(WAIT_S) >= 1
    queue.gate.open.set()
    assert all(each.result(WAIT_S) for each in (*first, *behind[1:]))
    assert isinstance(behind[0].exception(WAIT_S), Overloaded)
    assert [queue.stored(name) for name in range(1, 7)] == [[1.0], [2.0], [3.0], None, [5.0], [6.0]]
    assert queue.failures("queue_full") == 1 and len(queue.publisher.claims) == 0


def test_what_leaves_the_pool_before_there_is_room_is_claimed_no_more(queue: Queue) -> None:
    """At once, however long the queue stands: another process may be about to compute it, too."""
    first = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    gone, behind = waiting(queue, 4, 5)
    assert queue.device.submit(queue.residents.evict, queue.header(4).key).result(WAIT_S)
    assert isinstance(gone.exception(WAIT_S), Overloaded) and queue.publisher.room.waiting == NBYTES
    queue.claim(4).abort()
    queue.gate.open.set()
    assert all(each.result(WAIT_S) for each in (*first, behind))


def test_what_waits_for_room_in_the_pool_is_written_out_at_the_end(queue: Queue) -> None:
    futures = [queue.publish(name, gated=True) for name in (1, 2, 3)] + waiting(queue, 4, 5)
    threading.Timer(0.1, queue.gate.open.set).start()
    assert queue.publisher.stop(WAIT_S) and all(each.result(0) for each in futures)


def test_what_waits_for_room_when_the_time_to_drain_is_over_is_claimed_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = Queue(tmp_path, threads=1)
    monkeypatch.setattr("serving.publishing.publisher.STOP_S", 0.2)
    for name in (1, 2, 3):
        queue.publish(name, gated=True)
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    (behind,) = waiting(queue, 4)
    assert not queue.publisher.stop(0.1)
    assert isinstance(behind.exception(WAIT_S), Unavailable)
    queue.claim(4).abort()
    queue.gate.open.set()
    assert queue.publisher.flush(WAIT_S)
    queue.idle()
    queue.device.shutdown()
    queue.store.close()


def test_what_is_written_can_be_read_from_where_it_is(tmp_path: Path) -> None:
    """Its pages may have new owners by then."""
    queue = Queue(tmp_path, staged=2)
    future = queue.publish(1, gated=True)
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    queue.device.submit(lambda: None).result(WAIT_S)
    assert queue.device.submit(queue.residents.evict, queue.header(1).key).result(WAIT_S)
    queue.compute(2)  # over the same pages
    target = [bytearray(size) for size in queue.layout.plane_nbytes(queue.tokens)]
    landing = Buffers([memoryview(each) for each in target])
    assert queue.publisher.read(queue.header(1).key, landing) and not queue.publisher.read(queue.header(2).key, landing)
    assert {value for each in target for value in memoryview(each).cast("f")} == {1.0}
    queue.gate.open.set()
    future.result(WAIT_S)
    assert not queue.publisher.read(queue.header(1).key, landing)
    queue.close()
