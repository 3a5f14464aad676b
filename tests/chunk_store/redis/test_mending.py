"""Stores on a server that lost a part of what they keep there: named, made anew from the rows, nothing good removed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from chunk_store.errors import StoreTooNew, StoreUnavailable
from chunk_store.record import RecordOrder, RecordQuery
from chunk_store.tenant import tenant_of
from chunk_store.tools.verify import Problem, repair, verify
from tests.chunk_store.contract import loads, publish, sample
from tests.chunk_store.places import MooncakePlace, RedisPlace

pytestmark = pytest.mark.parametrize("place", ["redis", "mooncake"], indirect=True)

PARENT = sample(90)
ENTRIES = [PARENT, *(sample(number, context=[PARENT.key]) for number in range(4)), sample(5, salt="pepper")]

LOST = [
    *("used", "totals", "tenants", "catalogue", "records_created", "records_used", "records_named", "pinned", "tag:t"),
    *(
        f"records_created@{tenant_of('pepper')}",
        f"chunk:{PARENT.chunk_id}",
        f"needs:{PARENT.chunk_id}",
        "model:model-1",
    ),
]


@pytest.fixture
def server(place: RedisPlace | MooncakePlace) -> Iterator[RedisPlace | MooncakePlace]:
    store = place.open()
    for entry in ENTRIES:
        store.put_records([entry.record(name=f"n-{entry.key[:6]}", tags=("t",), pinned=entry is PARENT)])
        publish(store, entry)
    assert verify(store).sound
    yield place


def names(place: RedisPlace | MooncakePlace, start: str) -> list[str]:
    found = place.redis.client.scan_iter(match=f"{place.redis.prefix}{start}*")
    return [name.decode().removeprefix(place.redis.prefix) for name in found]


def check(place: RedisPlace | MooncakePlace) -> None:
    """Everything is there, in every list, and goes when it is told to."""
    store = place.open()
    assert verify(store).sound
    assert all(loads(store, entry) for entry in ENTRIES)
    for order in RecordOrder:
        found = store.list_records(RecordQuery(order=order, tag="t", tenants=None)).records
        assert {record.chunk_id for record in found} == {entry.chunk_id for entry in ENTRIES}
    (parent,) = store.get_records([PARENT.chunk_id])
    assert parent is not None and parent.pinned and parent.name
    stats = store.stats()
    assert (stats.entries, stats.records, stats.pinned_entries) == (len(ENTRIES), len(ENTRIES), 1)
    assert store.delete_chunks([entry.chunk_id for entry in ENTRIES], None).entries == len(ENTRIES)
    assert (store.stats().entries, store.stats().records, store.stats().nbytes) == (0, 0, 0)
    assert names(place, "blob:") == [] and names(place, "entry:") == []


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_list_is_made_anew(server: RedisPlace | MooncakePlace, lost: str) -> None:
    assert server.redis.client.delete(server.redis.name(lost)) == 1, "the name is one that the store uses"
    report = repair(server.open())
    assert (report.dropped, report.removed, report.left) == (0, 0, 0)
    assert lost == "catalogue" or any(finding.problem is Problem.LEDGER for finding in report.found.findings)
    check(server)


def test_lost_rows_of_entries_come_back_from_their_headers(server: RedisPlace | MooncakePlace) -> None:
    for name in names(server, "entry:"):
        server.redis.client.delete(server.redis.name(name))
    report = repair(server.open())
    assert (report.adopted, report.removed, report.left) == (len(ENTRIES), 0, 0)
    check(server)


def test_everything_but_the_rows_and_the_data_lost(server: RedisPlace | MooncakePlace) -> None:
    for name in names(server, ""):
        if not name.startswith(("entry:", "record:", "blob:", "settings")):
            server.redis.client.delete(server.redis.name(name))
    store = server.open()
    with pytest.raises(StoreUnavailable, match="verify --repair"):
        store.begin(PARENT.key)
    assert repair(store).removed == 0
    check(server)


def test_nothing_left_but_the_data(server: RedisPlace | MooncakePlace) -> None:
    for name in names(server, ""):
        if not name.startswith("blob:"):
            server.redis.client.delete(server.redis.name(name))
    store = server.open()
    assert repair(store).adopted == len(ENTRIES)
    assert all(loads(store, entry) for entry in ENTRIES) and verify(store).sound
    for entry in ENTRIES:
        store.put_records([entry.record()])
    assert store.delete_chunks([entry.chunk_id for entry in ENTRIES], None).entries == len(ENTRIES)
    assert names(server, "blob:") == []


def test_a_store_of_newer_software_is_refused(server: RedisPlace | MooncakePlace) -> None:
    settings = server.redis.name("settings")
    before = server.redis.client.hgetall(settings)
    server.redis.client.hset(settings, "version", 99)
    with pytest.raises(StoreTooNew, match="version 99"):
        server.open()
    server.redis.client.hset(settings, mapping=before)
    check(server)
