"""Pages of records: cursors, and the records of several tenants merged."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chunk_store.format.pages import LIST_LIMIT_MAX, After, decode_cursor, encode_cursor, merged_page, sort_value
from chunk_store.record import ChunkRecord, RecordOrder, RecordQuery
from chunk_store.tenant import Tenant
from tests.chunk_store.contract import sample

TENANTS = [Tenant("b"), Tenant("a"), Tenant("c")]


def record(number: int, tenant: Tenant, at: float) -> ChunkRecord:
    return sample(number).record(tenant=tenant, name=f"name {at}", created_at=at, last_used_at=-at)


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 3)), unique_by=lambda row: row[:2]),
    st.sampled_from(RecordOrder),
    st.integers(1, 4),
)
def test_pages_show_every_record_once_and_in_order(
    rows: list[tuple[int, int, int]], order: RecordOrder, limit: int
) -> None:
    all_of = {
        tenant: sorted(
            (record(number, tenant, float(at)) for number, rank, at in rows if TENANTS[rank] == tenant),
            key=lambda found: (sort_value(order, found), found.chunk_id),
        )
        for tenant in TENANTS
    }

    def walk(tenant: Tenant, after: After | None, at_too: bool) -> Iterator[ChunkRecord]:
        for found in all_of[tenant]:
            place = (sort_value(order, found), found.chunk_id)
            if (
                after is None
                or place > (after.value, after.chunk_id)
                or (at_too and place == (after.value, after.chunk_id))
            ):
                yield found

    shown: list[ChunkRecord] = []
    cursor = ""
    for _ in range(len(rows) + 1):
        page = merged_page(RecordQuery(order=order, limit=limit, cursor=cursor), TENANTS, walk)
        shown += page.records
        cursor = page.next_cursor
        if not cursor:
            break
    ranked = [(found, rank) for rank, tenant in enumerate(TENANTS) for found in all_of[tenant]]
    ranked.sort(key=lambda pair: (sort_value(order, pair[0]), pair[0].chunk_id, pair[1]))
    assert shown == [found for found, _ in ranked]


@pytest.mark.parametrize("order", RecordOrder)
def test_a_cursor_continues_where_its_page_ended_and_names_no_tenant(order: RecordOrder) -> None:
    last = record(1, Tenant("secret"), 4.0)
    cursor = encode_cursor(order, last, 2)
    assert decode_cursor(cursor, order) == After(sort_value(order, last), last.chunk_id, 2)
    assert "secret" not in cursor
    for other in RecordOrder:
        if other is not order:
            with pytest.raises(ValueError, match="cursor: belongs to another order"):
                decode_cursor(cursor, other)


@pytest.mark.parametrize("cursor", ["x", "!!!!", "W10=", "eyJhIjoxfQ==", "bnVsbA=="])
def test_what_is_no_cursor_is_refused(cursor: str) -> None:
    with pytest.raises(ValueError, match="cursor: not one"):
        decode_cursor(cursor, RecordOrder.NAME)


@pytest.mark.parametrize("limit", [0, -1, LIST_LIMIT_MAX + 1])
def test_a_page_of_no_size_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit: {limit}"):
        merged_page(RecordQuery(limit=limit), TENANTS, lambda *_: iter(()))
