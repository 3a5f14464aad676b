"""Which chunks: names, tags and types turned into chunk ids, over as many pages as it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from chunk_store.key import ChunkId
from chunk_store.record import ChunkRecord, RecordQuery
from chunk_store.store import ChunkStore
from chunk_store.tenant import DEFAULT_ONLY, Tenants

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


def chunks_with_tag(store: ChunkStore, tag: str, tenants: Tenants = DEFAULT_ONLY) -> list[ChunkId]:
    """Ids of the chunks of ``tenants`` that carry ``tag``; give them to ``delete_chunks`` to delete by tag."""
    if not tag:
        raise ValueError("tag: must not be empty (an empty tag would choose every chunk)")
    return [record.chunk_id for record in each_record(store, RecordQuery(tag=tag, tenants=tenants))]
