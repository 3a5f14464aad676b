"""The ledger of the embedded store: SQLite in write-ahead mode, one short transaction for each call.

Marks of use are gathered for up to a second and written with the next transaction: a read then costs no write lock.
Eviction order as this process sees it is exact, as other processes see it at most a second old; what must not be
evicted is leased.
"""

from __future__ import annotations

import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from chunk_store import claimant
from chunk_store.blobs import Quarantined
from chunk_store.entry import EntryHeader, EntryInfo, MissReason
from chunk_store.errors import StoreError, StoreFull
from chunk_store.format.versions import INDEX_VERSION
from chunk_store.key import ChunkId, ChunkKey, ModelIdentity
from chunk_store.ledger import IDENTITY_BITS, WRITE_TTL_S, Claimed, Placed, ReadTicket, Space, blob_name
from chunk_store.local import claims, entries, quarantine, records
from chunk_store.local.database import Database, Schema
from chunk_store.local.schema import SCHEMA, TENANTS, TOTALS
from chunk_store.local.upgrade import MIGRATIONS
from chunk_store.record import ChunkRecord, RecordPage, RecordQuery
from chunk_store.store import Busy, DeleteReport, Stored, StoreStats, SweepReport
from chunk_store.tenant import DEFAULT_ONLY, DEFAULT_TENANT, NO_LIMITS, Tenant, TenantLimits, Tenants, TenantUsage

TOUCH_DELAY_S_MAX = 1.0
FLUSH_WAIT_S = 0.02


class SqliteLedger:
    """See ``Ledger``. ``synchronous`` is SQLite's: NORMAL survives a killed process, FULL a power cut."""

    def __init__(self, path: Path, *, capacity_nbytes: int, records_max: int, synchronous: str) -> None:
        limits = f"INSERT INTO settings VALUES ('capacity_nbytes', {capacity_nbytes}), ('records_max', {records_max})"
        schema = Schema(INDEX_VERSION, f"{SCHEMA};;{limits}", MIGRATIONS)
        self._database = Database(path, schema, synchronous)
        self._used: dict[ChunkKey, float] = {}
        self._used_since = 0.0
        self._used_lock = threading.Lock()

    def set_limits(self, **wanted: int | None) -> None:
        """Changes ``capacity_nbytes``, ``records_max`` or ``quarantine_s``, for every process that uses the store; None
        leaves one as it is."""
        with self._database.write() as connection:
            for name, value in wanted.items():
                if value is not None:
                    connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))

    # -- content --------------------------------------------------------------------------------------
    def put_records(self, new: Sequence[ChunkRecord], *, limits: TenantLimits = NO_LIMITS) -> list[bool]:
        now = time.time()
        with self._database.read() as connection:
            full = claims.records_over(connection, new) > 0
        if full:
            with self._write() as connection:
                claims.remove_expired(connection, now)
        with self._write() as connection:
            claims.make_room_for(connection, new, limits, now)
            before = {record.tenant: claims.tenant_counts(connection, record.tenant)["pinned"] for record in new}
            added = [records.put(connection, record, now) for record in new]
            for tenant, pinned in before.items():
                claims.check_pins(connection, tenant, pinned, limits)
            return added

    def get_records(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> list[ChunkRecord | None]:
        with self._database.read() as connection:
            return records.get(connection, chunk_ids, time.time(), tenants)

    def list_records(self, query: RecordQuery) -> RecordPage:
        self._flush()
        with self._database.read() as connection:
            return records.page(connection, query, time.time())

    def set_pinned(
        self,
        chunk_ids: Sequence[ChunkId],
        pinned: bool,
        tenant: Tenant = DEFAULT_TENANT,
        *,
        limits: TenantLimits = NO_LIMITS,
    ) -> list[bool]:
        with self._write() as connection:
            before = claims.tenant_counts(connection, tenant)["pinned"]
            known = records.set_pinned(connection, chunk_ids, pinned, tenant, time.time())
            claims.check_pins(connection, tenant, before, limits)
            return known

    # -- entries --------------------------------------------------------------------------------------
    def find(self, keys: Sequence[ChunkKey]) -> list[EntryInfo | None]:
        with self._database.read() as connection:
            return entries.find(connection, keys)

    def list_entries(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> list[EntryInfo]:
        self._flush()
        with self._database.read() as connection:
            return entries.listed(connection, chunk_ids, tenants)

    def miss_reason(self, key: ChunkKey, chunk_id: ChunkId, model: ModelIdentity, tenant: Tenant) -> MissReason:
        with self._database.read() as connection:
            return entries.miss_reason(connection, key, chunk_id, model, tenant)

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
                quarantine.put(connection, blob, time.time())
            return bool(dropped)

    # -- claims ---------------------------------------------------------------------------------------
    def claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> Claimed | Stored | Busy:
        with self._database.read() as connection:  # waiting writers poll: keep them off the write lock
            answer = claims.answer(connection, key)
        if answer is not None:
            return answer
        with self._write() as connection:
            answer = claims.answer(connection, key)
            if answer is not None:
                return answer
            claims.drop(connection, key)
            connection.execute(
                "INSERT INTO claims VALUES (?, ?, ?, ?, 0, '')",
                (key, nonce, claimant.this_claimant(), time.time() + ttl_s),
            )
            return Claimed()

    def renew_claim(self, key: ChunkKey, nonce: str, ttl_s: float) -> None:
        with self._write() as connection:
            claims.check(connection, key, nonce)
            connection.execute("UPDATE claims SET expires_at = ? WHERE key = ?", (time.time() + ttl_s, key))

    def reserve(self, key: ChunkKey, nonce: str, space: Space, removed: Sequence[str]) -> list[str]:
        now, nbytes = time.time(), space.nbytes
        with self._write() as connection:
            claims.discard(connection, removed)
            claims.check(connection, key, nonce)
            claims.check_bytes(connection, key, space)
            capacity = claims.setting(connection, "capacity_nbytes")
            if nbytes > capacity:
                raise StoreFull(f"an entry of {nbytes} bytes is larger than the store's capacity of {capacity}")
            over = claims.space(connection) + nbytes - capacity
            if over > 0:
                claims.evict_over(connection, over - claims.total(connection, "garbage_nbytes"), nbytes, now)
                return claims.garbage(connection)
            connection.execute(
                "UPDATE claims SET reserved_nbytes = ?, tenant = ?, expires_at = MAX(expires_at, ?) WHERE key = ?",
                (nbytes, space.tenant, now + WRITE_TTL_S, key),
            )
            return []

    def evict(self, nbytes: int) -> list[str]:
        with self._write() as connection:
            nbytes -= quarantine.make_room(connection, nbytes)
            entries.evict(connection, nbytes, time.time())
            return claims.garbage(connection)

    def commit(self, key: ChunkKey, nonce: str, header: EntryHeader) -> EntryInfo:
        with self._write() as connection:
            claims.check(connection, key, nonce)
            connection.execute("DELETE FROM claims WHERE key = ?", (key,))
            return entries.insert(connection, header, blob_name(key, nonce), time.time())

    def drop_claim(self, key: ChunkKey, nonce: str) -> bool:
        with self._write() as connection:
            held = connection.execute("SELECT 1 FROM claims WHERE key = ? AND nonce = ?", (key, nonce)).fetchone()
            if held:
                claims.drop(connection, key)
            return bool(held)

    # -- leases ---------------------------------------------------------------------------------------
    def hold(self, lease: str, keys: Sequence[ChunkKey], ttl_s: float, wait_s: float | None = None) -> None:
        expires_at = time.time() + ttl_s
        with self._write(wait_s) as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO leases SELECT ?, key, ? FROM entries WHERE key = ? AND (NOT doomed OR EXISTS "
                "(SELECT 1 FROM leases WHERE leases.key = entries.key AND leases.lease = ?))",
                [(lease, expires_at, key, lease) for key in keys],
            )

    def unhold(self, lease: str, keys: Sequence[ChunkKey], wait_s: float | None = None) -> None:
        with self._write(wait_s) as connection:
            connection.executemany("DELETE FROM leases WHERE lease = ? AND key = ?", [(lease, key) for key in keys])
            entries.delete_doomed(connection, time.time())

    # -- removal and upkeep ---------------------------------------------------------------------------
    def delete_chunks(self, chunk_ids: Sequence[ChunkId], tenants: Tenants = DEFAULT_ONLY) -> DeleteReport:
        now = time.time()
        removed = count = nbytes = 0
        with self._write() as connection:
            for place in [(tenant, name) for tenant in records.named(connection, tenants) for name in chunk_ids]:
                removed += connection.execute("DELETE FROM records WHERE tenant = ? AND chunk_id = ?", place).rowcount
                found = entries.delete(connection, "tenant = ? AND chunk_id = ?", place, now)
                count, nbytes = count + found[0], nbytes + found[1]
        return DeleteReport(removed, count, nbytes)

    def delete_model(self, model: ModelIdentity) -> DeleteReport:
        with self._write() as connection:
            count, nbytes = entries.delete(connection, "model = ?", [model], time.time())
        return DeleteReport(0, count, nbytes)

    def sweep(self, quarantined: Sequence[Quarantined] = ()) -> SweepReport:
        now = time.time()
        with self._write() as connection:
            before = (claims.total(connection, "entries"), claims.total(connection, "entry_nbytes"))
            rows = connection.execute("SELECT key, owner, expires_at FROM claims").fetchall()
            dead = [key for key, holder, expires_at in rows if expires_at <= now or claimant.is_dead(holder)]
            for key in dead:
                claims.drop(connection, key)
            connection.execute("DELETE FROM leases WHERE expires_at <= ?", (now,))
            entries.delete_doomed(connection, now)
            removed = claims.remove_expired(connection, now)
            quarantine.agree(connection, quarantined)
            quarantine.end_old(connection, now)
            connection.execute("DELETE FROM tenants WHERE records = 0 AND entries = 0")
            over = (
                claims.space(connection)
                - claims.total(connection, "garbage_nbytes")
                - claims.setting(connection, "capacity_nbytes")
            )
            over -= quarantine.make_room(connection, over)
            if over > 0:
                entries.evict(connection, over, now)
            after = (claims.total(connection, "entries"), claims.total(connection, "entry_nbytes"))
        return SweepReport(len(dead), removed, before[0] - after[0], before[1] - after[1])

    def garbage(self) -> list[str]:
        with self._database.read() as connection:
            return claims.garbage(connection)

    def discard(self, blobs: Sequence[str]) -> None:
        if blobs:
            with self._write() as connection:
                claims.discard(connection, blobs)

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
                stored, counted = claims.total(connection, name), connection.execute(query).fetchone()[0]
                if stored != counted:
                    problems.append(f"total {name} is {stored}, the rows say {counted}")
            kept = connection.execute("SELECT * FROM tenants WHERE records != 0 OR entries != 0 ORDER BY tenant")
            if kept.fetchall() != connection.execute(f"{TENANTS} ORDER BY tenant").fetchall():
                problems.append("the counts of tenants do not agree with their rows")
        return problems

    def recount(self) -> None:
        with self._write() as connection:
            for name, query in TOTALS.items():
                connection.execute(f"UPDATE totals SET value = ({query}) WHERE name = ?", (name,))
            connection.execute("DELETE FROM tenants")
            connection.execute(f"INSERT INTO tenants {TENANTS}")

    def identity(self) -> str:
        with self._database.read() as connection:
            drawn = connection.execute("SELECT value FROM totals WHERE name = 'identity'").fetchone()
        if drawn is None:
            with self._write() as connection:  # of several processes one draws
                number = secrets.randbits(IDENTITY_BITS)
                connection.execute("INSERT OR IGNORE INTO totals VALUES ('identity', ?)", (number,))
                drawn = connection.execute("SELECT value FROM totals WHERE name = 'identity'").fetchone()
        return f"{drawn[0]:016x}"

    def stats(self, backend: str) -> StoreStats:
        with self._database.read() as connection:
            pinned, leased = entries.counts(connection, time.time())
            return StoreStats(
                backend=backend,
                records=claims.total(connection, "records"),
                records_max=claims.setting(connection, "records_max"),
                entries=claims.total(connection, "entries"),
                nbytes=claims.space(connection),
                capacity_nbytes=claims.setting(connection, "capacity_nbytes"),
                pinned_entries=pinned,
                leased_entries=leased,
                evictions=claims.total(connection, "evictions"),
                quarantined=claims.total(connection, "quarantined"),
                quarantine_entries=quarantine.count(connection),
                quarantine_nbytes=claims.total(connection, "quarantine_nbytes"),
            )

    def tenants(self) -> list[Tenant]:
        with self._database.read() as connection:
            return list(records.named(connection, None))

    def usage(self, tenant: Tenant) -> TenantUsage:
        with self._database.read() as connection:
            counts = claims.tenant_counts(connection, tenant)
            pinned, leased = entries.counts(connection, time.time(), tenant)
            return TenantUsage(**counts, pinned_entries=pinned, leased_entries=leased)

    def close(self) -> None:
        self._flush()
        self._database.close()

    @contextmanager
    def _write(self, wait_s: float | None = None) -> Iterator[sqlite3.Connection]:
        """A write transaction that begins by writing down what was used."""
        with self._database.write(wait_s) as connection:
            with self._used_lock:
                used, self._used = self._used, {}
            entries.touch(connection, used)
            yield connection

    def _touch(self, key: ChunkKey, now: float) -> None:
        with self._used_lock:
            if not self._used:
                self._used_since = now
            self._used[key] = now
            due = now - self._used_since > TOUCH_DELAY_S_MAX
            if due:
                self._used_since = now  # whether it can be written now or not
        if due:
            self._flush()

    def _flush(self) -> None:
        """Writes marks of use down, unless others write now: they are a hint, and nobody should wait for them."""
        if self._used:
            with suppress(StoreError), self._write(FLUSH_WAIT_S):
                pass
