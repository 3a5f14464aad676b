"""The Mooncake store proved by crashing it: its owner of memory, its master, and a prefill worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from chunk_store.errors import StoreError, StoreFull, StoreUnavailable
from chunk_store.open import open_store
from chunk_store.shared_store import SharedStore
from chunk_store.tools.verify import repair, verify
from tests.chunk_store.contract import Sample, loads, publish, sample
from tests.chunk_store.processes import child
from tests.chunk_store.servers import Mooncake, Server, mooncake, mooncake_url, need_mooncake
from tests.chunk_store.workers import CRASH_TOKENS, publish_once_each


@pytest.fixture
def cluster(tmp_path: Path, shared_redis: Server) -> Iterator[Mooncake]:
    need_mooncake()
    started = mooncake(tmp_path, shared_redis, memory_gib=0.0625)
    started.start()
    yield started
    started.kill()


def publishes(store: SharedStore, entry: Sample) -> bool:
    try:
        publish(store, entry)
    except StoreError:
        return False
    return loads(store, entry)


def swept_clean(store: SharedStore) -> bool:
    store.sweep()
    return not store.ledger.upkeep.garbage()


def eventually(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.2)
    return False


def test_a_killed_owner_costs_misses_and_a_new_one_is_filled_again(cluster: Mooncake) -> None:
    with closing(open_store(mooncake_url(cluster, "owner killed"))) as store:
        entries = [sample(number, tokens=CRASH_TOKENS) for number in range(4)]
        for entry in entries:
            store.put_records([entry.record()])
            publish(store, entry)
        assert all(loads(store, entry) for entry in entries)
        cluster.owner.kill()
        before = time.monotonic()
        assert not any(loads(store, entry) for entry in entries), "a dead owner's data is a miss"
        assert time.monotonic() - before < 60
        assert store.stats().records == 4, "content is in Redis and stays"
        assert store.lookup([entry.key for entry in entries]) == [None] * 4
        cluster.owner.start()
        assert eventually(lambda: publishes(store, entries[0]), 30)
        assert all(eventually(partial(publishes, store, entry), 30) for entry in entries[1:])
        repair(store)
        report = verify(store)
        assert report.sound, report.findings


def test_a_killed_master_is_unavailable_until_it_is_back(cluster: Mooncake) -> None:
    with closing(open_store(mooncake_url(cluster, "master killed"))) as store:
        publish(store, sample(1))
        cluster.kill()
        assert not loads(store, sample(1))
        with pytest.raises(StoreUnavailable, match="master"):
            open_store(mooncake_url(cluster, "master killed"))
        cluster.start()
        assert eventually(lambda: publishes(store, sample(3)), 30)
        repair(store)
        report = verify(store)
        assert report.sound, report.findings


@pytest.mark.slow  # each call to a dead master takes Mooncake's client four seconds to fail
def test_publishing_without_a_master_fails_and_leaves_nothing(cluster: Mooncake) -> None:
    with closing(open_store(mooncake_url(cluster, "no master"))) as store:
        cluster.kill()
        with pytest.raises(StoreError):
            publish(store, sample(2))
        cluster.start()
        assert eventually(lambda: publishes(store, sample(3)), 30)
        assert eventually(lambda: swept_clean(store), 60)
        assert verify(store).sound


def test_killed_writers(cluster: Mooncake) -> None:
    with closing(open_store(mooncake_url(cluster, "writers killed"))) as store:
        for kill in range(4):
            with child(publish_once_each, mooncake_url(cluster, "writers killed"), kill * 1000) as writer:
                time.sleep(0.02 * kill)
                mine = [int(number) for number in writer.kill()]
            assert all(loads(store, sample(number, tokens=CRASH_TOKENS)) for number in mine)
            store.sweep()
            assert store.ledger.claims.unfinished() == []
        assert eventually(lambda: swept_clean(store), 40), "what a dead writer left goes"
        report = verify(store)
        assert report.sound, report.findings
        assert len(list(store.blobs.names())) == store.stats().entries


def test_full_owners_evict_or_say_so(cluster: Mooncake) -> None:
    """The store's capacity is larger than the memory that is lent: it lives within what there is."""
    with closing(open_store(mooncake_url(cluster, "full"), capacity_nbytes=2**33)) as store:
        entries = [sample(number, tokens=20_000) for number in range(24)]
        for entry in entries:
            publish(store, entry)
        assert loads(store, entries[-1])
        assert store.stats().evictions > 0
        with store.lease([info.key for info in store.list_entries()]), pytest.raises(StoreFull):
            for number in range(100, 124):
                publish(store, sample(number, tokens=20_000))
