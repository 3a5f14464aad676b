"""All records that a query matches, over as many pages as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from chunk_store.record import ChunkRecord, RecordQuery
from chunk_store.store import ChunkStore

PAGE_RECORDS = 1000


def each_record(store: ChunkStore, query: RecordQuery) -> Iterator[ChunkRecord]:
    """All records that ``query`` matches from its cursor on, whatever its limit."""
    query = replace(query, limit=PAGE_RECORDS)
    while True:
        page = store.list_records(query)
        yield from page.records
        if not page.next_cursor:
            return
        query = replace(query, cursor=page.next_cursor)
