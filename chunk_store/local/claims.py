"""Claims in the embedded index: who writes which key, and the space that is reserved for it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence

from chunk_store.claimant import is_dead, this_claimant
from chunk_store.entry import EntryHeader, EntryInfo
from chunk_store.format.header import header_nbytes
from chunk_store.key import ChunkKey
from chunk_store.ledger import BUSY_RETRY_S, WRITE_TTL_S, blob_name, claim_lost
from chunk_store.limits import Space, no_room, quota_full, too_large
from chunk_store.local import counts, eviction
from chunk_store.local.entries import find_one, insert
from chunk_store.local.index import Index
from chunk_store.store import Busy, Stored


class LocalClaims:
    """The ``Claims`` of a directory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Stored | Busy | None:
        with self._index.read() as connection:  # waiting writers poll: keep them off the write lock
            answer = _answer(connection, key)
        if answer is not None:
            return answer
        with self._index.write() as connection:
            answer = _answer(connection, key)
            if answer is not None:
                return answer
            drop(connection, key)
            values = (key, nonce, this_claimant(), time.time() + ttl_s)
            connection.execute("INSERT INTO claims VALUES (?, ?, ?, ?, 0, '')", values)
            return None

    def renew(self, held: Sequence[tuple[ChunkKey, str]], ttl_s: float) -> list[bool]:
        with self._index.write() as connection:
            until = time.time() + ttl_s
            update = "UPDATE claims SET expires_at = ? WHERE key = ? AND nonce = ?"
            return [connection.execute(update, (until, key, nonce)).rowcount == 1 for key, nonce in held]

    def reserve(self, key: ChunkKey, nonce: str, space: Space, removed: Sequence[str]) -> list[str]:
        now, nbytes = time.time(), space.nbytes
        with self._index.write() as connection:
            eviction.discard(connection, removed)
            _check(connection, key, nonce)
            _check_quota(connection, key, space)
            capacity = counts.setting(connection, "capacity_nbytes")
            if nbytes > capacity:
                raise too_large(nbytes, capacity)
            over = counts.space(connection) + nbytes - capacity
            if over > 0:
                over -= counts.total(connection, "garbage_nbytes")
                if eviction.evict(connection, over, now) < over:  # undoes the transaction: in vain nothing is evicted
                    raise no_room(nbytes)
                return eviction.garbage(connection)
            connection.execute(
                "UPDATE claims SET reserved_nbytes = ?, tenant = ?, expires_at = MAX(expires_at, ?) WHERE key = ?",
                (nbytes, space.tenant, now + WRITE_TTL_S, key),
            )
            return []

    def evict(self, nbytes: int) -> list[str]:
        with self._index.write() as connection:
            eviction.evict(connection, nbytes, time.time())
            return eviction.garbage(connection)

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        with self._index.write() as connection:
            _check(connection, key, nonce)
            connection.execute("DELETE FROM claims WHERE key = ?", (key,))
            stored_nbytes = header_nbytes(header) + header.nbytes
            return insert(connection, header, blob_name(key, nonce), stored_nbytes, time.time())

    def drop(self, key: ChunkKey, nonce: str) -> bool:
        with self._index.write() as connection:
            held = connection.execute("SELECT 1 FROM claims WHERE key = ? AND nonce = ?", (key, nonce)).fetchone()
            if held:
                drop(connection, key)
            return bool(held)

    def unfinished(self) -> list[str]:
        with self._index.read() as connection:
            return [blob_name(*row) for row in connection.execute("SELECT key, nonce FROM claims")]


def drop(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Ends somebody else's claim; its blob becomes garbage."""
    row = connection.execute("SELECT nonce, reserved_nbytes FROM claims WHERE key = ?", (key,)).fetchone()
    if row is not None:
        connection.execute("DELETE FROM claims WHERE key = ?", (key,))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", (blob_name(key, row[0]), row[1]))


def _answer(connection: sqlite3.Connection, key: ChunkKey) -> Stored | Busy | None:
    """Why ``key`` cannot be claimed; None when it can."""
    info = find_one(connection, key)
    if info is not None:
        return Stored(info)
    row = connection.execute("SELECT owner, expires_at FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    remaining = row[1] - time.time()
    if remaining <= 0 or is_dead(row[0]):
        return None
    return Busy(min(BUSY_RETRY_S, remaining))


def _check(connection: sqlite3.Connection, key: ChunkKey, nonce: str) -> None:
    row = connection.execute("SELECT nonce FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None or row[0] != nonce:
        raise claim_lost(key)


def _check_quota(connection: sqlite3.Connection, key: ChunkKey, space: Space) -> None:
    """Raises ``QuotaFull`` if the tenant's entries, and what it writes, leave no room for ``space``."""
    if space.tenant_nbytes_max is None:
        return
    reserved = connection.execute(
        "SELECT COALESCE(SUM(reserved_nbytes), 0) FROM claims WHERE tenant = ? AND key != ?", (space.tenant, key)
    ).fetchone()[0]
    if counts.tenant_counts(connection, space.tenant)["nbytes"] + reserved + space.nbytes > space.tenant_nbytes_max:
        raise quota_full("bytes", space.tenant_nbytes_max)
