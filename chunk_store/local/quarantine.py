"""What the index knows of the quarantine: how much bad data is kept, since when, and what of it goes first.

What leaves the quarantine becomes garbage, like any blob that nobody wants. Functions of one connection and the time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from chunk_store.blobs import Quarantined
from chunk_store.limits import QUARANTINE_MAX, QUARANTINE_S_DEFAULT


def put(connection: sqlite3.Connection, blob: str, now: float) -> None:
    """Takes ``blob`` from the garbage into the quarantine; the oldest over the bound go."""
    connection.execute(
        "INSERT OR REPLACE INTO quarantine SELECT blob, nbytes, ? FROM garbage WHERE blob = ?", (now, blob)
    )
    connection.execute("DELETE FROM garbage WHERE blob = ?", (blob,))
    connection.execute("UPDATE totals SET value = value + 1 WHERE name = 'quarantined'")
    _end(connection, [blob for blob, _, _ in _rows(connection)[:-QUARANTINE_MAX]])


def agree(connection: sqlite3.Connection, found: Sequence[Quarantined]) -> None:
    """Makes the rows those of what is there: an index that is new, or was restored, knows nothing of it."""
    known = {row[0] for row in connection.execute("SELECT blob FROM quarantine")}
    gone = known - {bad.blob for bad in found}
    connection.executemany("DELETE FROM quarantine WHERE blob = ?", [(blob,) for blob in gone])
    new = [(bad.blob, bad.nbytes, bad.since) for bad in found if bad.blob not in known]
    connection.executemany("INSERT INTO quarantine VALUES (?, ?, ?)", new)


def end_old(connection: sqlite3.Connection, now: float) -> None:
    """Ends what has been kept for as long as the store keeps it."""
    row = connection.execute("SELECT value FROM settings WHERE name = 'quarantine_s'").fetchone()
    since = now - (row[0] if row else QUARANTINE_S_DEFAULT)
    _end(connection, [blob for blob, _, at in _rows(connection) if at <= since])


def make_room(connection: sqlite3.Connection, nbytes: int) -> int:
    """Ends the oldest until ``nbytes`` are free or none is left; returns the sum."""
    freed, ended = 0, []
    for blob, size, _ in _rows(connection):
        if freed >= nbytes:
            break
        ended.append(blob)
        freed += size
    _end(connection, ended)
    return freed


def count(connection: sqlite3.Connection) -> int:
    """How many bad blobs are kept."""
    return int(connection.execute("SELECT COUNT(*) FROM quarantine").fetchone()[0])


def _rows(connection: sqlite3.Connection) -> list[tuple[str, int, float]]:
    return connection.execute("SELECT blob, nbytes, since FROM quarantine ORDER BY since, blob").fetchall()


def _end(connection: sqlite3.Connection, blobs: Sequence[str]) -> None:
    for blob in blobs:
        connection.execute("INSERT OR IGNORE INTO garbage SELECT blob, nbytes FROM quarantine WHERE blob = ?", (blob,))
        connection.execute("DELETE FROM quarantine WHERE blob = ?", (blob,))
