"""Room for records in the embedded index: what the registry holds, and what each tenant may have of it.

Functions of one connection.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence

from chunk_store.errors import StoreFull
from chunk_store.key import ChunkId
from chunk_store.limits import quota_full
from chunk_store.local import counts
from chunk_store.record import ChunkRecord
from chunk_store.tenant import Tenant, TenantLimits


def records_over(connection: sqlite3.Connection, new: Sequence[ChunkRecord]) -> int:
    """By how many records ``new`` exceeds the registry; 0 where all of it is known."""
    added = sum(_unknown(connection, new).values())
    return (
        max(0, counts.total(connection, "records") + added - counts.setting(connection, "records_max")) if added else 0
    )


def make_room_for(connection: sqlite3.Connection, new: Sequence[ChunkRecord], limits: TenantLimits, now: float) -> None:
    """Drops transient records for ``new`` where the registry, or what a tenant may have of it, is full.

    Raises ``StoreFull`` and ``QuotaFull``, which undo the transaction: in vain nothing is dropped.
    """
    over = records_over(connection, new)
    over -= _drop_transient(connection, over, new, None, now)
    if over > 0 and not _within_shares(connection, new, over):
        raise StoreFull(f"the registry is full: {over} chunks too many", "delete chunks or raise records_max")
    if limits.records is None:
        return
    for tenant, added in _unknown(connection, new).items():
        over = counts.tenant_counts(connection, tenant)["records"] + added - limits.records
        if added and _drop_transient(connection, over, new, tenant, now) < over:
            raise quota_full("chunks", limits.records)


def check_pins(connection: sqlite3.Connection, tenant: Tenant, before: int, limits: TenantLimits) -> None:
    """Raises ``QuotaFull`` if a tenant has more pins now than ``before`` and than ``limits`` allow."""
    pinned = counts.tenant_counts(connection, tenant)["pinned"]
    if limits.pinned is not None and pinned > max(before, limits.pinned):
        raise quota_full("pins", limits.pinned)


def _unknown(connection: sqlite3.Connection, new: Sequence[ChunkRecord]) -> dict[Tenant, int]:
    """How many of ``new`` have no row yet, by tenant."""
    ids: dict[Tenant, set[ChunkId]] = {}
    for record in new:
        ids.setdefault(record.tenant, set()).add(record.chunk_id)
    counted = "SELECT COUNT(*) FROM records WHERE tenant = ? AND chunk_id IN (SELECT value FROM json_each(?))"
    return {
        tenant: len(mine) - connection.execute(counted, (tenant, json.dumps(list(mine)))).fetchone()[0]
        for tenant, mine in ids.items()
    }


def _within_shares(connection: sqlite3.Connection, new: Sequence[ChunkRecord], over: int) -> bool:
    """Whether ``new`` may exceed the registry by ``over`` records; ``ChunkStore.put_records`` says when."""
    added = {tenant: count for tenant, count in _unknown(connection, new).items() if count}
    counted = "SELECT COUNT(*) FROM tenants WHERE records > 0 AND tenant NOT IN (SELECT value FROM json_each(?))"
    others = connection.execute(counted, (json.dumps(list(added)),)).fetchone()[0]
    most = counts.setting(connection, "records_max")
    share = max(1, most // (others + len(added)))
    held = {tenant: counts.tenant_counts(connection, tenant)["records"] for tenant in added}
    return over <= most and all(held[tenant] + count <= share for tenant, count in added.items())


def _drop_transient(
    connection: sqlite3.Connection, count: int, keep: Sequence[ChunkRecord], tenant: Tenant | None, now: float
) -> int:
    """Drops up to ``count`` records of content that only passed through, least recently used first; returns how many.

    Of one tenant or of all. What is pinned, leased or in ``keep`` stays; KV stays until it is evicted itself.
    """
    if count <= 0:
        return 0
    return connection.execute(
        f"DELETE FROM records WHERE rowid IN (SELECT rowid FROM records WHERE transient AND NOT pinned "
        f"{'' if tenant is None else 'AND tenant = :tenant'} "
        "AND tenant || '/' || chunk_id NOT IN (SELECT value FROM json_each(:keep)) "
        "AND NOT EXISTS (SELECT 1 FROM entries JOIN leases USING (key) WHERE entries.tenant = records.tenant "
        "AND entries.chunk_id = records.chunk_id AND leases.expires_at > :now) "
        "ORDER BY last_used_at, chunk_id LIMIT :count)",
        {
            "tenant": tenant,
            "keep": json.dumps([f"{record.tenant}/{record.chunk_id}" for record in keep]),
            "now": now,
            "count": count,
        },
    ).rowcount
