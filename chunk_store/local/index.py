"""The SQLite index of a directory: one short transaction for each call, and marks of use.

Marks of use are gathered for up to a second and written with the next transaction: a read then costs no write lock.
Eviction order as this process sees it is exact, as other processes see it at most a second old; what must not be
evicted is leased.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from chunk_store.errors import StoreError
from chunk_store.format.versions import INDEX_VERSION
from chunk_store.key import ChunkKey
from chunk_store.limits import StoreLimits
from chunk_store.local.database import Database, Schema
from chunk_store.local.schema import SCHEMA
from chunk_store.local.upgrade import MIGRATIONS

INDEX = "index.sqlite"
TOUCH_DELAY_S_MAX = 1.0
FLUSH_WAIT_S = 0.02


class Index:
    """See ``Database``. ``synchronous`` is SQLite's: NORMAL survives a killed process, FULL a power cut."""

    def __init__(self, path: Path, limits: StoreLimits, synchronous: str) -> None:
        rows = ", ".join(f"('{name}', {value})" for name, value in limits.of_new_store.items())
        schema = Schema(INDEX_VERSION, f"{SCHEMA};;INSERT INTO settings VALUES {rows}", MIGRATIONS)
        self._database = Database(path, schema, synchronous)
        self.read = self._database.read
        self._used: dict[ChunkKey, float] = {}
        self._used_since = 0.0
        self._used_lock = threading.Lock()

    @contextmanager
    def write(self, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
        """A write transaction that begins by writing down what was used."""
        with self._database.write(wait_s) as connection:
            with self._used_lock:
                used, self._used = self._used, {}
            _touch(connection, used)
            yield connection

    def mark_used(self, key: ChunkKey, now: float) -> None:
        """Moves an entry and its chunk to the end of eviction order, soon."""
        with self._used_lock:
            if not self._used:
                self._used_since = now
            self._used[key] = now
            due = now - self._used_since > TOUCH_DELAY_S_MAX
            if due:
                self._used_since = now  # whether it can be written now or not
        if due:
            self.flush()

    def flush(self) -> None:
        """Writes marks of use down, unless others write now: they are a hint, and nobody should wait for them."""
        if self._used:
            with suppress(StoreError), self.write(FLUSH_WAIT_S):
                pass

    def close(self) -> None:
        self.flush()
        self._database.close()


def _touch(connection: sqlite3.Connection, used: dict[ChunkKey, float]) -> None:
    for key, at in used.items():
        connection.execute("UPDATE entries SET last_used_at = MAX(last_used_at, ?) WHERE key = ?", (at, key))
        connection.execute(
            "UPDATE records SET last_used_at = MAX(last_used_at, ?) "
            "WHERE (tenant, chunk_id) = (SELECT tenant, chunk_id FROM entries WHERE key = ?)",
            (at, key),
        )
