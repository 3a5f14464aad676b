"""Leases in the embedded index. Readers need none: a file that is open stays readable after it is unlinked."""

from __future__ import annotations

import time
from collections.abc import Sequence

from chunk_store.entry import MissReason
from chunk_store.key import ChunkKey
from chunk_store.ledger import ReadTicket
from chunk_store.local import eviction
from chunk_store.local.entries import was_evicted
from chunk_store.local.index import Index


class LocalLeases:
    """The ``Leases`` of a directory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float, wait_s: float | None = None) -> None:
        expires_at = time.time() + ttl_s
        with self._index.write(wait_s) as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO leases SELECT ?, key, ? FROM entries WHERE key = ? AND (NOT doomed OR EXISTS "
                "(SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.lease = ?))",
                [(lease, expires_at, key, lease) for key in keys],
            )

    def end(self, lease: str, keys: Sequence[ChunkKey], wait_s: float | None = None) -> None:
        with self._index.write(wait_s) as connection:
            connection.executemany("DELETE FROM leases WHERE lease = ? AND key = ?", [(lease, key) for key in keys])
            eviction.delete_doomed(connection, time.time())

    def begin_read(self, key: ChunkKey) -> ReadTicket | MissReason:
        """A deleted entry is readable while a lease lasts."""
        now = time.time()
        with self._index.read() as connection:
            row = connection.execute(
                f"SELECT blob FROM entries WHERE key = :key AND (NOT doomed OR {eviction.LEASED})",
                {"key": key, "now": now},
            ).fetchone()
            if row is None:
                return MissReason.EVICTED if was_evicted(connection, key) else MissReason.NOT_STORED
        self._index.mark_used(key, now)
        return ReadTicket(key, row[0])

    def end_read(self, ticket: ReadTicket) -> None:
        """Nothing to do: an open file stays readable."""
