"""Numbers of the embedded index: totals and tenants' counts, which triggers keep, and settings. Of one connection."""

from __future__ import annotations

import sqlite3

from chunk_store.tenant import Tenant


def total(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()[0])


def setting(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0])


def space(connection: sqlite3.Connection) -> int:
    """Bytes that count toward capacity: entries, what writers reserved, what waits for removal, what is quarantined."""
    names = ("entry_nbytes", "claim_nbytes", "garbage_nbytes", "quarantine_nbytes")
    return sum(total(connection, name) for name in names)


def tenant_counts(connection: sqlite3.Connection, tenant: Tenant) -> dict[str, int]:
    """Records, pinned records, entries and their bytes of one tenant."""
    names = ("records", "pinned", "entries", "nbytes")
    row = connection.execute(f"SELECT {', '.join(names)} FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
    return dict(zip(names, row or (0, 0, 0, 0), strict=True))


def held_entries(connection: sqlite3.Connection, now: float, tenant: Tenant | None = None) -> tuple[int, int]:
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
