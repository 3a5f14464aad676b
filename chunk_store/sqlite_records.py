"""Content in the embedded index: records, their tags, pages of them. Functions of one connection and the time."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from dataclasses import replace

from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, pack_token_ids, unpack_token_ids
from chunk_store.records import LIST_LIMIT_MAX, decode_cursor, encode_cursor
from chunk_store.store import ChunkRecord, RecordOrder, RecordPage, RecordQuery

_COLUMNS = "chunk_id, tokenizer, type, token_ids, name, tags, pinned, created_at, last_used_at, expires_at"
_LIVE = "(pinned OR expires_at IS NULL OR expires_at > ?)"
_SORT = {RecordOrder.CREATED: "created_at", RecordOrder.LAST_USED: "last_used_at", RecordOrder.NAME: "name"}


def get(connection: sqlite3.Connection, chunk_ids: Sequence[ChunkId], now: float) -> list[ChunkRecord | None]:
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM records WHERE chunk_id IN (SELECT value FROM json_each(?)) AND {_LIVE}",
        (json.dumps(list(chunk_ids)), now),
    )
    found = {row[0]: _record(row) for row in rows}
    return [found.get(chunk_id) for chunk_id in chunk_ids]


def put(connection: sqlite3.Connection, record: ChunkRecord, now: float) -> bool:
    """Registers or updates one record; True where it was new or had expired."""
    known = get(connection, [record.chunk_id], now)[0]
    if known is None:
        connection.execute("DELETE FROM records WHERE chunk_id = ?", (record.chunk_id,))  # an expired one
        created = record.created_at or now
        _insert(connection, replace(record, created_at=created, last_used_at=record.last_used_at or created))
        return True
    connection.execute(
        "UPDATE records SET name = ?, tags = ?, pinned = ?, expires_at = ? WHERE chunk_id = ?",
        (
            record.name or known.name,
            json.dumps(list(dict.fromkeys((*known.tags, *record.tags)))),
            record.pinned,
            record.expires_at,
            record.chunk_id,
        ),
    )
    _insert_tags(connection, record)
    return False


def page(connection: sqlite3.Connection, query: RecordQuery, now: float) -> RecordPage:
    """A page by keyset: rows inserted before the cursor never shift what follows it."""
    if not 1 <= query.limit <= LIST_LIMIT_MAX:
        raise ValueError(f"limit: {query.limit} is not in 1..{LIST_LIMIT_MAX}")
    sort = _SORT[query.order]
    conditions = [_LIVE]
    values: list[float | str] = [now]
    for column, wanted in (("type", query.type), ("name", query.name)):
        if wanted:
            conditions.append(f"{column} = ?")
            values.append(str(wanted))
    if query.tag:
        conditions.append("chunk_id IN (SELECT chunk_id FROM tags WHERE tag = ?)")
        values.append(query.tag)
    if query.cursor:
        conditions.append(f"({sort}, chunk_id) > (?, ?)")
        values += decode_cursor(query.cursor, query.order)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM records WHERE {' AND '.join(conditions)} ORDER BY {sort}, chunk_id LIMIT ?",
        (*values, query.limit + 1),
    ).fetchall()
    records = tuple(_record(row) for row in rows[: query.limit])
    return RecordPage(records, encode_cursor(query.order, records[-1]) if len(rows) > query.limit else "")


def set_pinned(connection: sqlite3.Connection, chunk_ids: Sequence[ChunkId], pinned: bool, now: float) -> list[bool]:
    known = [record is not None for record in get(connection, chunk_ids, now)]
    connection.executemany(
        "UPDATE records SET pinned = ? WHERE chunk_id = ?",
        [(pinned, chunk_id) for chunk_id, found in zip(chunk_ids, known, strict=True) if found],
    )
    return known


def expired(connection: sqlite3.Connection, now: float) -> list[ChunkId]:
    """Chunks whose TTL has run out; a pin suspends it."""
    rows = connection.execute("SELECT chunk_id FROM records WHERE expires_at <= ? AND NOT pinned", (now,))
    return [ChunkId(row[0]) for row in rows]


def _insert(connection: sqlite3.Connection, record: ChunkRecord) -> None:
    connection.execute(
        f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            record.chunk_id,
            record.tokenizer,
            record.type.value,
            pack_token_ids(record.token_ids),
            record.name,
            json.dumps(list(dict.fromkeys(record.tags))),
            record.pinned,
            record.created_at,
            record.last_used_at,
            record.expires_at,
        ),
    )
    _insert_tags(connection, record)


def _insert_tags(connection: sqlite3.Connection, record: ChunkRecord) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO tags (tag, chunk_id) VALUES (?, ?)", [(tag, record.chunk_id) for tag in record.tags]
    )


def _record(row: tuple[object, ...]) -> ChunkRecord:
    chunk_id, tokenizer, kind, token_ids, name, tags, pinned, created_at, last_used_at, expires_at = row
    assert isinstance(token_ids, bytes)
    assert isinstance(created_at, float) and isinstance(last_used_at, float)
    assert expires_at is None or isinstance(expires_at, float)
    return ChunkRecord(
        chunk_id=ChunkId(str(chunk_id)),
        tokenizer=TokenizerIdentity(str(tokenizer)),
        type=ChunkType(str(kind)),
        token_ids=unpack_token_ids(token_ids),
        name=str(name),
        tags=tuple(json.loads(str(tags))),
        pinned=bool(pinned),
        created_at=created_at,
        last_used_at=last_used_at,
        expires_at=expires_at,
    )
