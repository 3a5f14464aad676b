"""What goes from the embedded index: evicted, deleted and expired entries. Functions of one connection and the time.

What may be evicted is said once, in ``_EVICTABLE``: no live lease on the entry and no pin on its chunk. What goes turns
into garbage (by a trigger), until its blob is removed.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from chunk_store.key import ChunkId, ChunkKey
from chunk_store.ledger import TOMBSTONES_MAX
from chunk_store.local import quarantine
from chunk_store.tenant import Tenant

LEASED = "EXISTS (SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.expires_at > :now)"
_PINNED = (
    "EXISTS (SELECT 1 FROM records WHERE records.tenant = entries.tenant "
    "AND records.chunk_id = entries.chunk_id AND records.pinned)"
)
_EVICTABLE = f"NOT {LEASED} AND NOT {_PINNED}"


def evict(connection: sqlite3.Connection, nbytes: int, now: float) -> int:
    """Frees ``nbytes``, or as much as can go; returns the sum. Bad data goes first, then what was used longest ago."""
    freed = quarantine.make_room(connection, nbytes)
    victims = []
    for key, stored_nbytes in connection.execute(
        f"SELECT key, stored_nbytes FROM entries WHERE {_EVICTABLE} ORDER BY last_used_at, key", {"now": now}
    ):
        if freed >= nbytes:
            break
        victims.append(key)
        freed += stored_nbytes
    for key in victims:
        _evict_one(connection, key)
    return freed


def _evict_one(connection: sqlite3.Connection, key: ChunkKey) -> None:
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
    connection.execute(f"DELETE FROM entries WHERE doomed AND NOT {LEASED}", {"now": now})


def remove_expired(connection: sqlite3.Connection, now: float) -> int:
    """Evicts entries of expired chunks, then drops the records that no entry needs; returns how many."""
    removed = 0
    expired = _expired_chunks(connection, now)
    for tenant, chunk_id in expired:
        _evict_expired(connection, tenant, chunk_id, now)
    for place in expired:  # only now is it known what the entries of others still need
        if not _is_needed(connection, *place):
            removed += connection.execute("DELETE FROM records WHERE tenant = ? AND chunk_id = ?", place).rowcount
    return removed


def _evict_expired(connection: sqlite3.Connection, tenant: Tenant, chunk_id: ChunkId, now: float) -> None:
    """Evicts the entries of an expired chunk except leased ones."""
    rows = connection.execute(
        f"SELECT key FROM entries WHERE tenant = :tenant AND chunk_id = :chunk_id AND NOT {LEASED}",
        {"tenant": tenant, "chunk_id": chunk_id, "now": now},
    ).fetchall()
    for (key,) in rows:
        _evict_one(connection, key)


def _is_needed(connection: sqlite3.Connection, tenant: Tenant, chunk_id: ChunkId) -> bool:
    """Whether an entry of this chunk, or one computed under it, is stored."""
    return bool(
        connection.execute(
            "SELECT EXISTS (SELECT 1 FROM entries WHERE tenant = :tenant AND chunk_id = :id) OR EXISTS "
            "(SELECT 1 FROM needs WHERE tenant = :tenant AND chunk_id = :id)",
            {"tenant": tenant, "id": chunk_id},
        ).fetchone()[0]
    )


def garbage(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT blob FROM garbage")]


def discard(connection: sqlite3.Connection, blobs: Sequence[str]) -> None:
    connection.executemany("DELETE FROM garbage WHERE blob = ?", [(blob,) for blob in blobs])


def _bury(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Makes a new tombstone of an entry. The oldest over the bound go."""
    unbury(connection, key)
    connection.execute(
        "INSERT INTO tombstones (key, tenant, chunk_id) SELECT key, tenant, chunk_id FROM entries WHERE key = ?", (key,)
    )
    connection.execute(
        "DELETE FROM tombstones WHERE number <= (SELECT MAX(number) FROM tombstones) - ?", (TOMBSTONES_MAX,)
    )


def unbury(connection: sqlite3.Connection, key: ChunkKey) -> None:
    connection.execute("DELETE FROM tombstones WHERE key = ?", (key,))


def _expired_chunks(connection: sqlite3.Connection, now: float) -> list[tuple[Tenant, ChunkId]]:
    """Chunks whose TTL has run out; a pin suspends it."""
    rows = connection.execute("SELECT tenant, chunk_id FROM records WHERE expires_at <= ? AND NOT pinned", (now,))
    return [(Tenant(row[0]), ChunkId(row[1])) for row in rows]
