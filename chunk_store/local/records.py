"""Content in the embedded index: records, their tags, pages of them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from chunk_store.format.pages import After, merged_page
from chunk_store.key import ChunkId, ChunkType, TokenizerIdentity, pack_token_ids, unpack_token_ids
from chunk_store.local import counts, eviction, registry
from chunk_store.local.index import FLUSH_WAIT_S, Index
from chunk_store.record import NO_CONTENT, ChunkRecord, Content, RecordOrder, RecordPage, RecordQuery
from chunk_store.store import DeleteReport
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, NO_LIMITS, SHARED_TENANT, Tenant, TenantLimits, Tenants
from chunk_store.uses import Uses

_COLUMNS = (
    "chunk_id, tokenizer, type, token_ids, name, tags, pinned, created_at, last_used_at, expires_at, tenant, transient"
)
_WITHOUT_KNOWN = _COLUMNS.replace(
    "token_ids", "CASE WHEN chunk_id IN (SELECT value FROM json_each(?)) THEN x'' ELSE token_ids END"
)
_LIVE = "(pinned OR expires_at IS NULL OR expires_at > ?)"
_SORT = {RecordOrder.CREATED: "created_at", RecordOrder.LAST_USED: "last_used_at", RecordOrder.NAME: "name"}


class LocalRecords:
    """The ``Records`` of a directory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def put(self, new: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]:
        now = time.time()
        with self._index.read() as connection:
            full = registry.records_over(connection, new) > 0
        if full:
            with self._index.write() as connection:
                eviction.remove_expired(connection, now)
        with self._index.write() as connection:
            registry.make_room_for(connection, new, limits, now)
            before = {record.tenant: counts.tenant_counts(connection, record.tenant)["pinned"] for record in new}
            added = [_put(connection, record, now) for record in new]
            for tenant, pinned in before.items():
                registry.check_pins(connection, tenant, pinned, limits)
            return added

    def get(
        self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY, *, known: Content = NO_CONTENT
    ) -> list[ChunkRecord | None]:
        with self._index.read() as connection:
            return get(connection, chunk_ids, time.time(), tenants, known)

    def page(self, query: RecordQuery) -> RecordPage:
        """A page by keyset: rows inserted before the cursor never shift what follows it."""
        self._index.flush()
        now = time.time()
        with self._index.read() as connection:

            def walk(tenant: Tenant, after: After | None, at_too: bool) -> Iterator[ChunkRecord]:
                return _walk(connection, query, now, tenant, after, at_too)

            return merged_page(query, named(connection, query.tenants), walk)

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]:
        with self._index.write() as connection:
            before = counts.tenant_counts(connection, tenant)["pinned"]
            known = [record is not None for record in get(connection, chunk_ids, time.time(), [tenant])]
            connection.executemany(
                "UPDATE records SET pinned = ? WHERE tenant = ? AND chunk_id = ?",
                [(pinned, tenant, chunk_id) for chunk_id, found in zip(chunk_ids, known, strict=True) if found],
            )
            registry.check_pins(connection, tenant, before, limits)
            return known

    def delete(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        now = time.time()
        removed = count = nbytes = 0
        with self._index.write() as connection:
            for place in [(tenant, name) for tenant in named(connection, tenants) for name in chunk_ids]:
                removed += connection.execute("DELETE FROM records WHERE tenant = ? AND chunk_id = ?", place).rowcount
                found = eviction.delete(connection, "tenant = ? AND chunk_id = ?", place, now)
                count, nbytes = count + found[0], nbytes + found[1]
        return DeleteReport(removed, count, nbytes)

    def add_uses(self, uses: Uses) -> None:
        rows = [
            {"user": user, "chunk_id": name, "shared": SHARED_TENANT, "more": n} for (user, name), n in uses.items()
        ]
        with self._index.write(FLUSH_WAIT_S) as connection:
            connection.executemany(
                "INSERT INTO uses SELECT tenant, chunk_id, :user, :more FROM records "
                "WHERE chunk_id = :chunk_id AND tenant IN (:user, :shared) ORDER BY tenant = :user DESC LIMIT 1 "
                "ON CONFLICT DO UPDATE SET count = count + excluded.count",
                rows,
            )

    def uses(self, chunk_ids: Sequence[ChunkId], tenant: Tenant) -> list[int]:
        with self._index.read() as connection:
            rows = connection.execute(
                "SELECT chunk_id, SUM(count) FROM uses WHERE tenant IN (?, ?) AND user = ? "
                "AND chunk_id IN (SELECT value FROM json_each(?)) GROUP BY chunk_id",
                (tenant, SHARED_TENANT, tenant, json.dumps(list(chunk_ids))),
            )
            found = dict(rows.fetchall())
        return [found.get(chunk_id, 0) for chunk_id in chunk_ids]


def named(connection: sqlite3.Connection, tenants: Tenants) -> Sequence[Tenant]:
    """The tenants themselves: those given, or all that there are."""
    if tenants is not None:
        return tenants
    return [Tenant(row[0]) for row in connection.execute("SELECT tenant FROM tenants ORDER BY tenant")]


def get(
    connection: sqlite3.Connection,
    chunk_ids: Sequence[ChunkId],
    now: float,
    tenants: Tenants,
    known: Content = NO_CONTENT,
) -> list[ChunkRecord | None]:
    """Of each id the record of the first tenant that has one."""
    found: dict[ChunkId, ChunkRecord] = {}
    wanted, unread = json.dumps(list(chunk_ids)), json.dumps(list(known))
    for tenant in named(connection, tenants):
        rows = connection.execute(
            f"SELECT {_WITHOUT_KNOWN} FROM records "
            f"WHERE tenant = ? AND chunk_id IN (SELECT value FROM json_each(?)) AND {_LIVE}",
            (unread, tenant, wanted, now),
        )
        for row in rows:
            found.setdefault(ChunkId(row[0]), _record(row, known))
        if len(found) == len(chunk_ids):
            break
    return [found.get(chunk_id) for chunk_id in chunk_ids]


def _put(connection: sqlite3.Connection, record: ChunkRecord, now: float) -> bool:
    """Registers or updates one record; True where it was new or had expired."""
    place = (record.tenant, record.chunk_id)
    known = get(connection, [record.chunk_id], now, [record.tenant])[0]
    if known is None:
        connection.execute("DELETE FROM records WHERE tenant = ? AND chunk_id = ?", place)  # an expired one
        created = record.created_at or now
        _insert(connection, replace(record, created_at=created, last_used_at=record.last_used_at or created))
        return True
    if record.transient:
        connection.execute(
            "UPDATE records SET last_used_at = MAX(last_used_at, ?) WHERE tenant = ? AND chunk_id = ?", (now, *place)
        )
        return False
    connection.execute(
        "UPDATE records SET name = ?, tags = ?, pinned = ?, expires_at = ?, transient = 0 "
        "WHERE tenant = ? AND chunk_id = ?",
        (
            record.name or known.name,
            json.dumps(list(dict.fromkeys((*known.tags, *record.tags)))),
            record.pinned,
            record.expires_at,
            *place,
        ),
    )
    _insert_tags(connection, record)
    return False


def _walk(
    connection: sqlite3.Connection, query: RecordQuery, now: float, tenant: Tenant, after: After | None, at_too: bool
) -> Iterator[ChunkRecord]:
    sort = _SORT[query.order]
    conditions = ["tenant = ?", _LIVE]
    values: list[float | str] = [tenant, now]
    for column, wanted in (("type", query.type), ("name", query.name)):
        if wanted:
            conditions.append(f"{column} = ?")
            values.append(str(wanted))
    if query.tag:
        conditions.append("chunk_id IN (SELECT chunk_id FROM tags WHERE tenant = ? AND tag = ?)")
        values += [tenant, query.tag]
    if after is not None:
        conditions.append(f"({sort}, chunk_id) {'>=' if at_too else '>'} (?, ?)")
        values += [after.value, after.chunk_id]
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM records WHERE {' AND '.join(conditions)} ORDER BY {sort}, chunk_id LIMIT ?",
        (*values, query.limit + 1),
    )
    return (_record(row) for row in rows)


def _insert(connection: sqlite3.Connection, record: ChunkRecord) -> None:
    connection.execute(
        f"INSERT INTO records ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
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
            record.tenant,
            record.transient,
        ),
    )
    _insert_tags(connection, record)


def _insert_tags(connection: sqlite3.Connection, record: ChunkRecord) -> None:
    connection.executemany(
        "INSERT OR IGNORE INTO tags (tenant, tag, chunk_id) VALUES (?, ?, ?)",
        [(record.tenant, tag, record.chunk_id) for tag in record.tags],
    )


def _record(row: tuple[object, ...], known: Content = NO_CONTENT) -> ChunkRecord:
    """``known`` content was not read."""
    name_of_content, tokenizer, kind, token_ids, name, tags, pinned, *times, tenant, transient = row
    chunk_id = ChunkId(str(name_of_content))
    created_at, last_used_at, expires_at = times
    assert isinstance(token_ids, bytes)
    assert isinstance(created_at, float) and isinstance(last_used_at, float)
    assert expires_at is None or isinstance(expires_at, float)
    return ChunkRecord(
        chunk_id=chunk_id,
        tokenizer=TokenizerIdentity(str(tokenizer)),
        type=ChunkType(str(kind)),
        token_ids=known[chunk_id] if chunk_id in known else unpack_token_ids(token_ids),
        name=str(name),
        tags=tuple(json.loads(str(tags))),
        pinned=bool(pinned),
        created_at=created_at,
        last_used_at=last_used_at,
        expires_at=expires_at,
        tenant=Tenant(str(tenant)),
        transient=bool(transient),
    )
