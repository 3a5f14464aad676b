"""Upkeep of the embedded index: what is swept, counted and audited."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from chunk_store.blobs import Quarantined
from chunk_store.claimant import is_dead
from chunk_store.ledger import IDENTITY_BITS
from chunk_store.limits import StoreLimits
from chunk_store.local import counts, eviction, quarantine
from chunk_store.local.claims import drop
from chunk_store.local.index import Index
from chunk_store.local.records import named
from chunk_store.local.schema import TENANTS, TOTALS
from chunk_store.store import StoreStats, SweepReport
from chunk_store.tenant import Tenant, TenantUsage


class LocalUpkeep:
    """The ``Upkeep`` of a directory."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def sweep(self, quarantined: Sequence[Quarantined] = ()) -> SweepReport:
        now = time.time()
        with self._index.write() as connection:
            before = (counts.total(connection, "entries"), counts.total(connection, "entry_nbytes"))
            rows = connection.execute("SELECT key, owner, expires_at FROM claims").fetchall()
            dead = [key for key, holder, expires_at in rows if expires_at <= now or is_dead(holder)]
            for key in dead:
                drop(connection, key)
            connection.execute("DELETE FROM leases WHERE expires_at <= ?", (now,))
            eviction.delete_doomed(connection, now)
            removed = eviction.remove_expired(connection, now)
            quarantine.agree(connection, quarantined)
            quarantine.end_old(connection, now)
            connection.execute("DELETE FROM tenants WHERE records = 0 AND entries = 0")
            over = (
                counts.space(connection)
                - counts.total(connection, "garbage_nbytes")
                - counts.setting(connection, "capacity_nbytes")
            )
            eviction.evict(connection, over, now)
            after = (counts.total(connection, "entries"), counts.total(connection, "entry_nbytes"))
        return SweepReport(len(dead), removed, before[0] - after[0], before[1] - after[1])

    def garbage(self) -> list[str]:
        with self._index.read() as connection:
            return eviction.garbage(connection)

    def discard(self, blobs: Sequence[str]) -> None:
        if blobs:
            with self._index.write() as connection:
                eviction.discard(connection, blobs)

    def audit(self) -> list[str]:
        with self._index.read() as connection:
            rows = connection.execute("PRAGMA integrity_check").fetchall()
            problems = [f"index.sqlite: {row[0]}" for row in rows if row[0] != "ok"]
        with self._index.write() as connection:  # one consistent view of rows and totals
            for name, query in TOTALS.items():
                stored, counted = counts.total(connection, name), connection.execute(query).fetchone()[0]
                if stored != counted:
                    problems.append(f"total {name} is {stored}, the rows say {counted}")
            kept = connection.execute("SELECT * FROM tenants WHERE records != 0 OR entries != 0 ORDER BY tenant")
            if kept.fetchall() != connection.execute(f"{TENANTS} ORDER BY tenant").fetchall():
                problems.append("the counts of tenants do not agree with their rows")
        return problems

    def recount(self) -> None:
        with self._index.write() as connection:
            for name, query in TOTALS.items():
                connection.execute(f"UPDATE totals SET value = ({query}) WHERE name = ?", (name,))
            connection.execute("DELETE FROM tenants")
            connection.execute(f"INSERT INTO tenants {TENANTS}")

    def identity(self) -> str:
        with self._index.read() as connection:
            drawn = connection.execute("SELECT value FROM totals WHERE name = 'identity'").fetchone()
        if drawn is None:
            with self._index.write() as connection:  # of several processes one draws
                number = secrets.randbits(IDENTITY_BITS)
                connection.execute("INSERT OR IGNORE INTO totals VALUES ('identity', ?)", (number,))
                drawn = connection.execute("SELECT value FROM totals WHERE name = 'identity'").fetchone()
        return f"{drawn[0]:016x}"

    def set_limits(self, limits: StoreLimits) -> None:
        with self._index.write() as connection:
            connection.executemany("INSERT OR REPLACE INTO settings VALUES (?, ?)", limits.given.items())

    def stats(self, backend: str) -> StoreStats:
        with self._index.read() as connection:
            pinned, leased = counts.held_entries(connection, time.time())
            return StoreStats(
                backend=backend,
                records=counts.total(connection, "records"),
                records_max=counts.setting(connection, "records_max"),
                entries=counts.total(connection, "entries"),
                nbytes=counts.space(connection),
                capacity_nbytes=counts.setting(connection, "capacity_nbytes"),
                pinned_entries=pinned,
                leased_entries=leased,
                evictions=counts.total(connection, "evictions"),
                quarantined=counts.total(connection, "quarantined"),
                quarantine_entries=quarantine.count(connection),
                quarantine_nbytes=counts.total(connection, "quarantine_nbytes"),
            )

    def tenants(self) -> list[Tenant]:
        with self._index.read() as connection:
            return list(named(connection, None))

    def usage(self, tenant: Tenant) -> TenantUsage:
        with self._index.read() as connection:
            pinned, leased = counts.held_entries(connection, time.time(), tenant)
            found = counts.tenant_counts(connection, tenant)
            return TenantUsage(**found, pinned_entries=pinned, leased_entries=leased)
