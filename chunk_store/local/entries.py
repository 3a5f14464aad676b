"""Entries in the embedded index: finding, publishing, dropping them."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence

from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import Placed
from chunk_store.local import eviction, quarantine
from chunk_store.local.index import Index
from chunk_store.local.records import named
from chunk_store.store import DeleteReport
from chunk_store.tenant import DEFAULT_ONLY, Tenant, Tenants

_INFO = "key, chunk_id, model, tokens, nbytes, created_at, last_used_at, tenant"


class LocalEntries:
    """The ``Entries`` of a directory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def find(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
        with self._index.read() as connection:
            return find(connection, keys)

    def listed(self, chunk_ids: Sequence[ChunkId] = (), tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]:
        """Entries in eviction order; of ``chunk_ids``, or all without any."""
        self._index.flush()
        chosen = "AND chunk_id IN (SELECT value FROM json_each(?))" if chunk_ids else ""
        values = (json.dumps(list(chunk_ids)),) if chunk_ids else ()
        found: list[EntryInfo] = []
        with self._index.read() as connection:
            for tenant in named(connection, tenants):
                rows = connection.execute(
                    f"SELECT {_INFO} FROM entries WHERE tenant = ? AND NOT doomed {chosen}", (tenant, *values)
                )
                found += [EntryInfo(*row) for row in rows]
        return sorted(found, key=lambda info: (info.last_used_at, info.key))

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason:
        with self._index.read() as connection:
            if was_evicted(connection, key):
                return MissReason.EVICTED
            other = connection.execute(
                "SELECT 1 FROM entries WHERE tenant = ? AND chunk_id = ? AND model = ? AND key != ? AND NOT doomed "
                "LIMIT 1",
                (tenant, chunk_id, model, key),
            ).fetchone()
        return MissReason.CONTEXT_DIFFERS if other else MissReason.NOT_STORED

    def placed(self) -> list[Placed]:
        with self._index.read() as connection:
            return [Placed(*row) for row in connection.execute("SELECT key, blob, stored_nbytes FROM entries")]

    def locate(self, key: ChunkKey) -> Placed | None:
        with self._index.read() as connection:
            row = connection.execute("SELECT key, blob, stored_nbytes FROM entries WHERE key = ?", (key,)).fetchone()
        return Placed(*row) if row else None

    def adopt(self, header: EntryHeader, blob: str, stored_nbytes: int) -> bool:
        with self._index.write() as connection:
            if connection.execute("SELECT 1 FROM claims WHERE key = ?", (header.key,)).fetchone():
                return False
            if find_one(connection, header.key) is not None:
                return False
            insert(connection, header, blob, stored_nbytes, time.time())
            return True

    def forget(self, key: ChunkKey, blob: str, quarantined: bool) -> bool:
        with self._index.write() as connection:
            dropped = connection.execute("DELETE FROM entries WHERE key = ? AND blob = ?", (key, blob)).rowcount
            if dropped and quarantined:
                quarantine.put(connection, blob, time.time())
            return bool(dropped)

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        with self._index.write() as connection:
            count, nbytes = eviction.delete(connection, "model = ?", [model], time.time())
        return DeleteReport(0, count, nbytes)


def find(connection: sqlite3.Connection, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
    rows = connection.execute(
        f"SELECT {_INFO} FROM entries WHERE key IN (SELECT value FROM json_each(?)) AND NOT doomed",
        (json.dumps(list(keys)),),
    )
    found = {row[0]: EntryInfo(*row) for row in rows}
    return [found.get(key) for key in keys]


def find_one(connection: sqlite3.Connection, key: ChunkKey) -> EntryInfo | None:
    row = connection.execute(f"SELECT {_INFO} FROM entries WHERE key = ? AND NOT doomed", (key,)).fetchone()
    return None if row is None else EntryInfo(*row)


def was_evicted(connection: sqlite3.Connection, key: ChunkKey) -> bool:
    return connection.execute("SELECT 1 FROM tombstones WHERE key = ?", (key,)).fetchone() is not None


def insert(connection: sqlite3.Connection, header: EntryHeader, blob: str, stored_nbytes: int, now: float) -> EntryInfo:
    """Makes ``blob`` the entry of its key; a deleted entry that a lease still holds is replaced by its equal."""
    old = connection.execute("SELECT blob, stored_nbytes FROM entries WHERE key = ?", (header.key,)).fetchone()
    if old:
        connection.execute("UPDATE entries SET blob = ?, doomed = 0 WHERE key = ?", (blob, header.key))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", old)
    else:
        _insert_row(connection, header, blob, stored_nbytes, now)
    eviction.unbury(connection, header.key)
    for key in header.context:
        connection.execute(
            "INSERT OR IGNORE INTO needs (tenant, chunk_id, key) "
            "SELECT tenant, chunk_id, :mine FROM entries WHERE key = :key "
            "UNION SELECT tenant, chunk_id, :mine FROM tombstones WHERE key = :key",
            {"mine": header.key, "key": key},
        )
    info = find_one(connection, header.key)
    assert info is not None
    return info


def _insert_row(connection: sqlite3.Connection, header: EntryHeader, blob: str, stored_nbytes: int, now: float) -> None:
    connection.execute(
        "INSERT INTO entries (key, blob, chunk_id, model, tenant, tokens, nbytes, stored_nbytes, created_at, "
        "last_used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            header.key,
            blob,
            header.chunk_id,
            header.model,
            header.tenant,
            len(header.token_ids),
            header.nbytes,
            stored_nbytes,
            now,
            now,
        ),
    )
