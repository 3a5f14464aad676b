"""The Redis store proved by crashing it: the server, its writers, its memory."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import StoreFull, StoreUnavailable
from chunk_store.store import Busy, Stored
from chunk_store.tenant import DEFAULT_TENANT
from chunk_store.tools.verify import repair, verify
from tests.chunk_store.contract import loads, publish, sample
from tests.chunk_store.places import RedisPlace
from tests.chunk_store.processes import child
from tests.chunk_store.servers import Server, need_redis, redis_server, redis_url, running
from tests.chunk_store.workers import CRASH_TOKENS, answer_until_killed, publish_once_each

KILLS = 40


@pytest.fixture
def lasting(tmp_path: Path) -> Iterator[Server]:
    """A server that promises to keep what it acknowledged."""
    need_redis()
    yield from running(redis_server(tmp_path, "--appendonly", "yes"))


@pytest.fixture
def forgetful(tmp_path: Path) -> Iterator[Server]:
    """A server without persistence."""
    need_redis()
    yield from running(redis_server(tmp_path))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """A server with little memory that evicts nothing by itself."""
    need_redis()
    yield from running(redis_server(tmp_path, "--maxmemory", "12mb", "--maxmemory-policy", "noeviction"))


def test_a_killed_server_keeps_what_was_committed(lasting: Server) -> None:
    with closing(RedisPlace(redis_url(lasting))) as place:
        store = place.open()
        claim = store.begin(sample(9).key)
        assert not isinstance(claim, Stored | Busy)
        for number in range(5):
            store.put_records([sample(number).record()])
            publish(store, sample(number))
        lasting.kill()
        for call in (lambda: store.lookup([sample(1).key]), store.stats, store.sweep, lambda: place.open()):
            with pytest.raises(StoreUnavailable, match="redis at"):
                call()
        with pytest.raises(StoreUnavailable):
            publish(store, sample(7))
        lasting.start()
        assert all(loads(store, sample(number)) for number in range(5)), "the same store object goes on"
        assert store.stats().records == 5
        claim.write(sample(9).header, sample(9).views)
        claim.commit()
        assert loads(store, sample(9))
        assert verify(store).sound


def test_a_server_that_forgot_everything(forgetful: Server) -> None:
    """Without persistence a restart empties the store: misses, lost claims, and then it fills again."""
    server = forgetful
    with closing(RedisPlace(redis_url(server))) as place:
        store = place.open(capacity_nbytes=1_000_000)
        publish(store, sample(1))
        claim = store.begin(sample(2).key)
        assert not isinstance(claim, Stored | Busy)
        server.kill()
        server.start()
        assert not loads(store, sample(1))
        with pytest.raises(Exception, match="claim"):
            claim.write(sample(2).header, sample(2).views)
        claim.abort()
        publish(store, sample(1))
        assert loads(store, sample(1))
        assert store.stats().capacity_nbytes == 1_000_000


def test_services_recover_by_themselves(lasting: Server) -> None:
    with child(answer_until_killed, redis_url(lasting), ready=False) as service:
        for _ in range(3):
            wait_for(service, b"hit")
            lasting.kill()
            wait_for(service, b"unavailable")
            lasting.start()
        wait_for(service, b"hit")


def wait_for(service, wanted: bytes) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and service.reports.poll(15):
        report = service.reports.recv_bytes()
        assert b"TORN" not in report and b"verify" not in report, report
        if wanted in report:
            return
    pytest.fail(f"the service never said {wanted!r}")


def test_killed_writers(shared_redis: Server) -> None:
    with closing(RedisPlace(redis_url(shared_redis, "killed"))) as place:
        store = place.open(capacity_nbytes=2**33)
        delays = random.Random(3)
        reported: list[int] = []
        interrupted = 0
        for kill in range(KILLS):
            with child(publish_once_each, place.url(), kill * 1000) as writer:
                if kill % 3:  # so that most have published something, however slow the machine is
                    writer.wait_for_report()
                time.sleep(delays.uniform(0, 0.02))
                mine = [int(number) for number in writer.kill()]
            interrupted += bool(store.ledger.claims.unfinished())
            assert all(loads(store, sample(number, tokens=CRASH_TOKENS)) for number in mine)
            reported += mine
            store.sweep()
            assert store.ledger.claims.unfinished() == [], "a dead writer's claim ends with the next sweep"
        assert interrupted > KILLS / 10 and len(reported) > KILLS / 2
        report = verify(store)
        assert report.sound, report.findings
        assert len(list(store.blobs.names())) == store.stats().entries


def test_a_full_server_evicts_or_says_so(small: Server) -> None:
    """The store's capacity is larger than the server's memory: it lives within what there is."""
    with closing(RedisPlace(redis_url(small))) as place:
        store = place.open(capacity_nbytes=2**33)
        entries = [sample(number, tokens=CRASH_TOKENS) for number in range(50)]
        for entry in entries:
            publish(store, entry)
            assert loads(store, entry)
        assert 5 <= store.stats().entries < 50 and store.stats().evictions > 0
        assert verify(store).sound
        extra = sample(99, tokens=10 * CRASH_TOKENS)
        with store.lease([info.key for info in store.list_entries()]), pytest.raises(StoreFull):
            publish(store, extra)
        assert loads(store, entries[-1])


def test_a_server_that_evicts_by_itself_only_costs_misses(shared_redis: Server) -> None:
    """Values that vanish behind the ledger's back are misses, and repair makes the books agree again."""
    with closing(RedisPlace(redis_url(shared_redis, "vanish"))) as place:
        store = place.open()
        for number in range(4):
            publish(store, sample(number))
        for number in (1, 2):
            place.redis.client.delete(place.value(sample(number).key, "h"))
        assert not loads(store, sample(1))
        assert (
            store.miss_reason(sample(1).key, sample(1).chunk_id, sample(1).header.model, DEFAULT_TENANT)
            is MissReason.NOT_STORED
        )
        assert repair(store).dropped == 1
        assert verify(store).sound
        assert loads(store, sample(0)) and loads(store, sample(3))


def test_two_stores_share_a_server_by_prefix(shared_redis: Server) -> None:
    with (
        closing(RedisPlace(redis_url(shared_redis, "one"))) as first,
        closing(RedisPlace(redis_url(shared_redis, "two"))) as second,
    ):
        publish(first.open(), sample(1))
        assert not loads(second.open(), sample(1))
        assert loads(first.open(), sample(1))
