"""What every registry of records agrees on: how large a page is, what a cursor is, how tenants' pages are merged."""

from __future__ import annotations

import base64
import binascii
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from chunk_store.record import ChunkRecord, RecordOrder, RecordPage, RecordQuery
from chunk_store.tenant import Tenant

LIST_LIMIT_MAX = 10_000


@dataclass(frozen=True)
class After:
    """Where a page begins: behind the record with this sort value and chunk id of the ``rank``-th tenant."""

    value: float | str
    chunk_id: str
    rank: int


def merged_page(
    query: RecordQuery, tenants: Sequence[Tenant], walk: Callable[[Tenant, After | None, bool], Iterator[ChunkRecord]]
) -> RecordPage:
    """One page out of several tenants' records, each walked in the query's order.

    ``walk`` is given a tenant, where to begin, and whether a record at exactly that place is still to come.
    Raises ``ValueError`` for a limit or a cursor that is none.
    """
    if not 1 <= query.limit <= LIST_LIMIT_MAX:
        raise ValueError(f"limit: {query.limit} is not in 1..{LIST_LIMIT_MAX}")
    after = decode_cursor(query.cursor, query.order) if query.cursor else None

    def placed(rank: int, tenant: Tenant) -> Iterator[tuple[float | str, str, int, ChunkRecord]]:
        for record in walk(tenant, after, after is not None and rank > after.rank):
            yield sort_value(query.order, record), record.chunk_id, rank, record

    walks = [placed(rank, tenant) for rank, tenant in enumerate(tenants)]
    found = list(islice(heapq.merge(*walks, key=lambda place: place[:3]), query.limit + 1))
    records = tuple(place[3] for place in found[: query.limit])
    more = len(found) > query.limit
    return RecordPage(records, encode_cursor(query.order, records[-1], found[query.limit - 1][2]) if more else "")


def sort_value(order: RecordOrder, record: ChunkRecord) -> float | str:
    """What ``order`` sorts by; equal ones are sorted by chunk id."""
    if order is RecordOrder.NAME:
        return record.name
    return record.created_at if order is RecordOrder.CREATED else record.last_used_at


def encode_cursor(order: RecordOrder, last: ChunkRecord, rank: int) -> str:
    """A cursor that continues behind ``last``. It holds the tenant's rank, not its name."""
    place = [order.value, sort_value(order, last), last.chunk_id, rank]
    return base64.urlsafe_b64encode(json.dumps(place).encode()).decode()


def decode_cursor(cursor: str, order: RecordOrder) -> After:
    """Where the page begins. Raises ``ValueError`` for a cursor of another order or of no page at all."""
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor.encode()))
        name, value, chunk_id, rank = place
    except (ValueError, TypeError, binascii.Error) as error:
        raise ValueError("cursor: not one that list_records returned") from error
    wanted_type = str if order is RecordOrder.NAME else float
    sound = isinstance(value, wanted_type) and isinstance(chunk_id, str) and type(rank) is int
    if name != order.value or not sound:
        raise ValueError(f"cursor: belongs to another order than {order.value}")
    return After(value, chunk_id, rank)
