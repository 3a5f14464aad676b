"""Claims of what waits to be written: kept alive behind a slow store, and what is done about one that is lost."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from chunk_store.errors import ClaimLost, StoreUnavailable
from chunk_store.key import ChunkKey
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.store import Busy, Publication, Stored
from serving.store.heartbeat import EVERY_S, TTL_S
from tests.serving.publishing.queue_for_tests import WAIT_S, Queue

MANY = 40


class Clock:
    """The time by which claims run out."""

    def __init__(self) -> None:
        self.now = 1e9

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in ("claims", "upkeep"):
        monkeypatch.setattr(f"chunk_store.local.{module}.time", SimpleNamespace(time=made.time))
    return made


@pytest.fixture
def queue(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> Iterator[Queue]:
    """One thread writes, and the first write stops at the gate: all others wait. Renewals are the test's."""
    caplog.set_level(logging.WARNING)
    made = Queue(tmp_path, room=MANY, threads=1, pages=2 * MANY)
    made.publisher.claims.stop()
    yield made
    made.close()


@pytest.fixture
def other(queue: Queue, tmp_path: Path) -> Iterator[SharedStore]:
    """Another process's."""
    made = open_store(f"file://{tmp_path}")
    yield made
    made.close()


def take(store: SharedStore, key: ChunkKey) -> Publication:
    answer = store.begin(key)
    assert not isinstance(answer, Stored | Busy)
    return answer


def publish(store: SharedStore, queue: Queue, name: int, publication: Publication) -> None:
    planes = [memoryview(bytes(size)) for size in queue.layout.plane_nbytes(queue.tokens)]
    with publication:
        publication.write(queue.header(name), planes)
        publication.commit()


def test_claims_of_a_long_queue_outlive_a_store_that_takes_its_time(
    queue: Queue, other: SharedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Each step of the ledger takes seconds, and what has expired is swept between any two of them."""
    futures = [queue.publish(name, gated=True) for name in range(1, MANY + 1)]
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    renew, swept = queue.store.ledger.claims.renew, []

    def slow(held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        clock.now += 2.0
        swept.append(other.sweep().claims)
        return renew(held, ttl_s)

    monkeypatch.setattr(queue.store.ledger.claims, "renew", slow)
    for _ in range(4 * int(TTL_S / EVERY_S)):
        clock.now += EVERY_S
        queue.publisher.claims.renew()
    assert len(swept) == 4 * int(TTL_S / EVERY_S) and not any(swept)
    assert all(isinstance(other.begin(queue.header(name).key), Busy) for name in range(1, MANY + 1))
    queue.gate.open.set()
    assert [future.result(WAIT_S).key for future in futures] == [queue.header(n).key for n in range(1, MANY + 1)]
    assert len(queue.publisher.claims) == 0 and caplog.text == ""


def test_a_publication_that_ends_while_others_are_renewed_is_no_news(
    queue: Queue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    futures = [queue.publish(name, gated=True) for name in range(1, 6)]
    commit = queue.store.ledger.claims.commit

    def and_renew(*given: Any) -> Any:
        answer = commit(*given)
        queue.publisher.claims.renew()
        return answer

    monkeypatch.setattr(queue.store.ledger.claims, "commit", and_renew)
    queue.gate.open.set()
    assert all(future.result(WAIT_S) for future in futures) and caplog.text == ""


def test_a_claim_that_was_swept_is_taken_again_before_anybody_else_computes(
    queue: Queue, other: SharedStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (queue.publish(name, gated=True) for name in (1, 2))
    assert queue.gate.entered.acquire(timeout=WAIT_S)
    clock.now += TTL_S + 1
    assert other.sweep().claims == 2
    queue.publisher.claims.renew()
    assert isinstance(other.begin(queue.header(2).key), Busy)
    clock.now += TTL_S - 1
    queue.publisher.claims.renew()
    clock.now += 2
    assert other.sweep().claims == 0, "the new claim is renewed, too"
    queue.gate.open.set()
    assert first.result(WAIT_S) and second.result(WAIT_S), "the one that was being written is claimed and written anew"
    assert [queue.stored(name) for name in (1, 2)] == [[1.0], [2.0]]
    assert caplog.text.count("was lost, and is taken again") == 1
    assert len(list(queue.store.blobs.names())) == 2 and queue.failures("claim_lost") == 0


def test_what_another_process_has_stored_meanwhile_is_not_written(
    queue: Queue, other: SharedStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    queue.publish(1, gated=True)
    future = queue.publish(2)
    key = queue.header(2).key
    clock.now += TTL_S + 1
    theirs = take(other, key)
    for _ in range(3):
        queue.publisher.claims.renew()
    assert caplog.text.count("another process has it") == 1, "it is told once"
    publish(other, queue, 2, theirs)
    queue.gate.open.set()
    assert future.result(WAIT_S) == other.lookup([key])[0]
    assert queue.stored(2) == [0.0] and queue.failures("claim_lost") == 0


def test_what_another_process_is_about_to_store_is_left_to_it(
    queue: Queue, other: SharedStore, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    queue.publish(1, gated=True)
    left, died = queue.publish(2), queue.publish(3)
    clock.now += TTL_S + 1
    theirs, gone = (take(other, queue.header(name).key) for name in (2, 3))
    queue.publisher.claims.renew()
    gone.abort()  # it has died before it was done: then it is ours
    queue.gate.open.set()
    with pytest.raises(ClaimLost, match="another process"):
        left.result(WAIT_S)
    assert died.result(WAIT_S) and queue.stored(3) == [3.0] and queue.failures("claim_lost") == 1
    publish(other, queue, 2, theirs)
    queue.idle()


def test_a_claim_that_is_lost_while_it_is_written_is_taken_again_once(
    queue: Queue, other: SharedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, losses = queue.store.blobs.write, [1, 1, 1]

    def lose(*given: Any) -> None:
        write(*given)
        if losses:
            losses.pop()
            clock.now += TTL_S + 1
            other.sweep()

    monkeypatch.setattr(queue.store.blobs, "write", lose)
    with pytest.raises(ClaimLost):
        queue.publish(1).result(WAIT_S)
    assert len(losses) == 1, "twice, and no more"
    assert queue.publish(2).result(WAIT_S) and queue.stored(2) == [2.0]
    assert len(list(queue.store.blobs.names())) == 1 and len(queue.publisher.claims) == 0


def test_a_store_that_closes_meanwhile_ends_what_waits(queue: Queue, caplog: pytest.LogCaptureFixture) -> None:
    futures = [queue.publish(name, gated=True) for name in (1, 2, 3)]
    queue.store.close()
    queue.publisher.claims.renew()
    assert caplog.text == ""
    queue.gate.open.set()
    assert all(isinstance(future.exception(WAIT_S), StoreUnavailable) for future in futures)
    assert len(queue.publisher.claims) == 0


def test_a_claim_that_is_given_up_is_not_taken_again(queue: Queue, other: SharedStore, clock: Clock) -> None:
    key = queue.header(1).key
    held = queue.publisher.claims.hold(key, queue.claim(1))
    clock.now += TTL_S + 1
    other.sweep()
    held.end()
    held.end()
    held.take_again()
    take(other, key).abort()


def test_many_that_are_lost_do_not_keep_the_others_from_being_renewed(
    queue: Queue, other: SharedStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store that lost all claims and is slow: some are taken again at each renewal, not all in one."""
    held = [queue.publisher.claims.hold(queue.header(name).key, queue.claim(name)) for name in range(1, 8)]
    clock.now += TTL_S + 1
    assert other.sweep().claims == 7
    now = [0.0]
    monkeypatch.setattr("serving.publishing.held.time", SimpleNamespace(monotonic=lambda: now[0]))
    begin, begun = queue.store.begin, []

    def slow(key: ChunkKey, *, ttl_s: float) -> Any:
        now[0] += 0.4 * EVERY_S
        begun.append(key)
        return begin(key, ttl_s=ttl_s)

    monkeypatch.setattr(queue.store, "begin", slow)
    for most in (3, 6, 7, 7):
        queue.publisher.claims.renew()
        assert len(begun) == most
    for claim in held:
        claim.end()
