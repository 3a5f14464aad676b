"""The ledger of networked stores: Redis, one script for each step (``scripts/``).

Used for ``redis://``, where the data is in Redis too, and for ``mooncake://``, where it is not. What it survives is
what the server is configured for: with ``appendonly yes`` nothing committed is lost when the server is killed.
"""

from __future__ import annotations

from chunk_store.errors import StoreTooNew
from chunk_store.format.versions import REDIS_VERSION
from chunk_store.ledger import Ledger
from chunk_store.limits import StoreLimits
from chunk_store.redis.claims import RedisClaims
from chunk_store.redis.connection import RedisConnection
from chunk_store.redis.entries import RedisEntries
from chunk_store.redis.leases import RedisLeases
from chunk_store.redis.records import RedisRecords
from chunk_store.redis.scripts.upkeep import UPGRADE
from chunk_store.redis.upkeep import RedisUpkeep


def redis_ledger(connection: RedisConnection, limits: StoreLimits) -> Ledger:
    """The ledger of the store behind ``connection``, brought up to this version; ``limits`` are set.

    Raises ``StoreUnavailable``, ``StoreTooNew``.
    """
    with connection.errors():
        connection.client.ping()
    version = connection.run(UPGRADE, REDIS_VERSION)
    if version != REDIS_VERSION:
        problem = f"the store has version {version}, this software reads up to {REDIS_VERSION}"
        raise StoreTooNew(problem, "use the newer one")
    defaults = limits.of_new_store  # hold where the store has lost its own
    records, entries, leases = RedisRecords(connection, defaults), RedisEntries(connection), RedisLeases(connection)
    claims = RedisClaims(connection, entries, defaults)
    upkeep = RedisUpkeep(connection, claims, defaults)
    upkeep.set_limits(limits)
    return Ledger(records, entries, claims, leases, upkeep, connection.close)
