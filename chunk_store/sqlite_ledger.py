"""The ledger of the embedded store: SQLite in write-ahead mode, one short transaction for each call.

Marks of use are gathered for up to a second and written with the next transaction: a read then costs no write lock.
Eviction order as this process sees it is exact, as other processes see it at most a second old; what must not be
evicted is leased.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from chunk_store import owner
from chunk_store import sqlite_entries as entries
from chunk_store import sqlite_records as records
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import BUSY_RETRY_S, WRITE_TTL_S, Claimed, Placed, ReadTicket, blob_name
from chunk_store.sqlite_database import Database
from chunk_store.sqlite_schema import SCHEMA, TOTALS
from chunk_store.store import (
    Busy,
    ChunkRecord,
    ClaimLost,
    DeleteReport,
    EntryHeader,
    EntryInfo,
    MissReason,
    RecordPage,
    RecordQuery,
    Stored,
    StoreError,
    StoreFull,
    StoreStats,
    SweepReport,
)

TOUCH_DELAY_S_MAX = 1.0


class SqliteLedger:
    """See ``Ledger``. ``synchronous`` is SQLite's: NORMAL survives a killed process, FULL a power cut."""

    def __init__(self, path: Path, *, capacity_nbytes: int, records_max: int, synchronous: str) -> None:
        limits = f"INSERT INTO settings VALUES ('capacity_nbytes', {capacity_nbytes}), ('records_max', {records_max})"
        self._database = Database(path, f"{SCHEMA};;{limits}", synchronous)
        self._used: dict[ChunkKey, float] = {}
        self._used_since = 0.0
        self._used_lock = threading.Lock()

    def set_limits(self, *, capacity_nbytes: int | None, records_max: int | None) -> None:
        """Changes the store's limits, for every process that uses it; None leaves one as it is."""
        wanted = {"capacity_nbytes": capacity_nbytes, "records_max": records_max}
        with self._database.write() as connection:
            for name, value in wanted.items():
                if value is not None:
                    connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    # -- content --------------------------------------------------------------------------------------
    def put_records(self, new: Sequence[ChunkRecord]) -> list[bool]:
        now = time.time()
        with self._write() as connection:
            added = [records.put(connection, record, now) for record in new]
            if _total(connection, "records") > _setting(connection, "records_max"):
                _remove_expired(connection, now)
            over = _total(connection, "records") - _setting(connection, "records_max")
            if over > 0 and any(added):
                raise StoreFull(f"the registry is full: {over} chunks too many; delete chunks or raise records_max")
            return added

    def get_records(self, chunk_ids: Sequence[ChunkId]) -> list[ChunkRecord | None]:
        with self._database.read() as connection:
            return records.get(connection, chunk_ids, time.time())

    def list_records(self, query: RecordQuery) -> RecordPage:
        self._flush()
        with self._database.read() as connection:
            return records.page(connection, query, time.time())

    def set_pinned(self, chunk_ids: Sequence[ChunkId], pinned: bool) -> list[bool]:
        with self._write() as connection:
            return records.set_pinned(connection, chunk_ids, pinned, time.time())

    # -- entries --------------------------------------------------------------------------------------
    def find(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
        with self._database.read() as connection:
            return entries.find(connection, keys)

    def list_entries(self, chunk_ids: Sequence[ChunkId]) -> list[EntryInfo]:
        self._flush()
        with self._database.read() as connection:
            return entries.listed(connection, chunk_ids)

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, salt_digest: str) -> MissReason:
        with self._database.read() as connection:
            return entries.miss_reason(connection, key, chunk_id, model, salt_digest)

    def begin_read(self, key: ChunkKey) -> ReadTicket | MissReason:
        now = time.time()
        with self._database.read() as connection:
            blob = entries.blob_to_read(connection, key, now)
            if blob is None:
                evicted = entries.was_evicted(connection, key)
                return MissReason.EVICTED if evicted else MissReason.NOT_STORED
        self._touch(key, now)
        return ReadTicket(key, blob)

    def end_read(self, ticket: ReadTicket) -> None:
        """Nothing to do: an open file stays readable."""

    def forget(self, key: ChunkKey, blob: str, quarantined: bool) -> bool:
        with self._write() as connection:
            dropped = connection.execute("DELETE FROM entries WHERE key = ? AND blob = ?", (key, blob)).rowcount
            if dropped and quarantined:
                connection.execute("UPDATE totals SET value = value + 1 WHERE name = 'quarantined'")
            return bool(dropped)

    # -- claims ---------------------------------------------------------------------------------------
    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Claimed | Stored | Busy:
        with self._database.read() as connection:  # waiting writers poll: keep them off the write lock
            answer = _answer(connection, key)
        if answer is not None:
            return answer
        with self._write() as connection:
            answer = _answer(connection, key)
            if answer is not None:
                return answer
            _drop_claim(connection, key)
            connection.execute(
                "INSERT INTO claims VALUES (?, ?, ?, ?, 0)", (key, nonce, owner.this_owner(), time.time() + ttl_s)
            )
            return Claimed()

    def renew_claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> None:
        with self._write() as connection:
            _check_claim(connection, key, nonce)
            connection.execute("UPDATE claims SET expires_at = ? WHERE key = ?", (time.time() + ttl_s, key))

    def reserve(self, key: ChunkKey, nonce: str, nbytes: int, removed: Sequence[str]) -> list[str]:
        now = time.time()
        with self._write() as connection:
            _discard(connection, removed)
            _check_claim(connection, key, nonce)
            capacity = _setting(connection, "capacity_nbytes")
            if nbytes > capacity:
                raise StoreFull(f"an entry of {nbytes} bytes is larger than the store's capacity of {capacity}")
            over = _space(connection) + nbytes - capacity
            if over > 0:
                _evict_over(connection, over - _total(connection, "garbage_nbytes"), nbytes, now)
                return _garbage(connection)
            connection.execute(
                "UPDATE claims SET reserved_nbytes = ?, expires_at = MAX(expires_at, ?) WHERE key = ?",
                (nbytes, now + WRITE_TTL_S, key),
            )
            return []

    def evict(self, nbytes: int) -> list[str]:
        with self._write() as connection:
            entries.evict(connection, nbytes, time.time())
            return _garbage(connection)

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        with self._write() as connection:
            _check_claim(connection, key, nonce)
            connection.execute("DELETE FROM claims WHERE key = ?", (key,))
            return entries.insert(connection, header, blob_name(key, nonce), time.time())

    def drop_claim(self, key: ChunkKey, nonce: str) -> bool:
        with self._write() as connection:
            held = connection.execute("SELECT 1 FROM claims WHERE key = ? AND nonce = ?", (key, nonce)).fetchone()
            if held:
                _drop_claim(connection, key)
            return bool(held)

    # -- leases ---------------------------------------------------------------------------------------
    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float) -> None:
        expires_at = time.time() + ttl_s
        with self._write() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO leases SELECT ?, key, ? FROM entries WHERE key = ? AND (NOT doomed OR EXISTS "
                "(SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.lease = ?))",
                [(lease, expires_at, key, lease) for key in keys],
            )

    def unhold(self, lease: str, keys: Sequence[ChunkKey]) -> None:
        with self._write() as connection:
            connection.executemany("DELETE FROM leases WHERE lease = ? AND key = ?", [(lease, key) for key in keys])
            entries.delete_doomed(connection, time.time())

    # -- removal and upkeep ---------------------------------------------------------------------------
    def delete_chunks(self, chunk_ids: Sequence[ChunkId]) -> DeleteReport:
        now = time.time()
        removed = count = nbytes = 0
        with self._write() as connection:
            for chunk_id in chunk_ids:
                removed += connection.execute("DELETE FROM records WHERE chunk_id = ?", (chunk_id,)).rowcount
                found = entries.delete(connection, "chunk_id = ?", chunk_id, now)
                count, nbytes = count + found[0], nbytes + found[1]
        return DeleteReport(removed, count, nbytes)

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        with self._write() as connection:
            count, nbytes = entries.delete(connection, "model = ?", model, time.time())
        return DeleteReport(0, count, nbytes)

    def sweep(self) -> SweepReport:
        now = time.time()
        with self._write() as connection:
            before = (_total(connection, "entries"), _total(connection, "entry_nbytes"))
            rows = connection.execute("SELECT key, owner, expires_at FROM claims").fetchall()
            dead = [key for key, holder, expires_at in rows if expires_at <= now or owner.is_dead(holder)]
            for key in dead:
                _drop_claim(connection, key)
            connection.execute("DELETE FROM leases WHERE expires_at <= ?", (now,))
            entries.delete_doomed(connection, now)
            removed = _remove_expired(connection, now)
            over = _space(connection) - _total(connection, "garbage_nbytes") - _setting(connection, "capacity_nbytes")
            if over > 0:
                entries.evict(connection, over, now)
            after = (_total(connection, "entries"), _total(connection, "entry_nbytes"))
        return SweepReport(len(dead), removed, before[0] - after[0], before[1] - after[1])

    def garbage(self) -> list[str]:
        with self._database.read() as connection:
            return _garbage(connection)

    def discard(self, blobs: Sequence[str]) -> None:
        if blobs:
            with self._write() as connection:
                _discard(connection, blobs)

    def placed(self) -> list[Placed]:
        with self._database.read() as connection:
            return entries.placed(connection)

    def locate(self, key: ChunkKey) -> Placed | None:
        with self._database.read() as connection:
            return entries.locate(connection, key)

    def unfinished(self) -> list[str]:
        with self._database.read() as connection:
            return [blob_name(*row) for row in connection.execute("SELECT key, nonce FROM claims")]

    def adopt(self, header: EntryHeader, blob: str) -> bool:
        with self._write() as connection:
            if connection.execute("SELECT 1 FROM claims WHERE key = ?", (header.key,)).fetchone():
                return False
            if entries.find(connection, [header.key])[0] is not None:
                return False
            entries.insert(connection, header, blob, time.time())
            return True

    def audit(self) -> list[str]:
        with self._database.read() as connection:
            rows = connection.execute("PRAGMA integrity_check").fetchall()
            problems = [f"index.sqlite: {row[0]}" for row in rows if row[0] != "ok"]
        with self._write() as connection:  # one consistent view of rows and totals
            for name, query in TOTALS.items():
                stored, counted = _total(connection, name), connection.execute(query).fetchone()[0]
                if stored != counted:
                    problems.append(f"total {name} is {stored}, the rows say {counted}")
        return problems

    def recount(self) -> None:
        with self._write() as connection:
            for name, query in TOTALS.items():
                connection.execute(f"UPDATE totals SET value = ({query}) WHERE name = ?", (name,))

    def stats(self, backend: str) -> StoreStats:
        with self._database.read() as connection:
            pinned, leased = entries.counts(connection, time.time())
            return StoreStats(
                backend=backend,
                records=_total(connection, "records"),
                records_max=_setting(connection, "records_max"),
                entries=_total(connection, "entries"),
                nbytes=_space(connection),
                capacity_nbytes=_setting(connection, "capacity_nbytes"),
                pinned_entries=pinned,
                leased_entries=leased,
                evictions=_total(connection, "evictions"),
                quarantined=_total(connection, "quarantined"),
            )

    def close(self) -> None:
        with suppress(StoreError):
            self._flush()
        self._database.close()

    @contextmanager
    def _write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction that begins by writing down what was used."""
        with self._used_lock:
            used, self._used = self._used, {}
        with self._database.write() as connection:
            entries.touch(connection, used)
            yield connection

    def _touch(self, key: ChunkKey, now: float) -> None:
        with self._used_lock:
            if not self._used:
                self._used_since = now
            self._used[key] = now
            due = now - self._used_since > TOUCH_DELAY_S_MAX
        if due:
            with suppress(StoreError):  # order of eviction is a hint; a read must not fail over it
                self._flush()

    def _flush(self) -> None:
        if self._used:
            with self._write():
                pass


def _total(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()[0])


def _setting(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0])


def _space(connection: sqlite3.Connection) -> int:
    """Bytes that count toward capacity: entries, what writers reserved, what waits for removal."""
    return sum(_total(connection, name) for name in ("entry_nbytes", "claim_nbytes", "garbage_nbytes"))


def _garbage(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT blob FROM garbage")]


def _discard(connection: sqlite3.Connection, blobs: Sequence[str]) -> None:
    connection.executemany("DELETE FROM garbage WHERE blob = ?", [(blob,) for blob in blobs])


def _evict_over(connection: sqlite3.Connection, over: int, nbytes: int, now: float) -> None:
    """Evicts ``over`` bytes or raises ``StoreFull``, which undoes the transaction: in vain nothing is evicted."""
    if over > 0 and entries.evict(connection, over, now) < over:
        raise StoreFull(f"no room for {nbytes} bytes: the rest is pinned, leased or being written")


def _answer(connection: sqlite3.Connection, key: ChunkKey) -> Stored | Busy | None:
    """Why ``key`` cannot be claimed; None when it can."""
    info = entries.find(connection, [key])[0]
    if info is not None:
        return Stored(info)
    row = connection.execute("SELECT owner, expires_at FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    remaining = row[1] - time.time()
    if remaining <= 0 or owner.is_dead(row[0]):
        return None
    return Busy(min(BUSY_RETRY_S, remaining))


def _check_claim(connection: sqlite3.Connection, key: ChunkKey, nonce: str) -> None:
    row = connection.execute("SELECT nonce FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None or row[0] != nonce:
        raise ClaimLost(f"the claim on {key} expired and was taken or swept; begin again")


def _drop_claim(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Ends somebody else's claim; its blob becomes garbage."""
    row = connection.execute("SELECT nonce, reserved_nbytes FROM claims WHERE key = ?", (key,)).fetchone()
    if row is not None:
        connection.execute("DELETE FROM claims WHERE key = ?", (key,))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", (blob_name(key, row[0]), row[1]))


def _remove_expired(connection: sqlite3.Connection, now: float) -> int:
    """Evicts entries of expired chunks, then drops the records that no entry needs; returns how many."""
    removed = 0
    for chunk_id in records.expired(connection, now):
        entries.delete_expired(connection, chunk_id, now)
        if not entries.is_needed(connection, chunk_id):
            removed += connection.execute("DELETE FROM records WHERE chunk_id = ?", (chunk_id,)).rowcount
    return removed
