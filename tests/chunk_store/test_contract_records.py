"""Content records: registration, pages, pins, TTLs, limits."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, cast

import pytest

from chunk_store.errors import QuotaFull, StoreFull
from chunk_store.key import ChunkId, ChunkType, chunk_id
from chunk_store.record import ChunkRecord, RecordOrder, RecordQuery
from chunk_store.shared_store import SharedStore
from chunk_store.tenant import DEFAULT_TENANT, TenantLimits, tenant_of
from tests.chunk_store.contract import TOKENIZER, Place, loads, publish, sample


def test_a_record_comes_back_as_it_was_put(place: Place) -> None:
    store = place.open()
    record = ChunkRecord(
        chunk_id=chunk_id(TOKENIZER, ChunkType.CODE, (1, 2**32 - 1, 0)),
        tokenizer=TOKENIZER,
        type=ChunkType.CODE,
        token_ids=(1, 2**32 - 1, 0),
        name="naïve \u2603 'quoted'",
        tags=("b", "a"),
        pinned=True,
        created_at=100.5,
        last_used_at=200.25,
        expires_at=time.time() + 1000,
    )
    assert store.put_records([record]) == [True]
    assert place.open().get_records([record.chunk_id, ChunkId("0" * 64)]) == [record, None]


def test_what_is_known_is_not_read_again_and_all_else_is(place: Place) -> None:
    """Whoever has the content already is told what is said about it, and whether it is there."""
    store, mine = place.open(), tenant_of("mine")
    first, second, empty = sample(1).record(name="one", tags=("x",)), sample(2).record(), sample(3).record()
    store.put_records([first, second, replace(first, tenant=mine, name="mine")])
    names = [first.chunk_id, second.chunk_id, empty.chunk_id]
    (one, two, nothing) = store.get_records(names)
    assert one is not None and two is not None and nothing is None
    content = tuple(reversed(one.token_ids))  # other token ids than the store has, to tell them apart
    known = {one.chunk_id: content, empty.chunk_id: (7,), ChunkId("0" * 64): (8,)}
    found = store.get_records(names, known=known)
    assert found == [replace(one, token_ids=content), two, None] and found[0] is not None
    assert found[0].token_ids is content
    (own,) = store.get_records(names[:1], [mine, DEFAULT_TENANT], known=known)
    assert own is not None and (own.name, own.tenant, own.token_ids) == ("mine", mine, content)
    store.delete_chunks(names[:1])
    assert store.get_records(names[:1], known=known) == [None], "known, and not there any more"
    store.put_records([replace(second, expires_at=time.time() - 1.0)])
    assert store.get_records(names[1:2], known={two.chunk_id: two.token_ids}) == [None], "expired"


def test_putting_again_merges(place: Place) -> None:
    store = place.open()
    first = sample(1).record(name="one", tags=("x", "y"), pinned=True)
    assert store.put_records([first]) == [True]
    before = store.get_records([first.chunk_id])[0]
    expires_at = time.time() + 500
    again = replace(first, name="", tags=("z", "x"), pinned=False, expires_at=expires_at)
    assert store.put_records([again]) == [False]
    after = store.get_records([first.chunk_id])[0]
    assert before is not None and after is not None
    assert after.name == "one"
    assert set(after.tags) == {"x", "y", "z"}
    assert after.pinned is False
    assert after.expires_at == expires_at
    assert after.created_at == before.created_at
    assert abs(before.created_at - time.time()) < 60


def test_empty_batches(place: Place) -> None:
    store = place.open()
    assert store.put_records([]) == []
    assert store.get_records([]) == []
    assert store.lookup([]) == []
    assert store.set_pinned([], True) == []
    assert store.delete_chunks([]).records == 0
    store.lease([]).release()
    assert store.list_records(RecordQuery()).records == ()


def test_filters(place: Place) -> None:
    store = place.open()
    plain, tagged = sample(1).record(name="plain"), sample(2).record(name="other", tags=("t",))
    code = replace(sample(3).record(tags=("t", "u")), type=ChunkType.CODE)
    store.put_records([plain, tagged, code])

    def found(query: RecordQuery) -> set[ChunkId]:
        return {record.chunk_id for record in store.list_records(query).records}

    assert found(RecordQuery()) == {plain.chunk_id, tagged.chunk_id, code.chunk_id}
    assert found(RecordQuery(tag="t")) == {tagged.chunk_id, code.chunk_id}
    assert found(RecordQuery(tag="t", type=ChunkType.CODE)) == {code.chunk_id}
    assert found(RecordQuery(name="plain")) == {plain.chunk_id}
    assert found(RecordQuery(tag="nobody")) == set()


@pytest.mark.parametrize("order", list(RecordOrder))
def test_pages_are_complete_and_stable_under_inserts(place: Place, order: RecordOrder) -> None:
    store = place.open()
    times = (3.0, 1.0, 2.0, 2.0, 5.0, 4.0, 2.0)
    first = [
        sample(number).record(name=f"n{number % 3}", created_at=at, last_used_at=10 - at)
        for number, at in enumerate(times)
    ]
    store.put_records(first)
    seen: list[ChunkRecord] = []
    cursor, pages = "", 0
    while pages == 0 or cursor:
        page = store.list_records(RecordQuery(order=order, limit=2, cursor=cursor))
        seen += page.records
        cursor, pages = page.next_cursor, pages + 1
        store.put_records([sample(100 + pages).record(name="a", created_at=0.5, last_used_at=0.5)])
    keys = {
        RecordOrder.CREATED: [record.created_at for record in seen],
        RecordOrder.LAST_USED: [record.last_used_at for record in seen],
        RecordOrder.NAME: [record.name for record in seen],
    }[order]
    assert keys == sorted(cast(Any, keys))
    assert {record.chunk_id for record in seen} >= {record.chunk_id for record in first}
    assert len({record.chunk_id for record in seen}) == len(seen)


@pytest.mark.parametrize("cursor", ["nonsense", "bm9uc2Vuc2U=", "W10=", "\u2603"])
def test_a_foreign_cursor_is_refused(place: Place, cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor"):
        place.open().list_records(RecordQuery(cursor=cursor))


def test_a_cursor_of_another_order_is_refused(place: Place) -> None:
    store = place.open()
    store.put_records([sample(number).record() for number in range(3)])
    cursor = store.list_records(RecordQuery(order=RecordOrder.CREATED, limit=1)).next_cursor
    with pytest.raises(ValueError, match="cursor"):
        store.list_records(RecordQuery(order=RecordOrder.NAME, cursor=cursor))


@pytest.mark.parametrize("limit", [0, -1, 1_000_000])
def test_a_page_has_a_bound(place: Place, limit: int) -> None:
    with pytest.raises(ValueError, match="limit"):
        place.open().list_records(RecordQuery(limit=limit))


def test_a_full_registry_takes_none_of_a_batch(place: Place) -> None:
    store = place.open(records_max=3)
    store.put_records([sample(1).record(), sample(2).record()])
    with pytest.raises(StoreFull, match="records_max"):
        store.put_records([sample(3).record(), sample(4).record()])
    assert store.get_records([sample(3).chunk_id, sample(4).chunk_id]) == [None, None]
    assert store.stats().records == 2
    assert store.put_records([sample(3).record()]) == [True]
    assert store.put_records([sample(1).record(name="known ones can still be updated")]) == [False]
    store.delete_chunks([sample(1).chunk_id])
    assert store.put_records([sample(4).record()]) == [True]


def test_an_expired_record_makes_room_in_a_full_registry(place: Place) -> None:
    store = place.open(records_max=1)
    store.put_records([sample(1).record(expires_at=time.time() - 1)])
    assert store.put_records([sample(2).record()]) == [True]
    assert store.stats().records == 1


def test_an_expired_record_is_unknown_and_can_be_registered_again(place: Place) -> None:
    store = place.open()
    store.put_records([sample(1).record(name="old", expires_at=time.time() - 1)])
    assert store.get_records([sample(1).chunk_id]) == [None]
    assert store.list_records(RecordQuery()).records == ()
    assert store.set_pinned([sample(1).chunk_id], True) == [False]
    assert store.put_records([sample(1).record()]) == [True]
    (found,) = store.get_records([sample(1).chunk_id])
    assert found is not None and found.name == ""


def test_a_pin_suspends_the_ttl(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    store.put_records([entry.record(pinned=True, expires_at=time.time() - 1)])
    publish(store, entry)
    store.sweep()
    assert store.get_records([entry.chunk_id])[0] is not None
    assert loads(store, entry)
    assert store.set_pinned([entry.chunk_id], False) == [True]
    assert store.get_records([entry.chunk_id]) == [None]


def test_sweep_removes_an_expired_chunk_and_its_entries(place: Place) -> None:
    store = place.open()
    entry = sample(1)
    store.put_records([entry.record(expires_at=time.time() + 60)])
    publish(store, entry)
    assert store.sweep().records == 0
    store.put_records([entry.record(expires_at=time.time())])
    report = store.sweep()
    assert (report.records, report.entries) == (1, 1)
    assert store.stats().records == 0
    assert store.lookup([entry.key]) == [None]


def test_content_stays_while_an_entry_computed_under_it_does(place: Place) -> None:
    """The context's own KV may go, its record may expire; the row stays until nobody needs it."""
    store = place.open()
    parent = sample(1)
    child = sample(2, context=[parent.key])
    store.put_records([parent.record(), child.record()])
    publish(store, parent)
    publish(store, child)
    store.put_records([parent.record(expires_at=time.time())])
    report = store.sweep()
    assert (report.records, report.entries) == (0, 1)
    assert store.lookup([parent.key]) == [None]
    assert loads(store, child), "an entry outlives the KV it was computed under"
    assert store.stats().records == 2
    store.delete_chunks([child.chunk_id])
    assert store.sweep().records == 1
    assert store.stats().records == 0


def test_last_used_follows_loads(place: Place) -> None:
    store = place.open()
    entries = [sample(number) for number in range(3)]
    store.put_records([entry.record() for entry in entries])
    for entry in entries:
        publish(store, entry)
    assert loads(store, entries[0])
    order = [record.chunk_id for record in store.list_records(RecordQuery(order=RecordOrder.LAST_USED)).records]
    assert order[-1] == entries[0].chunk_id


# -- content that only passed through -------------------------------------------------------------------


def passing(number: int, **changes: Any) -> ChunkRecord:
    return sample(number).record(**{"transient": True, "created_at": float(number), **changes})


def there(store: SharedStore, *numbers: int) -> list[bool]:
    return [record is not None for record in store.get_records([sample(number).chunk_id for number in numbers])]


def test_what_only_passed_through_makes_room(place: Place) -> None:
    """Request 9 of 8, and 10, and so on: the least recently used goes; what was registered on purpose stays."""
    store = place.open(records_max=4)
    store.put_records([sample(1).record(created_at=1.0), passing(2), passing(3)])
    for number in range(4, 12):
        assert store.put_records([passing(number)]) == [True]
    assert there(store, 1, 2, 3, 8, 9, 10, 11) == [True, False, False, False, True, True, True]
    assert store.stats().records == 4
    store.put_records([sample(20).record(), sample(21).record(), sample(22).record()])
    assert there(store, 1, 20, 21, 22, 9, 10, 11) == [True] * 4 + [False] * 3
    with pytest.raises(StoreFull, match="records_max"):
        store.put_records([passing(30)])
    assert there(store, 1, 20, 21, 22) == [True] * 4


def test_in_vain_nothing_is_dropped(place: Place) -> None:
    store = place.open(records_max=3)
    store.put_records([passing(1), passing(2), sample(3).record()])
    with pytest.raises(StoreFull):
        store.put_records([sample(number).record() for number in (4, 5, 6)])
    assert there(store, 1, 2, 3) == [True] * 3
    store.put_records([passing(4), passing(1)])
    assert there(store, 1, 2, 3, 4) == [True, False, True, True], "what a batch names makes no room for it"


def test_order_of_dropping_is_order_of_use(place: Place) -> None:
    store = place.open(records_max=3)
    for number in (1, 2, 3):
        store.put_records([passing(number)])
        publish(store, sample(number))
    assert loads(store, sample(1))
    store.put_records([passing(4)])
    assert there(store, 1, 2, 3, 4) == [True, False, True, True]
    assert store.put_records([passing(3)]) == [False], "sent again is used again"
    store.put_records([passing(5)])
    assert there(store, 1, 3, 4, 5) == [True, True, False, True]
    assert loads(store, sample(2)), "its KV goes by its own rules"


def test_what_is_pinned_leased_or_registered_again_stays(place: Place) -> None:
    store = place.open(records_max=4)
    store.put_records([passing(number) for number in (1, 2, 3, 4)])
    for number in (2, 3):
        publish(store, sample(number))
    store.set_pinned([sample(1).chunk_id], True)
    assert store.put_records([sample(3).record(name="kept")]) == [False]
    with store.lease([sample(2).key]):
        store.put_records([passing(5)])
        assert there(store, 1, 2, 3, 4, 5) == [True, True, True, False, True]
        with pytest.raises(StoreFull):
            store.put_records([passing(6), passing(7)])
    store.put_records([passing(6), passing(7)])
    assert there(store, 1, 2, 3, 5, 6, 7) == [True, False, True, False, True, True]
    store.set_pinned([sample(1).chunk_id], False)
    store.put_records([passing(8), passing(9), passing(10)])
    assert there(store, 1, 3, 8, 9, 10) == [False, True, True, True, True]


def test_a_passing_record_changes_nothing_of_a_known_one(place: Place) -> None:
    store = place.open()
    expires = time.time() + 1000
    store.put_records([sample(1).record(name="mine", tags=("t",), pinned=True, expires_at=expires)])
    (before,) = store.get_records([sample(1).chunk_id])
    assert store.put_records([passing(1, name="other", tags=("u",))]) == [False]
    (after,) = store.get_records([sample(1).chunk_id])
    assert before is not None and after is not None
    assert after == replace(before, last_used_at=after.last_used_at) and not after.transient


def test_a_tenants_quota_is_made_room_in_by_its_own(place: Place) -> None:
    store = place.open()
    mine, other = tenant_of("mine"), tenant_of("other")
    store.put_records([passing(1, tenant=other), passing(2, tenant=mine), passing(3, tenant=mine)])
    limits = TenantLimits(records=2)
    assert store.put_records([passing(4, tenant=mine)], limits=limits) == [True]
    ids = [sample(number).chunk_id for number in (2, 3, 4)]
    assert [record is not None for record in store.get_records(ids, [mine])] == [False, True, True]
    assert store.get_records([sample(1).chunk_id], [other])[0] is not None
    store.put_records([sample(3).record(tenant=mine), sample(4).record(tenant=mine)], limits=limits)
    with pytest.raises(QuotaFull):
        store.put_records([passing(5, tenant=mine)], limits=limits)
