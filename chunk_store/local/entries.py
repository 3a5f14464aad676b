"""Entries in the embedded index: finding, publishing, evicting. Functions of one connection and the time.

What may be evicted is said once, in ``_EVICTABLE``: no live lease on the entry and no pin on its chunk. Readers need
no protection here, a file that is open stays readable after it is unlinked.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence

from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.format.header import header_nbytes
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import TOMBSTONES_MAX, Placed
from chunk_store.local.records import named
from chunk_store.tenant import Tenant, Tenants

_INFO = "key, chunk_id, model, tokens, nbytes, created_at, last_used_at, tenant"
_LEASED = "EXISTS (SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.expires_at > :now)"
_PINNED = (
    "EXISTS (SELECT 1 FROM records WHERE records.tenant = entries.tenant "
    "AND records.chunk_id = entries.chunk_id AND records.pinned)"
)
_EVICTABLE = f"NOT {_LEASED} AND NOT {_PINNED}"


def find(connection: sqlite3.Connection, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
    rows = connection.execute(
        f"SELECT {_INFO} FROM entries WHERE key IN (SELECT value FROM json_each(?)) AND NOT doomed",
        (json.dumps(list(keys)),),
    )
    found = {row[0]: EntryInfo(*row) for row in rows}
    return [found.get(key) for key in keys]


def listed(connection: sqlite3.Connection, chunk_ids: Sequence[ChunkId], tenants: Tenants) -> list[EntryInfo]:
    """Entries in eviction order; of ``chunk_ids``, or all without any."""
    chosen = "AND chunk_id IN (SELECT value FROM json_each(?))" if chunk_ids else ""
    values = (json.dumps(list(chunk_ids)),) if chunk_ids else ()
    found: list[EntryInfo] = []
    for tenant in named(connection, tenants):
        rows = connection.execute(
            f"SELECT {_INFO} FROM entries WHERE tenant = ? AND NOT doomed {chosen}", (tenant, *values)
        )
        found += [EntryInfo(*row) for row in rows]
    return sorted(found, key=lambda info: (info.last_used_at, info.key))


def placed(connection: sqlite3.Connection) -> list[Placed]:
    return [Placed(*row) for row in connection.execute("SELECT key, blob, stored_nbytes FROM entries")]


def locate(connection: sqlite3.Connection, key: ChunkKey) -> Placed | None:
    row = connection.execute("SELECT key, blob, stored_nbytes FROM entries WHERE key = ?", (key,)).fetchone()
    return Placed(*row) if row else None


def blob_to_read(connection: sqlite3.Connection, key: ChunkKey, now: float) -> str | None:
    """The blob of a readable entry; a deleted one is readable while a lease lasts."""
    row = connection.execute(
        f"SELECT blob FROM entries WHERE key = :key AND (NOT doomed OR {_LEASED})", {"key": key, "now": now}
    ).fetchone()
    return row[0] if row else None


def was_evicted(connection: sqlite3.Connection, key: ChunkKey) -> bool:
    return connection.execute("SELECT 1 FROM tombstones WHERE key = ?", (key,)).fetchone() is not None


def miss_reason(
    connection: sqlite3.Connection, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant
) -> MissReason:
    if was_evicted(connection, key):
        return MissReason.EVICTED
    other = connection.execute(
        "SELECT 1 FROM entries WHERE tenant = ? AND chunk_id = ? AND model = ? AND key != ? AND NOT doomed LIMIT 1",
        (tenant, chunk_id, model, key),
    ).fetchone()
    return MissReason.CONTEXT_DIFFERS if other else MissReason.NOT_STORED


def insert(connection: sqlite3.Connection, header: EntryHeader, blob: str, now: float) -> EntryInfo:
    """Makes ``blob`` the entry of its key; a deleted entry that a lease still holds is replaced by its equal."""
    old = connection.execute("SELECT blob, stored_nbytes FROM entries WHERE key = ?", (header.key,)).fetchone()
    if old:
        connection.execute("UPDATE entries SET blob = ?, doomed = 0 WHERE key = ?", (blob, header.key))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", old)
    else:
        _insert_row(connection, header, blob, now)
    _unbury(connection, header.key)
    for key in header.context:
        connection.execute(
            "INSERT OR IGNORE INTO needs (tenant, chunk_id, key) "
            "SELECT tenant, chunk_id, :mine FROM entries WHERE key = :key "
            "UNION SELECT tenant, chunk_id, :mine FROM tombstones WHERE key = :key",
            {"mine": header.key, "key": key},
        )
    info = find(connection, [header.key])[0]
    assert info is not None
    return info


def _insert_row(connection: sqlite3.Connection, header: EntryHeader, blob: str, now: float) -> None:
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
            header_nbytes(header) + header.nbytes,
            now,
            now,
        ),
    )


def evict(connection: sqlite3.Connection, nbytes: int, now: float) -> int:
    """Evicts least recently used entries until ``nbytes`` are free or nothing evictable is left; returns the sum."""
    freed = 0
    victims = []
    for key, stored_nbytes in _evictable(connection, now):
        if freed >= nbytes:
            break
        victims.append(key)
        freed += stored_nbytes
    for key in victims:
        remove_evicted(connection, key)
    return freed


def remove_evicted(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Turns an entry into garbage and remembers that it was there."""
    _bury(connection, key)
    connection.execute("DELETE FROM entries WHERE key = ?", (key,))
    connection.execute("UPDATE totals SET value = value + 1 WHERE name = 'evictions'")


def delete(connection: sqlite3.Connection, condition: str, values: Sequence[str], now: float) -> tuple[int, int]:
    """Deletes entries, those under a lease when it ends; returns how many and their KV bytes."""
    count, nbytes = connection.execute(
        f"SELECT COUNT(*), COALESCE(SUM(nbytes), 0) FROM entries WHERE {condition} AND NOT doomed", values
    ).fetchone()
    connection.execute(f"UPDATE entries SET doomed = 1 WHERE {condition}", values)
    delete_doomed(connection, now)
    return count, nbytes


def delete_doomed(connection: sqlite3.Connection, now: float) -> None:
    """Removes deleted entries that no lease holds any more."""
    connection.execute(f"DELETE FROM entries WHERE doomed AND NOT {_LEASED}", {"now": now})


def delete_expired(connection: sqlite3.Connection, tenant: Tenant, chunk_id: ChunkId, now: float) -> None:
    """Evicts the entries of an expired chunk except leased ones."""
    rows = connection.execute(
        f"SELECT key FROM entries WHERE tenant = :tenant AND chunk_id = :chunk_id AND NOT {_LEASED}",
        {"tenant": tenant, "chunk_id": chunk_id, "now": now},
    ).fetchall()
    for (key,) in rows:
        remove_evicted(connection, key)


def is_needed(connection: sqlite3.Connection, tenant: Tenant, chunk_id: ChunkId) -> bool:
    """Whether an entry of this chunk, or one computed under it, is stored."""
    return bool(
        connection.execute(
            "SELECT EXISTS (SELECT 1 FROM entries WHERE tenant = :tenant AND chunk_id = :id) OR EXISTS "
            "(SELECT 1 FROM needs WHERE tenant = :tenant AND chunk_id = :id)",
            {"tenant": tenant, "id": chunk_id},
        ).fetchone()[0]
    )


def touch(connection: sqlite3.Connection, used: dict[ChunkKey, float]) -> None:
    """Moves entries and their chunks to the end of eviction order."""
    for key, at in used.items():
        connection.execute("UPDATE entries SET last_used_at = MAX(last_used_at, ?) WHERE key = ?", (at, key))
        connection.execute(
            "UPDATE records SET last_used_at = MAX(last_used_at, ?) "
            "WHERE (tenant, chunk_id) = (SELECT tenant, chunk_id FROM entries WHERE key = ?)",
            (at, key),
        )


def counts(connection: sqlite3.Connection, now: float, tenant: Tenant | None = None) -> tuple[int, int]:
    """How many entries are pinned, and how many are leased; of one tenant or of all."""
    mine = "" if tenant is None else "AND entries.tenant = :tenant"
    values = {"now": now, "tenant": tenant}
    (pinned,) = connection.execute(
        f"SELECT COUNT(*) FROM records JOIN entries USING (tenant, chunk_id) WHERE records.pinned {mine}", values
    ).fetchone()
    (leased,) = connection.execute(
        f"SELECT COUNT(DISTINCT key) FROM leases JOIN entries USING (key) WHERE leases.expires_at > :now {mine}", values
    ).fetchone()
    return pinned, leased


def _evictable(connection: sqlite3.Connection, now: float) -> Iterator[tuple[ChunkKey, int]]:
    yield from connection.execute(
        f"SELECT key, stored_nbytes FROM entries WHERE {_EVICTABLE} ORDER BY last_used_at, key", {"now": now}
    )


def _bury(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Makes a new tombstone of an entry. The oldest over the bound go."""
    _unbury(connection, key)
    connection.execute(
        "INSERT INTO tombstones (key, tenant, chunk_id) SELECT key, tenant, chunk_id FROM entries WHERE key = ?", (key,)
    )
    connection.execute(
        "DELETE FROM tombstones WHERE number <= (SELECT MAX(number) FROM tombstones) - ?", (TOMBSTONES_MAX,)
    )


def _unbury(connection: sqlite3.Connection, key: ChunkKey) -> None:
    connection.execute("DELETE FROM tombstones WHERE key = ?", (key,))
