"""How the scripts know things: a tenant's chunk, a tenant's lists, all tenants, a limit. See ``scripts/prelude.py``."""

from __future__ import annotations

from collections.abc import Sequence

from chunk_store.redis.connection import RedisConnection
from chunk_store.tenant import DEFAULT_TENANT, Tenant, Tenants


def sid(tenant: Tenant, chunk_id: str) -> str:
    """How the scripts know a tenant's chunk."""
    return f"{tenant}/{chunk_id}" if tenant else chunk_id


def index_name(connection: RedisConnection, tenant: Tenant, name: str) -> str:
    """The key of what belongs to one tenant."""
    return connection.name(f"{name}@{tenant}" if tenant else name)


def named(connection: RedisConnection, tenants: Tenants) -> Sequence[Tenant]:
    """The tenants themselves: those given, or all that there are."""
    if tenants is not None:
        return tenants
    with connection.errors():
        others = connection.client.smembers(connection.name("tenants"))
    return [DEFAULT_TENANT, *sorted(Tenant(name.decode()) for name in others)]


def number(limit: int | None) -> str:
    """A limit as scripts take it."""
    return "" if limit is None else str(limit)
