"""Upkeep of a Redis store: what is swept, counted and audited."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from chunk_store.blobs import Quarantined
from chunk_store.claimant import is_dead
from chunk_store.ledger import IDENTITY_BITS
from chunk_store.limits import StoreLimits
from chunk_store.redis.claims import RedisClaims
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.mending import disagreements
from chunk_store.redis.names import index_name, named
from chunk_store.redis.scripts import upkeep as scripts
from chunk_store.store import StoreStats, SweepReport
from chunk_store.tenant import Tenant, TenantUsage


class RedisUpkeep:
    """The ``Upkeep`` of one Redis store."""

    def __init__(self, connection: RedisConnection, claims: RedisClaims, defaults: Mapping[str, int]) -> None:
        self._redis = connection
        self._claims = claims
        self._defaults = defaults

    def sweep(self, quarantined: Sequence[Quarantined] = ()) -> SweepReport:
        """On a server nothing is kept of bad data."""
        broken = 0
        for key, nonce, claimant in self._claims.held():
            if is_dead(claimant):
                broken += self._claims.drop(key, nonce)
        claims, *rest = (int(count) for count in self._redis.run(scripts.SWEEP, self._defaults["capacity_nbytes"]))
        return SweepReport(claims + broken, *rest)

    def garbage(self) -> list[str]:
        with self._redis.errors():
            return [blob.decode() for blob in self._redis.client.hkeys(self._redis.name("garbage"))]

    def discard(self, blobs: Sequence[str]) -> None:
        if blobs:
            self._redis.run(scripts.DISCARD, *blobs)

    def audit(self) -> list[str]:
        wrong = [part.decode() for part in self._redis.run(scripts.RECOUNT, 0)]
        triples = zip(wrong[::3], wrong[1::3], wrong[2::3], strict=True)
        problems = [f"total {name} is {stored}, the rows say {counted}" for name, stored, counted in triples]
        lists = disagreements(self._redis, correct=False)
        return problems + ([f"rows and lists disagree in {lists} places"] if lists else [])

    def recount(self) -> None:
        disagreements(self._redis, correct=True)
        self._redis.run(scripts.RECOUNT, 1)

    def identity(self) -> str:
        name = self._redis.name("totals")
        with self._redis.errors():
            number = self._redis.client.hget(name, "identity")
            if number is None:  # of several processes one draws
                self._redis.client.hsetnx(name, "identity", secrets.randbits(IDENTITY_BITS))
                number = self._redis.client.hget(name, "identity")
        return f"{int(number or 0):016x}"

    def set_limits(self, limits: StoreLimits) -> None:
        """On a server nothing is kept of bad data, so how long is of no use there."""
        given = {name: value for name, value in limits.given.items() if name != "quarantine_s"}
        if given:
            with self._redis.errors():
                self._redis.client.hset(self._redis.name("settings"), mapping=given)

    def stats(self, backend: str) -> StoreStats:
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            pipeline.hgetall(self._redis.name("totals"))
            pipeline.hgetall(self._redis.name("settings"))
            totals, settings = (
                {name.decode(): int(value) for name, value in part.items()} for part in pipeline.execute()
            )
        pinned, leased = self._redis.run(scripts.COUNTS)
        space = ("entry_nbytes", "claim_nbytes", "garbage_nbytes")
        return StoreStats(
            backend=backend,
            records=totals.get("records", 0),
            records_max=settings.get("records_max", self._defaults["records_max"]),
            entries=totals.get("entries", 0),
            nbytes=sum(totals.get(name, 0) for name in space),
            capacity_nbytes=settings.get("capacity_nbytes", self._defaults["capacity_nbytes"]),
            pinned_entries=pinned,
            leased_entries=leased,
            evictions=totals.get("evictions", 0),
            quarantined=totals.get("quarantined", 0),
        )

    def tenants(self) -> list[Tenant]:
        return list(named(self._redis, None))

    def usage(self, tenant: Tenant) -> TenantUsage:
        fields = [f"entries@{tenant}", f"entry_nbytes@{tenant}"]
        with self._redis.errors(), self._redis.client.pipeline(transaction=False) as pipeline:
            pipeline.hmget(self._redis.name("totals"), fields)
            pipeline.zcard(index_name(self._redis, tenant, "records_created"))
            pipeline.scard(index_name(self._redis, tenant, "pinned"))
            counts, records, pinned = pipeline.execute()
        entries, nbytes = (int(count or 0) for count in counts)
        pinned_entries, leased = self._redis.run(scripts.COUNTS, tenant)
        return TenantUsage(records, pinned, entries, nbytes, pinned_entries, leased)
