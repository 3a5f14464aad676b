"""Entries in the embedded index: finding, publishing, evicting. Functions of one connection and the time.

What may be evicted is said once, in ``_EVICTABLE``: no live lease on the entry and no pin on its chunk. Readers need
no protection here, a file that is open stays readable after it is unlinked.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Sequence

from chunk_store.header import header_nbytes
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import TOMBSTONES_MAX, Placed
from chunk_store.store import EntryHeader, EntryInfo, MissReason

_INFO = "key, chunk_id, model, tokens, nbytes, created_at, last_used_at"
_LEASED = "EXISTS (SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.expires_at > :now)"
_PINNED = "EXISTS (SELECT 1 FROM records WHERE records.chunk_id = entries.chunk_id AND records.pinned)"
_EVICTABLE = f"NOT {_LEASED} AND NOT {_PINNED}"


def find(connection: sqlite3.Connection, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
    rows = connection.execute(
        f"SELECT {_INFO} FROM entries WHERE key IN (SELECT value FROM json_each(?)) AND NOT doomed",
        (json.dumps(list(keys)),),
    )
    found = {row[0]: EntryInfo(*row) for row in rows}
    return [found.get(key) for key in keys]


def listed(connection: sqlite3.Connection, chunk_ids: Sequence[ChunkId]) -> list[EntryInfo]:
    """Entries in eviction order; of ``chunk_ids``, or all without any."""
    chosen = "AND chunk_id IN (SELECT value FROM json_each(?))" if chunk_ids else ""
    values = (json.dumps(list(chunk_ids)),) if chunk_ids else ()
    rows = connection.execute(
        f"SELECT {_INFO} FROM entries WHERE NOT doomed {chosen} ORDER BY last_used_at, key", values
    )
    return [EntryInfo(*row) for row in rows]


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
    connection: sqlite3.Connection, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, salt_digest: str
) -> MissReason:
    if was_evicted(connection, key):
        return MissReason.EVICTED
    rows = connection.execute(
        "SELECT DISTINCT salt_digest FROM entries WHERE chunk_id = ? AND model = ? AND key != ? AND NOT doomed",
        (chunk_id, model, key),
    )
    salts = {row[0] for row in rows}
    if salt_digest in salts:
        return MissReason.CONTEXT_DIFFERS
    return MissReason.SALT_DIFFERS if salts else MissReason.NOT_STORED


def insert(connection: sqlite3.Connection, header: EntryHeader, blob: str, now: float) -> EntryInfo:
    """Makes ``blob`` the entry of its key; a deleted entry that a lease still holds is replaced by its equal."""
    old = connection.execute("SELECT blob, stored_nbytes FROM entries WHERE key = ?", (header.key,)).fetchone()
    if old:
        connection.execute("UPDATE entries SET blob = ?, doomed = 0 WHERE key = ?", (blob, header.key))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", old)
    else:
        _insert_row(connection, header, blob, now)
    _bury(connection, header.key, None)
    for key in header.context:
        connection.execute(
            "INSERT OR IGNORE INTO needs (chunk_id, key) SELECT chunk_id, :mine FROM entries WHERE key = :key "
            "UNION SELECT chunk_id, :mine FROM tombstones WHERE key = :key",
            {"mine": header.key, "key": key},
        )
    info = find(connection, [header.key])[0]
    assert info is not None
    return info


def _insert_row(connection: sqlite3.Connection, header: EntryHeader, blob: str, now: float) -> None:
    connection.execute(
        "INSERT INTO entries (key, blob, chunk_id, model, salt_digest, tokens, nbytes, stored_nbytes, created_at, "
        "last_used_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            header.key,
            blob,
            header.chunk_id,
            header.model,
            header.salt_digest,
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
    for key, chunk_id, stored_nbytes in _evictable(connection, now):
        if freed >= nbytes:
            break
        victims.append((key, chunk_id))
        freed += stored_nbytes
    for key, chunk_id in victims:
        remove_evicted(connection, key, chunk_id)
    return freed


def remove_evicted(connection: sqlite3.Connection, key: ChunkKey, chunk_id: ChunkId) -> None:
    """Turns an entry into garbage and remembers that it was there."""
    connection.execute("DELETE FROM entries WHERE key = ?", (key,))
    connection.execute("UPDATE totals SET value = value + 1 WHERE name = 'evictions'")
    _bury(connection, key, chunk_id)


def delete(connection: sqlite3.Connection, condition: str, value: str, now: float) -> tuple[int, int]:
    """Deletes entries, those under a lease when it ends; returns how many and their KV bytes."""
    count, nbytes = connection.execute(
        f"SELECT COUNT(*), COALESCE(SUM(nbytes), 0) FROM entries WHERE {condition} AND NOT doomed", (value,)
    ).fetchone()
    connection.execute(f"UPDATE entries SET doomed = 1 WHERE {condition}", (value,))
    delete_doomed(connection, now)
    return count, nbytes


def delete_doomed(connection: sqlite3.Connection, now: float) -> None:
    """Removes deleted entries that no lease holds any more."""
    connection.execute(f"DELETE FROM entries WHERE doomed AND NOT {_LEASED}", {"now": now})


def delete_expired(connection: sqlite3.Connection, chunk_id: ChunkId, now: float) -> tuple[int, int]:
    """Evicts the entries of an expired chunk except leased ones; returns how many and their KV bytes."""
    rows = connection.execute(
        f"SELECT key, nbytes FROM entries WHERE chunk_id = :chunk_id AND NOT {_LEASED}",
        {"chunk_id": chunk_id, "now": now},
    ).fetchall()
    for key, _ in rows:
        remove_evicted(connection, key, chunk_id)
    return len(rows), sum(nbytes for _, nbytes in rows)


def is_needed(connection: sqlite3.Connection, chunk_id: ChunkId) -> bool:
    """Whether an entry of this chunk, or one computed under it, is stored."""
    return bool(
        connection.execute(
            "SELECT EXISTS (SELECT 1 FROM entries WHERE chunk_id = :id) OR EXISTS (SELECT 1 FROM needs "
            "WHERE chunk_id = :id)",
            {"id": chunk_id},
        ).fetchone()[0]
    )


def touch(connection: sqlite3.Connection, used: dict[ChunkKey, float]) -> None:
    """Moves entries and their chunks to the end of eviction order."""
    for key, at in used.items():
        connection.execute("UPDATE entries SET last_used_at = MAX(last_used_at, ?) WHERE key = ?", (at, key))
        connection.execute(
            "UPDATE records SET last_used_at = MAX(last_used_at, ?) "
            "WHERE chunk_id = (SELECT chunk_id FROM entries WHERE key = ?)",
            (at, key),
        )


def counts(connection: sqlite3.Connection, now: float) -> tuple[int, int]:
    """How many entries are pinned, and how many are leased."""
    (pinned,) = connection.execute(
        "SELECT COUNT(*) FROM records JOIN entries USING (chunk_id) WHERE records.pinned"
    ).fetchone()
    (leased,) = connection.execute(
        "SELECT COUNT(DISTINCT key) FROM leases JOIN entries USING (key) WHERE leases.expires_at > ?", (now,)
    ).fetchone()
    return pinned, leased


def _evictable(connection: sqlite3.Connection, now: float) -> Iterator[tuple[ChunkKey, ChunkId, int]]:
    yield from connection.execute(
        f"SELECT key, chunk_id, stored_nbytes FROM entries WHERE {_EVICTABLE} ORDER BY last_used_at, key",
        {"now": now},
    )


def _bury(connection: sqlite3.Connection, key: ChunkKey, chunk_id: ChunkId | None) -> None:
    """Replaces the tombstone of ``key``; removes it without a chunk. The oldest over the bound go."""
    connection.execute("DELETE FROM tombstones WHERE key = ?", (key,))
    if chunk_id is not None:
        connection.execute("INSERT INTO tombstones (key, chunk_id) VALUES (?, ?)", (key, chunk_id))
        connection.execute(
            "DELETE FROM tombstones WHERE number <= (SELECT MAX(number) FROM tombstones) - ?", (TOMBSTONES_MAX,)
        )
