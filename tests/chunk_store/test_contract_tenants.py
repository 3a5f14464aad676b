"""Tenants on every backend: each sees, names, counts and changes its own; what others have is not there."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest

from chunk_store.entry import MissReason
from chunk_store.errors import QuotaFull, StoreFull, StoreTooNew
from chunk_store.key import ChunkId
from chunk_store.record import RecordOrder, RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.tenant import DEFAULT_TENANT, SHARED_TENANT, Tenant, TenantLimits, TenantUsage, tenant_of, visible_to
from tests.chunk_store.contract import MODEL, Place, loads, publish, sample
from tests.chunk_store.places import RedisPlace
from tests.chunk_store.servers import Server, redis_url

A, B = tenant_of("a"), tenant_of("b")
ENTRY_NBYTES = 5 * 4 * (2 * 16 + 24) + 4096


def usage(store: SharedStore, tenant: Tenant) -> tuple[int, int, int]:
    counted = store.usage(tenant)
    return counted.records, counted.pinned, counted.entries


def seen(store: SharedStore, *tenants: Tenant, **query: Any) -> list[tuple[Tenant, str]]:
    page = store.list_records(RecordQuery(tenants=tenants, **query))
    return [(record.tenant, record.name) for record in page.records]


def test_one_content_of_two_tenants_is_two_chunks(place: Place) -> None:
    store = place.open()
    mine = sample(1, salt="a").record(name="mine", tags=("x",), pinned=True)
    assert store.put_records([mine]) == [True]
    theirs = sample(1, salt="b").record(name="theirs", tags=("y",))
    assert theirs.chunk_id == mine.chunk_id
    assert store.put_records([theirs]) == [True], "newly registered, as if nobody had it"
    assert store.put_records([replace(theirs, tags=("z",))]) == [False]
    (found,) = store.get_records([mine.chunk_id], [A])
    assert found is not None and (found.name, found.tags, found.pinned, found.tenant) == ("mine", ("x",), True, A)
    (found,) = store.get_records([mine.chunk_id], [B])
    assert found is not None and (found.name, found.tags, found.pinned) == ("theirs", ("y", "z"), False)
    assert store.get_records([mine.chunk_id]) == [None], "the default tenant has neither"
    assert usage(store, A) == (1, 1, 0) and usage(store, B) == (1, 0, 0) and store.stats().records == 2
    assert store.ledger.upkeep.audit() == []


WITHOUT: dict[str, Callable[[SharedStore, ChunkId, Tenant], object]] = {
    "get": lambda store, name, who: store.get_records([name], [who]),
    "list": lambda store, name, who: store.list_records(RecordQuery(tenants=(who,))),
    "list by name": lambda store, name, who: store.list_records(RecordQuery(tenants=(who,), name="secret")),
    "list by tag": lambda store, name, who: store.list_records(RecordQuery(tenants=(who,), tag="secret")),
    "pin": lambda store, name, who: store.set_pinned([name], True, who),
    "unpin": lambda store, name, who: store.set_pinned([name], False, who),
    "delete": lambda store, name, who: store.delete_chunks([name], [who]),
    "entries": lambda store, name, who: store.list_entries([name], [who]),
    "all entries": lambda store, name, who: store.list_entries([], [who]),
    "miss": lambda store, name, who: store.miss_reason(sample(1, salt=who).key, name, MODEL, who),
    "usage": lambda store, name, who: store.usage(who),
    "register": lambda store, name, who: store.put_records([sample(1).record(tenant=who)]),
}


@pytest.mark.parametrize("who", [B, DEFAULT_TENANT, SHARED_TENANT], ids=["b", "default", "shared"])
def test_what_another_tenant_has_is_not_there(place: Place, who: Tenant) -> None:
    """Each call answers as in a store that never saw the chunk, and leaves the other tenant's as it was."""
    store = place.open()
    entry = sample(1, salt="a")
    for call, ask in WITHOUT.items():
        store.put_records([entry.record(name="secret", tags=("secret",), pinned=call == "unpin")])
        publish(store, entry)
        before = store.get_records([entry.chunk_id], [A]), store.list_entries([], [A]), store.usage(A)
        there = ask(store, entry.chunk_id, who)
        assert (store.get_records([entry.chunk_id], [A]), store.list_entries([], [A]), store.usage(A)) == before
        store.delete_chunks([entry.chunk_id], None)
        assert there == ask(store, entry.chunk_id, who), call
        store.delete_chunks([entry.chunk_id], None)


def test_default_arguments_are_about_the_default_tenant(place: Place) -> None:
    store = place.open()
    entry = sample(1, salt="a")
    store.put_records([entry.record()])
    publish(store, entry)
    assert store.list_records(RecordQuery()).records == () and store.list_entries() == []
    assert store.set_pinned([entry.chunk_id], True) == [False]
    assert store.delete_chunks([entry.chunk_id]).records == 0
    assert usage(store, A) == (1, 0, 1)


def test_deleting_pinning_and_expiring_touch_one_tenants_entries(place: Place) -> None:
    store = place.open(capacity_nbytes=2 * ENTRY_NBYTES)
    mine, theirs, more = sample(1, salt="a"), sample(1, salt="b"), sample(2, salt="b")
    store.put_records([mine.record(), theirs.record(pinned=True)])
    publish(store, mine)
    publish(store, theirs)
    publish(store, more)  # makes room: one tenant's pin does not hold what another has of the chunk
    assert [loads(store, entry) for entry in (mine, theirs, more)] == [False, True, True]
    assert store.miss_reason(mine.key, mine.chunk_id, MODEL, A) is MissReason.EVICTED
    assert store.miss_reason(sample(1, salt="c").key, mine.chunk_id, MODEL, tenant_of("c")) is MissReason.NOT_STORED
    assert store.delete_chunks([theirs.chunk_id], [A]).records == 1
    assert loads(store, theirs) and usage(store, B) == (1, 1, 2)
    store.put_records([mine.record(expires_at=time.time() - 1)])
    store.sweep()
    assert usage(store, A) == (0, 0, 0) and A not in store.tenants() and loads(store, theirs)
    assert store.ledger.upkeep.audit() == []


@pytest.mark.parametrize("order", RecordOrder)
def test_pages_over_own_and_shared_content(place: Place, order: RecordOrder) -> None:
    """Also where both have the same chunk under the same name and time."""
    store = place.open()
    for salt, numbers in (("a", (1, 2, 3)), ("b", (2, 7)), ("", (2, 9))):
        store.put_records([sample(n, salt=salt).record(name="n", created_at=5.0, last_used_at=5.0) for n in numbers])
    shared = [sample(n).record(tenant=SHARED_TENANT, name="n", created_at=5.0, last_used_at=5.0) for n in (2, 3, 8)]
    store.put_records(shared)
    found, cursor = [], ""
    while True:
        page = store.list_records(RecordQuery(tenants=visible_to(A), order=order, limit=1, cursor=cursor))
        found += [(record.chunk_id, record.tenant) for record in page.records]
        cursor = page.next_cursor
        if not cursor:
            break
        assert A not in cursor
    wanted = [(sample(n).chunk_id, A) for n in (1, 2, 3)] + [(record.chunk_id, SHARED_TENANT) for record in shared]
    assert sorted(found) == sorted(wanted)
    assert [name for name, _ in found] == sorted(name for name, _ in wanted)
    (first,) = store.get_records([sample(2).chunk_id], visible_to(A))
    assert first is not None and first.tenant == A, "a tenant's own goes before what is shared"
    (first,) = store.get_records([sample(8).chunk_id], visible_to(A))
    assert first is not None and first.tenant == SHARED_TENANT
    everything = store.list_records(RecordQuery(tenants=None)).records
    assert len(everything) == 10 and store.delete_chunks([sample(2).chunk_id], None).records == 4


def test_names_and_tags_that_look_like_a_tenants(place: Place) -> None:
    store = place.open()
    store.put_records([sample(1, salt="a").record(tags=("x",), name="x")])
    store.put_records([sample(2).record(tags=(f"x@{A}", f"@{A}:x", f"{A}/x"), name=f"x@{A}")])
    assert seen(store, DEFAULT_TENANT, tag="x") == [] and seen(store, A, tag="x") == [(A, "x")]
    assert seen(store, DEFAULT_TENANT, tag=f"x@{A}") == [(DEFAULT_TENANT, f"x@{A}")]


def test_quotas(place: Place) -> None:
    store = place.open()
    limits = TenantLimits(records=2, pinned=1, nbytes=2 * ENTRY_NBYTES)
    mine = [sample(number, salt="a") for number in range(3)]
    assert store.put_records([mine[0].record(pinned=True), mine[1].record()], limits=limits) == [True, True]
    with pytest.raises(QuotaFull, match=r"quota chunks: .* 2, .*DeleteChunk"):
        store.put_records([mine[2].record()], limits=limits)
    assert store.put_records([mine[0].record(name="known ones still change", pinned=True)], limits=limits) == [False]
    with pytest.raises(QuotaFull, match=r"quota pins: .* 1, .*UnpinChunk"):
        store.put_records([mine[1].record(pinned=True)], limits=limits)
    with pytest.raises(QuotaFull, match="quota pins"):
        store.set_pinned([mine[1].chunk_id], True, A, limits=limits)
    assert usage(store, A) == (2, 1, 0)
    assert store.set_pinned([mine[0].chunk_id], True, A, limits=limits) == [True], "pinned already"
    assert store.set_pinned([mine[0].chunk_id], False, A, limits=limits) == [True]
    for entry in mine[:2]:
        publication = store.begin(entry.key)
        with publication:  # type: ignore[union-attr]
            publication.write(entry.header, entry.views, limits=limits)  # type: ignore[union-attr]
            publication.commit()  # type: ignore[union-attr]
    publication = store.begin(mine[2].key)
    with publication, pytest.raises(QuotaFull, match=rf"quota bytes: .* {2 * ENTRY_NBYTES}, .*DeleteChunk"):  # type: ignore[union-attr]
        publication.write(mine[2].header, mine[2].views, limits=limits)  # type: ignore[union-attr]
    other = sample(2, salt="b")
    store.put_records([other.record(pinned=True)], limits=limits)  # somebody else's quota is another one
    publish(store, other)
    assert store.usage(A) == TenantUsage(records=2, entries=2, nbytes=2 * ENTRY_NBYTES)
    assert store.delete_chunks([mine[0].chunk_id], [A]).entries == 1
    publish(store, mine[2])
    assert store.ledger.upkeep.audit() == []


def test_what_is_being_written_counts_toward_the_quota(place: Place) -> None:
    store = place.open()
    limits = TenantLimits(nbytes=ENTRY_NBYTES)
    one, two = sample(1, salt="a"), sample(2, salt="a")
    first, second = store.begin(one.key), store.begin(two.key)
    with first, second:  # type: ignore[union-attr]
        first.write(one.header, one.views, limits=limits)  # type: ignore[union-attr]
        with pytest.raises(QuotaFull):
            second.write(two.header, two.views, limits=limits)  # type: ignore[union-attr]
    assert usage(store, A) == (0, 0, 0)


def test_one_tenants_flood_leaves_others_their_share_of_the_registry(place: Place) -> None:
    """``ChunkStore.put_records`` says the rule. Eight chunks at most, all of them one tenant's."""
    store = place.open(records_max=8)
    record = {salt: [sample(number, salt=salt).record() for number in range(10)] for salt in "abc"}
    store.put_records(record["a"][:8])
    for number in range(3):
        assert store.put_records([record["b"][number]]) == [True], "fewer than half of eight"
    with pytest.raises(StoreFull, match=r"the registry is full: .*records_max"):
        store.put_records([record["a"][8]])
    with pytest.raises(StoreFull):
        store.put_records(record["b"][3:5])  # five would be more than a half
    with pytest.raises(StoreFull):
        store.put_records([record["c"][0], record["a"][8]])  # each in a batch needs room
    assert [usage(store, who)[0] for who in (A, B, tenant_of("c"))] == [8, 3, 0], "of a refused batch nothing stays"
    assert store.put_records([record["c"][0], record["b"][0]]) == [True, False], "known ones need none"
    with pytest.raises(StoreFull):
        store.put_records([record["b"][3]])  # a third of eight is two
    assert store.put_records([record["c"][1]]) == [True]
    with pytest.raises(StoreFull):
        store.put_records([record["c"][2]])
    for number in range(3):
        first = sample(number).record(tenant=Tenant(f"{number}" * 64))
        assert store.put_records([first]) == [True], "one chunk always is within the share"
    with pytest.raises(StoreFull):
        store.put_records([sample(9).record()])  # sixteen are there, twice the maximum
    store.delete_chunks([one.chunk_id for one in record["a"]], None)
    store.sweep()
    assert store.put_records(record["b"][:8]) == [True] * 8, "alone again, and everything is its share"
    assert store.stats().records == 8 and store.ledger.upkeep.audit() == []


def test_transient_content_makes_room_before_shares_do(place: Place) -> None:
    store = place.open(records_max=4)
    passing = [sample(n, salt="a").record(transient=True, created_at=float(n + 1)) for n in range(2)]
    store.put_records([*passing, sample(2, salt="a").record(), sample(3, salt="a").record()])
    for number in range(2):
        assert store.put_records([sample(number, salt="b").record()]) == [True]
    assert (usage(store, A)[0], usage(store, B)[0]) == (2, 2), "what only passed through went"
    with pytest.raises(StoreFull):
        store.put_records([sample(2, salt="b").record()])
    for number in range(3):
        sent = sample(number, salt="c").record(transient=True)
        assert store.put_records([sent]) == [True], "a share of one, by turns"
        assert usage(store, tenant_of("c"))[0] == 1 and store.stats().records == 5
    assert store.put_records([sample(5, salt="c").record()]) == [True]
    with pytest.raises(StoreFull):
        store.put_records([sample(6, salt="c").record(transient=True)])
    assert usage(store, tenant_of("c"))[0] == 1 and store.ledger.upkeep.audit() == []


def test_a_redis_store_of_before_tenants_is_upgraded(shared_redis: Server) -> None:
    """The names of the old layout, as the old scripts wrote them."""
    with closing(RedisPlace(redis_url(shared_redis, "before-tenants"))) as place:
        store = place.open()
        plain, salted = sample(1), sample(2, salt="a")
        store.put_records([plain.record(name="old", tags=("t",), pinned=True)])
        child = sample(3, context=[salted.key], salt="a")
        for entry in (plain, salted, child):
            publish(store, entry)
        redis, name = place.redis.client, place.redis.name
        for entry in (salted, child):
            redis.hset(name(f"entry:{entry.key}"), "chunk", entry.chunk_id)
            redis.rename(name(f"chunk:{A}/{entry.chunk_id}"), name(f"chunk:{entry.chunk_id}"))
        redis.hset(name(f"entry:{child.key}"), "needs", salted.chunk_id)
        redis.rename(name(f"needs:{A}/{salted.chunk_id}"), name(f"needs:{salted.chunk_id}"))
        redis.delete(name("tenants"))
        redis.hdel(name("settings"), "version")
        redis.hdel(name("totals"), *(f"{what}@{who}" for what in ("entries", "entry_nbytes") for who in ("", A)))

        again = place.open()
        assert seen(again, DEFAULT_TENANT, tag="t") == [(DEFAULT_TENANT, "old")]
        assert usage(again, DEFAULT_TENANT) == (1, 1, 1) and usage(again, A) == (0, 0, 2)
        assert [info.key for info in again.list_entries([salted.chunk_id])] == []
        assert [info.key for info in again.list_entries([salted.chunk_id], [A])] == [salted.key]
        assert all(loads(again, entry) for entry in (plain, salted, child)) and again.ledger.upkeep.audit() == []
        redis.hset(name("settings"), "version", 9)
        with pytest.raises(StoreTooNew, match="version 9"):
            place.open()
