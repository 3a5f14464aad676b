"""Claims and space in the embedded index: who writes, what counts toward capacity. Functions of one connection."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Sequence

from chunk_store import claimant
from chunk_store.errors import ClaimLost, StoreFull
from chunk_store.key import ChunkId, ChunkKey
from chunk_store.ledger import BUSY_RETRY_S, Space, blob_name, full_bytes, full_pins, full_records
from chunk_store.local import entries, quarantine, records
from chunk_store.record import ChunkRecord
from chunk_store.store import Busy, Stored
from chunk_store.tenant import Tenant, TenantLimits


def total(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM totals WHERE name = ?", (name,)).fetchone()[0])


def setting(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()[0])


def space(connection: sqlite3.Connection) -> int:
    """Bytes that count toward capacity: entries, what writers reserved, what waits for removal, what is quarantined."""
    names = ("entry_nbytes", "claim_nbytes", "garbage_nbytes", "quarantine_nbytes")
    return sum(total(connection, name) for name in names)


def garbage(connection: sqlite3.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT blob FROM garbage")]


def discard(connection: sqlite3.Connection, blobs: Sequence[str]) -> None:
    connection.executemany("DELETE FROM garbage WHERE blob = ?", [(blob,) for blob in blobs])


def evict_over(connection: sqlite3.Connection, over: int, nbytes: int, now: float) -> None:
    """Evicts ``over`` bytes or raises ``StoreFull``, which undoes the transaction: in vain nothing is evicted.

    Bad data goes first.
    """
    over -= quarantine.make_room(connection, over)
    if over > 0 and entries.evict(connection, over, now) < over:
        raise StoreFull(f"no room for {nbytes} bytes: the rest is pinned, leased or being written")


def answer(connection: sqlite3.Connection, key: ChunkKey) -> Stored | Busy | None:
    """Why ``key`` cannot be claimed; None when it can."""
    info = entries.find(connection, [key])[0]
    if info is not None:
        return Stored(info)
    row = connection.execute("SELECT owner, expires_at FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None:
        return None
    remaining = row[1] - time.time()
    if remaining <= 0 or claimant.is_dead(row[0]):
        return None
    return Busy(min(BUSY_RETRY_S, remaining))


def check(connection: sqlite3.Connection, key: ChunkKey, nonce: str) -> None:
    row = connection.execute("SELECT nonce FROM claims WHERE key = ?", (key,)).fetchone()
    if row is None or row[0] != nonce:
        raise ClaimLost(f"the claim on {key} expired and was taken or swept; begin again")


def drop(connection: sqlite3.Connection, key: ChunkKey) -> None:
    """Ends somebody else's claim; its blob becomes garbage."""
    row = connection.execute("SELECT nonce, reserved_nbytes FROM claims WHERE key = ?", (key,)).fetchone()
    if row is not None:
        connection.execute("DELETE FROM claims WHERE key = ?", (key,))
        connection.execute("INSERT OR IGNORE INTO garbage VALUES (?, ?)", (blob_name(key, row[0]), row[1]))


def records_over(connection: sqlite3.Connection, new: Sequence[ChunkRecord]) -> int:
    """By how many records ``new`` exceeds the registry; 0 where all of it is known."""
    added = sum(_unknown(connection, new).values())
    return max(0, total(connection, "records") + added - setting(connection, "records_max")) if added else 0


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


def make_room_for(connection: sqlite3.Connection, new: Sequence[ChunkRecord], limits: TenantLimits, now: float) -> None:
    """Drops transient records for ``new`` where the registry, or what a tenant may have of it, is full.

    Raises ``StoreFull`` and ``QuotaFull``, which undo the transaction: in vain nothing is dropped.
    """
    over = records_over(connection, new)
    over -= drop_transient(connection, over, new, None, now)
    if over > 0 and not _within_shares(connection, new, over):
        raise StoreFull(f"the registry is full: {over} chunks too many; delete chunks or raise records_max")
    if limits.records is not None:
        for tenant, added in _unknown(connection, new).items():
            over = tenant_counts(connection, tenant)["records"] + added - limits.records
            drop_transient(connection, over if added else 0, new, tenant, now)
    check_new_records(connection, new, limits)


def _within_shares(connection: sqlite3.Connection, new: Sequence[ChunkRecord], over: int) -> bool:
    """Whether ``new`` may exceed the registry by ``over`` records; ``ChunkStore.put_records`` says when."""
    added = {tenant: count for tenant, count in _unknown(connection, new).items() if count}
    counted = "SELECT COUNT(*) FROM tenants WHERE records > 0 AND tenant NOT IN (SELECT value FROM json_each(?))"
    others = connection.execute(counted, (json.dumps(list(added)),)).fetchone()[0]
    most = setting(connection, "records_max")
    share = max(1, most // (others + len(added)))
    held = {tenant: tenant_counts(connection, tenant)["records"] for tenant in added}
    return over <= most and all(held[tenant] + count <= share for tenant, count in added.items())


def drop_transient(
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


def check_new_records(connection: sqlite3.Connection, new: Sequence[ChunkRecord], limits: TenantLimits) -> None:
    """Raises ``QuotaFull`` if a tenant would have more records than ``limits`` allow."""
    if limits.records is None:
        return
    for tenant, added in _unknown(connection, new).items():
        if added and tenant_counts(connection, tenant)["records"] + added > limits.records:
            raise full_records(limits.records)


def check_pins(connection: sqlite3.Connection, tenant: Tenant, before: int, limits: TenantLimits) -> None:
    """Raises ``QuotaFull`` if a tenant has more pins now than ``before`` and than ``limits`` allow."""
    pinned = tenant_counts(connection, tenant)["pinned"]
    if limits.pinned is not None and pinned > max(before, limits.pinned):
        raise full_pins(limits.pinned)


def check_bytes(connection: sqlite3.Connection, key: ChunkKey, space: Space) -> None:
    """Raises ``QuotaFull`` if the tenant's entries, and what it writes, leave no room for ``space``."""
    if space.tenant_nbytes_max is None:
        return
    reserved = connection.execute(
        "SELECT COALESCE(SUM(reserved_nbytes), 0) FROM claims WHERE tenant = ? AND key != ?", (space.tenant, key)
    ).fetchone()[0]
    if tenant_counts(connection, space.tenant)["nbytes"] + reserved + space.nbytes > space.tenant_nbytes_max:
        raise full_bytes(space.tenant_nbytes_max)


def tenant_counts(connection: sqlite3.Connection, tenant: Tenant) -> dict[str, int]:
    """Records, pinned records, entries and their bytes of one tenant."""
    names = ("records", "pinned", "entries", "nbytes")
    row = connection.execute(f"SELECT {', '.join(names)} FROM tenants WHERE tenant = ?", (tenant,)).fetchone()
    return dict(zip(names, row or (0, 0, 0, 0), strict=True))


def remove_expired(connection: sqlite3.Connection, now: float) -> int:
    """Evicts entries of expired chunks, then drops the records that no entry needs; returns how many."""
    removed = 0
    expired = records.expired(connection, now)
    for tenant, chunk_id in expired:
        entries.delete_expired(connection, tenant, chunk_id, now)
    for place in expired:  # only now is it known what the entries of others still need
        if not entries.is_needed(connection, *place):
            removed += connection.execute("DELETE FROM records WHERE tenant = ? AND chunk_id = ?", place).rowcount
    return removed
